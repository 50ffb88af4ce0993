"""Lowering of operations that repeat elements, or move them around a dimension."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from graphwright.codegen.indexing import Index, flat, unflatten
from graphwright.codegen.values import Value
from graphwright.ir.errors import LoweringError

from .registry import POINTWISE, VIEWS, Reader, arguments, dtype_of, register

aten = torch.ops.aten


@register(VIEWS, aten.repeat.default)
def _repeat(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    source: Any = node.args[0]
    shape = reader.shape(source)
    ranges, own = reader.values.ranges, index[len(index) - len(shape) :]
    times: Any = node.args[1]
    once = [n == 1 for n in times[len(times) - len(shape) :]]
    return reader.value(
        source,
        tuple(
            sympy.Integer(0) if n == 1 else i if whole else ranges.remainder(i, n)
            for i, n, whole in zip(own, shape, once, strict=True)
        ),
    )


@register(VIEWS, aten.repeat_interleave.self_int)
def _repeat_interleave(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given = arguments(node)
    source, dim, times = given["self"], given["dim"], reader.size(given["repeats"])
    shape, ranges = reader.shape(source), reader.values.ranges
    if dim is None:
        return reader.value(source, unflatten(ranges.divide(index[0], times), shape, ranges))
    at = list(index)
    dim %= len(shape)
    at[dim] = ranges.divide(index[dim], times)
    return reader.value(source, at)


@register(POINTWISE, aten.roll.default)
def _roll(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, v = arguments(node), reader.values
    source, shape = given["self"], reader.shape(node)
    shifts, dims = list(given["shifts"]), [d % len(shape) for d in given["dims"]]
    flattened = not dims
    if flattened:
        # Without dimensions, elements move in their order.
        dims, shape, position = [0], (sympy.prod(shape),), (flat(index, shape),)
    else:
        position = index

    def read(at: tuple[Index, ...], rest: tuple[tuple[int, int], ...]) -> Value:
        if not rest:
            return reader.value(source, unflatten(at[0], reader.shape(node), v.ranges) if flattened else at)
        (dim, shift), *others = rest
        later, size = tuple(others), shape[dim]
        if not _is_number(size) or not isinstance(shift, int):
            raise LoweringError(f"{node.name}: rolling by {shift} around a dimension of {size} is not generated")
        shift %= max(int(size), 1)
        if shift == 0:
            return read(at, later)
        # What stands in front comes from the end, the others from `shift` before.
        front = v.less(at[dim], shift)
        with reader.under(front):
            wrapped = read(_moved(at, dim, int(size) - shift), later)
        with reader.under(v.op("not", torch.bool, front)):
            plain = read(_moved(at, dim, -shift), later)
        return v.op("where", dtype_of(node), front, wrapped, plain)

    return read(tuple(position), tuple(zip(dims, shifts, strict=True)))


def _is_number(size: Any) -> bool:
    return isinstance(size, int | sympy.Integer)


def _moved(at: tuple[Index, ...], dim: int, by: int) -> tuple[Index, ...]:
    return (*at[:dim], sympy.expand(at[dim] + by), *at[dim + 1 :])
