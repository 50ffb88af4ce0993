"""Comparisons, selection, extremes and conversions of pointers, lane by lane."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING

from . import scalars as s
from .casts import NARROW, Bits, as_number, convert_float, in_single
from .registry import elementwise
from .values import Affine, Number, Pointer, Uniform, Val, Vector

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Op


FOLDS = {
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "slt": operator.lt, "sle": operator.le, "sgt": operator.gt, "sge": operator.ge, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip


_INTEGER_EXTREMES = {"arith.maxsi": "smax", "arith.minsi": "smin", "arith.maxui": "umax", "arith.minui": "umin"}


_FLOAT_EXTREMES = {
    "arith.maxnumf": "maxnum", "arith.minnumf": "minnum", "arith.maximumf": "maximum", "arith.minimumf": "minimum",
}  # fmt: skip


def result_of(text: str, element: str, widths: tuple[int, ...]) -> Number:
    """Wrap an emitted operand."""
    return Vector(text, element, widths) if widths else Uniform(text, element)


@elementwise("arith.cmpi", "arith.cmpf")
def compare(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Compare; pointers as addresses."""
    numbers = [s.absolute(lowering.e, x) if isinstance(x, Pointer) else x for x in args]
    predicate = op.attrs["predicate"]
    if op.name == "arith.cmpf":
        numbers = [convert_float(lowering, x, "f32") if x.element in NARROW else x for x in numbers]
    a, c = numbers
    known, fold = s.known_integers(a, c), FOLDS.get(predicate)
    if known is not None and fold is not None and a.element != "i1":
        return s.constant(int(fold(*known)), "i1")
    if predicate in ("slt", "sge") and _alike(a, c):
        # Whole chunks are on one side of the bound: their first element tells.
        assert isinstance(a, Affine)
        a = a.base
    numbers = [a, c]
    widths = s.widths_with(*numbers)
    b = Bits(lowering, widths)
    texts = [s.vector_text(lowering.e, x, b.lanes) for x in numbers]
    instruction = "icmp" if op.name == "arith.cmpi" else "fcmp"
    return result_of(b.op(f"{instruction} {predicate}", a.element, *texts), "i1", widths)


def _alike(index: Number, bound: Number) -> bool:
    """Whether consecutive indices are all below a bound or all not, since both lie on multiples of the chunk's width."""
    if not isinstance(index, Affine) or not isinstance(bound, Uniform) or len(index.strides) != 1:
        return False
    width = index.widths[0]
    return index.strides[0].value == 1 and index.base.known_divisor % width == 0 and bound.known_divisor % width == 0


@elementwise("arith.select")
def select(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Choose lane by lane; the value that is not chosen has no effect."""
    return choose(lowering, as_number(args[0]), args[1], args[2], op.result.type.pointee)


def choose(lowering: Lowering, condition: Number, a: Val, c: Val, pointee: str | None = None) -> Val:
    """`condition ? a : c` on numbers or pointers."""
    if isinstance(condition, Uniform) and isinstance(condition.value, int):
        return a if condition.value & 1 else c
    e = lowering.e
    if isinstance(a, Pointer) and isinstance(c, Pointer):
        if a.base is not None and a.base == c.base and a.pointee == c.pointee:
            offset = choose(lowering, condition, a.offset, c.offset)
            return Pointer(a.base, as_number(offset), a.pointee)
        chosen = choose(lowering, condition, s.absolute(e, a), s.absolute(e, c))
        return Pointer(None, as_number(chosen), pointee or a.pointee)
    x, y = as_number(a), as_number(c)
    widths = s.widths_with(condition, x, y)
    lanes = math.prod(widths)
    kind = lowering.kind(x.element, widths)
    picked = (
        f"i1 {s.text(condition)}"
        if isinstance(condition, Uniform)
        else f"{lowering.kind('i1', widths)} {s.vector_text(e, condition, lanes)}"
    )
    texts = [s.vector_text(e, n, lanes) for n in (x, y)]
    return result_of(e.op(f"select {picked}, {kind} {texts[0]}, {kind} {texts[1]}"), x.element, widths)


@elementwise(*_INTEGER_EXTREMES, *_FLOAT_EXTREMES)
def extreme(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Minimum or maximum; maxnum and minnum ignore a NaN operand, maximum and minimum return it."""
    name = _INTEGER_EXTREMES.get(op.name) or _FLOAT_EXTREMES[op.name]

    def compute(numbers: list[Number], element: str) -> Number:
        a, c = numbers
        known = s.known_integers(a, c)
        if known is not None and name in ("smax", "smin"):
            return s.constant(max(known) if name == "smax" else min(known), element)
        widths = s.widths_with(*numbers)
        b = Bits(lowering, widths)
        texts = [s.vector_text(lowering.e, x, b.lanes) for x in numbers]
        return result_of(b.intrinsic(name, element, *texts), element, widths)

    return in_single(lowering, args, op.result.element, compute)


@elementwise("tt.ptr_to_int")
def pointer_to_int(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Address of a pointer."""
    assert isinstance(args[0], Pointer)
    return s.absolute(lowering.e, args[0])


@elementwise("tt.int_to_ptr")
def int_to_pointer(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Pointer to an address."""
    return Pointer(None, s.to_i64(lowering.e, as_number(args[0])), str(op.result.type.pointee))


@elementwise("tt.addptr")
def add_to_pointer(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Pointer arithmetic in elements."""
    assert isinstance(args[0], Pointer)
    return s.advance(lowering.e, args[0], as_number(args[1]))


@elementwise("ub.poison")
def poison(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Some value: zero."""
    if op.result.type.is_pointer:
        return Pointer(None, s.constant(0, "i64"), str(op.result.type.pointee))
    zero = 0.0 if op.result.type.is_float else 0
    return Uniform(zero, op.result.element)
