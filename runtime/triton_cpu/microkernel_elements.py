"""The operands of tile products, and the conversion of their elements."""

from __future__ import annotations

from dataclasses import dataclass

from .emit import Emitter, Text, vector_type
from .errors import UnsupportedError
from .isa import Isa

ELEMENT_BYTES = {"i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "f64": 8}

ACCUMULATOR_TYPES = {"f32": "float", "f64": "double", "i32": "i32"}


@dataclass(frozen=True, slots=True)
class Operand:
    """A matrix in memory: rows and columns of A are m and k, those of B are k and n.

    Args:
        pointer: address of element [0, 0].
        element: element type as stored: "f32", "f64", "f16", "bf16", "i8", "i16" or "i32".
        strides: distance of neighbouring rows and of neighbouring columns, in elements. B's column stride is 1. For a
            group in B, a row is a group of rows, and the column stride is the group; in A, the column stride is 1.
        group: consecutive k that lie side by side and are multiplied by one instruction.
        correction: address of n i32 values that are added to every row of the result, or None.
    """

    pointer: Text
    element: str
    strides: tuple[int | Text, int | Text]
    group: int = 1
    correction: Text | None = None


def converted(e: Emitter, isa: Isa, value: Text, stored: str, wanted: str, lanes: int) -> Text:
    """Emit the conversion of elements as stored to an accumulator type.

    Raises:
        UnsupportedError: there is no conversion that keeps every value.
    """
    target = vector_type(ACCUMULATOR_TYPES[wanted], lanes)
    if stored == wanted:
        return value
    if stored == "bf16" and wanted == "f32":
        short, integer = vector_type("i16", lanes), vector_type("i32", lanes)
        high = e.op(f"shl {integer} {e.op(f'zext {short} {value} to {integer}')}, {e.splat('16', 'i32', lanes)}")
        return e.op(f"bitcast {integer} {high} to {target}")
    if stored == "f16" and wanted == "f32":
        if isa.name == "portable":
            return half_to_float(e, value, lanes)
        return e.op(f"fpext {vector_type('half', lanes)} {value} to {target}")
    if stored == "f32" and wanted == "f64":
        return e.op(f"fpext {vector_type('float', lanes)} {value} to {target}")
    if stored in ("i8", "i16") and wanted == "i32":
        return e.op(f"sext {vector_type(stored, lanes)} {value} to {target}")
    raise UnsupportedError(f"a product of {stored} into {wanted}")


def half_to_float(e: Emitter, value: Text, lanes: int) -> Text:
    """Emit f16 -> f32 by integer arithmetic: without F16C, fpext is a call of a library that need not be there."""
    integer, kind = vector_type("i32", lanes), vector_type("float", lanes)
    short, half = vector_type("i16", lanes), vector_type("half", lanes)

    def bits(constant: int) -> Text:
        return e.splat(str(constant), "i32", lanes)

    wide = e.op(f"zext {short} {e.op(f'bitcast {half} {value} to {short}')} to {integer}")
    magnitude = e.op(f"shl {integer} {e.op(f'and {integer} {wide}, {bits(0x7FFF)}')}, {bits(13)}")
    rebias = e.splat("0x46F0000000000000", "float", lanes)  # 2**112
    scaled = e.op(f"bitcast {integer} {magnitude} to {kind}")
    finite = e.op(f"bitcast {kind} {e.op(f'fmul {kind} {scaled}, {rebias}')} to {integer}")
    special = e.op(f"icmp uge {integer} {magnitude}, {bits(0x7C00 << 13)}")
    condition = vector_type("i1", lanes)
    infinite = e.op(f"or {integer} {magnitude}, {bits(0x7F800000)}")
    chosen = e.op(f"select {condition} {special}, {integer} {infinite}, {integer} {finite}")
    sign = e.op(f"shl {integer} {e.op(f'and {integer} {wide}, {bits(0x8000)}')}, {bits(16)}")
    return e.op(f"bitcast {integer} {e.op(f'or {integer} {chosen}, {sign}')} to {kind}")
