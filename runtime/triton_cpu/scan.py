"""Prefix scans with any combine function."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import scalars as s
from .arithmetic import choose
from .buffers import Buffer
from .casts import as_number
from .combine import apply_region
from .emit import LLVM_TYPES, Text, vector_type
from .registry import materialiser
from .values import Coord, Coords, Number, Uniform, Val, Vector

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Op


@materialiser("tt.scan")
def scan(lowering: Lowering, op: Op) -> None:
    """Combine every element with all before it along an axis (all after it, in reverse)."""
    e, axis, operands = lowering.e, op.attrs["axis"], op.operands
    shape, reverse = operands[0].shape, bool(op.attrs.get("reverse", False))
    lowering.prepare(*operands)
    lane = lowering.natural_lane(operands[0])
    widths = lowering.chunk_widths(shape, lane)
    outputs = [lowering.new_buffer(shape, r.element, lane) for r in op.results]

    def descend(dims: list[int], at: list[Coord]) -> None:
        if not dims:
            _along(lowering, op, at, widths, outputs, reverse)
            return
        d, *others = dims
        if widths[d] == shape[d]:
            at[d] = Coord(0, widths[d])
            descend(others, at)
            return
        with e.loop(0, shape[d], widths[d]) as loop:
            at[d] = Coord(loop.index, widths[d], widths[d])
            descend(others, at)

    with e.scope():
        descend([d for d in range(len(shape)) if d != axis], [Coord(0)] * len(shape))
    for r, output in zip(op.results, outputs, strict=True):
        lowering.buffers[r] = output


def _along(lowering: Lowering, op: Op, at: list[Coord], widths: list[int], outputs: list[Buffer], reverse: bool) -> None:
    """Scan the chunks along the axis one after the other, carrying the last element of each into the next."""
    e, axis = lowering.e, op.attrs["axis"]
    size, width = op.operands[0].shape[axis], widths[axis]
    lanes = math.prod(widths)
    kinds = [vector_type(LLVM_TYPES[v.element], lanes) for v in op.operands]
    lane_widths = tuple(w for w in widths if w > 1)

    def step(base: int | Text, carry: list[Val] | None, is_first: Uniform | None) -> list[Val]:
        coords: Coords = (*at[:axis], Coord(base, width, width), *at[axis + 1 :])
        values: list[Val] = [lowering.eval(v, coords) for v in op.operands]
        values = _within(lowering, op, values, widths, reverse)
        if carry is not None:
            later = Uniform(e.op(f"xor i1 {s.text(is_first)}, true"), "i1") if is_first is not None else None
            joined = apply_region(lowering, op.body, [*carry, *values], later)
            if is_first is not None:
                joined = [choose(lowering, is_first, v, j) for v, j in zip(values, joined, strict=True)]
            values = joined
        for output, x in zip(outputs, values, strict=True):
            lowering.store_chunk(output, coords, x)
        return [
            _last(lowering, as_number(x), widths, axis, reverse, v.element) for x, v in zip(values, op.operands, strict=True)
        ]

    if size == width:
        step(0, None, None)
        return
    zeros = [(kind, "0" if lanes == 1 and kind[0] == "i" else "zeroinitializer") for kind in kinds]
    with e.loop(0, size, width, carried=zeros) as loop:
        carry: list[Val] = [
            Vector(p, v.element, lane_widths) if lane_widths else Uniform(p, v.element)
            for p, v in zip(loop.phis, op.operands, strict=True)
        ]
        base = e.op(f"sub i64 {size - width}, {loop.index}") if reverse else loop.index
        is_first = Uniform(e.op(f"icmp eq i64 {loop.index}, 0"), "i1")
        loop.next = [lowering.lanes_text(x, lanes) for x in step(base, carry, is_first)]


def _sides(widths: list[int], axis: int) -> tuple[int, int]:
    return math.prod(widths[:axis]), math.prod(widths[axis + 1 :])


def _within(lowering: Lowering, op: Op, values: list[Val], widths: list[int], reverse: bool) -> list[Val]:
    """Scan the lanes of one chunk along the axis in log2(width) steps."""
    axis, width, lanes = op.attrs["axis"], widths[op.attrs["axis"]], math.prod(widths)
    before, after = _sides(widths, axis)
    lane_widths = tuple(w for w in widths if w > 1)
    distance = 1
    while distance < width:
        order, keep = [], []
        for b in range(before):
            for i in range(width):
                source = i + distance if reverse else i - distance
                inside = 0 <= source < width
                for a in range(after):
                    order.append((b * width + (source if inside else i)) * after + a)
                    keep.append(not inside)
        moved: list[Val] = []
        for x, v in zip(values, op.operands, strict=True):
            text = s.vector_text(lowering.e, as_number(x), lanes)
            moved.append(Vector(lowering.e.shuffle(text, LLVM_TYPES[v.element], lanes, order), v.element, lane_widths))
        unchanged, changed = (_flags(keep, lane_widths, which) for which in (True, False))
        combined = apply_region(lowering, op.body, [*moved, *values], changed)
        values = [choose(lowering, unchanged, x, c) for x, c in zip(values, combined, strict=True)]
        distance *= 2
    return values


def _flags(keep: list[bool], widths: tuple[int, ...], which: bool) -> Number:
    """A constant mask of the lanes that are kept (`which`), or of the others."""
    return Vector("<" + ", ".join(f"i1 {str(k == which).lower()}" for k in keep) + ">", "i1", widths)


def _last(lowering: Lowering, x: Number, widths: list[int], axis: int, reverse: bool, element: str) -> Number:
    """The final element along the axis, in all its lanes."""
    width, lanes = widths[axis], math.prod(widths)
    if isinstance(x, Uniform) or width == 1:
        return x
    before, after = _sides(widths, axis)
    at = 0 if reverse else width - 1
    order = [(b * width + at) * after + a for b in range(before) for _ in range(width) for a in range(after)]
    text = lowering.e.shuffle(s.vector_text(lowering.e, x, lanes), LLVM_TYPES[element], lanes, order)
    return Vector(text, element, tuple(w for w in widths if w > 1))
