"""Recognition of gated feed-forwards."""

from __future__ import annotations

import pytest
import torch

aten = torch.ops.aten
MUL = aten.mul.Tensor
GLU = "graphwright.glu.default"


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("activation", ["silu", "relu", "sigmoid", "gelu", "gelu_tanh"])
def test_activations(builder, run, activation, swapped) -> None:
    """Each activation, the gate on either side, bitwise."""
    b = builder()
    gate, up = b.input("gate", "batch", 6), b.input("up", "batch", 6)
    keywords = {"approximate": "tanh"} if activation == "gelu_tanh" else {}
    active = b.call(getattr(aten, activation.removesuffix("_tanh")).default, gate, **keywords)
    outcome = run("raise-glu", b.program(b.call(MUL, up, active) if swapped else b.call(MUL, active, up)))
    assert outcome.operations == [GLU]
    assert outcome.plan.decisions[0].detail["activation"] == activation
    outcome.check(torch.randn(63, 6), torch.randn(63, 6))


def test_declines(builder, run) -> None:
    """A gate that is used elsewhere, or a factor of another shape or dtype, is left with the reason."""
    b = builder()
    gate, up = b.input("gate", 5, 6), b.input("up", 5, 6)
    row, half = b.input("row", 6), b.input("half", 5, 6, dtype=torch.bfloat16)
    twice = b.call(aten.silu.default, gate)
    results = [twice, b.call(MUL, twice, up)]
    results.append(b.call(MUL, b.call(aten.relu.default, gate), row))
    results.append(b.call(MUL, b.call(aten.sigmoid.default, gate), half))
    results.append(b.call(MUL, b.call(aten.sigmoid.default, gate), gate))
    outcome = run("raise-glu", b.program(*results))
    assert outcome.plan.decisions == ()
    assert [reason.split(" ", 1)[1] for reason in outcome.reasons] == [
        "is used for something else too",
        "and %row differ in shape",
        "gate is torch.float32, the values are torch.bfloat16",
    ]
