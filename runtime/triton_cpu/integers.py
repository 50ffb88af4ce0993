"""Integer arithmetic, lane by lane."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import scalars as s
from .arithmetic import FOLDS, result_of
from .casts import Bits, as_number
from .registry import elementwise
from .values import INTEGER_BITS, Affine, Number, Uniform, Val

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Op


_BITWISE = {"arith.andi": "and", "arith.ori": "or", "arith.xori": "xor"}


_SHIFTS = {"arith.shli": "shl", "arith.shrsi": "ashr", "arith.shrui": "lshr"}


_DIVISIONS = {"arith.divsi": "sdiv", "arith.divui": "udiv", "arith.remsi": "srem", "arith.remui": "urem"}


@elementwise("arith.addi")
def int_add(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Add integers."""
    return s.add(lowering.e, as_number(args[0]), as_number(args[1]))


@elementwise("arith.subi")
def int_sub(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Subtract integers."""
    return s.add(lowering.e, as_number(args[0]), as_number(args[1]), "sub")


@elementwise("arith.muli")
def int_mul(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Multiply integers."""
    return s.multiply(lowering.e, as_number(args[0]), as_number(args[1]))


@elementwise(*_BITWISE)
def bitwise(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """And, or, exclusive or."""
    a, b_ = as_number(args[0]), as_number(args[1])
    name = _BITWISE[op.name]
    known = s.known_integers(a, b_)
    if known is not None:
        return s.constant(FOLDS[name](*known), a.element)
    if a.element == "i1":
        neutral = 0 if name in ("or", "xor") else 1
        for x, y in ((a, b_), (b_, a)):
            if isinstance(x, Uniform) and isinstance(x.value, int) and x.value & 1 == neutral:
                return y
    return _instruction(lowering, name, a, b_)


@elementwise(*_SHIFTS)
def shift(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Shift; by the width or more gives 0 (or the sign, for an arithmetic right shift)."""
    a, by = as_number(args[0]), as_number(args[1])
    bits = INTEGER_BITS[a.element]
    if isinstance(by, Uniform) and isinstance(by.value, int) and 0 <= by.value < bits:
        if op.name == "arith.shli":
            return s.multiply(lowering.e, a, s.constant(1 << by.value, a.element))
        return _instruction(lowering, _SHIFTS[op.name], a, by)
    widths = s.widths_with(a, by)
    b = Bits(lowering, widths)
    x, n = s.vector_text(lowering.e, a, b.lanes), s.vector_text(lowering.e, by, b.lanes)
    fits = b.op("icmp ult", a.element, n, bits)
    if op.name == "arith.shrsi":
        n = b.select(fits, a.element, n, bits - 1)
        return result_of(b.op("ashr", a.element, x, n), a.element, widths)
    shifted = b.op(_SHIFTS[op.name], a.element, x, b.select(fits, a.element, n, 0))
    return result_of(b.select(fits, a.element, shifted, 0), a.element, widths)


def _instruction(lowering: Lowering, instruction: str, *numbers: Number) -> Number:
    widths = s.widths_with(*numbers)
    b = Bits(lowering, widths)
    texts = [s.vector_text(lowering.e, x, b.lanes) for x in numbers]
    return result_of(b.op(instruction, numbers[0].element, *texts), numbers[0].element, widths)


@elementwise(*_DIVISIONS)
def int_divide(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Divide toward zero, or take the remainder; a zero divisor gives some integer and never traps."""
    a, d = as_number(args[0]), as_number(args[1])
    instruction, element = _DIVISIONS[op.name], op.result.element
    if isinstance(a, Uniform) and isinstance(d, Uniform):
        if isinstance(a.value, int) and isinstance(d.value, int) and d.value != 0:
            return s.constant(_folded_division(instruction, a.value, d.value, element), element)
        return _uniform_division(lowering, instruction, a, d)
    if isinstance(a, Affine) and isinstance(d, Uniform):
        kept = _affine_division(lowering, instruction, a, d)
        if kept is not None:
            return kept
    widths = s.widths_with(a, d)
    b = Bits(lowering, widths)
    x, y = s.vector_text(lowering.e, a, b.lanes), s.vector_text(lowering.e, d, b.lanes)
    known = isinstance(d, Uniform) and d.is_constant and d.value not in (0, -1)
    if known or INTEGER_BITS[element] == 64:
        y = y if known else _safe_divisor(b, element, instruction, x, y)
        return result_of(b.op(instruction, element, x, y), element, widths)
    # fp64 holds 32-bit integers and truncates their quotient exactly; there is no vector instruction for integers.
    signed = instruction[0] == "s"
    wide = [b.cast("sitofp" if signed else "uitofp", t, element, "f64") for t in (x, _nonzero(b, element, y))]
    quotient = b.cast("trunc", b.cast("fptosi", b.op("fdiv", "f64", *wide), "f64", "i64"), "i64", element)
    if instruction in ("sdiv", "udiv"):
        return result_of(quotient, element, widths)
    return result_of(b.op("sub", element, x, b.op("mul", element, quotient, y)), element, widths)


def _folded_division(instruction: str, a: int, d: int, element: str) -> int:
    if instruction[0] == "u":
        a, d = a % (1 << INTEGER_BITS[element]), d % (1 << INTEGER_BITS[element])
    quotient = abs(a) // abs(d) * (1 if (a < 0) == (d < 0) else -1)
    return quotient if instruction.endswith("div") else a - quotient * d


def _nonzero(b: Bits, element: str, y: str) -> str:
    return b.select(b.op("icmp eq", element, y, 0), element, 1, y)


def _safe_divisor(b: Bits, element: str, instruction: str, x: str, y: str) -> str:
    """Replace divisors that trap: zero, and -1 under the smallest integer."""
    y = _nonzero(b, element, y)
    if instruction[0] == "s":
        smallest = b.op("icmp eq", element, x, -(1 << (INTEGER_BITS[element] - 1)))
        trap = b.op("and", "i1", smallest, b.op("icmp eq", element, y, -1))
        y = b.select(trap, element, 1, y)
    return y


def _uniform_division(lowering: Lowering, instruction: str, a: Uniform, d: Uniform) -> Uniform:
    b = Bits(lowering, ())
    element = a.element
    y = s.text(d)
    if not d.is_constant or d.value in (0, -1):
        y = _safe_divisor(b, element, instruction, s.text(a), y)
    text = b.op(instruction, element, s.text(a), y)
    nonnegative = a.is_nonnegative and (d.is_nonnegative or instruction == "srem")
    divisor = math.gcd(a.known_divisor, d.known_divisor) if instruction in ("srem", "urem") else 1
    return Uniform(text, element, divisor, nonnegative)


def _affine_division(lowering: Lowering, instruction: str, a: Affine, d: Uniform) -> Number | None:
    """Division of consecutive aligned indices: a remainder stays consecutive, a quotient is one number for all lanes."""
    if len(a.strides) != 1 or a.strides[0].value != 1:
        return None
    width = a.widths[0]
    if a.base.known_divisor % width or d.known_divisor % width or not a.base.is_nonnegative:
        return None
    if d.is_constant and d.value == 0:
        return None
    quotient = _uniform_division(lowering, instruction, a.base, d)
    return s.affine(quotient, a.strides, a.widths) if instruction.endswith("rem") else quotient


@elementwise("arith.ceildivsi", "arith.ceildivui", "arith.floordivsi")
def rounded_division(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Divide rounding up or down."""
    a, d = as_number(args[0]), as_number(args[1])
    widths = s.widths_with(a, d)
    b, element = Bits(lowering, widths), op.result.element
    x, y = s.vector_text(lowering.e, a, b.lanes), s.vector_text(lowering.e, d, b.lanes)
    instruction = "udiv" if op.name.endswith("ui") else "sdiv"
    y = _safe_divisor(b, element, instruction, x, y)
    quotient = b.op(instruction, element, x, y)
    remainder = b.op("sub", element, x, b.op("mul", element, quotient, y))
    inexact = b.op("icmp ne", element, remainder, 0)
    opposite = b.op("icmp slt", element, b.op("xor", element, x, y), 0)
    if op.name == "arith.floordivsi":
        adjust = b.select(b.op("and", "i1", inexact, opposite), element, -1, 0)
    else:
        same = b.op("xor", "i1", opposite, 1) if instruction == "sdiv" else b.constant(1, "i1")
        adjust = b.select(b.op("and", "i1", inexact, same), element, 1, 0)
    return result_of(b.op("add", element, quotient, adjust), element, widths)


@elementwise("tt.mulhiui")
def multiply_high(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Upper half of the unsigned product."""
    numbers = [as_number(x) for x in args]
    widths = s.widths_with(*numbers)
    b, element = Bits(lowering, widths), op.result.element
    bits = INTEGER_BITS[element]
    wide = f"i{2 * bits}"
    kind = wide if b.lanes == 1 else f"<{b.lanes} x {wide}>"
    e = lowering.e
    x, y = (e.op(f"zext {b.kind(element)} {s.vector_text(e, n, b.lanes)} to {kind}") for n in numbers)
    by = str(bits) if b.lanes == 1 else f"splat ({wide} {bits})"
    high = e.op(f"lshr {kind} {e.op(f'mul {kind} {x}, {y}')}, {by}")
    return result_of(e.op(f"trunc {kind} {high} to {b.kind(element)}"), element, widths)


@elementwise("math.absi")
def int_abs(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Absolute value; the smallest integer stays itself."""
    x = as_number(args[0])
    widths = s.widths_with(x)
    b = Bits(lowering, widths)
    text = s.vector_text(lowering.e, x, b.lanes)
    negative = b.op("icmp slt", x.element, text, 0)
    return result_of(b.select(negative, x.element, b.op("sub", x.element, 0, text), text), x.element, widths)
