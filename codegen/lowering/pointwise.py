"""Lowering of pointwise operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from graphwright.codegen.indexing import Index
from graphwright.codegen.values import Value, Values, held_dtype

from .registry import POINTWISE, Reader, arguments, dtype_of, operands, register

aten = torch.ops.aten


def _common_dtype(args: tuple[Any, ...]) -> torch.dtype:
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    # Symbolic numbers promote as the plain ones that they stand for.
    values = [int(v.node.hint or 2) if isinstance(v, torch.SymInt) else v for v in values]
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if len(values) == 1:
        return tensors[0].dtype
    return reduce(
        lambda dtype, pair: torch.promote_types(dtype, torch.result_type(*pair)),
        pairwise(values),
        torch.result_type(values[0], values[1]),
    )


Formula = Callable[..., Value]


def _arithmetic(names: tuple[str, ...], formula: Formula, *targets: Any, rounded: bool = False) -> None:
    """Enter an operation that computes in its result's dtype; `names` are the operands in the schema."""

    @register(POINTWISE, *targets)
    def lower(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
        given = arguments(node)
        dtype = dtype_of(node)
        given_values = operands(reader, index, tuple(given[n] for n in names), dtype, rounded=rounded)
        return formula(reader.values, held_dtype(dtype), given, *given_values)


def _comparison(name: str, *targets: Any) -> None:
    @register(POINTWISE, *targets)
    def lower(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
        given = (node.args[0], node.args[1])
        dtype = _common_dtype(given)
        return reader.values.op(name, torch.bool, *operands(reader, index, given, dtype, rounded=True))


def _unary(name: str, *targets: Any) -> None:
    _arithmetic(("self",), lambda v, dtype, _, x: v.op(name, dtype, x), *targets)


for _name, _targets in {
    "neg": (aten.neg.default,),
    "exp": (aten.exp.default,),
    "exp2": (aten.exp2.default,),
    "expm1": (aten.expm1.default,),
    "log": (aten.log.default,),
    "log2": (aten.log2.default,),
    "log10": (aten.log10.default,),
    "log1p": (aten.log1p.default,),
    "sqrt": (aten.sqrt.default,),
    "rsqrt": (aten.rsqrt.default,),
    "sin": (aten.sin.default,),
    "cos": (aten.cos.default,),
    "tan": (aten.tan.default,),
    "asin": (aten.asin.default,),
    "acos": (aten.acos.default,),
    "atan": (aten.atan.default,),
    "sinh": (aten.sinh.default,),
    "cosh": (aten.cosh.default,),
    "tanh": (aten.tanh.default,),
    "erf": (aten.erf.default,),
    "erfc": (aten.erfc.default,),
    "abs": (aten.abs.default,),
    "sigmoid": (aten.sigmoid.default,),
}.items():
    _unary(_name, *_targets)


def _rounding(name: str, *targets: Any) -> None:
    """Enter an operation that leaves integers as they are."""
    _arithmetic(("self",), lambda v, dtype, _, x: v.op(name, dtype, x) if dtype.is_floating_point else x, *targets)


_rounding("floor", aten.floor.default)
_rounding("ceil", aten.ceil.default)
_rounding("trunc", aten.trunc.default)
_rounding("round", aten.round.default)

for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _comparison(_name, getattr(aten, _name).Tensor, getattr(aten, _name).Scalar)


def _scaled(v: Values, dtype: torch.dtype, given: Any, x: Value) -> Value:
    alpha = given.get("alpha", 1)
    return x if alpha == 1 else v.op("mul", dtype, x, v.constant(alpha, dtype))


_BOTH = ("self", "other")
_arithmetic(
    _BOTH,
    lambda v, t, g, x, y: v.op("or" if t is torch.bool else "add", t, x, _scaled(v, t, g, y)),
    aten.add.Tensor,
    aten.add.Scalar,
    rounded=True,
)
_arithmetic(_BOTH, lambda v, t, g, x, y: v.op("sub", t, x, _scaled(v, t, g, y)), aten.sub.Tensor, aten.sub.Scalar, rounded=True)
_arithmetic(
    _BOTH, lambda v, t, g, x, y: v.op("sub", t, y, _scaled(v, t, g, x)), aten.rsub.Tensor, aten.rsub.Scalar, rounded=True
)
_arithmetic(_BOTH, lambda v, t, g, x, y: v.op("and" if t is torch.bool else "mul", t, x, y), aten.mul.Tensor, aten.mul.Scalar)
_arithmetic(_BOTH, lambda v, t, g, x, y: v.op("div", t, x, y), aten.div.Tensor, aten.div.Scalar)
_arithmetic(_BOTH, lambda v, t, g, x, y: _maximum(v, t, x, y), aten.maximum.default, aten.max.other)
_arithmetic(_BOTH, lambda v, t, g, x, y: _minimum(v, t, x, y), aten.minimum.default, aten.min.other)
_arithmetic(_BOTH, lambda v, t, g, x, y: v.op("and", t, x, y), aten.bitwise_and.Tensor, aten.bitwise_and.Scalar)
_arithmetic(_BOTH, lambda v, t, g, x, y: v.op("or", t, x, y), aten.bitwise_or.Tensor, aten.bitwise_or.Scalar)
_arithmetic(_BOTH, lambda v, t, g, x, y: v.op("xor", t, x, y), aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar)
_arithmetic(_BOTH, lambda v, t, g, x, y: v.op("and", t, x, y), aten.logical_and.default)
_arithmetic(_BOTH, lambda v, t, g, x, y: v.op("or", t, x, y), aten.logical_or.default)
_arithmetic(_BOTH, lambda v, t, g, x, y: v.op("ne", t, x, y), aten.logical_xor.default)
_arithmetic(("self",), lambda v, t, g, x: v.op("not", t, x), aten.logical_not.default, aten.bitwise_not.default)
_arithmetic(("self",), lambda v, t, g, x: v.op("mul", t, x, x), aten.square.default)
_arithmetic(("self",), lambda v, t, g, x: v.op("div", t, v.constant(1, t), x), aten.reciprocal.default)
_arithmetic(("self",), lambda v, t, g, x: _relu(v, t, x), aten.relu.default)
_arithmetic(("self",), lambda v, t, g, x: v.op("mul", t, x, v.op("sigmoid", t, x)), aten.silu.default)
_arithmetic(("self",), lambda v, t, g, x: _gelu(v, t, x, g["approximate"]), aten.gelu.default)
_arithmetic(
    ("self", "tensor1", "tensor2"),
    lambda v, t, g, x, a, b: v.op("add", t, x, v.op("mul", t, v.constant(g["value"], t), v.op("mul", t, a, b))),
    aten.addcmul.default,
)
_arithmetic(("self",), lambda v, t, g, x: _hardtanh(v, t, x, g["min_val"], g["max_val"]), aten.hardtanh.default)
_arithmetic(("self",), lambda v, t, g, x: _hardtanh(v, t, x, 0, 6), aten.relu6.default)
_arithmetic(("self",), lambda v, t, g, x: _hardsigmoid(v, t, x), aten.hardsigmoid.default)
_arithmetic(("self",), lambda v, t, g, x: v.op("mul", t, x, _hardsigmoid(v, t, x)), aten.hardswish.default)


def _maximum(v: Values, dtype: torch.dtype, x: Value, y: Value) -> Value:
    larger = v.op("gt", torch.bool, x, y)
    if dtype.is_floating_point:
        # A NaN on either side is the result.
        larger = v.op("or", torch.bool, larger, v.op("ne", torch.bool, x, x))
    return v.op("where", dtype, larger, x, y)


def _minimum(v: Values, dtype: torch.dtype, x: Value, y: Value) -> Value:
    smaller = v.op("lt", torch.bool, x, y)
    if dtype.is_floating_point:
        smaller = v.op("or", torch.bool, smaller, v.op("ne", torch.bool, x, x))
    return v.op("where", dtype, smaller, x, y)


def _at_least(v: Values, dtype: torch.dtype, x: Value, low: Value) -> Value:
    return v.op("where", dtype, v.op("lt", torch.bool, x, low), low, x)


def _at_most(v: Values, dtype: torch.dtype, x: Value, high: Value) -> Value:
    return v.op("where", dtype, v.op("gt", torch.bool, x, high), high, x)


def _relu(v: Values, dtype: torch.dtype, x: Value) -> Value:
    zero = v.constant(0, dtype)
    return v.op("where", dtype, v.op("le", torch.bool, x, zero), zero, x)


def _hardtanh(v: Values, dtype: torch.dtype, x: Value, low: Any, high: Any) -> Value:
    return _at_most(v, dtype, _at_least(v, dtype, x, v.constant(low, dtype)), v.constant(high, dtype))


def _hardsigmoid(v: Values, dtype: torch.dtype, x: Value) -> Value:
    shifted = v.op("add", dtype, v.op("div", dtype, x, v.constant(6, dtype)), v.constant(0.5, dtype))
    return _hardtanh(v, dtype, shifted, 0, 1)


def _gelu(v: Values, dtype: torch.dtype, x: Value, approximate: str) -> Value:
    if approximate == "tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u), which takes one exponential.
        cube = v.op("mul", dtype, v.op("mul", dtype, x, x), x)
        inner = v.op("add", dtype, x, v.op("mul", dtype, v.constant(0.044715, dtype), cube))
        scaled = v.op("mul", dtype, v.constant(2 * math.sqrt(2 / math.pi), dtype), inner)
        return v.op("mul", dtype, x, v.op("sigmoid", dtype, scaled))
    half = v.op("mul", dtype, v.constant(0.5, dtype), x)
    tail = v.op("erf", dtype, v.op("mul", dtype, x, v.constant(math.sqrt(0.5), dtype)))
    return v.op("mul", dtype, half, v.op("add", dtype, v.constant(1, dtype), tail))


def activation(v: Values, name: str, dtype: torch.dtype, x: Value) -> Value | None:
    """Return an activation by its name in `graphwright::glu`, None if it is not known."""
    if name in ("gelu", "gelu_tanh"):
        return _gelu(v, dtype, x, "tanh" if name == "gelu_tanh" else "none")
    if name == "silu":
        return v.op("mul", dtype, x, v.op("sigmoid", dtype, x))
    if name == "relu":
        return _relu(v, dtype, x)
    if name == "sigmoid":
        return v.op("sigmoid", dtype, x)
    return None


@register(POINTWISE, aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, dtype, v = arguments(node), dtype_of(node), reader.values
    held = held_dtype(dtype)
    (result,) = operands(reader, index, (given["self"],), dtype)
    for name, plain, exact in (("min", _at_least, _maximum), ("max", _at_most, _minimum)):
        if given.get(name) is not None:
            (bound,) = operands(reader, index, (given[name],), dtype)
            # A bound that is NaN is the result.
            known = bound.kind == "constant" and bound.payload == bound.payload
            result = (plain if known else exact)(v, held, result, bound)
    return result


@register(POINTWISE, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _pow(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, dtype, v = arguments(node), dtype_of(node), reader.values
    held = held_dtype(dtype)
    exponent = given["exponent"]
    base, power = operands(reader, index, (given["self"], exponent), dtype)
    if exponent == 0.5 and held.is_floating_point:
        return v.op("sqrt", held, base)
    if exponent == -0.5 and held.is_floating_point:
        return v.op("rsqrt", held, base)
    if isinstance(exponent, int | float) and 0 <= exponent <= 8 and exponent == int(exponent):
        result = v.constant(1, held) if exponent == 0 else base
        for _ in range(int(exponent) - 1):
            result = v.op("mul", held, result, base)
        return result
    if exponent == -1 and held.is_floating_point:
        return v.op("div", held, v.constant(1, held), base)
    if not held.is_floating_point:
        return _no_lowering(node, "an integer power that is not a small constant")
    return v.op("pow", held, base, power)


def _no_lowering(node: fx.Node, what: str) -> Value:
    from graphwright.ir.errors import LoweringError

    raise LoweringError(f"{node.name}: {node.target} with {what} is not generated")


@register(POINTWISE, aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    condition, x, y = node.args
    (chosen,) = operands(reader, index, (condition,), torch.bool)
    either = operands(reader, index, (x, y), dtype_of(node))
    return reader.values.op("where", held_dtype(dtype_of(node)), chosen, *either)


@register(POINTWISE, aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    x, mask, fill = node.args
    (chosen,) = operands(reader, index, (mask,), torch.bool)
    either = operands(reader, index, (fill, x), dtype_of(node))
    return reader.values.op("where", held_dtype(dtype_of(node)), chosen, *either)


@register(POINTWISE, torch.ops.prims.convert_element_type.default)
def _convert(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    # Widening back what was narrowed keeps the narrow rounding; a store to a half-precision buffer rounds by itself.
    return reader.values.cast(reader.value(node.args[0], index), dtype_of(node))


@register(POINTWISE, aten.isnan.default)
def _isnan(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    x = reader.value(node.args[0], index)
    return reader.values.op("ne", torch.bool, x, x)


@register(POINTWISE, aten.isinf.default)
def _isinf(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    x = reader.value(node.args[0], index)
    if not x.dtype.is_floating_point:
        return reader.values.constant(False, torch.bool)
    size = reader.values.op("abs", x.dtype, x)
    return reader.values.op("eq", torch.bool, size, reader.values.constant(math.inf, x.dtype))


@register(POINTWISE, aten.sign.default, aten.sgn.default)
def _sign(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    v, x = reader.values, reader.value(node.args[0], index)
    zero = v.constant(0, x.dtype)
    up = v.cast(v.op("gt", torch.bool, x, zero), x.dtype)
    down = v.cast(v.op("lt", torch.bool, x, zero), x.dtype)
    return v.op("sub", x.dtype, up, down)


@register(POINTWISE, aten.leaky_relu.default)
def _leaky_relu(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, v, x = arguments(node), reader.values, reader.value(node.args[0], index)
    scaled = v.op("mul", x.dtype, x, v.constant(given["negative_slope"], x.dtype))
    return v.op("where", x.dtype, v.op("gt", torch.bool, x, v.constant(0, x.dtype)), x, scaled)


@register(POINTWISE, aten.elu.default)
def _elu(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, v, x = arguments(node), reader.values, reader.value(node.args[0], index)
    dtype = x.dtype
    negative = v.op("expm1", dtype, v.op("mul", dtype, x, v.constant(given["input_scale"], dtype)))
    negative = v.op("mul", dtype, negative, v.constant(given["alpha"] * given["scale"], dtype))
    positive = v.op("mul", dtype, x, v.constant(given["scale"], dtype))
    return v.op("where", dtype, v.op("gt", torch.bool, x, v.constant(0, dtype)), positive, negative)


@register(POINTWISE, aten.softplus.default)
def _softplus(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, v, x = arguments(node), reader.values, reader.value(node.args[0], index)
    dtype = x.dtype
    scaled = v.op("mul", dtype, x, v.constant(given["beta"], dtype))
    soft = v.op("div", dtype, v.op("log1p", dtype, v.op("exp", dtype, scaled)), v.constant(given["beta"], dtype))
    return v.op("where", dtype, v.op("gt", torch.bool, scaled, v.constant(given["threshold"], dtype)), x, soft)


@register(POINTWISE, aten.batch_norm.default)
def _batch_norm(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given, dtype, v = arguments(node), held_dtype(dtype_of(node)), reader.values
    if given["training"] or given["running_mean"] is None:
        return _no_lowering(node, "statistics of the batch")

    def channel(name: str) -> Value:
        return v.cast(reader.value(given[name], (index[1],)), dtype)

    scale = v.op("rsqrt", dtype, v.op("add", dtype, channel("running_var"), v.constant(given["eps"], dtype)))
    if given["weight"] is not None:
        scale = v.op("mul", dtype, scale, channel("weight"))
    x = v.cast(reader.value(given["input"], index), dtype)
    result = v.op("mul", dtype, v.op("sub", dtype, x, channel("running_mean")), scale)
    return result if given["bias"] is None else v.op("add", dtype, result, channel("bias"))
