"""Matrix products: which operand is read as vectors, where operands are packed, and where the result goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import direct, masks
from . import scalars as s
from .analysis import lane_by_lane
from .buffers import Buffer, storage_type
from .casts import HALVES, NARROW, as_number, convert_float
from .emit import Text
from .errors import UnsupportedError
from .isa import Isa
from .microkernel import Operand, emit_product
from .microkernel_groups import Packing, pack, packing_of
from .registry import materialiser
from .values import BYTES, Coord, Coords, Uniform, Vector

if TYPE_CHECKING:
    from .analysis import Plan
    from .carried import Carried
    from .lowering import Lowering
    from .ttir import Function, Op, Value

PADDED_ROW_BYTES = 512
"""Packed rows from this length on get a cache line of padding, so that rows do not fall into the same cache sets."""

_ACCUMULATORS = {"f16": "f32", "bf16": "f32", "f32": "f32", "f64": "f64", "i32": "i32"}


def plan_dots(plan: Plan, function: Function, isa: Isa) -> None:
    """Fix the lane dimensions of the operands and results of every product.

    Computing the transposed product reads a K-contiguous right operand (`tl.trans(k)` of row-major keys) as the broadcast one,
    with no transposition; the left operand is then packed with M along the lanes, once if a loop does not change it.
    """
    for op in function.walk():
        if op.name != "tt.dot":
            continue
        a, b = op.operands[:2]
        rank, layout = len(a.shape), plan.layout
        m, n = rank - 2, rank - 1
        outside = a.block is not op.block
        reads_rows = layout.lane(a) == m and a.shape[m] > 1
        transposed = layout.lane(b) == rank - 2 and b.shape[rank - 2] > 1 and a.shape[m] >= isa.lanes
        if transposed and (outside or reads_rows):
            plan.transposed.add(op)
            broadcast, vectors, lane, k_dim = b, a, m, rank - 2
        else:
            broadcast, vectors, lane, k_dim = a, b, n, rank - 1
        if _grouping(isa, op) is not None and rank == 2 and layout.natural(broadcast) == k_dim:
            plan.grouped.add(op)
            layout.decide(broadcast, k_dim)
        else:
            layout.decide(vectors, lane)
        layout.decide(op.result, lane)


def _grouping(isa: Isa, op: Op) -> Packing | None:
    a, b = op.operands[:2]
    if a.element != b.element or _ACCUMULATORS.get(op.result.element) != {"i8": "i32", "bf16": "f32"}.get(a.element):
        return None
    return packing_of(isa, a.element, a.shape[-1])


def _roles(lowering: Lowering, op: Op) -> tuple[Value, Value]:
    """(the operand whose elements are broadcast, the one that is read as vectors)."""
    a, b = op.operands[:2]
    return (b, a) if op in lowering.plan.transposed else (a, b)


@materialiser("tt.dot")
def product(lowering: Lowering, op: Op) -> None:
    """C + A @ B, batched over a leading dimension."""
    result, c = op.result, op.operands[2]
    accumulator = _ACCUMULATORS.get(result.element)
    if accumulator is None:
        raise UnsupportedError(f"tl.dot with a result of {result.element}", op.line)
    transposed = op in lowering.plan.transposed
    broadcast, vectors = operands(lowering, op)
    lowering.prepare(c)
    replaced = lowering.in_place.get(result)
    if replaced is not None:
        buffer = lowering.buffers[replaced]
    else:
        buffer = lowering.new_buffer(result.shape, result.element, lowering.plan.layout.lane(result))
    rows, columns = result.shape[-2:][:: -1 if transposed else 1]

    def one(batch: tuple[Coord, ...]) -> None:
        at = [c.base for c in batch]

        def coords(row: int | Text, column: int | Text, lanes: int) -> Coords:
            across = Coord(column, lanes, lanes)
            pair = (across, Coord(row)) if transposed else (Coord(row), across)
            return (*batch, *pair)

        def initial(row: int | Text, column: int | Text, lanes: int) -> Text:
            value = as_number(lowering.eval(c, coords(row, column, lanes)))
            if value.element in HALVES:
                value = convert_float(lowering, value, "f32")
            return s.vector_text(lowering.e, value, lanes)

        def store(row: int | Text, column: int | Text, lanes: int, text: Text) -> None:
            value = Vector(text, accumulator, (lanes,)) if lanes > 1 else Uniform(text, accumulator)
            if result.element in HALVES:
                value = convert_float(lowering, value, result.element)  # type: ignore[assignment]
            lowering.store_chunk(buffer, coords(row, column, lanes), value)

        x, y = (_slice(lowering, v, at, transposed) for v in (broadcast, vectors))
        k = op.operands[0].shape[-1]
        emit_product(lowering.e, lowering.isa, rows, columns, k, x, y, accumulator, initial, store)

    if len(result.shape) == 2:
        with lowering.e.scope():
            one(())
    else:
        with lowering.e.loop(0, result.shape[0], 1) as loop:
            one((Coord(loop.index),))
    lowering.buffers[result] = buffer


def _slice(lowering: Lowering, x: Buffer | Operand, batch: list[int | Text], transposed: bool) -> Operand:
    if isinstance(x, Operand):
        return x
    offset = lowering.e.combine(*zip(x.strides, batch, strict=False))
    pointer = lowering.e.address(storage_type(x.element), x.pointer, offset)
    last, first = x.strides[-1], x.strides[-2]
    return Operand(pointer, x.element, (last, first) if transposed else (first, last))


def operands(lowering: Lowering, op: Op) -> tuple[Buffer | Operand, Buffer | Operand]:
    """The operands of a product in memory: (broadcast, vectors)."""
    broadcast, vectors = _roles(lowering, op)
    return operand(lowering, op, broadcast, as_vectors=False), operand(lowering, op, vectors, as_vectors=True)


def operand(lowering: Lowering, op: Op, value: Value, *, as_vectors: bool) -> Buffer | Operand:
    """An operand in the form that its product wants; one that is already there is used again."""
    if value.element not in (*NARROW, "f32", "f64", "i8", "i16", "i32"):
        raise UnsupportedError(f"tl.dot on {value.element}", op.line)
    transposed = op in lowering.plan.transposed
    rank = len(value.shape)
    if op in lowering.plan.grouped:
        packing = _grouping(lowering.isa, op)
        assert packing is not None
        if as_vectors:
            return _grouped_vectors(lowering, value, packing, transposed=transposed)
        k_dim = rank - 2 if transposed else rank - 1
        return _converted(lowering, value, packing.element, k_dim, as_vectors=False)
    element = "f32" if value.element in NARROW else value.element
    if not as_vectors:
        return _converted(lowering, value, element, None, as_vectors=False)
    return _converted(lowering, value, element, rank - 2 if transposed else rank - 1, as_vectors=True)


def _converted(lowering: Lowering, value: Value, element: str, lane: int | None, *, as_vectors: bool) -> Buffer:
    """A tensor as a matrix of `element`: in memory where it can be read there, else copied into scratch.

    Args:
        lowering: the kernel.
        value: the tensor.
        element: element type wanted.
        lane: the dimension whose elements must lie side by side; None for any. Two products may want different ones.
        as_vectors: whether the product reads it as vectors.
    """

    def held(key: Any) -> Buffer | None:
        found = lowering.buffers.get(key)
        fits = found is not None and (lane is None or found.strides[lane] == 1 or found.shape[lane] == 1)
        return found if fits else None

    plain: Any = value if element == value.element else (element, value)
    keys = (plain, (element, value, lane))
    for key in keys:
        found = held(key)
        if found is not None:
            return found
    made = _read_directly(lowering, value, lane, as_vectors) if element == value.element else None
    if made is None:
        lowering.prepare(value)
        found = held(plain)
        if found is not None:
            return found
        made = _copied(lowering, value, element, lane, as_vectors=as_vectors)
    lowering.buffers[keys[0] if plain not in lowering.buffers else keys[1]] = made
    return made


def _copied(lowering: Lowering, value: Value, element: str, lane: int | None, *, as_vectors: bool) -> Buffer:
    along = lowering.plan.layout.lane(value) if lane is None else lane
    padded = as_vectors and value.shape[along] * BYTES[element] >= PADDED_ROW_BYTES
    buffer = lowering.new_buffer(value.shape, element, along, 64 // BYTES[element] if padded else 0)
    _fill(lowering, value, buffer)
    return buffer


def _fill(lowering: Lowering, value: Value, buffer: Buffer) -> None:
    def chunk(coords: Coords) -> Any:
        return _as_element(lowering, as_number(lowering.eval(value, coords)), buffer.element)

    natural, cost = lowering.natural_lane(value), lowering.plan.cost(value)
    masks.versioned(lowering, [value], lambda: lowering.fill_buffer(buffer, natural, chunk, cost=cost))


def _as_element(lowering: Lowering, x: Any, element: str) -> Any:
    if x.element == element:
        return x
    if element == "i16":
        widths = s.widths_with(x)
        source, target = lowering.kind(x.element, widths), lowering.kind(element, widths)
        return lowering.emit(f"sext {source} {lowering.text(x, widths)} to {target}", element, widths)
    return convert_float(lowering, x, element)


def _read_directly(lowering: Lowering, value: Value, lane: int | None, as_vectors: bool) -> Buffer | None:
    found = direct.source(lowering, value)
    if found is None:
        return None
    load, order = found
    if lane is None:
        lane = lowering.plan.layout.lane(value)
    elif not direct.suits_vectors(lowering, load, order, lane):
        return None
    view = direct.in_memory(lowering, load, order)
    if view is None:
        return None
    condition, held = view
    if condition == "true":
        return held
    e = lowering.e
    copy = lowering.new_buffer(value.shape, value.element, lane)
    copying, done, before = e.fresh_label("copy"), e.fresh_label("read"), e.current
    e.branch(condition, done, copying)
    e.label(copying)
    with lowering.region():
        lowering.prepare(value)
        _fill(lowering, value, copy)
    last = e.current
    e.jump(done)
    e.label(done)

    def either(kind: str, a: int | Text, b: int | Text) -> int | Text:
        return a if a == b else e.op(f"phi {kind} [{a}, %{before}], [{b}, %{last}]")

    pointer = either("ptr", held.pointer, copy.pointer)
    strides = [either("i64", a, b) for a, b in zip(held.strides, copy.strides, strict=True)]
    return Buffer(str(pointer), value.shape, strides, value.element)


def _grouped_vectors(lowering: Lowering, value: Value, packing: Packing, *, transposed: bool) -> Operand:
    key = (value, packing, transposed)
    if key in lowering.packed:
        return lowering.packed[key]
    k, n = value.shape[:: -1 if transposed else 1]
    lowering.prepare(value)
    if lowering.natural_lane(value) != (0 if transposed else 1):
        lowering.materialise(value)
    target = lowering.scratch.take(lowering.e, packing.bytes(k, n), "i8")

    def load(row: int | Text, column: int | Text, lanes: int) -> Text:
        across = Coord(column, lanes, lanes)
        coords = (across, Coord(row)) if transposed else (Coord(row), across)
        return lowering.lanes_text(lowering.eval(value, coords), lanes)

    filled: list[Operand] = []

    def nest() -> None:
        filled.append(pack(lowering.e, lowering.isa, packing, k, n, value.element, load, target))

    masks.versioned(lowering, [value], nest)
    lowering.packed[key] = filled[0]
    return filled[0]


def hoist_operands(lowering: Lowering, op: Op) -> None:
    """Pack before a loop what its products read from outside it."""
    for inner in op.walk():
        if inner.name != "tt.dot":
            continue
        for value, as_vectors in zip(_roles(lowering, inner), (False, True), strict=True):
            if not _is_inside(value, op):
                operand(lowering, inner, value, as_vectors=as_vectors)


def _is_inside(value: Value, op: Op) -> bool:
    block = value.block
    while block is not None:
        if block.parent is op:
            return True
        block = block.parent.block if block.parent is not None else None
    return False


def find_in_place(lowering: Lowering, carried: list[Carried], produced: list[Value]) -> None:
    """Let products that accumulate onto a loop-carried tensor, used for nothing else, write over it."""
    for c, y in zip(carried, produced, strict=True):
        if c.kind != "buffer":
            continue
        chain: list[Value] = []
        while y.op is not None and y.op.name == "tt.dot" and y.block is c.argument.block:
            chain.append(y)
            y = y.op.operands[2]
            if y.op is None or y.op.name != "tt.dot":
                break
        sources = [c.argument, *reversed(chain[1:])]
        targets = list(reversed(chain))
        if chain and all(
            _feeds_only(source, target.op) and lane_by_lane(target.op.operands[2], source)  # type: ignore[arg-type, union-attr]
            for source, target in zip(sources, targets, strict=True)
        ):
            for target in targets:
                lowering.in_place[target] = c.argument


def _feeds_only(value: Value, dot: Op) -> bool:
    """Whether `value` is used only, lane by lane, for the accumulator of one product."""
    for use in value.uses:
        if use is dot:
            if dot.operands[2] is not value or value in dot.operands[:2]:
                return False
        elif len(use.results) != 1 or use.block is not dot.block or not _feeds_only(use.result, dot):
            return False
    return bool(value.uses)
