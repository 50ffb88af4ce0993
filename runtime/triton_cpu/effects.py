"""device_assert and device_print."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import checks
from . import scalars as s
from .buffers import storage_type
from .casts import as_number, convert_float
from .emit import LLVM_TYPES, Text
from .registry import statement
from .values import BYTES, INTEGER_BITS, Coords, Number, Pointer, Uniform

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Op, Value


@statement("tt.assert")
def device_assert(lowering: Lowering, op: Op) -> None:
    """Report the first program in which the condition fails, and end that program."""
    condition = op.operands[0]
    lowering.prepare(condition)
    lane = lowering.natural_lane(condition) if condition.shape else 0
    lowering.for_each_chunk(
        condition.shape, lane, lambda coords: check_lanes(lowering, op, as_number(lowering.eval(condition, coords)))
    )


def check_lanes(lowering: Lowering, op: Op, condition: Number) -> None:
    """Emit the test of a tt.assert on lanes; one that fails ends the program."""
    e = lowering.e
    site = checks.site_of(lowering, op, "assert", str(op.attrs.get("message", "")))
    widths = s.widths_with(condition) if lowering.active is None else s.widths_with(condition, lowering.active)
    lanes = math.prod(widths)
    holds = s.vector_text(e, condition, lanes)
    if condition.element != "i1":
        zero = "0" if lanes == 1 else "zeroinitializer"
        holds = e.op(f"icmp ne {lowering.kind(condition.element, widths)} {holds}, {zero}")
    if lowering.active is not None:
        kind = lowering.kind("i1", widths)
        ones = "true" if lanes == 1 else "splat (i1 true)"
        holds = e.op(f"select {kind} {s.vector_text(e, lowering.active, lanes)}, {kind} {holds}, {kind} {ones}")
    if lanes > 1:
        holds = e.call("i1", f"llvm.vector.reduce.and.v{lanes}i1", [(f"<{lanes} x i1>", holds)])
    failed, passed = e.fresh_label("failed"), e.fresh_label("passed")
    e.branch(holds, passed, failed)
    e.label(failed)
    e.raw(f"call void @report_fault(ptr %fault, i32 {site}, i32 %pid0, i32 %pid1, i32 %pid2, i64 0)")
    e.raw("ret void")
    e.label(passed)


def _string(lowering: Lowering, text: str) -> Text:
    """Address of a constant C string."""
    data = text.encode() + b"\0"
    name = f"text.{len([k for k in lowering.e.declarations if k.startswith('text.')])}"
    for known, declared in lowering.e.declarations.items():
        if known.startswith("text.") and declared.endswith(_escaped(data)):
            return f"@{known}"
    lowering.e.declare(name, f"@{name} = internal constant [{len(data)} x i8] {_escaped(data)}")
    return f"@{name}"


def _escaped(data: bytes) -> str:
    return 'c"' + "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\' else f"\\{b:02X}" for b in data) + '"'


@statement("tt.print")
def device_print(lowering: Lowering, op: Op) -> None:
    """Print each element on a line: 'pid (x, y, z) idx (i, j) prefix value', as on a GPU."""
    checks.site_of(lowering, op, "print", str(op.attrs.get("prefix", "")))
    prefix = str(op.attrs.get("prefix", "")).replace("%", "%%")
    if not op.operands:
        _print(lowering, f"pid (%d, %d, %d){prefix}\n", [])
        return
    signed = op.attrs.get("is_signed") or [1] * len(op.operands)
    for number, value in enumerate(op.operands):
        lowering.prepare(value)
        operand = f"(operand {number}) " if len(op.operands) > 1 else ""

        def line(coords: Coords, value: Value = value, operand: str = operand, is_signed: bool = bool(signed[number])) -> None:
            code, arg = _formatted(lowering, value, coords, is_signed, bool(op.attrs.get("hex", False)))
            places = ", ".join("%lld" for _ in coords)
            indices = [("i64", str(c.base)) for c in coords]
            _print(lowering, f"pid (%d, %d, %d) idx ({places}){prefix}{operand}{code}\n", [*indices, arg])

        lowering.for_each_element(value.shape, line)


def _formatted(lowering: Lowering, value: Value, coords: Coords, is_signed: bool, in_hex: bool) -> tuple[str, tuple[str, Text]]:
    x = lowering.eval(value, coords)
    e = lowering.e
    if isinstance(x, Pointer):
        return "%p", ("ptr", e.op(f"inttoptr i64 {s.vector_text(e, s.absolute(e, x), 1)} to ptr"))
    assert isinstance(x, Uniform)
    if x.element in INTEGER_BITS:
        bits = INTEGER_BITS[x.element]
        wide = s.text(x)
        if bits < 64:
            extend = "sext" if is_signed and bits > 1 and not in_hex else "zext"
            wide = e.op(f"{extend} {LLVM_TYPES[x.element]} {s.text(x)} to i64")
        code = f"0x%0{max(bits // 4, 1)}llx" if in_hex else "%lld" if is_signed else "%llu"
        return code, ("i64", wide)
    if in_hex:
        bits = 8 * BYTES[x.element]
        text = s.text(x)
        if LLVM_TYPES[x.element] != f"i{bits}":
            text = e.op(f"bitcast {storage_type(x.element)} {text} to i{bits}")
        wide = text if bits == 64 else e.op(f"zext i{bits} {text} to i64")
        return f"0x%0{bits // 4}llx", ("i64", wide)
    wide_float = convert_float(lowering, convert_float(lowering, x, "f32") if x.element != "f64" else x, "f64")
    return "%f", ("double", s.vector_text(e, wide_float, 1))


def _print(lowering: Lowering, form: str, args: list[tuple[str, Text]]) -> None:
    """Call printf; the three program indices come first."""
    lowering.e.declare("printf", "declare i32 @printf(ptr, ...)")
    programs = [("i32", f"%pid{axis}") for axis in range(3)]
    texts = ", ".join(f"{kind} {text}" for kind, text in [("ptr", _string(lowering, form)), *programs, *args])
    lowering.e.op(f"call i32 (ptr, ...) @printf({texts})")
