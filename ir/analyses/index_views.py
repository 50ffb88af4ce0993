"""What each ATen operator that only moves elements does to indices: views, slices, permutations, concatenation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch

from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.index import Expr
from graphwright.ir.analyses.index_call import (
    Call,
    Indices,
    Inexpressible,
    dtype_of,
    is_one,
    make_call,
    replace,
    rule,
    shape_of,
    size_expression,
)

if TYPE_CHECKING:
    from graphwright.ir.analyses.index_functions import IndexFunctions


@rule("alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy")
def _same(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    return f.at(call["self"], i)


@rule("to", "_to_copy", "convert_element_type", "type_as")
def _convert(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    source = call.get("self", call.get("a"))
    return f.cast(f.at(source, i), call.dtype, dtype_of(source))


@rule("dropout", "native_dropout")
def _dropout(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    if call["train"]:
        raise Inexpressible("random values")
    return f.at(call["input"], i)


@rule("unsqueeze")
def _unsqueeze(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    dim = call["dim"] % len(call.shape)
    return f.at(call["self"], i[:dim] + i[dim + 1 :])


@rule("squeeze")
def _squeeze(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    shape = shape_of(call["self"])
    dims = call.get("dim", range(len(shape)))
    asked = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}
    rest = iter(i)
    return f.at(call["self"], tuple(ix.ZERO if d in asked and is_one(n) else next(rest) for d, n in enumerate(shape)))


@rule("transpose", "t", "permute", "swapaxes", "numpy_T")
def _permute(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    rank = len(i)
    order = list(range(rank))
    if call.name == "permute":
        order = [d % rank for d in call["dims"]]
    elif call.name in ("t", "numpy_T"):
        order.reverse()
    else:
        a, b = (call.get(f"dim{n}", call.get(f"axis{n}")) % rank for n in (0, 1))
        order[a], order[b] = b, a
    return f.at(call["self"], tuple(i[order.index(d)] for d in range(rank)))


@rule("expand", "broadcast_to", "expand_as")
def _expand(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    return f.operand(call["self"], i)


@rule("repeat")
def _repeat(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    shape, repeats = shape_of(call["self"]), call["repeats"]
    own = []
    for size, times, index in zip(shape, repeats[len(repeats) - len(shape) :], i[len(i) - len(shape) :], strict=True):
        if not is_one(size) and not is_one(times):
            if not isinstance(size, int) or size < 1:
                raise Inexpressible(f"repeating a dimension of size {size}")
            index = ix.modulo(index, size, f.facts)
        own.append(ix.ZERO if is_one(size) else index)
    return f.at(call["self"], tuple(own))


@rule("slice")
def _slice(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    dim = call["dim"] % len(i)
    start = f.size(call.get("start", 0))
    if isinstance(start.value, int) and start.kind == "const" and start.value < 0:
        start = ix.maximum(ix.add(size_expression(shape_of(call["self"])[dim]), start), ix.ZERO, f.facts)
    return f.at(call["self"], replace(i, dim, ix.add(start, ix.multiply(i[dim], f.size(call["step"])))))


@rule("narrow")
def _narrow(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    dim = call["dim"] % len(i)
    return f.at(call["self"], replace(i, dim, ix.add(i[dim], f.size(call["start"]))))


@rule("select")
def _select(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    shape = shape_of(call["self"])
    dim = call["dim"] % len(shape)
    index = f.wrap(f.size(call["index"]), size_expression(shape[dim]))
    return f.at(call["self"], (*i[:dim], index, *i[dim:]))


@rule("getitem")
def _part(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    source, number = call["self"], call["index"]
    whole = make_call(source)
    dim = whole.get("dim", 0)
    if whole.name == "unbind":
        dim %= len(i) + 1
        return f.at(whole["self"], (*i[:dim], ix.const(number), *i[dim:]))
    if whole.name not in ("split", "split_with_sizes", "chunk", "tensor_split"):
        raise Inexpressible(f"one result of {whole.name}")
    dim %= len(i)
    index = i[dim]
    for part in source.meta["val"][:number]:
        index = ix.add(index, size_expression(part.shape[dim]))
    return f.at(whole["self"], replace(i, dim, index))


@rule("cat", "concat")
def _cat(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    dim = call["dim"] % len(i)
    pieces = [t for t in call["tensors"] if len(shape_of(t)) == len(i)]
    ends = [ix.ZERO]
    for piece in pieces:
        ends.append(ix.add(ends[-1], size_expression(shape_of(piece)[dim])))
    result = None
    for piece, start, end in reversed(list(zip(pieces, ends, ends[1:], strict=False))):
        own = replace(i, dim, ix.subtract(i[dim], start))
        value = f.cast(f.at(piece, own), call.dtype, dtype_of(piece))
        before = ix.compare("lt", i[dim], end, f.facts)
        result = value if result is None else ix.where(before, value, result, facts=f.facts)
    if result is None:
        raise Inexpressible("the concatenation of nothing")
    return result


@rule("constant_pad_nd", "pad")
def _pad(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    if call.get("mode", "constant") != "constant":
        raise Inexpressible("padding with anything but one value")
    shape, inside, own = shape_of(call["self"]), ix.TRUE, list(i)
    for n, before in enumerate(call["pad"][::2]):
        dim = len(i) - 1 - n
        own[dim] = ix.subtract(i[dim], f.size(before))
        last = ix.subtract(size_expression(shape[dim]), ix.ONE)
        within = (ix.ge0(own[dim], f.facts), ix.ge0(ix.subtract(last, own[dim]), f.facts))
        inside = ix.and_(inside, *within, facts=f.facts)
    outside = f.cast(f.operand(call.get("value", 0), ()), call.dtype)
    return ix.where(inside, f.at(call["self"], tuple(own)), outside, facts=f.facts)


@rule("flip")
def _flip(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    own = list(i)
    for dim in call["dims"]:
        own[dim] = ix.subtract(ix.subtract(size_expression(call.shape[dim]), ix.ONE), i[dim])
    return f.at(call["self"], tuple(own))


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten")
def _view(f: IndexFunctions, call: Call, i: Indices) -> Expr:
    return f.at(call["self"], _reindex(f, i, call.shape, shape_of(call["self"])))


def _reindex(f: IndexFunctions, i: Indices, new: tuple[Any, ...], old: tuple[Any, ...]) -> Indices:
    """Return where in the `old` shape the element `i` of the `new` one is, by groups of dimensions of equal size."""
    sizes = [[sympy.sympify(n.node.expr if isinstance(n, torch.SymInt) else n) for n in shape] for shape in (new, old)]
    own: list[Expr] = []
    at_new = at_old = 0
    while at_new < len(new) or at_old < len(old):
        if at_new < len(new) and sizes[0][at_new] == 1:
            at_new += 1
            continue
        if at_old < len(old) and sizes[1][at_old] == 1:
            own.append(ix.ZERO)
            at_old += 1
            continue
        ends, products = [at_new, at_old], [sympy.Integer(1), sympy.Integer(1)]
        while ends == [at_new, at_old] or sympy.expand(products[0] - products[1]) != 0:
            ratio = sympy.simplify(products[1] / products[0])
            # The side that is a divisor of the other grows.
            grows = ratio > 1 if ratio.is_number else ratio.is_polynomial()
            grow = 0 if ends[0] == at_new or (ends[1] > at_old and grows) else 1
            if ends[grow] >= len(sizes[grow]):
                raise Inexpressible(f"a view of {old} as {new}")
            products[grow] *= sizes[grow][ends[grow]]
            ends[grow] += 1
        flat = ix.ZERO
        for dim in range(at_new, ends[0]):
            flat = ix.add(ix.multiply(flat, size_expression(new[dim])), i[dim])
        inner: list[Expr] = []
        for dim in range(ends[1] - 1, at_old, -1):
            if not isinstance(old[dim], int) or old[dim] < 1:
                raise Inexpressible(f"a view of {old} as {new}")
            inner.append(ix.modulo(flat, old[dim], f.facts))
            flat = ix.floor_divide(flat, old[dim], f.facts)
        own += [flat, *reversed(inner)]
        at_new, at_old = ends
    return tuple(own)
