"""`graphwright::rms_norm`: division by the root of the mean square of the last dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch

from .definition import computed_in, define, expect

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

SCHEMA = "rms_norm(Tensor x, Tensor? weight, float eps, float weight_offset=0.0, *, bool cast_before_weight=True) -> Tensor"


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    *,
    cast_before_weight: bool = True,
) -> torch.Tensor:
    """Return x / sqrt(mean(x^2, -1) + eps) * (weight + weight_offset).

    Args:
        x: [..., E], floating point; the norm is computed in float32 (float64 for float64).
        weight: [E]; None for no factor.
        eps: added to the mean square, at least 0.
        weight_offset: added to the weight: 1 for models that store the weight's distance from 1.
        cast_before_weight: round the normalised value to x's dtype and multiply by the weight as stored (Llama, T5); False:
            multiply in float32 and round the product to x's dtype (Gemma).

    Returns:
        [..., E]; x's dtype, or the dtype that x's and the weight's promote to where the cast comes first.
    """
    wide = x.to(computed_in(x.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast_before_weight:
        return (weight + weight_offset if weight_offset else weight) * normed.to(x.dtype)
    factor = weight.to(wide.dtype)
    return (normed * (factor + weight_offset if weight_offset else factor)).to(x.dtype)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    *,
    cast_before_weight: bool = True,
) -> torch.Tensor:
    expect(x.dim() > 0, "rms_norm needs a dimension to normalise over")
    expect(x.is_floating_point(), f"rms_norm needs floating point values, got {x.dtype}")
    dtype = x.dtype
    if weight is not None:
        expect(weight.dim() == 1, f"the weight must have one dimension, got {tuple(weight.shape)}")
        expect(weight.shape[0] == x.shape[-1], f"the weight has {weight.shape[0]}, x {x.shape[-1]} features")
        if cast_before_weight:
            dtype = torch.promote_types(dtype, weight.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    # Square, sum, scale, weight.
    return 4 * sympy.prod(program.shape(node))


rms_norm = define(SCHEMA, rms_norm_reference, _fake, _flops)
