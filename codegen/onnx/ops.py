"""How each operation of the dialect is written for ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.ops.definition import computed_in
from graphwright.ir.ops.rotary import rotary_reference

from . import merge
from .calls import onnx_call

aten = torch.ops.aten


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    *,
    cast_before_weight: bool = True,
) -> torch.Tensor:
    """Return `graphwright::rms_norm` as RMSNormalization, whose result has the weight's dtype."""
    wide = computed_in(x.dtype)
    dtype = x.dtype if cast_before_weight else wide
    factor = x.new_ones((x.shape[-1],), dtype=dtype) if weight is None else weight
    if weight_offset and weight is not None:
        factor = (weight if cast_before_weight else weight.to(wide)) + weight_offset
    if not cast_before_weight:
        normed = onnx_call("RMSNormalization", [x.to(wide), factor.to(wide)], {"epsilon": eps, "axis": -1}, wide, x.shape)
        return normed.to(x.dtype)
    if factor.dtype == x.dtype:
        return onnx_call("RMSNormalization", [x, factor], {"epsilon": eps, "axis": -1}, dtype, x.shape)
    plain = onnx_call("RMSNormalization", [x, x.new_ones((x.shape[-1],))], {"epsilon": eps, "axis": -1}, dtype, x.shape)
    return factor * plain


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return `graphwright::glu` written out."""
    # The exporter writes silu as Swish only from opset 24; onnxruntime fuses the product by itself.
    activated = gate * torch.sigmoid(gate) if activation == "silu" else dialect.ACTIVATIONS[activation](gate)
    return activated * up


def take_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return `graphwright::take_rows` written out."""
    there = (index >= 0).reshape((*index.shape, *(1 for _ in x.shape[1:])))
    return torch.where(there, x[index.clamp(min=0)], torch.zeros((), dtype=x.dtype, device=x.device))


LOWERINGS: Mapping[Any, Callable[..., torch.Tensor]] = {
    dialect.rms_norm: rms_norm,
    dialect.glu: glu,
    dialect.rotary: rotary_reference,
    dialect.take_rows: take_rows,
    **merge.LOWERINGS,
}
"""Operation -> what is traced in its place. Attention, and what leads to it, is written by `Writer`, which sees more."""


def repeats_its_half(node: Any) -> bool:
    """Return whether the second half of a table's features [..., D] is its first: cat([x, x], -1), and what keeps that."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if node.target is aten.cat.default:
        parts: Any = node.args[0]
        last = node.args[1] if len(node.args) > 1 else 0
        return len(parts) == 2 and parts[0] is parts[1] and last in (-1, node.meta["val"].dim() - 1)
    source: Any = node.args[0]
    if node.target is aten.unsqueeze.default:
        return node.args[1] not in (-1, node.meta["val"].dim() - 1) and repeats_its_half(source)
    if node.target in _ELEMENTWISE:
        plain = all(not isinstance(a, fx.Node) or a.meta["val"].numel() == 1 for a in node.args[1:])
        return plain and repeats_its_half(source)
    return False


_ELEMENTWISE = frozenset(
    {
        aten.cos.default,
        aten.sin.default,
        aten.mul.Tensor,
        aten.mul.Scalar,
        torch.ops.prims.convert_element_type.default,
        aten._to_copy.default,
    }
)
