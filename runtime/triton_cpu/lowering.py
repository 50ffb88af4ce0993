"""The heart of the code generator: tensors are evaluated chunk by chunk, on demand.

No tensor is computed where its operation stands. Operations with effects (`STATEMENTS`) ask for the chunks they need, and
evaluation walks back through the operands, remembering what it has emitted in the scopes of the `Emitter`. What `Plan`
marks, and what only makes sense whole (`MATERIALISERS`), is computed into a `Buffer` first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from . import masks
from . import scalars as s
from .analysis import Plan
from .buffers import Buffer
from .chunks import Chunks, index_as
from .emit import LLVM_TYPES, Text
from .errors import UnsupportedError
from .fetching import fetch_behind
from .generated import Site, SiteKind
from .microkernel import Operand
from .options import CPUOptions
from .registry import ELEMENTWISE, EVALUATORS, MATERIALISERS, STATEMENTS
from .ttir import Block, Op, Value
from .values import Affine, Coord, Coords, Number, Pointer, Uniform, Val, lanes_of


@dataclass(eq=False)
class Induction:
    """A tensor carried round a loop whose elements all grow by the same amount: `initial` plus one run-time number."""

    initial: Value
    offset: Number


@dataclass(eq=False, kw_only=True)
class Lowering(Chunks):
    """State of lowering one kernel to the body of an LLVM function."""

    plan: Plan
    options: CPUOptions
    environment: dict[Value, Val] = field(default_factory=dict)
    """Scalars (and, while a combine region is applied, its lanes)."""
    buffers: dict[object, Buffer] = field(default_factory=dict)
    """Materialised tensors by value; converted copies under other keys."""
    packed: dict[object, Operand] = field(default_factory=dict)
    """Operands of products in the grouped form of their instruction."""
    inductions: dict[Value, Induction] = field(default_factory=dict)
    saving: dict[Value, Buffer] = field(default_factory=dict)
    """Values to store into a buffer when a chunk of them is evaluated in the nest being emitted."""
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
        try:
            return handler(self, op, args)
        except UnsupportedError as error:
            if error.line:
                raise
            raise UnsupportedError(f"{op.name}: {error.what}", op.line) from error

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

        def chunk(coords: Coords) -> Val:
            nonlocal consecutive, lanes
            x = self.eval(value, coords)
            lanes = lanes_of(coords)
            if not (isinstance(x, Affine) and len(x.strides) == 1 and x.strides[0].value == 1):
                consecutive = False
            return x

        lane, cost = self.natural_lane(value), self.plan.cost(value)
        masks.versioned(self, [value], lambda: self.fill_buffer(buffer, lane, chunk, cost=cost))
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
        if op.name == "tt.load":
            fetch_behind(self, op)
        for result in op.results:
            if result in self.plan.pinned:
                self.materialise(result)

    def add_site(self, kind: SiteKind, op: Op, message: str = "") -> int:
        """Register a place that can report a fault; return its number."""
        self.sites.append(Site(kind, op.line, message))
        return len(self.sites) - 1
