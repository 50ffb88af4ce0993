"""Recognition of activations that are written out."""

from __future__ import annotations

import math

import pytest
import torch

aten = torch.ops.aten
ADD, MUL, POW, TANH = aten.add.Tensor, aten.mul.Tensor, aten.pow.Tensor_Scalar, aten.tanh.default


def gpt2(b, x):
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))."""
    inner = b.call(MUL, b.call(ADD, x, b.call(MUL, b.call(POW, x, 3.0), 0.044715)), math.sqrt(2 / math.pi))
    return b.call(MUL, b.call(MUL, x, 0.5), b.call(ADD, b.call(TANH, inner), 1.0))


def bloom(b, x):
    """x * 0.5 * (1 + tanh(0.79788456 * x * (1 + 0.044715 * x * x)))."""
    inner = b.call(ADD, b.call(MUL, b.call(MUL, x, 0.044715), x), 1)
    inner = b.call(TANH, b.call(MUL, b.call(MUL, x, 0.79788456), inner))
    return b.call(MUL, b.call(MUL, x, 0.5), b.call(ADD, inner, 1.0))


def exact(b, x):
    """x * 0.5 * (1 + erf(x / sqrt(2)))."""
    inner = b.call(aten.erf.default, b.call(aten.div.Tensor, x, math.sqrt(2.0)))
    return b.call(MUL, b.call(MUL, x, 0.5), b.call(ADD, inner, 1.0))


def silu(b, x):
    """x * sigmoid(x)."""
    return b.call(MUL, x, b.call(aten.sigmoid.default, x))


def after_a_sum(b, x):
    """The argument is itself the end of a chain of such operations."""
    return gpt2(b, b.call(ADD, b.call(MUL, x, 3.0), 1.0))


@pytest.mark.parametrize(
    ("spelling", "operations"),
    [
        (gpt2, ["aten.gelu.default"]),
        (bloom, ["aten.gelu.default"]),
        (exact, ["aten.gelu.default"]),
        (silu, ["aten.silu.default"]),
        (after_a_sum, ["aten.mul.Tensor", "aten.add.Tensor", "aten.gelu.default"]),
    ],
)
def test_spellings(builder, run, spelling, operations) -> None:
    """The function decides, not its spelling."""
    b = builder()
    outcome = run("raise-gelu", b.program(spelling(b, b.input("x", "batch", 5))))
    assert outcome.operations == operations
    outcome.check(torch.linspace(-20, 20, 1000).reshape(200, 5), tolerance=1e-5)


def test_the_tanh_form_is_told_from_the_exact_one(builder, run) -> None:
    """The two differ by less than 0.001, and are not confused."""
    kinds = []
    for spelling in (gpt2, exact):
        b = builder()
        kinds.append(run("raise-gelu", b.program(spelling(b, b.input("x", 5)))).plan.decisions[0].detail["kind"])
    assert kinds == ["gelu_tanh", "gelu"]


def test_other_functions_stay(builder, run) -> None:
    """x * sigmoid(1.702 x) is neither; nor is a GELU whose tanh is needed elsewhere."""
    b = builder()
    x = b.input("x", 5)
    program = b.program(b.call(MUL, x, b.call(aten.sigmoid.default, b.call(MUL, x, 1.702))))
    assert run("raise-gelu", program).plan.decisions == ()
    b = builder()
    y = gpt2(b, b.input("x", 5))
    tanh = next(node for node in b.built.graph.nodes if node.target is TANH)
    assert run("raise-gelu", b.program(y, tanh)).plan.decisions == ()


def test_two_values_are_no_activation(builder, run) -> None:
    """y * sigmoid(x) has two arguments."""
    b = builder()
    x, y = b.input("x", 5), b.input("y", 5)
    program = b.program(b.call(MUL, y, b.call(aten.sigmoid.default, x)))
    assert run("raise-gelu", program).plan.decisions == ()
