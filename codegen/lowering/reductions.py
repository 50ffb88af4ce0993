"""Lowering of reductions over trailing dimensions, and of the norms and softmaxes made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphwright.codegen.indexing import Index, product
from graphwright.codegen.values import Value, held_dtype

from .registry import REDUCED_DIMS, REDUCTIONS, Reader, arguments, dtype_of, register

aten = torch.ops.aten


def _rank(node: fx.Node) -> int:
    return node.args[0].meta["val"].dim()  # type: ignore[union-attr, no-any-return]


def _dims(node: fx.Node) -> list[int]:
    """Return the reduced dimensions of sum, mean and the like."""
    rank = _rank(node)
    given = arguments(node).get("dim")
    if given is None or given == []:
        return list(range(rank))
    return sorted(d % max(1, rank) for d in ([given] if isinstance(given, int) else given))


def _softmax_dim(node: fx.Node) -> list[int]:
    return [arguments(node)["dim"] % max(1, _rank(node))]


def _normalized(node: fx.Node) -> list[int]:
    rank = _rank(node)
    return list(range(rank - len(arguments(node)["normalized_shape"]), rank))


def _pooled(node: fx.Node) -> list[int]:
    """Return the dimensions that an adaptive pool takes whole; none if it leaves more than one element of them."""
    sizes = arguments(node)["output_size"]
    rank = _rank(node)
    return list(range(rank - len(sizes), rank)) if all(n == 1 for n in sizes) else []


def _outer(node: fx.Node, index: tuple[Index, ...]) -> tuple[Index, ...]:
    """Return the part of a result's index that is not reduced; trailing dimensions of size 1 may stand for the others."""
    return index[: _rank(node) - len(REDUCED_DIMS[node.target](node))]


def _sizes(reader: Reader, node: fx.Node) -> Sequence[Any]:
    shape = reader.shape(node.args[0])  # type: ignore[arg-type]
    return [shape[d] for d in REDUCED_DIMS[node.target](node)]


_POOLS = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default)


def _simple(kind: str, *targets: Any) -> None:
    for target in targets:
        REDUCED_DIMS[target] = _pooled if target in _POOLS else _dims

    @register(REDUCTIONS, *targets)
    def lower(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
        outer, v = _outer(node, index), reader.values
        dtype = held_dtype(dtype_of(node))
        total = reader.reduce(
            "sum" if kind == "mean" else kind,
            node,
            _sizes(reader, node),
            lambda inner: v.cast(reader.value(node.args[0], (*outer, *inner)), dtype),
        )
        if kind != "mean":
            return total
        return v.op("div", dtype, total, v.cast(v.index(product(_sizes(reader, node))), dtype))


_simple("sum", aten.sum.dim_IntList, aten.sum.default)
_simple("mean", aten.mean.dim, aten.mean.default, *_POOLS)
_simple("max_nan", aten.amax.default)
_simple("min_nan", aten.amin.default)
_simple("any", aten.any.dim, aten.any.default, aten.any.dims)
_simple("all", aten.all.dim, aten.all.default, aten.all.dims)

for _target in (aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default):
    REDUCED_DIMS[_target] = _softmax_dim
REDUCED_DIMS[aten.layer_norm.default] = _normalized
REDUCED_DIMS[aten.rms_norm.default] = _normalized
REDUCED_DIMS[aten.var.correction] = _dims


@register(REDUCTIONS, aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def _softmax(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    v, dtype = reader.values, held_dtype(dtype_of(node))
    outer, sizes = index[:-1], _sizes(reader, node)

    def score(inner: tuple[Index, ...]) -> Value:
        return v.cast(reader.value(node.args[0], (*outer, *inner)), dtype)

    # A NaN among the scores is not seen by the maximum, but by the sum: every result is NaN, as it should be.
    top = reader.reduce("max", node, sizes, score)

    def weight(inner: tuple[Index, ...]) -> Value:
        return v.op("exp", dtype, v.op("sub", dtype, score(inner), top))

    total = reader.reduce("sum", node, sizes, weight)
    if node.target in (aten.log_softmax.int, aten._log_softmax.default):
        shifted = v.op("sub", dtype, score((index[-1],)), top)
        return v.op("sub", dtype, shifted, v.op("log", dtype, total))
    return v.op("div", dtype, weight((index[-1],)), total)


def mean_and_variance(
    reader: Reader, node: fx.Node, outer: tuple[Index, ...], sizes: Sequence[Any], correction: float = 0.0
) -> tuple[Value, Value]:
    """Return the mean and the variance of the rows of a node's first operand; the variance from distances to the mean."""
    v, dtype = reader.values, held_dtype(dtype_of(node))

    def element(inner: tuple[Index, ...]) -> Value:
        return v.cast(reader.value(node.args[0], (*outer, *inner)), dtype)

    count = v.cast(v.index(product(sizes)), dtype)
    mean = v.op("div", dtype, reader.reduce("sum", node, sizes, element), count)

    def square(inner: tuple[Index, ...]) -> Value:
        distance = v.op("sub", dtype, element(inner), mean)
        return v.op("mul", dtype, distance, distance)

    divisor = count if correction == 0 else _at_least_zero(reader, v.op("sub", dtype, count, v.constant(correction, dtype)))
    return mean, v.op("div", dtype, reader.reduce("sum", node, sizes, square), divisor)


def _at_least_zero(reader: Reader, value: Value) -> Value:
    v, zero = reader.values, reader.values.constant(0, value.dtype)
    return v.op("where", value.dtype, v.op("lt", torch.bool, value, zero), zero, value)


@register(REDUCTIONS, aten.var.correction)
def _variance(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    correction = arguments(node)["correction"]
    return mean_and_variance(
        reader, node, _outer(node, index), _sizes(reader, node), 1.0 if correction is None else float(correction)
    )[1]


@register(REDUCTIONS, aten.layer_norm.default)
def _layer_norm(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, v, dtype = arguments(node), reader.values, held_dtype(dtype_of(node))
    outer, inner = _outer(node, index), index[_rank(node) - len(REDUCED_DIMS[node.target](node)) :]
    mean, variance = mean_and_variance(reader, node, outer, _sizes(reader, node))
    scale = v.op("rsqrt", dtype, v.op("add", dtype, variance, v.constant(given["eps"], dtype)))
    x = v.cast(reader.value(node.args[0], index), dtype)
    result = v.op("mul", dtype, v.op("sub", dtype, x, mean), scale)
    if given["weight"] is not None:
        result = v.op("mul", dtype, result, v.cast(reader.value(given["weight"], inner), dtype))
    if given["bias"] is not None:
        result = v.op("add", dtype, result, v.cast(reader.value(given["bias"], inner), dtype))
    return result


@register(REDUCTIONS, aten.rms_norm.default)
def _rms_norm(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, sizes = arguments(node), _sizes(reader, node)
    eps = torch.finfo(dtype_of(node)).eps if given["eps"] is None else given["eps"]
    return root_mean_square(reader, node, index, sizes, given["weight"], eps, 0.0)


def root_mean_square(
    reader: Reader, node: fx.Node, index: tuple[Index, ...], sizes: Sequence[Any], weight: Any, eps: float, offset: float
) -> Value:
    """Return an element of x / sqrt(mean(x^2) + eps) * (weight + offset), over the trailing dimensions of these sizes."""
    v, dtype = reader.values, held_dtype(dtype_of(node))
    outer, inner = index[: len(index) - len(sizes)], index[len(index) - len(sizes) :]

    def square(at: tuple[Index, ...]) -> Value:
        x = v.cast(reader.value(node.args[0], (*outer, *at)), dtype)
        return v.op("mul", dtype, x, x)

    total = reader.reduce("sum", node, sizes, square)
    mean = v.op("div", dtype, total, v.cast(v.index(product(sizes)), dtype))
    scale = v.op("rsqrt", dtype, v.op("add", dtype, mean, v.constant(eps, dtype)))
    result = v.op("mul", dtype, v.cast(reader.value(node.args[0], index), dtype), scale)
    if weight is None:
        return result
    factor = v.cast(reader.value(weight, inner), dtype)
    if offset:
        factor = v.op("add", dtype, factor, v.constant(offset, dtype))
    return v.op("mul", dtype, result, factor)
