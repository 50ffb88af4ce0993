"""Lowering of the dialect's operations that are computed in loops."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from graphwright.codegen.indexing import Index
from graphwright.codegen.values import Value, held_dtype
from graphwright.ir import dialect

from .pointwise import activation
from .reductions import root_mean_square
from .registry import POINTWISE, REDUCED_DIMS, REDUCTIONS, Reader, arguments, dtype_of, register

REDUCED_DIMS[dialect.rms_norm] = lambda node: [node.args[0].meta["val"].dim() - 1]  # type: ignore[union-attr]


@register(REDUCTIONS, dialect.rms_norm)
def _rms_norm(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given = arguments(node)
    size = reader.shape(given["x"])[-1]
    return root_mean_square(reader, node, index, [size], given["weight"], given["eps"], given["weight_offset"])


@register(POINTWISE, dialect.glu)
def _glu(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, v, dtype = arguments(node), reader.values, held_dtype(dtype_of(node))
    gate, up = (v.cast(reader.value(given[name], index), dtype) for name in ("gate", "up"))
    activated = activation(v, given["activation"], dtype, gate)
    if activated is None:
        from graphwright.ir.errors import LoweringError

        raise LoweringError(f"{node.name}: there is no kernel for the activation {given['activation']!r}")
    return v.op("mul", dtype, activated, up)


@register(POINTWISE, dialect.rotary)
def _rotary(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, v, dtype = arguments(node), reader.values, held_dtype(dtype_of(node))
    size = reader.shape(given["x"])[-1]
    rotated = size if given["rotated"] is None else given["rotated"]
    outer, at = index[:-1], index[-1]
    half = sympy.sympify(rotated) / 2

    def x(position: Index) -> Value:
        return v.cast(reader.broadcast(given["x"], (*outer, sympy.expand(position))), dtype)

    def table(name: str) -> Value:
        return v.cast(reader.broadcast(given[name], index), dtype)

    def turned() -> Value:
        if given["interleaved"]:
            pair = v.ranges.divide(at, 2)
            first = v.less(at, 2 * pair + 1)
            with reader.under(first):
                after = v.op("neg", dtype, x(at + 1))
            with reader.under(v.op("not", torch.bool, first)):
                before = x(at - 1)
        else:
            first = v.less(at, half)
            with reader.under(first):
                after = v.op("neg", dtype, x(at + half))
            with reader.under(v.op("not", torch.bool, first)):
                before = x(at - half)
        partner = v.op("where", dtype, first, after, before)
        straight = v.op("mul", dtype, x(at), table("cos"))
        return v.op("add", dtype, straight, v.op("mul", dtype, partner, table("sin")))

    if rotated == size:
        return turned()
    inside = v.less(at, rotated)
    with reader.under(inside):
        result = turned()
    return v.op("where", dtype, inside, result, x(at))
