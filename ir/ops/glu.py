"""`graphwright::glu`: a gated feed-forward's product of an activated gate and the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import sympy
import torch
from torch.nn import functional

from .definition import define, expect

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

SCHEMA = "glu(Tensor gate, Tensor up, str activation) -> Tensor"

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
}
"""What may be done to the gate, by name."""

ACTIVATION_FLOPS = 8
"""A rough count for one activation: what an exponential and a division cost."""


def glu_reference(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return activation(gate) * up.

    Args:
        gate: any shape, floating point.
        up: the same shape and dtype.
        activation: one of `ACTIVATIONS`.
    """
    return ACTIVATIONS[activation](gate) * up


def _fake(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    expect(activation in ACTIVATIONS, f"no activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    expect(gate.dtype == up.dtype, f"the gate is {gate.dtype}, the values are {up.dtype}")
    expect(gate.dim() == up.dim(), f"the gate has {gate.dim()} dimensions, the values {up.dim()}")
    for mine, other in zip(gate.shape, up.shape, strict=True):
        expect(mine == other, f"shapes differ: {tuple(gate.shape)} and {tuple(up.shape)}")
    return torch.empty_like(gate)


def _flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    return (ACTIVATION_FLOPS + 1) * sympy.prod(program.shape(node))


glu = define(SCHEMA, glu_reference, _fake, _flops)
