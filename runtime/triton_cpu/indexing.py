"""Operations that go through an index into a tensor: gather and histogram."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import scalars as s
from .buffers import storage_type
from .casts import as_number
from .registry import materialiser
from .values import Coord, Coords, Uniform, Val

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Op


def index_inside(lowering: Lowering, index: Val, size: int) -> str:
    """An index as i64, brought into [0, size): one outside has no meaning, but must not reach foreign memory."""
    wide = s.vector_text(lowering.e, s.to_i64(lowering.e, as_number(index)), 1)
    return lowering.e.op(f"and i64 {wide}, {size - 1}")


@materialiser("tt.gather")
def gather(lowering: Lowering, op: Op) -> None:
    """Pick elements along an axis by index, one at a time."""
    source, indices = op.operands
    axis, result = op.attrs["axis"], op.result
    held = lowering.materialise(source)
    lowering.materialise(indices)
    output = lowering.new_buffer(result.shape, result.element, len(result.shape) - 1)

    def write(coords: Coords) -> None:
        at = index_inside(lowering, lowering.eval(indices, coords), source.shape[axis])
        picked = (*coords[:axis], Coord(at), *coords[axis + 1 :])
        lowering.store_chunk(output, coords, lowering.load_chunk(held, picked))

    lowering.for_each_element(result.shape, write)
    lowering.buffers[result] = output


@materialiser("tt.histogram")
def histogram(lowering: Lowering, op: Op) -> None:
    """Count the elements equal to each bin's number; others are ignored."""
    e, result = lowering.e, op.result
    source, *mask = op.operands
    for value in op.operands:
        lowering.materialise(value)
    output = lowering.new_buffer(result.shape, result.element, 0)
    zero = s.constant(0, result.element)
    lowering.for_each_chunk(result.shape, 0, lambda at: lowering.store_chunk(output, at, zero))
    kind = storage_type(result.element)

    def count(coords: Coords) -> None:
        x = s.to_i64(e, as_number(lowering.eval(source, coords)))
        text = s.vector_text(e, x, 1)
        wanted = e.op(f"icmp ult i64 {text}, {result.shape[0]}")
        for m in mask:
            wanted = e.op(f"and i1 {wanted}, {s.vector_text(e, as_number(lowering.eval(m, coords)), 1)}")
        with e.when(wanted):
            at = (Coord(text),)
            old = lowering.load_chunk(output, at)
            assert isinstance(old, Uniform)
            lowering.store_chunk(output, at, Uniform(e.op(f"add {kind} {s.text(old)}, 1"), result.element))

    lowering.for_each_element(source.shape, count)
    lowering.buffers[result] = output
