"""Lowering of division that rounds, and of the remainders that belong to it."""

from __future__ import annotations

import torch
from torch import fx

from graphwright.codegen.indexing import Index
from graphwright.codegen.values import Value, Values, held_dtype

from .registry import POINTWISE, Reader, arguments, dtype_of, operands, register

aten = torch.ops.aten


@register(POINTWISE, aten.floor_divide.default, aten.floor_divide.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def _rounded_division(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, v = arguments(node), reader.values
    mode = given.get("rounding_mode", "floor")
    x, y, dtype = _operands(reader, node, index)
    if mode is None:
        return v.op("div", dtype, x, y)
    if not dtype.is_floating_point:
        quotient = v.op("truncdiv", dtype, x, y)
        return quotient if mode == "trunc" else v.op("sub", dtype, quotient, v.cast(_rounds_down(v, dtype, x, y), dtype))
    if mode == "trunc":
        return v.op("trunc", dtype, v.op("div", dtype, x, y))
    return _floor_of_quotient(v, dtype, x, y)


def _operands(
    reader: Reader, node: fx.Node, index: tuple[Index, ...], *, rounded: bool = False
) -> tuple[Value, Value, torch.dtype]:
    given = arguments(node)
    dtype = dtype_of(node)
    x, y = operands(reader, index, (given["self"], given["other"]), dtype, rounded=rounded)
    return x, y, held_dtype(dtype)


def _floor_of_quotient(v: Values, dtype: torch.dtype, x: Value, y: Value) -> Value:
    # As eager does: the exact remainder decides, not the rounded quotient, so that 6 // 0.1 is 59.
    rest = v.op("fmod", dtype, x, y)
    quotient = v.op("div", dtype, v.op("sub", dtype, x, rest), y)
    one = v.constant(1, dtype)
    quotient = v.op("where", dtype, _rounds_down(v, dtype, x, y), v.op("sub", dtype, quotient, one), quotient)
    below = v.op("floor", dtype, quotient)
    above = v.op("gt", torch.bool, v.op("sub", dtype, quotient, below), v.constant(0.5, dtype))
    nearest = v.op("where", dtype, above, v.op("add", dtype, below, one), below)
    by_zero = v.op("eq", torch.bool, y, v.constant(0, dtype))
    return v.op("where", dtype, by_zero, v.op("div", dtype, x, y), nearest)


def _rest(v: Values, dtype: torch.dtype, x: Value, y: Value) -> Value:
    return v.op("fmod" if dtype.is_floating_point else "truncmod", dtype, x, y)


def _rounds_down(v: Values, dtype: torch.dtype, x: Value, y: Value) -> Value:
    """Whether truncated division is above the floor: there is a remainder, and it has the other sign."""
    zero, rest = v.constant(0, dtype), _rest(v, dtype, x, y)
    opposite = v.op("ne", torch.bool, v.op("lt", torch.bool, rest, zero), v.op("lt", torch.bool, y, zero))
    return v.op("and", torch.bool, v.op("ne", torch.bool, rest, zero), opposite)


@register(POINTWISE, aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)
def _remainder(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    v = reader.values
    x, y, dtype = _operands(reader, node, index, rounded=True)
    rest = _rest(v, dtype, x, y)
    return v.op("where", dtype, _rounds_down(v, dtype, x, y), v.op("add", dtype, rest, y), rest)


@register(POINTWISE, aten.fmod.Tensor, aten.fmod.Scalar)
def _fmod(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    x, y, dtype = _operands(reader, node, index, rounded=True)
    return _rest(reader.values, dtype, x, y)
