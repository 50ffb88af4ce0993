"""Repeating elements and rolling them around gives what eager gives, at any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphwright.compiled import Compiled

Check = Callable[..., Compiled]


def calls_of(compiled: Compiled) -> list[str]:
    """Return the operations that PyTorch runs."""
    return [step.operation for step in compiled.schedule.steps if hasattr(step, "operation")]


def repeats(x: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Repeat along every dimension, along new ones, once, and where there is one element."""
    return (
        x.repeat(2, 3, 1) + 1,
        x.repeat(2, 1, 1, 4),
        x.repeat(1, 1, 1) * 2,
        row.repeat(x.shape[0], 1).relu(),
        x.repeat(3, 1, 2).sum(-1),
        x.repeat(2, 1, 1).transpose(0, 1)[:, 1:] - 1,
    )


def interleaved(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Repeat each element, along one dimension, the last one, or of all in order."""
    return (
        x.repeat_interleave(3, dim=1) + 1,
        x.repeat_interleave(2, dim=-1),
        x.repeat_interleave(4),
        x.repeat_interleave(1, dim=0),
    )


def rolled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Roll either way, by nothing, by more than there is, around several dimensions, and in order."""
    return (
        x.roll(1, 2) + 1,
        x.roll(-1, 2) + 1,
        x.roll((2, -3), (0, 1)).exp(),
        x.roll(0, 1) * 2,
        x.roll(1000003, 2),
        x.roll((1, 1), (1, 1)),
        x.roll(5),
        x.roll(-5),
    )


@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 1, 1), (3, 5, 63), (2, 4, 1000), (2, 0, 3)])
def test_repeats(check: Check, shape: tuple[int, ...]) -> None:
    """Repetitions read their operand where it is, without an operation of PyTorch."""
    made = check(repeats, (torch.randn(shape), torch.randn(1, 5)))
    assert calls_of(made) == []
    made = check(interleaved, (torch.randn(shape),))
    assert calls_of(made) == []


def test_repeats_of_any_size(check: Check) -> None:
    """Sizes and numbers of repetitions may differ from call to call."""

    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.repeat(y.shape[0], 2, 1), x.repeat_interleave(y.shape[0], dim=1) + 1, x.repeat_interleave(2, dim=0).sum(-1)

    sizes = ((2, 3, 4), (5, 1, 2), (1, 63, 7))
    inputs = [(torch.randn(a, b, 6), torch.randn(c, 2)) for a, b, c in sizes]
    made = check(function, *inputs, dynamic={"args.0": {0: "a", 1: "b"}, "args.1": {0: "c"}})
    assert calls_of(made) == []


@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 1, 1), (3, 5, 63), (2, 4, 1000)])
def test_rolls(check: Check, shape: tuple[int, ...]) -> None:
    """Rolled elements come from the other end."""
    made = check(rolled, (torch.randn(shape),))
    assert calls_of(made) == []


def test_roll_around_a_size_that_changes_is_left_to_eager(check: Check) -> None:
    """The number of elements a dimension has tells where rolled ones come from; a kernel for any number is not made."""
    inputs = [(torch.randn(3, tokens),) for tokens in (7, 2, 63)]
    made = check(lambda x: x.roll(3, 1) + 1, *inputs, dynamic={"args.0": {1: "tokens"}})
    assert calls_of(made) == ["aten::roll.default"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_dtypes(check: Check, dtype: torch.dtype) -> None:
    """Elements of any dtype are moved as they are."""
    x = (torch.randn(3, 5, 6) * 9).to(dtype)

    def function(x: Any) -> Any:
        return x.roll(2, -1), x.repeat(2, 1, 3), x.repeat_interleave(2, 1)

    check(function, (x,))


def test_rolled_windows(check: Check) -> None:
    """Shifted windows are one kernel: rolling, cutting up and what follows."""

    def function(x: torch.Tensor) -> torch.Tensor:
        windows = x.roll((-1, -1), (1, 2)).view(-1, 2, 3, 2, 3, 4).transpose(2, 3).reshape(-1, 9, 4)
        return torch.nn.functional.gelu(windows)

    made = check(function, *[(torch.randn(batch, 6, 6, 4),) for batch in (2, 5)], dynamic=None)
    assert calls_of(made) == []
    assert len(made.schedule.steps) == 1


def test_norm_and_windows(check: Check) -> None:
    """A norm whose rows are then rolled and dealt out to windows takes its rows in the windows' kernel."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x + 1
        normed = torch.nn.functional.layer_norm(y, (16,)).view(-1, 8, 8, 16).roll((-2, -2), (1, 2))
        return y, normed.view(-1, 2, 4, 2, 4, 16).transpose(2, 3).reshape(-1, 16, 16)

    made = check(function, *[(torch.randn(batch, 64, 16),) for batch in (2, 5)], dynamic={"args.0": {0: "batch"}})
    assert calls_of(made) == []
    assert len(made.schedule.steps) == 1
