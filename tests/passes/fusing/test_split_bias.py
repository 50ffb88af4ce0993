"""Taking the bias out of linear layers."""

from __future__ import annotations

import torch

aten = torch.ops.aten


def test_the_bias_is_added_after(builder, run) -> None:
    """A linear layer with a bias becomes a product and a sum; one without stays."""
    b = builder()
    x = b.input("x", "batch", 4)
    y = b.call(aten.linear.default, x, b.weight("w", torch.randn(3, 4)), b.weight("b", torch.randn(3)))
    z = b.call(aten.linear.default, y, b.weight("v", torch.randn(2, 3)))
    outcome = run("split-bias", b.program(z))
    assert outcome.operations == ["aten.linear.default", "aten.add.Tensor", "aten.linear.default"]
    outcome.check(torch.randn(5, 4), tolerance=1e-6)
