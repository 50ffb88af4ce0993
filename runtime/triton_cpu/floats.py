"""Float arithmetic and elementary functions, lane by lane."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import fp8, mathlib
from . import scalars as s
from .arithmetic import result_of
from .casts import HALVES, Bits, as_number, in_single
from .errors import UnsupportedError
from .mathlib import libdevice
from .registry import elementwise
from .values import Number, Uniform, Val

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


_MATH = {
    f"math.{n}": n
    for n in (
        "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "tanh", "sinh", "cosh", "asin", "acos",
        "atan", "atan2", "asinh", "acosh", "atanh", "erf", "erfc", "cbrt", "sqrt", "rsqrt", "floor", "ceil", "trunc", "round",
        "fma", "copysign",
    )
} | {"math.powf": "pow", "math.roundeven": "rint", "tt.precise_sqrt": "sqrt", "arith.remf": "fmod"}  # fmt: skip


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
