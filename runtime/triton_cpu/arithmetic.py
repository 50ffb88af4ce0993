"""Integer and float arithmetic, comparisons, selection: one instruction or a few per lane."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING

from . import fp8, mathlib
from . import scalars as s
from .casts import HALVES, NARROW, Bits, as_number, convert_float, in_single
from .errors import UnsupportedError
from .mathlib import libdevice
from .registry import elementwise
from .values import INTEGER_BITS, Affine, Number, Pointer, Uniform, Val, Vector

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Op

_FLOAT = {
    "arith.addf": "fadd",
    "arith.subf": "fsub",
    "arith.mulf": "fmul",
    "arith.divf": "fdiv",
    "tt.precise_divf": "fdiv",
}
_BITWISE = {"arith.andi": "and", "arith.ori": "or", "arith.xori": "xor"}
_SHIFTS = {"arith.shli": "shl", "arith.shrsi": "ashr", "arith.shrui": "lshr"}
_FOLDS = {
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "slt": operator.lt, "sle": operator.le, "sgt": operator.gt, "sge": operator.ge, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip
_DIVISIONS = {"arith.divsi": "sdiv", "arith.divui": "udiv", "arith.remsi": "srem", "arith.remui": "urem"}
_INTEGER_EXTREMES = {"arith.maxsi": "smax", "arith.minsi": "smin", "arith.maxui": "umax", "arith.minui": "umin"}
_FLOAT_EXTREMES = {
    "arith.maxnumf": "maxnum", "arith.minnumf": "minnum", "arith.maximumf": "maximum", "arith.minimumf": "minimum",
}  # fmt: skip
_MATH = {
    f"math.{n}": n
    for n in (
        "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "tanh", "sinh", "cosh", "asin", "acos",
        "atan", "atan2", "asinh", "acosh", "atanh", "erf", "erfc", "cbrt", "sqrt", "rsqrt", "floor", "ceil", "trunc", "round",
        "fma", "copysign",
    )
} | {"math.powf": "pow", "math.roundeven": "rint", "tt.precise_sqrt": "sqrt", "arith.remf": "fmod"}  # fmt: skip


def result_of(text: str, element: str, widths: tuple[int, ...]) -> Number:
    """Wrap an emitted operand."""
    return Vector(text, element, widths) if widths else Uniform(text, element)


@elementwise(*_FLOAT)
def float_binary(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Add, subtract, multiply or divide floats."""
    contract = (
        "contract " if lowering.options.enable_fp_fusion and op.name in ("arith.addf", "arith.subf", "arith.mulf") else ""
    )

    def compute(numbers: list[Number], element: str) -> Number:
        widths = s.widths_with(*numbers)
        b = Bits(lowering, widths)
        if op.name == "arith.divf" and element == "f32" and widths and _has_fma(lowering) and isinstance(numbers[1], Uniform):
            return result_of(_divide_by_uniform(lowering, b, numbers[0], numbers[1]), element, widths)
        texts = [s.vector_text(lowering.e, x, b.lanes) for x in numbers]
        return result_of(b.op(f"{_FLOAT[op.name]} {contract}".rstrip(), element, *texts), element, widths)

    return in_single(lowering, args, op.result.element, compute)


def _has_fma(lowering: Lowering) -> bool:
    return lowering.isa.name != "portable" or not lowering.isa.cpu.startswith("x86-64")


def _divide_by_uniform(lowering: Lowering, b: Bits, x: Number, d: Uniform) -> str:
    """Divide by one number for all lanes: multiply by its reciprocal and correct the remainder.

    Several times the speed of a vector division. A divisor too small for its reciprocal is scaled, with the dividend, by a
    power of two; where the remainder is not a number (infinities, a zero divisor) the product itself is right.
    """
    e, one = lowering.e, Bits(lowering, ())
    small = one.op("fcmp olt", "f32", one.intrinsic("fabs", "f32", s.text(d)), 2.0**-64)
    scale = one.select(small, "f32", 2.0**64, 1.0)
    divisor = one.op("fmul", "f32", s.text(d), scale)
    reciprocal = one.op("fdiv", "f32", 1.0, divisor)
    spread = [s.vector_text(e, Uniform(t, "f32"), b.lanes) for t in (scale, divisor, reciprocal)]
    dividend = b.op("fmul", "f32", s.vector_text(e, x, b.lanes), spread[0])
    quotient = b.op("fmul", "f32", dividend, spread[2])
    remainder = b.intrinsic("fma", "f32", b.op("fneg", "f32", quotient), spread[1], dividend)
    corrected = b.intrinsic("fma", "f32", remainder, spread[2], quotient)
    is_nan = b.op("fcmp uno", "f32", remainder, remainder)
    return b.select(is_nan, "f32", quotient, corrected)


@elementwise(*_MATH)
def math_function(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Elementary functions."""

    def compute(numbers: list[Number], element: str) -> Number:
        return call_math(lowering, _MATH[op.name], numbers, element)

    return in_single(lowering, args, op.result.element, compute)


def call_math(lowering: Lowering, name: str, numbers: list[Number], element: str) -> Number:
    """Call a function of the math library on all lanes."""
    widths = s.widths_with(*numbers)
    b = Bits(lowering, widths)
    texts = [s.vector_text(lowering.e, x, b.lanes) for x in numbers]
    return result_of(mathlib.call(lowering.e, lowering.isa, name, element, b.lanes, texts), element, widths)


@elementwise("tt.extern_elementwise")
def extern(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """A libdevice function, by its symbol."""
    try:
        entry = libdevice.lookup(op.attrs["symbol"])
    except UnsupportedError as error:
        raise UnsupportedError(error.what, op.line) from error
    numbers = [as_number(x) for x in args]
    widths = s.widths_with(*numbers)
    lanes = math.prod(widths)
    texts = [s.vector_text(lowering.e, x, lanes) for x in numbers]
    text = mathlib.call(lowering.e, lowering.isa, entry.name, entry.element, lanes, texts)
    return result_of(text, op.result.element, widths)


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
        return s.constant(_FOLDS[name](*known), a.element)
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


@elementwise("arith.cmpi", "arith.cmpf")
def compare(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Compare; pointers as addresses."""
    numbers = [s.absolute(lowering.e, x) if isinstance(x, Pointer) else x for x in args]
    predicate = op.attrs["predicate"]
    if op.name == "arith.cmpf":
        numbers = [convert_float(lowering, x, "f32") if x.element in NARROW else x for x in numbers]
    a, c = numbers
    known, fold = s.known_integers(a, c), _FOLDS.get(predicate)
    if known is not None and fold is not None and a.element != "i1":
        return s.constant(int(fold(*known)), "i1")
    widths = s.widths_with(*numbers)
    b = Bits(lowering, widths)
    texts = [s.vector_text(lowering.e, x, b.lanes) for x in numbers]
    instruction = "icmp" if op.name == "arith.cmpi" else "fcmp"
    return result_of(b.op(f"{instruction} {predicate}", a.element, *texts), "i1", widths)


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


@elementwise("tt.clampf")
def clamp(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Limit to [low, high]; a NaN becomes `low` unless it is to be propagated."""
    propagate = "all" in str(op.attrs.get("propagate_nan", "none"))
    low_name, high_name = ("maximum", "minimum") if propagate else ("maxnum", "minnum")

    def compute(numbers: list[Number], element: str) -> Number:
        widths = s.widths_with(*numbers)
        b = Bits(lowering, widths)
        x, low, high = (s.vector_text(lowering.e, n, b.lanes) for n in numbers)
        return result_of(b.intrinsic(high_name, element, b.intrinsic(low_name, element, x, low), high), element, widths)

    return in_single(lowering, args, op.result.element, compute)


@elementwise("math.absf", "arith.negf")
def sign_bit(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Clear or flip the sign."""
    x = as_number(args[0])
    widths = s.widths_with(x)
    b = Bits(lowering, widths)
    text = s.vector_text(lowering.e, x, b.lanes)
    if x.element in HALVES:
        bits = text if x.element == "bf16" else b.cast("bitcast", text, "f16", "i16")
        bits = b.op("and", "i16", bits, 0x7FFF) if op.name == "math.absf" else b.op("xor", "i16", bits, -0x8000)
        text = bits if x.element == "bf16" else b.cast("bitcast", bits, "i16", "f16")
    elif x.element in fp8.FORMATS:
        text = fp8.with_sign(b, text, x.element, flipped=op.name == "arith.negf")
    else:
        text = b.intrinsic("fabs", x.element, text) if op.name == "math.absf" else b.op("fneg", x.element, text)
    return result_of(text, x.element, widths)


@elementwise("math.absi")
def int_abs(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Absolute value; the smallest integer stays itself."""
    x = as_number(args[0])
    widths = s.widths_with(x)
    b = Bits(lowering, widths)
    text = s.vector_text(lowering.e, x, b.lanes)
    negative = b.op("icmp slt", x.element, text, 0)
    return result_of(b.select(negative, x.element, b.op("sub", x.element, 0, text), text), x.element, widths)


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
