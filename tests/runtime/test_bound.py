"""Calls that are bound to their tensors once and run many times."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright
from graphwright.ir.errors import InputError


class Layer(nn.Module):
    """A product between pointwise operations."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x * 2.0)) + 1.0


@pytest.fixture(scope="module")
def layer():
    """A compiled layer and the executable of it."""
    torch.manual_seed(0)
    model = Layer().eval()
    return model, graphwright.compile(model, torch.randn(3, 5, 16))._executable


def test_a_run_reads_what_the_tensors_hold_now(layer) -> None:
    """Each run computes anew, into the same memory."""
    model, executable = layer
    x = torch.randn(2, 7, 16)
    call = executable.bind(x)
    result = call.results
    for _ in range(3):
        x.normal_()
        call.run()
        assert call.results is result
        with torch.no_grad():
            torch.testing.assert_close(result, model(x), atol=1e-5, rtol=1e-5)


def test_other_calls_do_not_move_its_memory(layer) -> None:
    """A bound call stays valid whatever larger calls the program gets, and however many."""
    model, executable = layer
    x = torch.randn(1, 2, 16)
    call = executable.bind(x)
    for size in range(1, 40):
        executable(torch.randn(size, 50, 16))
    call.run()
    with torch.no_grad():
        torch.testing.assert_close(call.results, model(x), atol=1e-5, rtol=1e-5)


def test_tensors_that_would_have_to_be_copied_are_refused(layer) -> None:
    """What is bound is used in place."""
    with pytest.raises(InputError, match="used in place"):
        layer[1].bind(torch.randn(7, 2, 16).transpose(0, 1))
    with pytest.raises(InputError, match="expected"):
        layer[1].bind(torch.randn(2, 7, 16).double())
