"""Loads and stores through pointer tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import checks, masks
from . import scalars as s
from .arithmetic import choose
from .buffers import storage_type
from .casts import as_number
from .emit import Text, mangle, vector_type
from .errors import UnsupportedError
from .registry import evaluator, statement
from .shapes import concatenate
from .values import BYTES, Affine, Coords, Number, Pointer, Uniform, Val, Vector, widths_of

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Op, Value

_ZEROS = "@zeros = internal constant [1024 x i8] zeroinitializer, align 64"


@evaluator("tt.load")
def load(lowering: Lowering, op: Op, value: Value, coords: Coords) -> Val:
    """Read a chunk; lanes that are masked off get `other`, or zero."""
    if any(not v.shape for v in op.operands) and value.shape:
        raise UnsupportedError("a load of a block pointer", op.line)
    pointer, *rest = (lowering.eval(v, coords) for v in op.operands)
    assert isinstance(pointer, Pointer)
    mask = as_number(rest[0]) if rest else None
    result = read(lowering, op, pointer, mask, rest[1] if len(rest) > 1 else None, widths_of(coords))
    if not value.type.is_pointer:
        return result
    number = as_number(result)
    return Pointer(None, number, str(value.type.pointee))


def read(lowering: Lowering, op: Op, pointer: Pointer, mask: Number | None, other: Val | None, widths: tuple[int, ...]) -> Val:
    """Load from the addresses of a pointer form. Elements that are pointers come back as i64."""
    if isinstance(mask, Uniform) and isinstance(mask.value, int):
        if mask.value & 1 == 0:
            return other if other is not None else Uniform(0.0 if pointer.pointee[0] in "fb" else 0, pointer.pointee)
        mask = None
    if isinstance(other, Pointer):
        other = s.absolute(lowering.e, other)
    if lowering.options.checked:
        checks.check(lowering, op, "load", pointer, mask, widths)
    element = "i64" if pointer.pointee == "ptr" else pointer.pointee
    kind = storage_type(element)
    if isinstance(pointer.offset, Uniform) and not isinstance(mask, Vector):
        return _read_dense(lowering, pointer, mask, other, element, ())
    if isinstance(mask, Affine):
        mask = Vector(lowering.lanes_text(mask, math.prod(mask.widths)), "i1", mask.widths)
    contiguous = contiguous_lanes(pointer.offset, pointer, widths)
    if contiguous == math.prod(widths):
        even = len(op.operands) > 1 and masks.is_monotone(lowering, op.operands[1])
        return _read_dense(lowering, pointer, mask, other, element, widths, even_mask=even)
    if contiguous >= 4 and isinstance(pointer.offset, Affine):
        return _read_rows(lowering, pointer, pointer.offset, mask, other, element, widths)
    lanes = math.prod(widths)
    addresses = address_vector(lowering, pointer, lanes)
    vector = vector_type(kind, lanes)
    masked = s.vector_text(lowering.e, mask, lanes) if mask is not None else "splat (i1 true)"
    given = _passthrough(lowering, other, element, lanes)
    symbol = f"llvm.masked.gather.{mangle(kind, lanes)}.{mangle('ptr', lanes)}"
    args = [(f"<{lanes} x ptr>", addresses), ("i32", str(BYTES[element])), (f"<{lanes} x i1>", masked), (vector, given)]
    return from_memory(lowering, lowering.e.call(vector, symbol, args), element, widths)


def contiguous_lanes(offset: Number, pointer: Pointer, widths: tuple[int, ...]) -> int:
    """How many lanes, counted from the innermost dimension, lie side by side in memory."""
    if not isinstance(offset, Affine):
        return 1
    step = BYTES[pointer.pointee] if pointer.base is None else 1
    lanes = 1
    for stride, width in zip(reversed(offset.strides), reversed(offset.widths), strict=True):
        if stride.value != step * lanes:
            return lanes
        lanes *= width
    return lanes


def address_of(lowering: Lowering, pointer: Pointer, offset: Uniform) -> Text:
    """One address."""
    e = lowering.e
    if pointer.base is None:
        return e.op(f"inttoptr i64 {s.text(offset)} to ptr")
    return e.address(storage_type(pointer.pointee), pointer.base, offset.value)  # type: ignore[arg-type]


def address_vector(lowering: Lowering, pointer: Pointer, lanes: int) -> Text:
    """The addresses of all lanes as a vector of ptr."""
    offsets = s.vector_text(lowering.e, pointer.offset, lanes)
    if pointer.base is None:
        return lowering.e.op(f"inttoptr <{lanes} x i64> {offsets} to <{lanes} x ptr>")
    return lowering.e.op(f"getelementptr {storage_type(pointer.pointee)}, ptr {pointer.base}, <{lanes} x i64> {offsets}")


def first_offset(offset: Number) -> Uniform:
    """Offset of lane 0 of a uniform or affine offset."""
    if isinstance(offset, Affine):
        return offset.base
    assert isinstance(offset, Uniform)
    return offset


def from_memory(lowering: Lowering, loaded: Text, element: str, widths: tuple[int, ...]) -> Number:
    """A loaded operand as a number: booleans are bytes in memory."""
    if element == "i1":
        lanes = math.prod(widths)
        zero = "0" if lanes == 1 else "zeroinitializer"
        loaded = lowering.e.op(f"icmp ne {vector_type('i8', lanes)} {loaded}, {zero}")
    return Vector(loaded, element, widths) if widths else Uniform(loaded, element)


def _passthrough(lowering: Lowering, other: Val | None, element: str, lanes: int) -> Text:
    if other is None:
        return "zeroinitializer"
    return to_memory(lowering, other, element, lanes)


def to_memory(lowering: Lowering, x: Val, element: str, lanes: int) -> Text:
    """Operand of a number as it is stored: booleans as bytes."""
    text = lowering.lanes_text(x, lanes)
    if element == "i1":
        return lowering.e.op(f"zext {vector_type('i1', lanes)} {text} to {vector_type('i8', lanes)}")
    return text


def _unless_full(lowering: Lowering, mask: Text, lanes: int) -> tuple[str, str]:
    """Branch on whether a mask holds in all lanes; start the block where it does, return the other label and the end's.

    Masked accesses that miss the cache cost up to twice as much as plain ones, even if the mask holds everywhere. In a row,
    nearly all chunks lie on one side of its end, so the branch is predicted.
    """
    e = lowering.e
    full, part, done = e.fresh_label("full"), e.fresh_label("part"), e.fresh_label("done")
    bits = e.op(f"bitcast <{lanes} x i1> {mask} to i{lanes}")
    e.branch(e.op(f"icmp eq i{lanes} {bits}, -1"), full, part)
    e.label(full)
    return part, done


def _read_dense(
    lowering: Lowering,
    pointer: Pointer,
    mask: Number | None,
    other: Val | None,
    element: str,
    widths: tuple[int, ...],
    *,
    even_mask: bool = False,
) -> Number:
    e, lanes = lowering.e, math.prod(widths)
    kind = storage_type(element)
    vector = vector_type(kind, lanes)
    address = address_of(lowering, pointer, first_offset(pointer.offset))
    align = BYTES[element]
    if isinstance(mask, Vector):
        masked = (f"<{lanes} x i1>", mask.text)
        args = [("ptr", address), ("i32", str(align)), masked, (vector, _passthrough(lowering, other, element, lanes))]
        symbol = f"llvm.masked.load.{mangle(kind, lanes)}.p0"
        if not even_mask:
            return from_memory(lowering, e.call(vector, symbol, args), element, widths)
        part, done = _unless_full(lowering, mask.text, lanes)
        loaded = e.op(f"load {vector}, ptr {address}, align {align}")
        full = e.current
        e.jump(done)
        e.label(part)
        masked_load = e.call(vector, symbol, args)
        e.jump(done)
        e.label(done)
        both = e.op(f"phi {vector} [{loaded}, %{full}], [{masked_load}, %{part}]")
        return from_memory(lowering, both, element, widths)
    if mask is None:
        return from_memory(lowering, e.op(f"load {vector}, ptr {address}, align {align}"), element, widths)
    e.declare("zeros", _ZEROS)
    address = e.op(f"select i1 {s.vector_text(e, mask, 1)}, ptr {address}, ptr @zeros")
    result = from_memory(lowering, e.op(f"load {vector}, ptr {address}, align {align}"), element, widths)
    if other is None or (isinstance(other, Uniform) and other.value == 0 and str(other.value)[0] != "-"):
        return result
    return as_number(choose(lowering, mask, result, as_number(other)))


def _read_rows(
    lowering: Lowering,
    pointer: Pointer,
    offset: Affine,
    mask: Number | None,
    other: Val | None,
    element: str,
    widths: tuple[int, ...],
) -> Number:
    """A chunk over several dimensions whose innermost one is contiguous: a vector load for each row."""
    e, inner = lowering.e, widths[-1]
    rows = [offset.base]
    for stride, width in zip(offset.strides[:-1], offset.widths[:-1], strict=True):
        steps = [s.uniform_binary(e, "mul", stride, s.constant(i, "i64")) for i in range(width)]
        rows = [s.uniform_binary(e, "add", r, step) for r in rows for step in steps]
    texts = []
    for r, row in enumerate(rows):
        picks = list(range(r * inner, (r + 1) * inner))

        def part(x: Number, picks: list[int] = picks) -> Number:
            if isinstance(x, Uniform):
                return x
            text = s.vector_text(e, x, math.prod(widths))
            kind = "i1" if x.element == "i1" else storage_type(x.element)
            return Vector(e.shuffle(text, kind, math.prod(widths), picks), x.element, (inner,))

        step_size = s.constant(BYTES[pointer.pointee] if pointer.base is None else 1, "i64")
        at = Pointer(pointer.base, s.affine(row, (step_size,), (inner,)), pointer.pointee)
        piece = _read_dense(
            lowering,
            at,
            part(mask) if mask is not None else None,
            part(as_number(other)) if other is not None else None,
            element,
            (inner,),
        )
        texts.append(s.vector_text(e, piece, inner))
    kind = "i1" if element == "i1" else storage_type(element)
    return Vector(concatenate(lowering, texts, kind, inner), element, widths)


@statement("tt.store")
def store(lowering: Lowering, op: Op) -> None:
    """Write a tensor or a scalar where the mask holds."""
    target = op.operands[0]
    if target.shape != op.operands[1].shape:
        raise UnsupportedError("a store to a block pointer", op.line)
    lowering.prepare(*op.operands)
    layout = lowering.plan.layout
    lane = layout.contiguous(target, layout.lane(op.operands[1]) if target.shape else 0)

    def write(coords: Coords) -> None:
        pointer, x, *mask = (lowering.eval(v, coords) for v in op.operands)
        assert isinstance(pointer, Pointer)
        write_chunk(lowering, op, pointer, x, as_number(mask[0]) if mask else None, widths_of(coords))

    cost = sum(lowering.plan.cost(v) for v in op.operands)
    if not target.shape:
        write(())
        return
    masks.versioned(lowering, op.operands, lambda: lowering.for_each_chunk(target.shape, lane, write, cost=cost))


def write_chunk(lowering: Lowering, op: Op, pointer: Pointer, x: Val, mask: Number | None, widths: tuple[int, ...]) -> None:
    """Store to the addresses of a pointer form."""
    e, lanes = lowering.e, math.prod(widths)
    if isinstance(mask, Uniform) and isinstance(mask.value, int):
        if mask.value & 1 == 0:
            return
        mask = None
    if lowering.options.checked:
        checks.check(lowering, op, "store", pointer, mask, widths)
    element = "i64" if pointer.pointee == "ptr" else pointer.pointee
    kind = storage_type(element)
    vector = vector_type(kind, lanes)
    data = to_memory(lowering, x, element, lanes)
    align = BYTES[element]
    if contiguous_lanes(pointer.offset, pointer, widths) == lanes and not (lanes > 1 and isinstance(pointer.offset, Uniform)):
        address = address_of(lowering, pointer, first_offset(pointer.offset))
        if mask is not None and not isinstance(mask, Uniform):
            masked = s.vector_text(e, mask, lanes)
            args = [(vector, data), ("ptr", address), ("i32", str(align)), (f"<{lanes} x i1>", masked)]
            symbol = f"llvm.masked.store.{mangle(kind, lanes)}.p0"
            if not masks.is_monotone(lowering, op.operands[2]):
                e.call("void", symbol, args)
                return
            part, done = _unless_full(lowering, masked, lanes)
            e.raw(f"store {vector} {data}, ptr {address}, align {align}")
            e.jump(done)
            e.label(part)
            e.call("void", symbol, args)
            e.jump(done)
            e.label(done)
            return
        if mask is not None:
            # A store that must not happen goes to the program's own scratch, which nothing reads there.
            address = e.op(f"select i1 {s.text(mask)}, ptr {address}, ptr %scratch")
        e.raw(f"store {vector} {data}, ptr {address}, align {align}")
        return
    masked = s.vector_text(e, mask, lanes) if mask is not None else "splat (i1 true)"
    addresses = address_vector(lowering, pointer, lanes)
    args = [(vector, data), (f"<{lanes} x ptr>", addresses), ("i32", str(align)), (f"<{lanes} x i1>", masked)]
    e.call("void", f"llvm.masked.scatter.{mangle(kind, lanes)}.{mangle('ptr', lanes)}", args)
