"""Conversions between number types.

Narrow floats (fp16, bf16 and the 8-bit ones) are computed in fp32 and rounded after every operation. bf16 travels as its
bits: LLVM's own bfloat becomes library calls on most CPUs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import fp8
from . import scalars as s
from .emit import LLVM_TYPES, mangle, vector_type
from .errors import UnsupportedError
from .literals import float_bits
from .registry import elementwise
from .values import INTEGER_BITS, Affine, Number, Pointer, Uniform, Val, Vector

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Op

HALVES = ("f16", "bf16")
NARROW = (*HALVES, *fp8.FORMATS)
"""Float types that are computed in fp32."""


def as_number(x: Val) -> Number:
    """The number that a form is; pointers are a mistake of the caller."""
    if isinstance(x, Pointer):
        raise UnsupportedError("arithmetic on a pointer")
    return x


class Bits:
    """Short-hand for integer and float instructions on all lanes of a value."""

    def __init__(self, lowering: Lowering, widths: tuple[int, ...]) -> None:
        self.lowering = lowering
        self.lanes = 1
        for w in widths:
            self.lanes *= w

    def constant(self, value: int | float, element: str) -> str:
        """A constant in all lanes."""
        return s.vector_text(self.lowering.e, Uniform(value, element), self.lanes)

    def kind(self, element: str) -> str:
        """LLVM type with all lanes."""
        return vector_type(LLVM_TYPES[element], self.lanes)

    def op(self, instruction: str, element: str, *operands: str | int | float) -> str:
        """Emit `instruction <type> a, b`; numbers become constants of the type."""
        texts = [x if isinstance(x, str) else self.constant(x, element) for x in operands]
        return self.lowering.e.op(f"{instruction} {self.kind(element)} {', '.join(texts)}")

    def cast(self, instruction: str, x: str, source: str, target: str) -> str:
        """Emit a cast."""
        return self.lowering.e.op(f"{instruction} {self.kind(source)} {x} to {self.kind(target)}")

    def select(self, condition: str, element: str, a: str | int | float, b: str | int | float) -> str:
        """Emit a lane-wise select."""
        kind = self.kind(element)
        texts = [x if isinstance(x, str) else self.constant(x, element) for x in (a, b)]
        return self.lowering.e.op(f"select {self.kind('i1')} {condition}, {kind} {texts[0]}, {kind} {texts[1]}")

    def intrinsic(self, name: str, element: str, *operands: str) -> str:
        """Call an overloaded intrinsic whose operands and result have one type."""
        kind = self.kind(element)
        symbol = f"llvm.{name}.{mangle(LLVM_TYPES[element], self.lanes)}"
        return self.lowering.e.call(kind, symbol, [(kind, x) for x in operands])


def convert_float(lowering: Lowering, x: Number, target: str, *, toward_zero: bool = False) -> Number:
    """Convert between float types, to nearest even unless `toward_zero`."""
    source = x.element
    if source == target:
        return x
    if isinstance(x, Uniform) and isinstance(x.value, (int, float)) and not toward_zero:
        return Uniform(_rounded(float(x.value), target), target)
    widths = s.widths_with(x)
    b = Bits(lowering, widths)
    text = s.vector_text(lowering.e, x, b.lanes)
    if source in HALVES:
        text, source = (_from_bf16(b, text) if source == "bf16" else _from_f16(b, text)), "f32"
    elif source in fp8.FORMATS:
        text, source = fp8.widen(b, text, source, _from_f16), "f32"
    if source == "f64" and target in NARROW:
        text, source = _round_to_odd(b, text), "f32"
    if source == "f32" and target == "f64":
        text = b.cast("fpext", text, "f32", "f64")
    elif source == "f64" and target == "f32":
        text = b.cast("fptrunc", text, "f64", "f32")
    elif target == "bf16":
        text = _to_bf16(b, text, toward_zero)
    elif target == "f16":
        text = _to_f16(b, text, toward_zero)
    elif target in fp8.FORMATS:
        text = fp8.narrow(b, text, target, toward_zero)
    return Vector(text, target, widths) if widths else Uniform(text, target)


def _rounded(value: float, element: str) -> float:
    if element == "f64" or value != value:
        return value
    if element in fp8.FORMATS:
        return fp8.rounded(value, element)
    if element == "bf16":
        return float(struct.unpack("<f", struct.pack("<I", float_bits(value, "bf16") << 16))[0])
    code, integer = {"f16": ("<e", "<H"), "f32": ("<f", "<I")}[element]
    return float(struct.unpack(code, struct.pack(integer, float_bits(value, element)))[0])


def _from_bf16(b: Bits, x: str) -> str:
    wide = b.op("shl", "i32", b.cast("zext", x, "i16", "i32"), 16)
    return b.cast("bitcast", wide, "i32", "f32")


def _to_bf16(b: Bits, x: str, toward_zero: bool) -> str:
    bits = b.cast("bitcast", x, "f32", "i32")
    high = b.op("lshr", "i32", bits, 16)
    rounded = high
    if not toward_zero:
        odd = b.op("and", "i32", high, 1)
        rounded = b.op("lshr", "i32", b.op("add", "i32", b.op("add", "i32", bits, 0x7FFF), odd), 16)
    is_nan = b.op("fcmp uno", "f32", x, x)
    rounded = b.select(is_nan, "i32", b.op("or", "i32", high, 0x40), rounded)
    return b.cast("trunc", rounded, "i32", "i16")


def _native_f16(b: Bits) -> bool:
    """Whether LLVM converts fp16 by instructions rather than by calls into a compiler library."""
    isa = b.lowering.isa
    return isa.name != "portable" or not isa.cpu.startswith("x86-64")


def _from_f16(b: Bits, x: str) -> str:
    if _native_f16(b):
        return b.cast("fpext", x, "f16", "f32")
    bits = b.cast("zext", b.cast("bitcast", x, "f16", "i16"), "i16", "i32")
    magnitude = b.op("shl", "i32", b.op("and", "i32", bits, 0x7FFF), 13)
    # Scaling by 2^112 moves the exponent bias of fp16 to that of fp32, denormals included.
    scaled = b.op("fmul", "f32", b.cast("bitcast", magnitude, "i32", "f32"), 2.0**112)
    special = b.op("icmp uge", "i32", magnitude, 0x7C00 << 13)
    scaled_bits = b.cast("bitcast", scaled, "f32", "i32")
    finite = b.select(special, "i32", b.op("or", "i32", magnitude, 0x7F800000), scaled_bits)
    sign = b.op("shl", "i32", b.op("and", "i32", bits, 0x8000), 16)
    return b.cast("bitcast", b.op("or", "i32", finite, sign), "i32", "f32")


def _to_f16(b: Bits, x: str, toward_zero: bool) -> str:
    if toward_zero:
        x = _drop_below_f16(b, x)
    if _native_f16(b):
        return b.cast("fptrunc", x, "f32", "f16")
    bits = b.cast("bitcast", x, "f32", "i32")
    sign = b.op("and", "i32", bits, -0x80000000)
    magnitude = b.op("xor", "i32", bits, sign)
    is_nan = b.op("icmp ugt", "i32", magnitude, 0x7F800000)
    overflow = b.op("icmp uge", "i32", magnitude, 0x477FF000)
    small = b.op("icmp ult", "i32", magnitude, 0x38800000)
    # Adding 0.5 to a denormal result lines its bits up at the bottom of the mantissa, rounded by the addition itself.
    aligned = b.op("fadd", "f32", b.cast("bitcast", magnitude, "i32", "f32"), 0.5)
    denormal = b.op("sub", "i32", b.cast("bitcast", aligned, "f32", "i32"), 0x3F000000)
    odd = b.op("and", "i32", b.op("lshr", "i32", magnitude, 13), 1)
    biased = b.op("add", "i32", b.op("add", "i32", magnitude, -0x38000000 + 0xFFF), odd)
    result = b.select(small, "i32", denormal, b.op("lshr", "i32", biased, 13))
    result = b.select(overflow, "i32", 0x7C00, result)
    result = b.select(is_nan, "i32", 0x7E00, result)
    result = b.op("or", "i32", result, b.op("lshr", "i32", sign, 16))
    return b.cast("bitcast", b.cast("trunc", result, "i32", "i16"), "i16", "f16")


def _drop_below_f16(b: Bits, x: str) -> str:
    """Clear the bits of an fp32 that fp16 cannot hold, and clamp to its largest finite value, so that rounding is exact."""
    bits = b.cast("bitcast", x, "f32", "i32")
    truncated = b.cast("bitcast", b.op("and", "i32", bits, -0x2000), "i32", "f32")
    magnitude = b.op("and", "i32", bits, 0x7FFFFFFF)
    sign = b.op("and", "i32", bits, -0x80000000)
    is_finite = b.op("icmp ult", "i32", magnitude, 0x7F800000)
    too_large = b.op("and", "i1", is_finite, b.op("icmp ugt", "i32", magnitude, 0x477FE000))
    largest = b.cast("bitcast", b.op("or", "i32", sign, 0x477FE000), "i32", "f32")
    # A denormal result needs fewer bits still: 2^-24 is the unit there.
    units = b.intrinsic("trunc", "f32", b.op("fmul", "f32", x, 2.0**24))
    denormal = b.op("fmul", "f32", units, 2.0**-24)
    result = b.select(b.op("icmp ult", "i32", magnitude, 0x38800000), "f32", denormal, truncated)
    result = b.select(too_large, "f32", largest, result)
    return b.select(is_finite, "f32", result, x)


def _round_to_odd(b: Bits, x: str) -> str:
    """Narrow fp64 to fp32 so that a second rounding gives the correctly rounded result."""
    narrow = b.cast("fptrunc", x, "f64", "f32")
    back = b.cast("fpext", narrow, "f32", "f64")
    inexact = b.op("fcmp one", "f64", back, x)
    above = b.op("fcmp ogt", "f64", b.intrinsic("fabs", "f64", back), b.intrinsic("fabs", "f64", x))
    bits = b.cast("bitcast", narrow, "f32", "i32")
    down = b.select(above, "i32", b.op("sub", "i32", bits, 1), bits)
    return b.cast("bitcast", b.select(inexact, "i32", b.op("or", "i32", down, 1), bits), "i32", "f32")


def in_single(lowering: Lowering, args: list[Val], element: str, compute: Callable[[list[Number], str], Number]) -> Number:
    """Compute on float operands, in fp32 with one rounding at the end for the narrow types."""
    numbers = [as_number(x) for x in args]
    if element not in NARROW:
        return compute(numbers, element)
    wide = [convert_float(lowering, x, "f32") if x.element in NARROW else x for x in numbers]
    return convert_float(lowering, compute(wide, "f32"), element)


@elementwise("arith.extf", "arith.truncf", "tt.fp_to_fp")
def float_cast(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Convert between float types."""
    rounding = str(op.attrs.get("rounding", op.attrs.get("roundingMode", "rtne")))
    return convert_float(lowering, as_number(args[0]), op.result.element, toward_zero=rounding in ("rtz", "toward_zero"))


@elementwise("arith.sitofp", "arith.uitofp")
def int_to_float(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Convert an integer to the nearest float."""
    x, target = as_number(args[0]), op.result.element
    if isinstance(x, Uniform) and isinstance(x.value, int):
        value = x.value if op.name == "arith.sitofp" else x.value % (1 << INTEGER_BITS[x.element])
        return Uniform(_rounded(float(-value if x.element == "i1" and op.name == "arith.sitofp" else value), target), target)
    widths = s.widths_with(x)
    b = Bits(lowering, widths)
    # fp32 does not hold every 32-bit integer; fp64 does, so the narrow types round once.
    via = target if target not in NARROW else ("f32" if INTEGER_BITS[x.element] <= 16 else "f64")
    text = b.cast(op.name[6:], s.vector_text(lowering.e, x, b.lanes), x.element, via)
    return convert_float(lowering, Vector(text, via, widths) if widths else Uniform(text, via), target)


@elementwise("arith.fptosi", "arith.fptoui")
def float_to_int(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Convert a float to an integer toward zero; what does not fit gives some integer."""
    x, target = as_number(args[0]), op.result.element
    if x.element in NARROW:
        x = convert_float(lowering, x, "f32")
    widths = s.widths_with(x)
    b = Bits(lowering, widths)
    text = s.vector_text(lowering.e, x, b.lanes)
    # Narrow results are cut from a wider integer: what the narrow conversion does outside its range differs by width.
    via = "i64" if target == "i64" or (target == "i32" and op.name == "arith.fptoui") else "i32"
    instruction = "fptoui" if target == "i64" and op.name == "arith.fptoui" else "fptosi"
    text = b.cast(instruction, text, x.element, via)
    if via != target:
        text = b.cast("trunc", text, via, target)
    return Vector(text, target, widths) if widths else Uniform(text, target)


@elementwise("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast")
def int_cast(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Change the width of an integer."""
    x, target = as_number(args[0]), op.result.element
    if x.element == target:
        return x
    if isinstance(x, Uniform) and isinstance(x.value, int):
        value = x.value
        if op.name == "arith.extui":
            value %= 1 << INTEGER_BITS[x.element]
        elif x.element == "i1" and op.name == "arith.extsi":
            value = -(value & 1)
        return s.constant(value, target)
    if op.name in ("arith.extsi", "arith.index_cast") and target == "i64":
        return s.to_i64(lowering.e, x)
    widths = s.widths_with(x)
    b = Bits(lowering, widths)
    if op.name == "arith.trunci" and isinstance(x, Affine):
        parts = [_cut(lowering, p, target) for p in (x.base, *x.strides)]
        return s.affine(parts[0], tuple(parts[1:]), widths)
    instruction = {"arith.extsi": "sext", "arith.extui": "zext"}.get(op.name, "trunc")
    if op.name == "arith.index_cast":
        instruction = "sext" if INTEGER_BITS[target] > INTEGER_BITS[x.element] else "trunc"
    text = b.cast(instruction, s.vector_text(lowering.e, x, b.lanes), x.element, target)
    if widths:
        return Vector(text, target, widths)
    assert isinstance(x, Uniform)
    return Uniform(text, target, x.divisor if instruction != "trunc" else 1, x.nonnegative and instruction != "trunc")


def _cut(lowering: Lowering, x: Uniform, target: str) -> Uniform:
    if isinstance(x.value, int):
        return s.constant(x.value, target)
    text = lowering.e.op(f"trunc {LLVM_TYPES[x.element]} {s.text(x)} to {LLVM_TYPES[target]}")
    return Uniform(text, target, x.divisor)


@elementwise("tt.bitcast", "arith.bitcast")
def bitcast(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Reinterpret the bits of a number, or the pointee of a pointer."""
    x, target = args[0], op.result.type
    if isinstance(x, Pointer):
        if not target.is_pointer:
            raise UnsupportedError(f"bitcast of a pointer to {target}", op.line)
        return Pointer(None, s.absolute(lowering.e, x), str(target.pointee))
    if LLVM_TYPES[x.element] == LLVM_TYPES[target.element]:
        if isinstance(x, Vector):
            return Vector(x.text, target.element, x.widths)
        if isinstance(x, Uniform) and not x.is_constant:
            return Uniform(str(x.value), target.element)
    widths = s.widths_with(x)
    b = Bits(lowering, widths)
    text = s.vector_text(lowering.e, x, b.lanes)
    if LLVM_TYPES[x.element] != LLVM_TYPES[target.element]:
        text = b.cast("bitcast", text, x.element, target.element)
    elif not widths:
        text = lowering.e.op(f"freeze {b.kind(target.element)} {text}")
    return Vector(text, target.element, widths) if widths else Uniform(text, target.element)
