"""Reductions, softmaxes and norms against eager, in every way of walking over rows."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional as F

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def reductions(x: torch.Tensor) -> dict[str, Any]:
    """Return everything that is made of rows."""
    return {
        "sum": x.sum(-1),
        "sum_keep": x.sum(-1, keepdim=True),
        "mean": x.mean(-1),
        "amax": x.amax(-1),
        "amin": x.amin(-1, keepdim=True),
        "any": (x > 1).any(-1),
        "all": (x > -3).all(-1),
        "count": (x > 0).sum(-1),
        "softmax": x.softmax(-1),
        "log_softmax": x.log_softmax(-1),
        "layer_norm": F.layer_norm(x, x.shape[-1:]),
        "rms_norm": F.rms_norm(x, x.shape[-1:], eps=1e-5),
        "var": x.var(-1),
        "var_biased": x.var(-1, correction=0),
        "std": x.std(-1),
        "logsumexp": x.logsumexp(-1),
        "norm": x.norm(dim=-1),
        "centred": x - x.mean(-1, keepdim=True),
        "normalized": F.normalize(x, dim=-1),
    }


@pytest.mark.parametrize("columns", [1, 2, 5, 63, 64, 100, 127, 1000])
def test_rows_of_any_length(check: Any, columns: int) -> None:
    """Rows shorter and longer than a vector, with and without a rest, are reduced whole."""
    torch.manual_seed(columns)
    calls = [(torch.randn(rows, columns),) for rows in (7, 1, 130)]
    with warnings.catch_warnings():
        # One column has no variance: it is NaN, and eager warns of it.
        warnings.filterwarnings("ignore", message=r".*degrees of freedom", category=UserWarning)
        check(reductions, *calls, dynamic={"args.0": {0: "rows"}})


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(check: Any, dtype: torch.dtype) -> None:
    """Sums are in float32 or wider, and rounded once."""
    torch.manual_seed(0)
    check(reductions, (torch.randn(3, 70).to(dtype),), ulps=32)


def test_row_length_of_the_call(check: Any) -> None:
    """A length that a call brings is walked over in blocks, with one kernel for all."""
    torch.manual_seed(0)
    calls = [(torch.randn(3, n),) for n in (70, 2, 1024, 1025, 3000)]
    check(reductions, *calls, dynamic={"args.0": {0: "rows", 1: "columns"}})


def test_long_rows(check: Any) -> None:
    """Rows of more than 16384 elements are walked over in blocks."""
    torch.manual_seed(0)
    check(reductions, (torch.randn(2, 20000),))


def test_nan_and_infinities(check: Any) -> None:
    """NaN and infinities go into a row's results as in eager, and into no other row's."""
    torch.manual_seed(0)
    x = torch.randn(30, 100)
    x[0, 3] = math.nan
    x[1, 99] = math.inf
    x[2, 0] = -math.inf
    x[3] = -math.inf
    x[4, 5], x[4, 6] = math.inf, -math.inf

    def function(x: torch.Tensor) -> dict[str, Any]:
        return {k: v for k, v in reductions(x).items() if k not in ("layer_norm", "normalized", "std")}

    check(function, (x,))
    check(function, (x,), dynamic={"args.0": {1: "columns"}})
    check(function, (x[:, :5].contiguous(),))


def test_integers_and_booleans(check: Any) -> None:
    """Sums of integers are int64; extremes keep their dtype."""
    torch.manual_seed(0)

    def function(x: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
        return {
            "sum": x.sum(-1),
            "sum_narrow": x.sum(-1, dtype=torch.int32),
            "mean": x.float().mean(-1),
            "amax": x.amax(-1),
            "amin": x.amin(-1),
            "any": x.any(-1),
            "all": x.all(-1),
            "count": b.sum(-1),
            "any_b": b.any(-1),
            "all_b": b.all(-1, keepdim=True),
            "amax_b": b.amax(-1),
        }

    for dtype in (torch.int64, torch.int32, torch.int8, torch.uint8):
        x = torch.randint(0 if dtype is torch.uint8 else -9, 9, (5, 37)).to(dtype)
        b = torch.rand(5, 37) < 0.5
        b[0], b[1] = True, False
        check(function, (x, b))
    check(function, (x, b), dynamic={"args.0": {1: "n"}, "args.1": {1: "n"}})


def test_several_dimensions(check: Any) -> None:
    """Trailing dimensions are taken together; others, all and none of them go to PyTorch or through a copy."""
    torch.manual_seed(0)

    def function(x: torch.Tensor) -> dict[str, Any]:
        return {
            "last_two": x.sum((-1, -2)),
            "last_two_keep": x.mean((-2, -1), keepdim=True) + x,
            "all": x.sum(),
            "mean_all": x.mean(),
            "amax_all": x.amax(),
            "any_all": (x > 2).any(),
            "first": x.sum(0),
            "middle": x.sum(1, keepdim=True),
            "ends": x.amax((0, 2)),
            "softmax_middle": x.softmax(1),
            "norm": F.layer_norm(x, x.shape[-2:]),
            "var": x.var((-1, -2)),
            "of_transposed": x.transpose(1, 2).sum(-1),
            "of_transposed_keep": x.transpose(0, 2).softmax(-1),
            "max": x.max(-1).values,
            "argmax": x.argmax(-1),
            "cumsum": x.cumsum(-1),
        }

    check(function, (torch.randn(3, 4, 5),))
    check(function, (torch.randn(3, 4, 5),), (torch.randn(6, 2, 5),), dynamic={"args.0": {0: "a", 1: "b"}})


def test_norms_with_weights(check: Any) -> None:
    """Weights and biases of norms are applied by column."""
    torch.manual_seed(0)
    weights = [torch.randn(48), torch.randn(48)]

    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
        return {
            "layer": F.layer_norm(x, (48,), w, b, 1e-3),
            "layer_no_bias": F.layer_norm(x, (48,), w),
            "rms": F.rms_norm(x, (48,), w),
            "scaled": (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * (1 + w),
        }

    for dtype in (torch.float32, torch.bfloat16):
        check(function, (torch.randn(5, 3, 48).to(dtype),), weights=[w.to(dtype) for w in weights])


def test_reductions_of_reductions(check: Any) -> None:
    """Reductions are made of what other reductions gave, in the same row and across rows."""
    torch.manual_seed(0)

    def function(x: torch.Tensor) -> dict[str, Any]:
        top = x.amax(-1, keepdim=True)
        weights = (x - top).exp()
        normal = weights / weights.sum(-1, keepdim=True)
        entropy = -(normal * normal.clamp_min(1e-9).log()).sum(-1)
        return {
            "entropy": entropy,
            "of_rows": entropy.sum(-1),
            "back": x * entropy.softmax(-1).unsqueeze(-1),
            "twice": F.layer_norm(F.layer_norm(x, x.shape[-1:]) + x, x.shape[-1:]),
            "pooled": (x * (x > 0)).sum(-1) / (x > 0).sum(-1).clamp_min(1),
        }

    check(function, (torch.randn(3, 4, 33),))
    calls = [(torch.randn(shape),) for shape in ((3, 4, 33), (1, 7, 33), (2, 1, 33))]
    check(function, *calls, dynamic={"args.0": {0: "a", 1: "b"}})


def test_reduction_used_elsewhere(check: Any) -> None:
    """A row's result is used at other rows, by shifting, turning and gathering."""
    torch.manual_seed(0)

    def function(x: torch.Tensor) -> dict[str, Any]:
        total = x.sum(-1)
        normal = x.softmax(-1)
        return {
            "shifted": total[1:] - total[:-1],
            "turned": total.flip(0) + total,
            "padded": F.pad(total, (1, 2)),
            "outer": total[:, None] + total[None, :],
            "halves": torch.cat([normal[:, 5:], normal[:, :5]], -1),
            "turned_rows": normal.flip(-1) * x,
            "next_row": normal[1:] * x[:-1],
            "transposed": normal.t() + 1,
        }

    check(function, (torch.randn(9, 12),))
    check(function, (torch.randn(9, 12),), (torch.randn(4, 12),), dynamic={"args.0": {0: "n"}})
