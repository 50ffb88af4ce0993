"""Norms with fixed statistics, pools of everything, padding, and the smaller and the larger of two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphwright.compiled import Compiled

Check = Callable[..., Compiled]


def calls_of(compiled: Compiled) -> list[str]:
    """Return the operations that PyTorch runs."""
    return [step.operation for step in compiled.schedule.steps if hasattr(step, "operation")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_evaluation(check: Check, dtype: torch.dtype, affine: bool) -> None:
    """Batch norm with running statistics is computed with what stands around it."""
    norm = nn.BatchNorm2d(6, affine=affine)
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        if tensor is not None:
            nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.1, 3)
    made = check(
        nn.Sequential(norm, nn.ReLU()).to(dtype), *[(torch.randn(b, 6, 5, 7, dtype=dtype),) for b in (2, 3)], dynamic=None
    )
    assert calls_of(made) == []
    assert len(made.schedule.steps) == 1


def test_batch_norm_of_rows(check: Check) -> None:
    """The second dimension holds the channels, whatever else there is."""
    norm = nn.BatchNorm1d(63)
    nn.init.normal_(norm.running_mean)
    check(norm, (torch.randn(5, 63),))
    check(norm, (torch.randn(2, 63, 9),))


def test_statistics_of_the_batch_are_left_to_eager(check: Check) -> None:
    """Without running statistics a norm reads the whole batch."""
    made = check(lambda x: F.batch_norm(x, None, None, training=True) + 1, (torch.randn(4, 3, 5),))
    assert calls_of(made) == ["aten::batch_norm.default"]


def test_pools_of_everything_are_means(check: Check) -> None:
    """Adaptive pools that leave one element take whole rows; others are left to eager."""
    made = check(lambda x: (F.adaptive_avg_pool1d(x[0], 1) + 1, F.adaptive_avg_pool2d(x, (1, 1))), (torch.randn(2, 3, 9, 63),))
    assert calls_of(made) == []
    made = check(lambda x: F.adaptive_avg_pool2d(x, (3, 1)) + 1, (torch.randn(2, 3, 9, 63),))
    assert calls_of(made) == ["aten::adaptive_avg_pool2d.default"]


@pytest.mark.parametrize("width", [1, 63, 1000])
def test_padding(check: Check, width: int) -> None:
    """Padding with a constant, with nothing, and negative padding, which cuts off."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            F.pad(x, (0, 0, 0, 0)) * 2,
            F.pad(x, (1, 2)) + 1,
            F.pad(x, (0, 0, 2, 1), value=-1.5),
            F.pad(x, (3, 0, 0, 1, 1, 0), value=float("inf")),
            F.pad(x, (2, -1, -1, 3)),
        )

    made = check(function, (torch.randn(2, 3, width),))
    assert calls_of(made) == []


def test_padding_of_any_size(check: Check) -> None:
    """Sizes may differ from call to call, and what is added may depend on them."""
    inputs = [(torch.randn(2, tokens, 5),) for tokens in (7, 8, 30)]
    made = check(lambda x: F.pad(x, (0, 0, 0, (16 - x.shape[1] % 16) % 16)).exp(), *inputs, dynamic=None)
    assert calls_of(made) == []
    made = check(lambda x: F.pad(x, (1, 0, 2, 3)) + 1, *inputs, dynamic=None)
    assert calls_of(made) == []


def test_other_padding_is_left_to_eager(check: Check) -> None:
    """Reflected elements are not generated."""
    made = check(lambda x: F.pad(x, (2, 1), mode="reflect") + 1, (torch.randn(2, 3, 9),))
    assert any("pad" in call for call in calls_of(made))


def test_smaller_and_larger_of_two(check: Check) -> None:
    """`torch.min(x, y)` and `torch.max(x, y)` broadcast, promote, and pass NaN on."""
    x, y = torch.randn(4, 63), torch.randn(63)
    x[1, 2] = y[5] = torch.nan
    made = check(
        lambda x, y, n: (torch.min(x, y), torch.max(x, y) + 1, torch.min(n, n.t()), torch.max(n, x[:, :4])),
        (x, y, torch.randint(-9, 9, (4, 4))),
    )
    assert calls_of(made) == []
