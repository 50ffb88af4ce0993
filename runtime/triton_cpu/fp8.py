"""8-bit floats: a byte in memory and in registers, computed in fp32.

Narrowing saturates, as NVIDIA's `cvt.rn.satfinite` does: what lies beyond the largest finite number, infinities included,
becomes that number. Torch's `to` gives infinity (e5m2) or NaN (the others) there, and the same bits everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .casts import Bits
    from .emit import Text


@dataclass(frozen=True, slots=True)
class Format:
    """How a byte encodes a number: a sign, then the exponent, then the mantissa.

    Args:
        mantissa: bits of the mantissa.
        bias: bias of the exponent.
        greatest: code of the largest finite number.
        nan: code of NaN; 0x80 where there is no negative zero.
        infinity: code of infinity; None where there is none.
    """

    mantissa: int
    bias: int
    greatest: int
    nan: int
    infinity: int | None = None

    @property
    def has_negative_zero(self) -> bool:
        """Whether zero has a sign."""
        return self.nan != 0x80

    def value(self, code: int) -> float:
        """The number that a code of a finite number stands for."""
        exponent, mantissa = (code & 0x7F) >> self.mantissa, code & ((1 << self.mantissa) - 1)
        if exponent:
            mantissa |= 1 << self.mantissa
        magnitude = math.ldexp(mantissa, max(exponent, 1) - self.bias - self.mantissa)
        return -magnitude if code & 0x80 else magnitude


FORMATS = {
    "f8E5M2": Format(2, 15, 0x7B, 0x7F, 0x7C),
    "f8E4M3FN": Format(3, 7, 0x7E, 0x7F),
    "f8E5M2FNUZ": Format(2, 16, 0x7F, 0x80),
    "f8E4M3FNUZ": Format(3, 8, 0x7F, 0x80),
}
"""Format of each TTIR element type."""


def float8_bits(value: float, element: str) -> int:
    """Code of a number rounded to nearest even; an infinity stays one where the type has it."""
    f = FORMATS[element]
    if math.isnan(value):
        return f.nan
    if math.isinf(value) and f.infinity is not None:
        code = f.infinity
    else:
        magnitude = min(abs(value), f.value(f.greatest))
        exponent = max(math.frexp(magnitude)[1] - 1, 1 - f.bias)
        mantissa = round(math.ldexp(magnitude, f.mantissa - exponent))
        # A normal number's leading bit adds the one that the exponent lacks here.
        code = mantissa + ((exponent + f.bias - 1) << f.mantissa) if mantissa else 0
    negative = math.copysign(1.0, value) < 0 and (code != 0 or f.has_negative_zero)
    return code | 0x80 if negative else code


def rounded(value: float, element: str) -> float:
    """The number of an 8-bit type that conversion to it gives."""
    f = FORMATS[element]
    if math.isnan(value):
        return value
    limit = f.value(f.greatest)
    return f.value(float8_bits(min(max(value, -limit), limit), element))


def widen(b: Bits, x: Text, element: str, from_half: Callable[[Bits, Text], Text]) -> Text:
    """Emit the conversion to fp32, which is exact.

    Args:
        b: where to emit.
        x: the codes, as i8.
        element: the 8-bit type.
        from_half: emits the conversion of fp16 to fp32.
    """
    f = FORMATS[element]
    magnitude = b.op("and", "i8", x, 0x7F)
    scale: Text | float
    if f.mantissa == 3:
        # fp16 with the same mantissa and a wider exponent: its denormals are no slower, unlike those of fp32.
        bits = b.op("and", "i16", b.op("shl", "i16", b.cast("sext", x, "i8", "i16"), 7), -0x4001)
        scale = 2.0 ** (15 - f.bias)
    elif f.has_negative_zero:
        bits, scale = b.op("shl", "i16", b.cast("zext", x, "i8", "i16"), 8), 1.0
    else:
        # Twice the number in fp16, but for the last exponent, for which fp16 has no numbers: that one is lowered by one.
        is_last = b.op("icmp uge", "i8", magnitude, 0x7C)
        lowered = b.op("sub", "i8", x, b.select(is_last, "i8", 4, 0))
        bits = b.op("shl", "i16", b.cast("zext", lowered, "i8", "i16"), 8)
        scale = b.select(is_last, "f32", 1.0, 0.5)
    single = from_half(b, b.cast("bitcast", bits, "i16", "f16"))
    if scale == 1.0:
        return single
    single = b.op("fmul", "f32", single, scale)
    is_nan = b.op("icmp eq", "i8", magnitude if f.has_negative_zero else x, f.nan)
    quiet = b.select(is_nan, "i32", 0x7FC00000, 0)
    return b.cast("bitcast", b.op("or", "i32", b.cast("bitcast", single, "f32", "i32"), quiet), "i32", "f32")


def narrow(b: Bits, x: Text, element: str, toward_zero: bool) -> Text:
    """Emit the conversion from fp32, to nearest even or toward zero; what is too large becomes the largest number."""
    f = FORMATS[element]
    shift, rebias = 23 - f.mantissa, (127 - f.bias) << 23
    bits = b.cast("bitcast", x, "f32", "i32")
    sign = b.op("and", "i32", bits, -0x80000000)
    magnitude = b.op("xor", "i32", bits, sign)
    limited = b.intrinsic("umin", "i32", magnitude, b.constant((f.greatest << shift) + rebias, "i32"))
    single = b.cast("bitcast", limited, "i32", "f32")
    if toward_zero:
        denormal = b.cast("fptosi", b.op("fmul", "f32", single, 2.0 ** (f.bias + f.mantissa - 1)), "f32", "i32")
        kept = limited
    else:
        # The last bit of this sum is the unit of a denormal result, so that the addition itself rounds.
        exponent = 24 - f.bias - f.mantissa
        aligned = b.op("fadd", "f32", single, 2.0**exponent)
        denormal = b.op("sub", "i32", b.cast("bitcast", aligned, "f32", "i32"), (127 + exponent) << 23)
        odd = b.op("and", "i32", b.op("lshr", "i32", limited, shift), 1)
        kept = b.op("add", "i32", b.op("add", "i32", limited, (1 << (shift - 1)) - 1), odd)
    normal = b.op("lshr", "i32", b.op("sub", "i32", kept, rebias), shift)
    is_small = b.op("icmp ult", "i32", limited, (128 - f.bias) << 23)
    code = b.select(is_small, "i32", denormal, normal)
    if toward_zero and f.infinity is not None:
        code = b.select(b.op("icmp eq", "i32", magnitude, 0x7F800000), "i32", f.infinity, code)
    is_nan = b.op("icmp ugt", "i32", magnitude, 0x7F800000)
    sign = b.op("lshr", "i32", sign, 24)
    if f.has_negative_zero:
        code = b.op("or", "i32", b.select(is_nan, "i32", f.nan, code), sign)
    else:
        signed = b.select(b.op("icmp eq", "i32", code, 0), "i32", 0, b.op("or", "i32", code, sign))
        code = b.select(is_nan, "i32", f.nan, signed)
    return b.cast("trunc", code, "i32", "i8")


def with_sign(b: Bits, x: Text, element: str, *, flipped: bool) -> Text:
    """Emit the negation or, unless `flipped`, the absolute value of codes."""
    code = b.op("xor", "i8", x, -0x80) if flipped else b.op("and", "i8", x, 0x7F)
    if FORMATS[element].has_negative_zero:
        return code
    kept = b.op("icmp eq", "i8", b.op("and", "i8", x, 0x7F) if flipped else x, 0 if flipped else -0x80)
    return b.select(kept, "i8", x, code)
