"""Lowering of operations that rearrange elements, and of those that make them from their index."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from graphwright.codegen.indexing import Index, flat, unflatten
from graphwright.codegen.values import Value, held_dtype
from graphwright.ir.errors import LoweringError

from .registry import GENERATORS, POINTWISE, VIEWS, Reader, arguments, dtype_of, register

aten = torch.ops.aten


@register(VIEWS, aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default)
@register(VIEWS, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints)
def _reshape(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    source: Any = node.args[0]
    old, new = reader.shape(source), reader.shape(node)
    kept = _match(new, old, index)
    if kept is not None:
        return reader.value(source, kept)
    return reader.value(source, unflatten(flat(index, new), old, reader.values.ranges))


def _match(new: tuple[Any, ...], old: tuple[Any, ...], index: tuple[Index, ...]) -> tuple[Index, ...] | None:
    """Return the index in `old` where the shapes differ in dimensions of size 1 only."""
    if [n for n in new if n != 1] != [n for n in old if n != 1]:
        return None
    kept = iter([i for i, n in zip(index, new, strict=True) if n != 1])
    return tuple(sympy.Integer(0) if n == 1 else next(kept) for n in old)


@register(VIEWS, aten.permute.default, aten.transpose.int, aten.t.default)
def _permute(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    order = permutation(node, len(index))
    result: list[Index] = [sympy.Integer(0)] * len(index)
    for position, dim in enumerate(order):
        result[dim] = index[position]
    return reader.value(node.args[0], tuple(result))


def _args(node: fx.Node) -> Any:
    return node.args


def permutation(node: fx.Node, rank: int) -> list[int]:
    """Return, for each dimension of the result of a transposition, the dimension of the operand."""
    order, args = list(range(rank)), _args(node)
    if node.target is aten.permute.default:
        return [d % rank for d in args[1]]
    if rank >= 2:
        first, second = (0, 1) if node.target is aten.t.default else (args[1] % rank, args[2] % rank)
        order[first], order[second] = order[second], order[first]
    return order


@register(VIEWS, aten.expand.default)
def _expand(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    return reader.broadcast(node.args[0], index)


@register(VIEWS, aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default)
def _same(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    return reader.value(node.args[0], index)


def slice_start(reader: Any, node: fx.Node) -> tuple[int, Index, int]:
    """Return the dimension, the first index and the step of a slice."""
    given = arguments(node)
    source = given["self"]
    shape = reader.shape(source)
    dim = given["dim"] % len(shape)
    start = 0 if given["start"] is None else reader.size(given["start"])
    if isinstance(start, int | sympy.Integer) and start < 0:
        # Counted from the end, and no further than the beginning: the size of the result tells.
        start = shape[dim] + start
        if isinstance(shape[dim], int):
            start = max(0, start)
    return dim, sympy.sympify(start), given["step"]


@register(VIEWS, aten.slice.Tensor)
def _slice(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    dim, start, step = slice_start(reader, node)
    moved = start + step * index[dim]
    return reader.value(node.args[0], (*index[:dim], sympy.expand(moved), *index[dim + 1 :]))


@register(VIEWS, aten.select.int)
def _select(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    source, dim, at = _args(node)
    shape = reader.shape(source)
    dim, at = dim % len(shape), reader.size(at)
    at = shape[dim] + at if isinstance(at, int) and at < 0 else at
    return reader.value(source, (*index[:dim], sympy.sympify(at), *index[dim:]))


@register(VIEWS, aten.flip.default)
def _flip(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    shape = reader.shape(node)
    dims = {d % len(shape) for d in _args(node)[1]}
    turned = tuple(sympy.expand(n - 1 - i) if k in dims else i for k, (i, n) in enumerate(zip(index, shape, strict=True)))
    return reader.value(node.args[0], turned)


@register(POINTWISE, aten.cat.default)
def _cat(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    parts: Any = node.args[0]
    rank = len(index)
    dim = arguments(node)["dim"] % rank
    v, dtype = reader.values, dtype_of(node)
    # An empty one-dimensional tensor may stand among tensors of any rank.
    parts = [p for p in parts if len(reader.shape(p)) == rank and reader.shape(p)[dim] != 0]

    def piece(k: int, start: Index) -> Value:
        shifted = (*index[:dim], sympy.expand(index[dim] - start), *index[dim + 1 :])
        if k == len(parts) - 1:
            return v.cast(reader.value(parts[k], shifted), held_dtype(dtype))
        stop = sympy.expand(start + reader.shape(parts[k])[dim])
        here = v.less(index[dim], stop)
        if here.kind == "constant":
            return v.cast(reader.value(parts[k], shifted), held_dtype(dtype)) if here.payload else piece(k + 1, stop)
        with reader.under(here):
            this = v.cast(reader.value(parts[k], shifted), held_dtype(dtype))
        with reader.under(v.op("not", torch.bool, here)):
            rest = piece(k + 1, stop)
        return v.op("where", dtype, here, this, rest)

    return piece(0, sympy.Integer(0))


@register(POINTWISE, aten.stack.default)
def _stack(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    parts: Any = node.args[0]
    dim = arguments(node)["dim"] % len(index)
    at, rest = index[dim], (*index[:dim], *index[dim + 1 :])
    v, dtype = reader.values, dtype_of(node)
    result = v.cast(reader.value(parts[-1], rest), held_dtype(dtype))
    for k in reversed(range(len(parts) - 1)):
        result = v.op("where", dtype, v.less(at, k + 1), v.cast(reader.value(parts[k], rest), held_dtype(dtype)), result)
    return result


@register(POINTWISE, aten.constant_pad_nd.default, aten.pad.default)
def _pad(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, v, dtype = arguments(node), reader.values, dtype_of(node)
    require(given.get("mode", "constant") == "constant", node, "only padding with a constant is generated")
    source, pads = given["self"], given["pad"]
    shape = reader.shape(source)
    inner, inside = list(index), v.constant(True, torch.bool)
    for k in range(len(pads) // 2):
        dim = len(shape) - 1 - k
        before = reader.size(pads[2 * k])
        inner[dim] = sympy.expand(index[dim] - before)
        if before != 0:
            inside = v.op("and", torch.bool, inside, v.op("not", torch.bool, v.less(index[dim], before)))
        inside = v.op("and", torch.bool, inside, v.less(inner[dim], shape[dim]))
    with reader.under(inside):
        value = reader.value(source, tuple(inner))
    return v.op("where", dtype, inside, value, v.constant(given["value"] or 0, dtype))


@register(POINTWISE, aten.tril.default, aten.triu.default)
def _triangle(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, v = arguments(node), reader.values
    row, column, diagonal = index[-2], index[-1], given["diagonal"]
    below = v.less(column - row, diagonal + 1) if node.target is aten.tril.default else v.less(row - column, 1 - diagonal)
    value = reader.value(given["self"], index)
    return v.op("where", value.dtype, below, value, v.constant(0, value.dtype))


@register(GENERATORS, aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, v, dtype = arguments(node), reader.values, held_dtype(dtype_of(node))
    start, step = given.get("start", 0), given.get("step", 1)
    if isinstance(start, float) or isinstance(step, float):
        scaled = v.op("mul", dtype, v.cast(v.index(index[0]), dtype), v.constant(step, dtype))
        return v.op("add", dtype, v.constant(start, dtype), scaled)
    return v.cast(v.index(reader.size(start) + reader.size(step) * index[0]), dtype)


@register(GENERATORS, aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default)
def _full(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given = arguments(node)
    return _number(reader, given["s"] if "s" in given else given["fill_value"], dtype_of(node))


@register(GENERATORS, aten.fill.Scalar)
def _fill(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    return _number(reader, node.args[1], dtype_of(node))


def _number(reader: Reader, number: Any, dtype: torch.dtype) -> Value:
    if isinstance(number, int | float | bool):
        return reader.values.constant(number, dtype)
    return reader.values.cast(reader.values.index(reader.size(number)), held_dtype(dtype))


@register(GENERATORS, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    return reader.values.constant(0, dtype_of(node))


@register(GENERATORS, aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    return reader.values.constant(1, dtype_of(node))


def require(condition: bool, node: fx.Node, message: str) -> None:
    """Raise unless a lowering's condition holds.

    Raises:
        LoweringError: it does not.
    """
    if not condition:
        raise LoweringError(f"{node.name}: {message}")
