"""The heart of the code generator: tensors are evaluated chunk by chunk, on demand.

No tensor is computed where its operation stands. Operations with effects (`STATEMENTS`) ask for the chunks they need, and
evaluation walks back through the operands, remembering what it has emitted in the scopes of the `Emitter`. What `Plan`
marks, and what only makes sense whole (`MATERIALISERS`), is computed into a `Buffer` first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from . import masks
from . import scalars as s
from .analysis import Plan
from .buffers import Buffer, Scratch, storage_type, strides_for
from .emit import LLVM_TYPES, Emitter, Text, vector_type
from .errors import UnsupportedError
from .generated import Site, SiteKind
from .isa import Isa
from .microkernel import Operand
from .options import CPUOptions
from .registry import ELEMENTWISE, EVALUATORS, MATERIALISERS, STATEMENTS
from .ttir import Block, Op, Value
from .values import Affine, Coord, Coords, Number, Pointer, Uniform, Val, Vector, lanes_of, widths_of

UNROLL_CHUNKS = 4
"""Chunks computed per iteration of a loop over a row."""

CHEAP_TREE_OPS = 24
"""A tree of more operations than this is not unrolled so far."""


@dataclass(eq=False)
class Induction:
    """A tensor carried round a loop whose elements all grow by the same amount: `initial` plus one run-time number."""

    initial: Value
    offset: Number


@dataclass(eq=False)
class Lowering:
    """State of lowering one kernel to the body of an LLVM function."""

    plan: Plan
    isa: Isa
    options: CPUOptions
    e: Emitter = field(default_factory=Emitter)
    scratch: Scratch = field(default_factory=Scratch)
    environment: dict[Value, Val] = field(default_factory=dict)
    """Scalars (and, while a combine region is applied, its lanes)."""
    buffers: dict[object, Buffer] = field(default_factory=dict)
    """Materialised tensors by value; converted copies under other keys."""
    packed: dict[Value, Operand] = field(default_factory=dict)
    """Operands of products in the grouped form of their instruction."""
    inductions: dict[Value, Induction] = field(default_factory=dict)
    saving: dict[Value, Buffer] = field(default_factory=dict)
    """Values to store into a buffer when a chunk of them is evaluated in the nest being emitted."""
    rotated: dict[Value, Buffer] = field(default_factory=dict)
    """Copies of loop-carried tensors that another one takes over at the end of an iteration."""
    in_place: dict[Value, Value] = field(default_factory=dict)
    """Results that may be written over the buffer of a loop-carried value."""
    assumed: frozenset[Value] = frozenset()
    """Masks that hold everywhere in the nest being emitted."""
    active: Number | None = None
    """Lanes in which the combine function being applied counts; None for all."""
    sites: list[Site] = field(default_factory=list)
    op: Op | None = None
    """The statement being lowered, for error messages."""

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def eval(self, value: Value, coords: Coords) -> Val:
        """Return `value` at a chunk; the form has the chunk's lanes, or is uniform."""
        if not value.shape:
            return self.environment[value]
        if value in self.assumed:
            return self._assumed(value, coords)
        key = (value, coords)
        for scope in reversed(self.e.scopes):
            if key in scope:
                return scope[key]  # type: ignore[no-any-return]
        result: Val
        if value in self.buffers:
            result = self.load_chunk(self.buffers[value], coords)
            if isinstance(result, Pointer):
                result = Pointer(result.base, result.offset, str(value.type.pointee))
        elif value in self.inductions:
            induction = self.inductions[value]
            initial = self.eval(induction.initial, coords)
            if isinstance(initial, Pointer):
                result = s.advance(self.e, initial, induction.offset)
            else:
                result = s.add(self.e, initial, induction.offset)
        elif value.op is None:
            raise UnsupportedError(f"a block argument of type {value.type} used before it is known")
        else:
            result = self._eval_op(value.op, value, coords)
        if value in self.saving:
            self.store_chunk(self.saving[value], coords, result)
        self.e.scopes[-1][key] = result
        return result

    def _assumed(self, value: Value, coords: Coords) -> Val:
        """A mask that holds everywhere, or an index that is a run of consecutive integers."""
        held = self.buffers.get(value)
        if held is None or held.run is None:
            return s.constant(1, "i1")
        (at,), (_, first) = coords, held.run
        base = s.uniform_binary(self.e, "add", first, index_as(self.e, at, value.element))
        return s.affine(base, (s.constant(1, value.element),), (at.width,)) if at.width > 1 else base

    def _eval_op(self, op: Op, value: Value, coords: Coords) -> Val:
        handler = EVALUATORS.get(op.name)
        if handler is not None:
            return handler(self, op, value, coords)
        return self.elementwise(op, [self.eval(v, coords) for v in op.operands])

    def elementwise(self, op: Op, args: list[Val]) -> Val:
        """Apply a lane-by-lane operation."""
        handler = ELEMENTWISE.get(op.name)
        if handler is None:
            raise UnsupportedError(f"{op.name} on {', '.join(str(v.type) for v in op.operands) or op.result.type}", op.line)
        return handler(self, op, args)

    def scalar(self, value: Value) -> Uniform:
        """A scalar that is a number."""
        result = self.environment[value]
        assert isinstance(result, Uniform), f"{value} is not a scalar number"
        return result

    def number(self, value: Value, coords: Coords) -> Number:
        """`eval` for a value that is not a pointer."""
        result = self.eval(value, coords)
        assert not isinstance(result, Pointer)
        return result

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

    # -- materialisation ----------------------------------------------------------------------------------------------

    def prepare(self, *roots: Value, fuse: tuple[int, ...] | None = None) -> list[Value]:
        """Materialise what evaluating `roots` reads from buffers.

        Args:
            roots: values about to be evaluated in a loop nest.
            fuse: shape of that nest, if it may store planned values itself while it evaluates them.

        Returns:
            Planned values that the nest evaluates at its own chunks, inner ones first: to be stored by it.
        """
        fusable: list[Value] = []
        seen: set[tuple[Value, bool]] = set()

        def visit(value: Value, same_chunk: bool) -> None:
            if not value.shape or (value, same_chunk) in seen:
                return
            seen.add((value, same_chunk))
            if value in self.buffers:
                return
            if value in self.inductions:
                visit(self.inductions[value].initial, False)
                return
            op = value.op
            if op is None:
                return
            if op.name in MATERIALISERS:
                MATERIALISERS[op.name](self, op)
                return
            planned = value in self.plan.planned
            if planned and not (same_chunk and fuse == value.shape and op.name in ELEMENTWISE):
                self.materialise(value)
                return
            same_chunk = same_chunk and op.name in ELEMENTWISE
            for operand in op.operands:
                visit(operand, same_chunk)
            if planned and value not in fusable:
                fusable.append(value)

        for root in roots:
            visit(root, fuse is not None)
        return [v for v in fusable if v not in self.buffers]

    def materialise(self, value: Value) -> Buffer:
        """Compute a tensor into a buffer, unless it is in one."""
        if value in self.buffers:
            return self.buffers[value]
        op = value.op
        if op is not None and op.name in MATERIALISERS:
            MATERIALISERS[op.name](self, op)
            return self.buffers[value]
        lane = self.plan.layout.lane(value)
        buffer = self.new_buffer(value.shape, value.element, lane)
        buffer.consecutive = self.fill(buffer, value) and value.element in ("i32", "i64") and len(value.shape) == 1
        self.buffers[value] = buffer
        if op is not None and op.name in ("arith.remsi", "arith.remui") and len(value.shape) == 1:
            buffer.run = self._run(value, op)
        return buffer

    def _run(self, value: Value, op: Op) -> tuple[Text, Uniform] | None:
        """For the remainder of consecutive indices: whether it wraps nowhere, and its first element.

        Every wrap loses a whole divisor between the first and the last element, so these two show whether there is one.
        """
        source, divisor = op.operands
        if self.plan.layout.strides(source) != (1,) or not masks.is_affine(self, source):
            return None
        if any(stride != 0 for stride in self.plan.layout.strides(divisor)):
            return None
        size = value.shape[0]
        first, last = (self.load_chunk(self.buffers[value], (Coord(i),)) for i in (0, size - 1))
        assert isinstance(first, Uniform)
        assert isinstance(last, Uniform)
        kind = LLVM_TYPES[value.element]
        distance = self.e.op(f"sub {kind} {s.text(last)}, {s.text(first)}")
        return self.e.op(f"icmp eq {kind} {distance}, {size - 1}"), first

    def fill(self, buffer: Buffer, value: Value) -> bool:
        """Emit the nest that writes all of `value` into `buffer`; return whether every chunk held consecutive integers."""
        if value.op is not None and value not in self.buffers:
            self.prepare(*(value.op.operands if value not in self.inductions else [value]))
        consecutive, lanes = True, 0

        def write(coords: Coords) -> None:
            nonlocal consecutive, lanes
            x = self.eval(value, coords)
            lanes = lanes_of(coords)
            if not (isinstance(x, Affine) and len(x.strides) == 1 and x.strides[0].value == 1):
                consecutive = False
            self.store_chunk(buffer, coords, x)

        lane, cost = self.natural_lane(value), self.plan.cost(value)
        masks.versioned(self, [value], lambda: self.for_each_chunk(value.shape, lane, write, cost=cost))
        return consecutive and lanes > 1

    def natural_lane(self, value: Value) -> int:
        """The dimension along which a value is read best, whatever the layout of the buffer it goes to."""
        return self.buffers[value].lane if value in self.buffers else self.plan.layout.natural(value)

    @contextmanager
    def region(self) -> Iterator[None]:
        """Forget at the end what was materialised inside: it does not dominate what follows."""
        saved, packed = dict(self.buffers), dict(self.packed)
        with self.scratch.frame(), self.e.scope():
            yield
        self.buffers, self.packed = saved, packed

    def copy_buffer(self, source: Buffer, target: Buffer) -> None:
        """Emit the nest that copies one buffer into another of the same shape."""
        self.for_each_chunk(source.shape, source.lane, lambda at: self.store_chunk(target, at, self.load_chunk(source, at)))

    def store_all(self, buffer: Buffer, value: Value) -> None:
        """Emit the nest that copies a prepared tensor into a buffer."""
        cost = self.plan.cost(value)
        self.for_each_chunk(value.shape, buffer.lane, lambda at: self.store_chunk(buffer, at, self.eval(value, at)), cost=cost)

    # -- statements ---------------------------------------------------------------------------------------------------

    def block(self, block: Block) -> None:
        """Lower the operations of a block in order, terminator excluded where it is a yield."""
        for op in block.ops:
            self.op = op
            self.statement(op)

    def statement(self, op: Op) -> None:
        """Lower one operation where it stands: effects, control flow, scalars; tensors wait until they are asked for."""
        handler = STATEMENTS.get(op.name)
        if handler is not None:
            handler(self, op)
            return
        if not op.results:
            raise UnsupportedError(op.name, op.line)
        if all(not r.shape for r in op.results):
            if op.name in MATERIALISERS:
                MATERIALISERS[op.name](self, op)
            elif op.name in EVALUATORS:
                self.environment[op.result] = EVALUATORS[op.name](self, op, op.result, ())
            else:
                self.environment[op.result] = self.elementwise(op, [self.environment[v] for v in op.operands])
            return
        if op.name not in MATERIALISERS and op.name not in EVALUATORS and op.name not in ELEMENTWISE:
            raise UnsupportedError(f"{op.name} with result {op.results[0].type}", op.line)
        if op.name in MATERIALISERS:
            if op.results[0] not in self.buffers:
                MATERIALISERS[op.name](self, op)
            return
        for result in op.results:
            if result in self.plan.pinned:
                self.materialise(result)

    def add_site(self, kind: SiteKind, op: Op, message: str = "") -> int:
        """Register a place that can report a fault; return its number."""
        self.sites.append(Site(kind, op.line, message))
        return len(self.sites) - 1


def index_as(e: Emitter, at: Coord, element: str, start: int = 0) -> Uniform:
    """The base of a coordinate plus `start` as an i32 or i64."""
    if isinstance(at.base, int):
        return s.constant(at.base + start, element)
    base = at.base
    if element != "i64":
        base = s.memo(e, ("index", at.base, element), lambda: e.op(f"trunc i64 {at.base} to {LLVM_TYPES[element]}"))
    return s.uniform_binary(e, "add", Uniform(base, element, at.divisor, True), s.constant(start, element))


def _is_dense(lane_strides: Sequence[tuple[int | Text, int]]) -> bool:
    """Whether the lanes of a chunk lie side by side in memory, in order."""
    step = 1
    for stride, width in reversed(lane_strides):
        if stride != step:
            return False
        step *= width
    return True
