"""Rows by number."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir import dialect


@pytest.mark.parametrize("rest", [(), (1,), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_rows_and_zeros(rest, dtype):
    """Each index gives that row, and a negative one a row of zeros."""
    x = torch.randint(1, 9, (5, *rest)).to(dtype)
    index = torch.tensor([[4, -1, 0], [2, 2, -7]])
    found = dialect.take_rows(x, index)
    assert found.shape == (2, 3, *rest)
    assert found.dtype == dtype
    for k, row in zip(index.reshape(-1).tolist(), found.reshape(6, *rest), strict=True):
        assert torch.equal(row, x[k] if k >= 0 else torch.zeros_like(x[0]))


def test_nothing_to_take():
    """A tensor without rows gives zeros, an empty index nothing."""
    assert dialect.take_rows(torch.ones(0, 3), torch.tensor([-1])).tolist() == [[0.0] * 3]
    assert dialect.take_rows(torch.ones(2, 3), torch.zeros(0, dtype=torch.int64)).shape == (0, 3)


@pytest.mark.parametrize(("x", "index"), [(torch.ones(()), torch.tensor([0])), (torch.ones(2), torch.tensor([0.0]))])
def test_what_does_not_fit_is_refused(x, index):
    """Single numbers have no rows, and an index is of integers."""
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(RuntimeError):
        dialect.take_rows(mode.from_tensor(x), mode.from_tensor(index))
