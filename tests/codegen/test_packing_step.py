"""Kernels of packed programs, in memory that holds NaN before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright
from graphwright.ir import dialect


class Taken(nn.Module):
    def forward(self, x, index):
        return dialect.take_rows(x, index)


class Ragged(nn.Module):
    """Attention on q, k, v that lie in one tensor [P, 3, H, D], as a projection writes them."""

    def __init__(self, heads, key_heads, softcap=0.0):
        super().__init__()
        self.heads, self.key_heads, self.softcap = heads, key_heads, softcap

    def forward(self, qkv, starts):
        q, k, v = qkv.split([self.heads, self.key_heads, self.key_heads], 1)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        found = dialect.ragged_attention(q, k, v, starts, 200, scale=0.3, softcap=self.softcap)
        return found[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize(
    ("rest", "dtype"),
    [((), torch.int64), ((1,), torch.bool), ((63,), torch.bfloat16), ((5, 24), torch.float32), ((1500,), torch.float32)],
)
def test_take_rows(rest, dtype):
    """Rows of any length and dtype are copied, and negative numbers give zeros."""
    x = torch.randint(1, 9, (7, *rest)).to(dtype)
    index = torch.randint(-1, 7, (3, 21))
    compiled = graphwright.compile(Taken(), x, index, dynamic={"x": {0: "many"}, "index": {1: "count"}}, check=False)
    assert torch.equal(compiled(x, index), dialect.take_rows(x, index))
    more, index = torch.cat([x, x]), torch.randint(-1, 14, (3, 1))
    assert torch.equal(compiled(more, index), dialect.take_rows(more, index))


@pytest.mark.parametrize(
    ("heads", "size", "softcap", "dtype", "tolerance"),
    [
        ((4, 4), 32, 0.0, torch.float32, 1e-5),
        ((4, 2), 16, 2.0, torch.float32, 1e-5),
        ((2, 2), 80, 0.0, torch.float32, 1e-5),
        ((2, 1), 64, 0.0, torch.bfloat16, 2e-2),
    ],
)
def test_ragged_attention(heads, size, softcap, dtype, tolerance):
    """Sequences of all lengths, also of none, get what the reference computes."""
    model = Ragged(*heads, softcap)

    def inputs(lengths):
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return torch.randn(sum(lengths), heads[0] + 2 * heads[1], size).to(dtype), starts

    dynamic = {"qkv": {0: "packed"}, "starts": {0: "sequences"}}
    compiled = graphwright.compile(model, *inputs([5, 3]), dynamic=dynamic, check=False)
    for lengths in ([1], [63, 1, 0, 130], [0, 0, 7], [200, 64, 65]):
        given = inputs(lengths)
        expected, found = model(*given).double(), compiled(*given).double()
        assert not found.isnan().any()
        assert (found - expected).norm() <= tolerance * expected.norm()


def test_rows_are_read_where_they_lie():
    """The columns of a wider tensor are read in place, each row at its own distance."""

    class Part(nn.Module):
        def forward(self, x, index):
            return dialect.take_rows((x + 1)[:, 3:20], index)

    x, index = torch.randn(9, 40), torch.randint(-1, 9, (33,))
    compiled = graphwright.compile(Part(), x, index, check=False)
    assert torch.equal(compiled(x, index), dialect.take_rows((x + 1)[:, 3:20], index))
    assert compiled.report.steps == {"kernel": 2}
