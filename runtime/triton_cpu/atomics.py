"""Atomic read-modify-write and compare-and-swap, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import checks
from . import scalars as s
from .casts import HALVES, Bits, as_number, convert_float
from .emit import LLVM_TYPES, Text
from .errors import UnsupportedError
from .fp8 import FORMATS
from .memory import address_of, first_offset
from .registry import statement
from .values import BYTES, Coords, Number, Pointer, Uniform

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Op

_ORDERINGS = {"relaxed": "monotonic", "acquire": "acquire", "release": "release", "acq_rel": "acq_rel"}
_KINDS = {
    "add": "add", "fadd": "fadd", "max": "max", "min": "min", "umax": "umax", "umin": "umin", "and": "and", "or": "or",
    "xor": "xor", "exch": "xchg",
}  # fmt: skip


def ordering(op: Op) -> str:
    """LLVM ordering of an atomic operation."""
    return _ORDERINGS.get(str(op.attrs.get("sem", "acq_rel")), "acq_rel")


@statement("tt.atomic_rmw")
def read_modify_write(lowering: Lowering, op: Op) -> None:
    """Combine a value into memory where the mask holds; the result is what was there, or zero."""
    kind = _KINDS.get(op.attrs["kind"])
    if kind is None:
        raise UnsupportedError(f"tl.atomic with {op.attrs['kind']}", op.line)
    pointers, values, *masks = op.operands
    if kind == "fadd" and values.element in FORMATS:
        raise UnsupportedError(f"tl.atomic_add on {values.element}", op.line)

    def one(coords: Coords) -> Uniform:
        pointer = lowering.eval(pointers, coords)
        assert isinstance(pointer, Pointer)
        value = as_number(lowering.eval(values, coords))
        assert isinstance(value, Uniform)
        mask = as_number(lowering.eval(masks[0], coords)) if masks else None
        return _guarded(lowering, op, pointer, mask, lambda address: _rmw(lowering, op, kind, address, value))

    _each(lowering, op, one)


@statement("tt.atomic_cas")
def compare_and_swap(lowering: Lowering, op: Op) -> None:
    """Replace a value in memory if it equals the expected one, bit by bit; the result is what was there."""
    pointers, expected, values = op.operands
    bits = f"i{8 * BYTES[values.element]}" if not values.type.is_pointer else "i64"

    def one(coords: Coords) -> Uniform:
        pointer = lowering.eval(pointers, coords)
        assert isinstance(pointer, Pointer)
        old, new = (_as_bits(lowering, lowering.lanes_text(lowering.eval(v, coords), 1), v.element) for v in (expected, values))

        def swap(address: Text) -> Text:
            order = ordering(op)
            weaker = {"acq_rel": "acquire", "release": "monotonic"}.get(order, order)
            pair = lowering.e.op(f"cmpxchg ptr {address}, {bits} {old}, {bits} {new} {order} {weaker}")
            return _from_bits(lowering, lowering.e.op(f"extractvalue {{ {bits}, i1 }} {pair}, 0"), values.element)

        return _guarded(lowering, op, pointer, None, swap)

    _each(lowering, op, one)


def _each(lowering: Lowering, op: Op, one: Callable[[Coords], Uniform]) -> None:
    """Run an operation for every element in order, keeping the results if they are used."""
    result = op.results[0] if op.results else None
    shape = op.operands[0].shape
    if not shape:
        old = one(())
        if result is not None:
            lowering.environment[result] = old
        return
    lowering.prepare(*op.operands)
    for value in op.operands:
        if lowering.plan.cost(value) > 2 and not value.type.is_pointer:
            lowering.materialise(value)
    output = None
    if result is not None and result.uses:
        output = lowering.new_buffer(shape, result.element, len(shape) - 1)

    def body(coords: Coords) -> None:
        old = one(coords)
        if output is not None:
            lowering.store_chunk(output, coords, old)

    lowering.for_each_element(shape, body)
    if output is not None and result is not None:
        lowering.buffers[result] = output


def _guarded(lowering: Lowering, op: Op, pointer: Pointer, mask: Number | None, run: Callable[[Text], Text]) -> Uniform:
    """Run an atomic where `mask` holds; elsewhere the result is zero."""
    e, element = lowering.e, op.operands[1].element
    if lowering.options.checked:
        checks.check(lowering, op, "atomic", pointer, mask, ())
    address = address_of(lowering, pointer, first_offset(pointer.offset))
    assert mask is None or isinstance(mask, Uniform)
    if mask is None or (mask.is_constant and int(mask.value) & 1):
        return Uniform(run(address), element)
    then, done, before = e.fresh_label("A"), e.fresh_label("N"), e.current
    e.branch(s.text(mask), then, done)
    e.label(then)
    with e.scope():
        old = run(address)
    last = e.current
    e.jump(done)
    e.label(done)
    kind = LLVM_TYPES[element]
    zero = s.text(s.constant(0.0 if kind in ("float", "double", "half") else 0, element))
    return Uniform(e.op(f"phi {kind} [{old}, %{last}], [{zero}, %{before}]"), element)


def _rmw(lowering: Lowering, op: Op, kind: str, address: Text, value: Uniform) -> Text:
    element = value.element
    if kind == "fadd" and element in HALVES:
        return _half_add(lowering, op, address, value)
    text = s.text(value)
    if kind == "xchg":
        bits = f"i{8 * BYTES[element]}"
        old = lowering.e.op(f"atomicrmw xchg ptr {address}, {bits} {_as_bits(lowering, text, element)} {ordering(op)}")
        return _from_bits(lowering, old, element)
    return lowering.e.op(f"atomicrmw {kind} ptr {address}, {LLVM_TYPES[element]} {text} {ordering(op)}")


def _half_add(lowering: Lowering, op: Op, address: Text, value: Uniform) -> Text:
    """Add to a 16-bit float by compare-and-swap: no processor adds them in memory."""
    e, element = lowering.e, value.element
    head, done = e.fresh_label("R"), e.fresh_label("S")
    first = e.op(f"load atomic i16, ptr {address} monotonic, align 2")
    before = e.current
    e.jump(head)
    e.label(head)
    seen, following = e.fresh("p"), e.fresh("n")
    e.lines.append(f"  {seen} = phi i16 [{first}, %{before}], [{following}, %{head}]")
    old = _from_bits(lowering, seen, element)
    wide = [convert_float(lowering, Uniform(x, element), "f32") for x in (old, s.text(value))]
    total = e.op(f"fadd float {s.text(wide[0])}, {s.text(wide[1])}")  # type: ignore[arg-type]
    new = convert_float(lowering, Uniform(total, "f32"), element)
    bits = _as_bits(lowering, s.text(new), element)  # type: ignore[arg-type]
    pair = e.op(f"cmpxchg ptr {address}, i16 {seen}, i16 {bits} {ordering(op)} monotonic")
    e.lines.append(f"  {following} = extractvalue {{ i16, i1 }} {pair}, 0")
    e.branch(e.op(f"extractvalue {{ i16, i1 }} {pair}, 1"), done, head)
    e.label(done)
    return old


def _as_bits(lowering: Lowering, text: Text, element: str) -> Text:
    kind = LLVM_TYPES[element]
    if element in ("f16", "f32", "f64"):
        return Bits(lowering, ()).cast("bitcast", text, element, {"half": "i16", "float": "i32", "double": "i64"}[kind])
    return text


def _from_bits(lowering: Lowering, text: Text, element: str) -> Text:
    if element in ("f16", "f32", "f64"):
        return Bits(lowering, ()).cast("bitcast", text, {"f16": "i16", "f32": "i32", "f64": "i64"}[element], element)
    return text
