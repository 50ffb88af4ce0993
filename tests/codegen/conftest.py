"""Compile small functions and compare them with eager, in memory that holds NaN before the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.compiled import Compiled


class Function(nn.Module):
    """A module that calls a function, with tensors as its weights."""

    def __init__(self, function: Callable[..., Any], weights: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(*args, *self.weights)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, list | tuple | type({}.values())):
        return [leaf for entry in value for leaf in _flat(entry)]
    return [value]


def _names(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{k}{n and '.'}{n}" for k, v in value.items() for n in _names(v)]
    if isinstance(value, list | tuple):
        return [f"{k}{n and '.'}{n}" for k, v in enumerate(value) for n in _names(v)]
    return [""]


ULPS = 16
"""Results may be off by so many units in the last place of their dtype at their own size, and at an eighth of the largest."""


def difference(found: Any, expected: Any, ulps: float = ULPS) -> str:
    """Say how a result differs from eager's: type, dtype, shape, NaN and infinities are exact, numbers up to rounding."""
    if not isinstance(expected, torch.Tensor):
        return "" if type(found) is type(expected) and found == expected else f"{found!r} instead of {expected!r}"
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return f"{found.dtype} {list(found.shape)} instead of {expected.dtype} {list(expected.shape)}"
    if expected.dtype.is_floating_point:
        a, b = found.double(), expected.double()
        finite = b.isfinite()
        largest = b[finite].abs().max() if finite.any() else torch.tensor(0.0)
        # Sums are rounded at the size of their largest terms.
        allowed = ulps * (torch.finfo(expected.dtype).eps * (b.abs() + largest / 8) + torch.finfo(expected.dtype).tiny)
        right = (a == b) | (a.isnan() & b.isnan()) | (finite & ((a - b).abs() <= allowed))
    else:
        right = found == expected
    if right.all():
        return ""
    wrong = ~right
    some, instead = found[wrong][:4].tolist(), expected[wrong][:4].tolist()
    return f"{int(wrong.sum())} of {wrong.numel()} differ, such as {some} instead of {instead}"


def differences(found: Any, expected: Any, ulps: float = ULPS) -> dict[str, str]:
    """Say for each of nested results that differs how it does."""
    assert type(found) is type(expected)
    named = zip(_names(expected), _flat(found), _flat(expected), strict=True)
    return {name: text for name, a, b in named if (text := difference(a, b, ulps))}


def poison(compiled: Compiled) -> None:
    """Fill the memory of temporary buffers with NaN."""
    compiled._executable._arena.fill_(0xFF)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new tensors hold NaN, so that what a kernel leaves out is seen, and draw the same numbers in every run."""
    torch.manual_seed(0)
    original = torch.empty_strided

    def empty_strided(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = original(*args, **kwargs)
        if type(made) is torch.Tensor and made.device.type == "cpu" and made.numel():
            made.untyped_storage().fill_(0xFF)
        return made

    monkeypatch.setattr("graphwright.runtime.executable.torch.empty_strided", empty_strided)


Check = Callable[..., Compiled]


@pytest.fixture
def check() -> Check:
    """Return a function that compiles a function of tensors, and compares it with eager at all given inputs."""

    def run(
        function: Callable[..., Any] | nn.Module,
        *calls: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor] = (),
        dynamic: Any = False,
        ulps: float = ULPS,
    ) -> Compiled:
        module = function if isinstance(function, nn.Module) else Function(function, weights)
        module.eval()
        compiled = graphwright.compile(module, *calls[0], dynamic=dynamic, check=False)
        for inputs in calls:
            with torch.no_grad():
                expected = module(*inputs)
            compiled(*inputs)
            poison(compiled)
            found = compiled(*inputs)
            wrong = differences(found, expected, ulps)
            shapes = [list(t.shape) for t in inputs]
            assert not wrong, "\n".join(f"{name} of {shapes}: {text}" for name, text in wrong.items())
        return compiled

    return run
