"""Fetching tiles ahead: which loads ask for it, and that it changes nothing but time."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from graphwright.runtime.triton_cpu import isa
from graphwright.runtime.triton_cpu.generate import generate
from graphwright.runtime.triton_cpu.options import CPUOptions


@triton.jit
def sum_kernel(X, Y, rows, stride, POLICY: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Sums of columns, tile after tile."""
    r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    total = tl.zeros([C], tl.float32)
    for first in range(0, rows, R):
        x = tl.load(X + (first + r) * stride + c, mask=first + r < rows, other=0.0, eviction_policy=POLICY)
        total += tl.sum(x, 0)
    tl.store(Y + tl.arange(0, C), total)


@triton.jit
def row_kernel(X, Y, rows, stride, POLICY: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The same row by row: a load of one dimension."""
    c = tl.arange(0, C)
    total = tl.zeros([C], tl.float32)
    for row in range(rows):
        total += tl.load(X + row * stride + c, eviction_policy=POLICY)
    tl.store(Y + c, total)


@triton.jit
def column_kernel(X, Y, rows, stride, POLICY: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Columns whose elements are not side by side."""
    r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    tl.store(Y + r * C + c, tl.load(X + r * stride + c * 3, eviction_policy=POLICY))


def fetches(ttir_text: Any, kernel: Any, policy: str, rows: int = 8, columns: int = 32) -> int:
    """Return how many instructions of a kernel fetch a line."""
    signature = {
        "X": "*fp32",
        "Y": "*fp32",
        "rows": "i32",
        "stride": "i32",
        "POLICY": tl.constexpr(policy),
        "R": rows,
        "C": columns,
    }
    chosen = isa.detect("")
    return generate(ttir_text(kernel, signature), chosen, CPUOptions(isa=chosen.name)).llvm_ir.count("call void @llvm.prefetch")


def test_tiles_that_are_read_once_are_fetched_ahead(ttir_text: Any) -> None:
    """A row of 32 float32 is two lines; other policies, single rows and scattered elements fetch nothing."""
    assert fetches(ttir_text, sum_kernel, "evict_first") == 2
    assert fetches(ttir_text, sum_kernel, "evict_first", columns=16) == 1
    assert fetches(ttir_text, sum_kernel, "") == 0
    assert fetches(ttir_text, sum_kernel, "evict_last") == 0
    assert fetches(ttir_text, row_kernel, "evict_first") == 0
    assert fetches(ttir_text, column_kernel, "evict_first") == 0


@pytest.mark.parametrize("rows", [1, 63, 1000])
def test_the_result_is_the_same(rows: int) -> None:
    """Whatever the number of rows, and however far apart they are."""
    x = torch.randn(rows, 40)
    y = torch.full((32,), torch.nan)
    sum_kernel[(1,)](x, y, rows, 40, "evict_first", 8, 32)
    torch.testing.assert_close(y, x[:, :32].sum(0), rtol=1e-4, atol=1e-4)


def test_what_lies_behind_the_end_is_not_touched() -> None:
    """A tensor at the end of its mapping: fetching beyond does not fault."""
    page = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    x = torch.frombuffer(page, dtype=torch.float32)[-64 * 32 :].view(64, 32).fill_(1.0)
    y = torch.empty(32)
    # The distance between rows takes the lines to be fetched far past all mapped memory.
    sum_kernel[(1,)](x, y, 1, 1 << 30, "evict_first", 8, 32)
    assert torch.equal(y, torch.ones(32))
    sum_kernel[(1,)](x, y, 64, 32, "evict_first", 8, 32)
    assert torch.equal(y, torch.full((32,), 64.0))
