"""Captures that cannot be: what is said of them, and what is captured in their place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright
from graphwright.ir.errors import CaptureError, InputError, LoweringError, OptionError


class Function(nn.Module):
    """A module whose forward is a function of one tensor."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear, "got type. What to do: pass an instance"),
        (lambda: torch.jit.script(nn.Linear(6, 6)), "holds no Python code any more. What to do: pass the module"),
        (lambda: nn.LazyLinear(3), "What to do: call the model once before"),
        (lambda: nn.Linear(6, 6, device="meta"), "What to do: move the model and the arguments to one device"),
        (
            lambda: nn.Linear(5, 6),
            "What to do: check the arguments: called in PyTorch the model itself raises RuntimeError: mat1",
        ),
    ],
    ids=["class", "script", "lazy", "device", "argument"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*torch.jit.script.*")
def test_what_cannot_be_captured_says_what_to_do(model, message):
    """Each kind of model that cannot be captured has its own advice."""
    with pytest.raises(CaptureError, match=message):
        graphwright.capture(model(), torch.randn(2, 6))


@pytest.mark.parametrize("dynamic", ["batch", {"x": "batch"}, {"x": [0]}, 3])
def test_names_of_another_form_are_refused(dynamic):
    """What is no table of names says so, with an example."""
    with pytest.raises(OptionError, match=r"dynamic: expected names .* such as \{'x': \{0: 'batch'\}\}"):
        graphwright.capture(Function(torch.relu), torch.randn(2, 6), dynamic=dynamic)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: torch.tensor(x.tolist()),
        lambda x: x.nonzero(),
    ],
    ids=["item", "mask", "tolist", "nonzero"],
)
def test_sizes_and_numbers_made_of_values_are_refused_with_their_line(function):
    """What a graph can hold, but no schedule of known sizes, names the line and the way out."""
    with pytest.raises(LoweringError, match=r"test_capture_refusals\.py:\d+\).*What to do: use torch\.where or a mask"):
        graphwright.compile(Function(function), torch.randn(3, 5))


def test_a_size_that_cannot_vary_is_fixed_at_the_samples():
    """The sample call is never refused: where no range holds around it, its sizes are fixed."""
    model = Function(lambda x: x * 2 if x.shape[1] % 3 else x * 3)
    for tokens in (1, 5, 6):
        x = torch.randn(2, tokens, 6)
        program = graphwright.capture(model, x)
        torch.testing.assert_close(program.reference(x), model(x))
        for other in range(1, 12):
            y = torch.randn(2, other, 6)
            try:
                found = program.reference(y)
            except InputError:
                continue
            torch.testing.assert_close(found, model(y))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * 3 // 2) % 5,
        lambda x: x & 3,
        lambda x: 4 | x,
        lambda x: x.bitwise_xor(1),
        lambda x: 20 % (x.abs() + 1),
        lambda x: x.float() % 2.5,
    ],
    ids=["remainder", "and", "or", "xor", "reversed", "float"],
)
def test_integer_operations_with_numbers(function):
    """Remainders of numbers and bits of them are captured, with sizes that vary, and compiled."""
    model, x = Function(function), torch.randint(-9, 9, (2, 5))
    program = graphwright.capture(model, x)
    assert sorted(program.dimensions) == ["batch", "tokens"]
    y = torch.randint(-9, 9, (4, 3))
    torch.testing.assert_close(program.reference(y), model(y), rtol=0, atol=0)
    torch.testing.assert_close(graphwright.compile(program)(y), model(y), rtol=0, atol=0)
