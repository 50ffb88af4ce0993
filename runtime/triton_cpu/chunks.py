"""Loop nests over tiles, and reading and writing the chunks of buffers. Knows nothing of Triton's operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import scalars as s
from .buffers import Buffer, Scratch, storage_type, strides_for
from .emit import LLVM_TYPES, Emitter, Text, vector_type
from .isa import Isa
from .values import Affine, Coord, Coords, Number, Pointer, Uniform, Val, Vector, lanes_of, widths_of

UNROLL_CHUNKS = 4
"""Chunks computed per iteration of a loop over a row."""

CHEAP_TREE_OPS = 24
"""A tree of more operations than this is not unrolled so far."""


@dataclass(eq=False, kw_only=True)
class Chunks:
    """The function being emitted, and the scratch memory of one program."""

    isa: Isa
    e: Emitter = field(default_factory=Emitter)
    scratch: Scratch = field(default_factory=Scratch)

    def lanes_text(self, x: Val, lanes: int) -> Text:
        """LLVM operand of a form with all its lanes; addresses as i64."""
        return s.vector_text(self.e, s.absolute(self.e, x) if isinstance(x, Pointer) else x, lanes)

    def emit(self, right_hand_side: str, element: str, widths: tuple[int, ...]) -> Number:
        """Emit an instruction that computes a value of `element` with the given lanes."""
        result = self.e.op(right_hand_side)
        return Vector(result, element, widths) if widths else Uniform(result, element)

    def kind(self, element: str, widths: tuple[int, ...]) -> str:
        """LLVM type of a register with the given lanes."""
        return vector_type(LLVM_TYPES[element], math.prod(widths))

    def text(self, x: Val, widths: tuple[int, ...]) -> Text:
        """LLVM operand of a form, spread over the given lanes."""
        return self.lanes_text(x, math.prod(widths))

    # -- loop nests ---------------------------------------------------------------------------------------------------

    def for_each_chunk(self, shape: tuple[int, ...], lane: int, body: Callable[[Coords], None], *, cost: int = 0) -> None:
        """Emit a loop nest that covers a tensor of `shape`, with `body` emitting the work of one chunk.

        Args:
            shape: dimensions, powers of two.
            lane: the dimension to run along the lanes; its neighbours join in where it is shorter than a vector.
            body: called with the chunk.
            cost: operations in the body, which limits unrolling.
        """
        widths = self.chunk_widths(shape, lane)
        order = [d for d in range(len(shape)) if d != lane and shape[d] > widths[d]]
        if shape and shape[lane] > widths[lane]:
            order.append(lane)
        coords = [Coord(0, w) for w in widths]

        def descend(depth: int) -> None:
            if depth == len(order):
                body(tuple(coords))
                return
            d = order[depth]
            width, count = widths[d], shape[d] // widths[d]
            innermost = depth == len(order) - 1
            unroll = (UNROLL_CHUNKS if cost <= CHEAP_TREE_OPS else 1) if innermost and width > 1 else 1
            if count <= unroll:
                for c in range(count):
                    coords[d] = Coord(c * width, width)
                    descend(depth + 1)
                return
            with self.e.loop(0, shape[d], width * unroll) as loop:
                for u in range(unroll):
                    base = loop.index if u == 0 else self.e.op(f"add i64 {loop.index}, {u * width}")
                    coords[d] = Coord(base, width, width)
                    descend(depth + 1)

        with self.e.scope():
            descend(0)

    def fill_buffer(self, buffer: Buffer, lane: int, value: Callable[[Coords], Val], *, cost: int = 0) -> None:
        """Emit the nest that writes a tensor into a buffer, evaluated chunk by chunk along `lane`.

        Args:
            buffer: the target; its own lanes may run along another dimension.
            lane: as in `for_each_chunk`.
            value: emits the tensor at a chunk.
            cost: as in `for_each_chunk`.
        """
        shape, lanes = buffer.shape, self.isa.lanes
        turned = len(shape) == 2 and buffer.strides[1 - lane] == 1 and all(n % lanes == 0 for n in shape)
        if not turned or storage_type(buffer.element) not in ("float", "i32") or cost > CHEAP_TREE_OPS:
            self.for_each_chunk(shape, lane, lambda at: self.store_chunk(buffer, at, value(at)), cost=cost)
            return
        e, kind = self.e, storage_type(buffer.element)
        with e.scope(), e.loop(0, shape[1 - lane], lanes) as rows, e.loop(0, shape[lane], lanes) as columns:

            def at(first: Coord, second: Coord) -> Coords:
                return (second, first) if lane == 0 else (first, second)

            across = Coord(columns.index, lanes, lanes)
            lines = []
            for r in range(lanes):
                row = Coord(e.combine((rows.index, 1), (r, 1)))
                lines.append(self.lanes_text(value(at(row, across)), lanes))
            for c, line in enumerate(_transposed(e, lines, kind)):
                column = Coord(e.combine((columns.index, 1), (c, 1)))
                self.store_chunk(buffer, at(Coord(rows.index, lanes, lanes), column), Vector(line, buffer.element, (lanes,)))

    def for_each_element(self, shape: tuple[int, ...], body: Callable[[Coords], None]) -> None:
        """Emit a loop nest over single elements, row-major."""
        coords: list[Coord] = []

        def descend(depth: int) -> None:
            if depth == len(shape):
                body(tuple(coords))
                return
            with self.e.loop(0, shape[depth], 1) as loop:
                coords.append(Coord(loop.index))
                descend(depth + 1)
                coords.pop()

        with self.e.scope():
            descend(0)

    def chunk_widths(self, shape: tuple[int, ...], lane: int) -> list[int]:
        """Width of a chunk in every dimension: a full vector where the tensor has as many elements."""
        widths = [1] * len(shape)
        room = self.isa.lanes
        for d in [lane, *(d for d in reversed(range(len(shape))) if d != lane)] if shape else []:
            widths[d] = min(shape[d], room)
            room //= widths[d]
            if shape[d] > widths[d] or room <= 1:
                break
        return widths

    # -- buffers ------------------------------------------------------------------------------------------------------

    def new_buffer(self, shape: tuple[int, ...], element: str, lane: int, padding: int = 0) -> Buffer:
        """Reserve scratch for a tensor, with `padding` unused elements after each row of lanes."""
        strides = strides_for(shape, lane, padding) if shape else []
        rows = math.prod(shape) // shape[lane] if shape else 1
        pointer = self.scratch.take(self.e, math.prod(shape) + rows * padding, element)
        return Buffer(pointer, shape, strides, element)

    def element_address(self, buffer: Buffer, coords: Coords) -> Text:
        """Address of the first element of a chunk of a buffer."""
        terms = zip(buffer.strides, (c.base for c in coords), strict=True)
        return self.e.address(storage_type(buffer.element), buffer.pointer, self.e.combine(*terms))

    def _lane_strides(self, buffer: Buffer, coords: Coords) -> list[tuple[int | Text, int]]:
        return [(stride, c.width) for stride, c in zip(buffer.strides, coords, strict=True) if c.width > 1]

    def load_chunk(self, buffer: Buffer, coords: Coords) -> Val:
        """Read a chunk of a buffer."""
        e, kind, widths, lanes = self.e, storage_type(buffer.element), widths_of(coords), lanes_of(coords)
        address = self.element_address(buffer, coords)
        if buffer.consecutive and widths:
            first = e.op(f"load {kind}, ptr {address}")
            return Affine(Uniform(first, buffer.element), (s.constant(1, buffer.element),), widths, buffer.element)
        if not widths:
            return self._from_storage(e.op(f"load {kind}, ptr {address}"), buffer.element, widths)
        if _is_dense(self._lane_strides(buffer, coords)):
            loaded = e.op(f"load {vector_type(kind, lanes)}, ptr {address}, align {self._alignment(buffer, coords)}")
        else:
            loaded = self._gather_rows(buffer, coords, address)
        return self._from_storage(loaded, buffer.element, widths)

    def _alignment(self, buffer: Buffer, coords: Coords) -> int:
        return {"i8": 1, "i16": 2, "half": 2, "i32": 4, "float": 4}.get(storage_type(buffer.element), 8)

    def _lane_offsets(self, buffer: Buffer, coords: Coords) -> list[list[tuple[int | Text, int]]]:
        """For every lane, the (stride, index) terms of its offset from the chunk's first element."""
        offsets: list[list[tuple[int | Text, int]]] = [[]]
        for stride, width in self._lane_strides(buffer, coords):
            offsets = [[*o, (stride, i)] for o in offsets for i in range(width)]
        return offsets

    def _gather_rows(self, buffer: Buffer, coords: Coords, address: Text) -> Text:
        kind, lanes = storage_type(buffer.element), lanes_of(coords)
        offsets = [self.e.combine(*terms) for terms in self._lane_offsets(buffer, coords)]
        result = "poison"
        for lane, offset in enumerate(offsets):
            x = self.e.op(f"load {kind}, ptr {self.e.address(kind, address, offset)}")
            result = self.e.op(f"insertelement {vector_type(kind, lanes)} {result}, {kind} {x}, i32 {lane}")
        return result

    def _from_storage(self, loaded: Text, element: str, widths: tuple[int, ...]) -> Val:
        lanes = math.prod(widths)
        if element == "i1":
            return self.emit(f"trunc {vector_type('i8', lanes)} {loaded} to {vector_type('i1', lanes)}", "i1", widths)
        number: Number = Vector(loaded, element, widths) if widths else Uniform(loaded, element)
        if element != "ptr":
            return number
        address = Vector(loaded, "i64", widths) if widths else Uniform(loaded, "i64")
        return Pointer(None, address, "")

    def store_chunk(self, buffer: Buffer, coords: Coords, x: Val) -> None:
        """Write a chunk of a buffer."""
        e, kind, lanes = self.e, storage_type(buffer.element), lanes_of(coords)
        address = self.element_address(buffer, coords)
        data = self.lanes_text(x, lanes)
        if buffer.element == "i1":
            data = e.op(f"zext {vector_type('i1', lanes)} {data} to {vector_type('i8', lanes)}")
        if lanes == 1 or _is_dense(self._lane_strides(buffer, coords)):
            align = self._alignment(buffer, coords)
            e.raw(f"store {vector_type(kind, lanes)} {data}, ptr {address}, align {align}")
            return
        for lane, terms in enumerate(self._lane_offsets(buffer, coords)):
            element = e.op(f"extractelement {vector_type(kind, lanes)} {data}, i32 {lane}")
            e.raw(f"store {kind} {element}, ptr {e.address(kind, address, e.combine(*terms))}")

    def copy_buffer(self, source: Buffer, target: Buffer) -> None:
        """Emit the nest that copies one buffer into another of the same shape."""
        self.for_each_chunk(source.shape, source.lane, lambda at: self.store_chunk(target, at, self.load_chunk(source, at)))


def index_as(e: Emitter, at: Coord, element: str, start: int = 0) -> Uniform:
    """The base of a coordinate plus `start` as an i32 or i64."""
    if isinstance(at.base, int):
        return s.constant(at.base + start, element)
    base = at.base
    if element != "i64":
        base = s.memo(e, ("index", at.base, element), lambda: e.op(f"trunc i64 {at.base} to {LLVM_TYPES[element]}"))
    return s.uniform_binary(e, "add", Uniform(base, element, at.divisor, True), s.constant(start, element))


def _transposed(e: Emitter, lines: Sequence[Text], kind: str) -> list[Text]:
    """Emit the transposition of a square of lanes: halves change places, then quarters within them, and so on."""
    lines, size = list(lines), len(lines)
    step = size // 2
    while step:
        kept = [i if not i & step else size + i - step for i in range(size)]
        moved = [i + step if not i & step else size + i for i in range(size)]
        for r in range(size):
            if not r & step:
                upper, lower = lines[r], lines[r + step]
                lines[r] = e.shuffle(upper, kind, size, kept, lower)
                lines[r + step] = e.shuffle(upper, kind, size, moved, lower)
        step //= 2
    return lines


def _is_dense(lane_strides: Sequence[tuple[int | Text, int]]) -> bool:
    """Whether the lanes of a chunk lie side by side in memory, in order."""
    step = 1
    for stride, width in reversed(lane_strides):
        if stride != step:
            return False
        step *= width
    return True
