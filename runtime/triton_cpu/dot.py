"""Matrix products: which operand is read as vectors, where operands are packed, and where the result goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import masks
from . import scalars as s
from .analysis import _lane_by_lane
from .buffers import Buffer, storage_type
from .casts import HALVES, as_number, convert_float
from .emit import Text
from .errors import UnsupportedError
from .isa import Isa
from .microkernel import Operand, emit_product
from .registry import materialiser
from .values import Coord, Coords, Uniform, Vector

if TYPE_CHECKING:
    from .analysis import Plan
    from .control import Carried
    from .lowering import Lowering
    from .ttir import Function, Op, Value


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
            layout.decide(a, m)
            layout.decide(op.result, m)
        else:
            layout.decide(b, n)
            layout.decide(op.result, n)


@materialiser("tt.dot")
def product(lowering: Lowering, op: Op) -> None:
    """C + A @ B, batched over a leading dimension."""
    result = op.result
    a, b, c = op.operands[:3]
    rank = len(result.shape)
    transposed = op in lowering.plan.transposed
    accumulator = {"f16": "f32", "bf16": "f32", "f32": "f32", "f64": "f64", "i32": "i32"}.get(result.element)
    if accumulator is None:
        raise UnsupportedError(f"tl.dot with a result of {result.element}", op.line)
    left, right = (operand(lowering, op, v, accumulator) for v in (a, b))
    lowering.prepare(c)
    replaced = lowering.in_place.get(result)
    if replaced is not None:
        buffer = lowering.buffers[replaced]
    else:
        buffer = lowering.new_buffer(result.shape, result.element, lowering.plan.layout.lane(result))
    m, k = a.shape[-2:]
    n = b.shape[-1]

    def one(batch: tuple[Coord, ...]) -> None:
        at = [c.base for c in batch]
        x, y = (_slice(lowering, v, at) for v in (left, right))
        if transposed:
            rows, columns = n, m
            vectors = Operand(x.pointer, x.element, (x.strides[1], x.strides[0]))
            broadcast = Operand(y.pointer, y.element, (y.strides[1], y.strides[0]))
        else:
            rows, columns, broadcast, vectors = m, n, x, y

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

        emit_product(lowering.e, lowering.isa, rows, columns, k, broadcast, vectors, accumulator, initial, store)

    if rank == 2:
        with lowering.e.scope():
            one(())
    else:
        with lowering.e.loop(0, result.shape[0], 1) as loop:
            one((Coord(loop.index),))
    lowering.buffers[result] = buffer


def _slice(lowering: Lowering, x: Buffer, batch: list[int | Text]) -> Operand:
    offset = lowering.e.combine(*zip(x.strides, batch, strict=False))
    pointer = lowering.e.address(storage_type(x.element), x.pointer, offset)
    return Operand(pointer, x.element, (x.strides[-2], x.strides[-1]))


def operand(lowering: Lowering, op: Op, value: Value, accumulator: str) -> Buffer:
    """An operand of a product in memory, 16-bit floats widened to fp32."""
    if value.element not in (*HALVES, "f32", "f64", "i8", "i16", "i32"):
        raise UnsupportedError(f"tl.dot on {value.element}", op.line)
    if value.element not in HALVES:
        return lowering.materialise(value)
    key: Any = ("f32", value)
    if key in lowering.buffers:
        return lowering.buffers[key]
    lowering.prepare(value)
    lane = lowering.plan.layout.lane(value)
    buffer = lowering.new_buffer(value.shape, "f32", lane)

    def write(coords: Coords) -> None:
        lowering.store_chunk(buffer, coords, convert_float(lowering, as_number(lowering.eval(value, coords)), "f32"))

    natural, cost = lowering.natural_lane(value), lowering.plan.cost(value)
    masks.versioned(lowering, [value], lambda: lowering.for_each_chunk(value.shape, natural, write, cost=cost))
    lowering.buffers[key] = buffer
    return buffer


def hoist_operands(lowering: Lowering, op: Op) -> None:
    """Pack before a loop what its products read from outside it."""
    for inner in op.walk():
        if inner.name != "tt.dot":
            continue
        for value in inner.operands[:2]:
            if not _is_inside(value, op):
                operand(lowering, inner, value, "f32")


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
            _feeds_only(source, target.op) and _lane_by_lane(target.op.operands[2], source, {})  # type: ignore[arg-type, union-attr]
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
