"""What each ATen operator that makes or computes elements does: makers, readers, scans and pointwise operators.

A new operator is one function under `@rule`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.index import Expr
from graphwright.ir.analyses.index_call import (
    Call,
    Indices,
    Inexpressible,
    dtype_of,
    is_one,
    replace,
    rule,
    shape_of,
    size_expression,
)

if TYPE_CHECKING:
    from graphwright.ir.analyses.index_functions import IndexFunctions


# ---- makers


@rule("arange")
def _arange(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    start = f.operand(call.get("start", 0), ())
    step = f.operand(call.get("step", 1), ())
    if "float" in (start.type, step.type):
        return f.cast(ix.binary("add", start, ix.binary("mul", i[0], step)), call.dtype)
    return f.cast(ix.add(start, ix.multiply(i[0], step)), call.dtype)


@rule("iota")
def _iota(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    return f.cast(ix.add(f.size(call["start"]), ix.multiply(i[0], f.size(call["step"]))), call.dtype)


@rule("ones", "new_ones", "ones_like")
def _ones(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    return f.cast(ix.ONE, call.dtype)


@rule("zeros", "new_zeros", "zeros_like")
def _zeros(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    return f.cast(ix.ZERO, call.dtype)


@rule("full", "new_full", "full_like", "scalar_tensor", "fill")
def _full(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    name = next(name for name in ("fill_value", "s", "value") if name in call.arguments)
    return f.cast(f.operand(call[name], ()), call.dtype)


@rule("eye")
def _eye(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    return f.cast(ix.eq0(ix.subtract(i[0], i[1]), f.facts), call.dtype)


# ---- readers


@rule("index")
def _index(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    shape, tables = shape_of(call["self"]), call["indices"]
    places = [d for d, table in enumerate(tables) if table is not None]
    if any(dtype_of(tables[d]) in (torch.bool, torch.uint8) for d in places):
        raise Inexpressible("an index by a mask")
    rank = max(len(shape_of(tables[d])) for d in places)
    # Tables side by side put their dimensions where they stand; others put them first.
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    rest = iter(i[:first] + i[first + rank :])
    own = []
    for d, size in enumerate(shape):
        if d in places:
            own.append(f.wrap(f.operand(tables[d], i[first : first + rank]), size_expression(size)))
        else:
            own.append(next(rest))
    return f.at(call["self"], tuple(own))


@rule("embedding")
def _embedding(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    return f.at(call["weight"], (f.at(call["indices"], i[:-1]), i[-1]))


@rule("index_select")
def _index_select(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    dim = call["dim"] % len(i)
    return f.at(call["self"], replace(i, dim, f.at(call["index"], (i[dim],))))


@rule("gather")
def _gather(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    return f.at(call["self"], replace(i, call["dim"] % len(i), f.at(call["index"], i)))


# ---- scans


@rule("cumsum")
def _cumsum(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    dim = call["dim"] % len(i)
    over = f.bound_variable(size_expression(call.shape[dim]))
    body = ix.as_integer(f.at(call["self"], replace(i, dim, ix.var(over)))) if dtype_of(call["self"]) != torch.bool else None
    if dtype_of(call["self"]) == torch.bool:
        body = ix.to_int(f.at(call["self"], replace(i, dim, ix.var(over))))
    if body is None:
        raise Inexpressible("a running sum of values that are not whole numbers")
    result = ix.sum_(over, i[dim], body, f.facts)
    if f.for_kernels and ix.contains(result, "sum"):
        raise Inexpressible("a running sum over a tensor")
    return f.cast(result, call.dtype)


@rule("diff")
def _diff(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    before, dim = call.get("prepend"), call["dim"] % len(i)
    if call["n"] != 1 or call.get("append") is not None or (before is not None and not is_one(shape_of(before)[dim])):
        raise Inexpressible("a difference other than of neighbours")

    def difference(a: Expr, b: Expr) -> Expr:
        if call.dtype == torch.bool:
            return ix.not_(ix.eq0(ix.subtract(ix.to_int(a), ix.to_int(b)), f.facts), f.facts)
        return _arithmetic(f, "sub", call.dtype, a, b)

    def at(index: Expr) -> Expr:
        return f.at(call["self"], replace(i, dim, index))

    if before is None:
        return difference(at(ix.add(i[dim], ix.ONE)), at(i[dim]))
    start = difference(at(ix.ZERO), f.at(before, replace(i, dim, ix.ZERO)))
    later = difference(at(i[dim]), at(ix.subtract(i[dim], ix.ONE)))
    return ix.where(ix.eq0(i[dim], f.facts), start, later, facts=f.facts)


@rule("tril", "triu")
def _triangle(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    above = ix.add(ix.subtract(i[-1], i[-2]), ix.const(call["diagonal"]), -1)
    kept = ix.ge0(above if call.name == "triu" else ix.negate(above), f.facts)
    return ix.where(kept, f.at(call["self"], i), f.cast(ix.ZERO, call.dtype), facts=f.facts)


# ---- pointwise


def _arithmetic(f: IndexFunctions, name: str, dtype: torch.dtype, a: Expr, b: Expr) -> Expr:
    if dtype.is_floating_point:
        return f.cast(ix.binary(name, a, b, f.facts), dtype)
    a, b = ix.to_int(a), ix.to_int(b)
    match name:
        case "add" | "sub":
            result = ix.add(a, b, 1 if name == "add" else -1)
        case "mul":
            result = ix.multiply(a, b)
        case _:
            result = (ix.minimum if name == "min" else ix.maximum)(a, b, f.facts)
    return f.cast(result, dtype)


_ARITHMETIC = {"minimum": "min", "maximum": "max"}


@rule("add", "sub", "rsub", "mul", "minimum", "maximum", "min", "max")
def _binary(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    if "other" not in call.arguments or not isinstance(call.get("dim", None), type(None)):
        raise Inexpressible("a reduction")
    a, b = f.operand(call["self"], i), f.operand(call["other"], i)
    alpha = call.get("alpha", 1)
    if call.name == "rsub":
        a, b = b, a
    if alpha != 1:
        if call.name == "rsub":
            raise Inexpressible("a scaled reversed difference")
        b = _arithmetic(f, "mul", call.dtype, b, ix.const(alpha))
    name = _ARITHMETIC.get(call.name, "sub" if call.name == "rsub" else call.name)
    return _arithmetic(f, name, call.dtype, a, b)


@rule("div", "true_divide", "floor_divide")
def _divide(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    a, b = f.operand(call["self"], i), f.operand(call["other"], i)
    rounding = call.get("rounding_mode", "floor" if call.name == "floor_divide" else None)
    if rounding is None:
        return f.cast(ix.binary("div", a, b, f.facts), call.dtype)
    divisor, dividend = ix.as_integer(b) if b.type != "bool" else None, ix.as_integer(a) if a.type != "bool" else None
    if (
        divisor is None
        or dividend is None
        or not isinstance(divisor.value, int)
        or divisor.kind != "const"
        or divisor.value < 1
    ):
        raise Inexpressible("a whole division by anything but a positive number")
    low = ix.lower(dividend, f.facts)
    if rounding == "trunc" and (low is None or low < 0):
        raise Inexpressible("a division of negative numbers rounded towards 0")
    return f.cast(ix.floor_divide(dividend, divisor.value, f.facts), call.dtype)


@rule("remainder", "fmod")
def _remainder(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    a, b = f.operand(call["self"], i), f.operand(call["other"], i)
    if a.type != "int" or b.kind != "const" or not isinstance(b.value, int) or b.value < 1:
        raise Inexpressible("a remainder of anything but a division by a positive number")
    low = ix.lower(a, f.facts)
    if call.name == "fmod" and (low is None or low < 0):
        raise Inexpressible("the remainder of negative numbers rounded towards 0")
    return f.cast(ix.modulo(a, b.value, f.facts), call.dtype)


@rule("clamp", "clamp_min", "clamp_max")
def _clamp(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    result = f.operand(call["self"], i)
    for bound, name in (("min", "max"), ("max", "min")):
        if call.get(bound) is not None:
            result = _arithmetic(f, name, call.dtype, result, f.operand(call[bound], i))
    return result


@rule("neg")
def _negate(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    return _arithmetic(f, "mul", call.dtype, f.operand(call["self"], i), ix.const(-1))


@rule("abs")
def _absolute(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    a = f.operand(call["self"], i)
    return (ix.float_absolute if a.type == "float" else ix.absolute)(a, f.facts)


@rule("log", "exp", "sqrt")
def _function(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    return f.cast(ix.unary(call.name, f.operand(call["self"], i)), call.dtype)


@rule("le", "lt", "ge", "gt", "eq", "ne")
def _compare(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    return ix.compare(call.name, f.operand(call["self"], i), f.operand(call["other"], i), f.facts)


@rule("__and__", "logical_and", "bitwise_and", "__or__", "logical_or", "bitwise_or", "__xor__", "logical_xor", "bitwise_xor")
def _logic(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    if call.dtype != torch.bool:
        raise Inexpressible("logic on the bits of integers")
    a, b = (ix.to_bool(f.operand(call[name], i), f.facts) for name in ("self", "other"))
    if "xor" in call.name:
        return ix.where(a, ix.not_(b, f.facts), b, facts=f.facts)
    return (ix.and_ if "and" in call.name else ix.or_)(a, b, facts=f.facts)


@rule("bitwise_not", "logical_not", "__invert__")
def _not(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    if call.dtype != torch.bool:
        raise Inexpressible("logic on the bits of integers")
    return ix.not_(ix.to_bool(f.operand(call["self"], i), f.facts), f.facts)


def _choose(f: IndexFunctions, call: Call, i: Indices, condition: fx.Node, a: Any, b: Any) -> Expr:
    sides = [f.cast(f.operand(x, i), call.dtype, dtype_of(x)) for x in (a, b)]
    return ix.where(ix.to_bool(f.operand(condition, i), f.facts), *sides, facts=f.facts)


@rule("where")
def _where(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    if "other" not in call.arguments:
        raise Inexpressible("the positions of what is true")
    return _choose(f, call, i, call["condition"], call["self"], call["other"])


@rule("masked_fill")
def _masked_fill(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    return _choose(f, call, i, call["mask"], call["value"], call["self"])
