"""Constants as LLVM literals."""

from __future__ import annotations

import struct

from .fp8 import FORMATS, float8_bits


def float_bits(value: float, element: str) -> int:
    """Bit pattern of `value` rounded to a float type."""
    if element in FORMATS:
        return float8_bits(value, element)
    if element == "f64":
        return int(struct.unpack("<Q", struct.pack("<d", value))[0])
    if element == "f16":
        try:
            return int(struct.unpack("<H", struct.pack("<e", value))[0])
        except OverflowError:
            return 0x7C00 if value > 0 else 0xFC00
    try:
        bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    except OverflowError:
        bits = 0x7F800000 if value > 0 else 0xFF800000
    if element == "f32":
        return bits
    if value != value:
        return 0x7FC0
    rounded = float(struct.unpack("<f", struct.pack("<I", bits))[0])
    if rounded != value:
        # The nearest fp32 is cut toward zero and made odd, so that rounding a second time gives what rounding once would.
        bits = (bits - (abs(rounded) > abs(value))) | 1
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def literal(value: int | float, element: str) -> str:
    """LLVM literal of a constant of a TTIR element type."""
    if element == "f32":
        rounded = struct.unpack("<f", struct.pack("<I", float_bits(float(value), "f32")))[0]
        return f"0x{float_bits(rounded, 'f64'):016X}"
    if element == "f64":
        return f"0x{float_bits(float(value), 'f64'):016X}"
    if element == "f16":
        return f"0xH{float_bits(float(value), 'f16'):04X}"
    if element == "bf16" or element in FORMATS:
        return str(float_bits(float(value), element))
    if element == "i1":
        return "true" if int(value) & 1 else "false"
    if element == "ptr":
        return "null" if value == 0 else f"inttoptr (i64 {int(value)} to ptr)"
    return str(int(value))
