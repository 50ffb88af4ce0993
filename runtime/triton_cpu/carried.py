"""Tensors and scalars carried round a loop: in registers, in buffers, or symbolic where they only step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import scalars as s
from .analysis import lane_by_lane
from .buffers import Buffer
from .casts import as_number
from .emit import LLVM_TYPES, Text
from .lowering import Induction
from .registry import ELEMENTWISE
from .values import Coord, Pointer, Uniform, Val

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Value


@dataclass(eq=False)
class Carried:
    """How one loop-carried value is kept: 'same', 'scalar', 'offset', 'address', 'step' or 'buffer'."""

    kind: str
    argument: Value
    initial: Value
    increments: list[Value]

    @property
    def has_phi(self) -> bool:
        """Whether a scalar is carried in a register."""
        return self.kind in ("scalar", "offset", "address", "step")

    @property
    def phi_element(self) -> str:
        """Element type of that scalar."""
        if self.kind in ("offset", "address") or self.argument.type.is_pointer:
            return "i64"
        return self.argument.element


def classify(lowering: Lowering, argument: Value, initial: Value, produced: Value, *, symbolic: bool) -> Carried:
    """Choose how to carry a value from what an iteration makes of it."""
    if produced is argument:
        return Carried("same", argument, initial, [])
    increments = _increments(argument, produced) if symbolic else None
    if not argument.shape:
        if not argument.type.is_pointer:
            return Carried("scalar", argument, initial, [])
        start = lowering.environment[initial]
        keeps_base = increments is not None and isinstance(start, Pointer) and start.base is not None
        return Carried("offset" if keeps_base else "address", argument, initial, [])
    if increments is not None and argument.element in ("i32", "i64", "ptr"):
        return Carried("step", argument, initial, increments)
    return Carried("buffer", argument, initial, [])


def _increments(argument: Value, produced: Value) -> list[Value] | None:
    """What an iteration adds to all elements of a value, if it does nothing else to it."""
    increments: list[Value] = []
    while produced is not argument:
        op = produced.op
        if op is None or op.name not in ("tt.addptr", "arith.addi") or op.block is not argument.block:
            return None
        a, b = op.operands
        if _is_uniform(b):
            increments.append(b)
            produced = a
        elif op.name == "arith.addi" and _is_uniform(a):
            increments.append(a)
            produced = b
        else:
            return None
    return increments


def _is_uniform(value: Value) -> bool:
    if not value.shape:
        return True
    op = value.op
    if op is None:
        return False
    if op.name == "tt.splat":
        return True
    if op.name == "arith.constant":
        return not isinstance(op.attrs["value"], list)
    return op.name in ELEMENTWISE and bool(op.operands) and all(_is_uniform(v) for v in op.operands)


def known_divisor(lowering: Lowering, value: Value) -> int:
    """A divisor of an integer (all elements of it), from what is known before it is computed."""
    known = lowering.environment.get(value)
    if isinstance(known, Uniform):
        return known.known_divisor
    op = value.op
    if op is None:
        return 1
    if op.name == "arith.constant" and isinstance(op.attrs["value"], int):
        return s.constant(op.attrs["value"], "i64").known_divisor
    if op.name in ("tt.splat", "arith.extsi", "tt.broadcast", "arith.index_cast"):
        return known_divisor(lowering, op.operands[0])
    if op.name == "arith.muli":
        return known_divisor(lowering, op.operands[0]) * known_divisor(lowering, op.operands[1])
    if op.name in ("arith.addi", "arith.subi"):
        return math.gcd(*(known_divisor(lowering, v) for v in op.operands))
    return 1


def start(lowering: Lowering, carried: list[Carried]) -> list[tuple[str, Text]]:
    """Emit the initial values; return (LLVM type, operand) of those in registers."""
    phis: list[tuple[str, Text]] = []
    for c in carried:
        if c.kind == "buffer":
            lane = lowering.plan.layout.lane(c.argument)
            buffer = lowering.new_buffer(c.argument.shape, c.argument.element, lane)
            lowering.prepare(c.initial)
            lowering.store_all(buffer, c.initial)
            lowering.buffers[c.argument] = buffer
            lowering.plan.layout.decide(c.argument, lane)
        elif c.kind == "step":
            lowering.prepare(c.initial)
            phis.append((LLVM_TYPES[c.phi_element], "0"))
        elif c.has_phi:
            phis.append((LLVM_TYPES[c.phi_element], _register(lowering, c, lowering.environment[c.initial])))
    return phis


def _register(lowering: Lowering, c: Carried, x: Val) -> Text:
    if c.kind == "offset":
        assert isinstance(x, Pointer)
        return s.vector_text(lowering.e, x.offset, 1)
    return lowering.lanes_text(x, 1)


def bind(lowering: Lowering, carried: list[Carried], targets: list[Value], texts: list[Text]) -> None:
    """Make values (a loop's arguments, or its results) stand for what is carried."""
    remaining = iter(texts)
    for c, target in zip(carried, targets, strict=True):
        text = next(remaining) if c.has_phi else ""
        if c.kind == "same":
            if target.shape:
                lowering.inductions[target] = Induction(c.initial, s.constant(0, c.phi_element))
            else:
                lowering.environment[target] = lowering.environment[c.initial]
        elif c.kind == "scalar":
            lowering.environment[target] = Uniform(text, target.element)
        elif c.kind == "offset":
            first = lowering.environment[c.initial]
            assert isinstance(first, Pointer)
            lowering.environment[target] = Pointer(first.base, Uniform(text, "i64"), str(target.type.pointee))
        elif c.kind == "address":
            lowering.environment[target] = Pointer(None, Uniform(text, "i64"), str(target.type.pointee))
        elif c.kind == "step":
            divisor = math.gcd(*(known_divisor(lowering, v) for v in c.increments)) if c.increments else 1
            lowering.inductions[target] = Induction(c.initial, Uniform(text, c.phi_element, divisor))
        else:
            lowering.buffers[target] = lowering.buffers[c.argument]
            lowering.plan.layout.decide(target, lowering.buffers[c.argument].lane)


def finish(lowering: Lowering, carried: list[Carried], produced: list[Value]) -> list[Text]:
    """Emit the end of an iteration: update the buffers, and return the operands for the registers."""
    _update_buffers(lowering, [(c, y) for c, y in zip(carried, produced, strict=True) if c.kind == "buffer"])
    texts: list[Text] = []
    for c, y in zip(carried, produced, strict=True):
        if c.kind == "step":
            total = lowering.inductions[c.argument].offset
            for increment in c.increments:
                by = as_number(lowering.eval(increment, tuple(Coord(0) for _ in increment.shape)))
                total = s.add(lowering.e, total, s.to_i64(lowering.e, by) if c.argument.type.is_pointer else by)
            texts.append(lowering.lanes_text(total, 1))
        elif c.has_phi:
            texts.append(_register(lowering, c, lowering.environment[y]))
    return texts


def _update_buffers(lowering: Lowering, pairs: list[tuple[Carried, Value]]) -> None:
    """Write the new value of each carried tensor over the old one, keeping old values that others still read."""
    arguments = {c.argument for c, _ in pairs}
    pending = []
    for c, y in pairs:
        if lowering.buffers.get(y) is lowering.buffers[c.argument]:
            continue
        lowering.prepare(y)
        if lowering.buffers.get(y) is not lowering.buffers[c.argument]:
            pending.append((c, y))
    copies: dict[Value, Buffer] = {}
    for c, y in pending:
        if y in arguments:
            # A rotation: the old value of another argument must survive that argument's own update.
            old = lowering.buffers[y]
            copies[y] = lowering.new_buffer(old.shape, old.element, old.lane)
            lowering.copy_buffer(old, copies[y])
        elif y not in lowering.buffers:
            reads_others = _reads_lazily(lowering, y, arguments - {c.argument}, set())
            if reads_others or not lane_by_lane(y, c.argument):
                lowering.materialise(y)
    for c, y in pending:
        buffer = lowering.buffers[c.argument]
        if y in copies:
            lowering.copy_buffer(copies[y], buffer)
        else:
            lowering.store_all(buffer, y)


def _reads_lazily(lowering: Lowering, value: Value, targets: set[Value], seen: set[Value]) -> bool:
    """Whether evaluating `value` now would read the buffer of one of `targets`."""
    if value in targets:
        return True
    if value in seen or value in lowering.buffers or not value.shape:
        return False
    seen.add(value)
    if value in lowering.inductions:
        return _reads_lazily(lowering, lowering.inductions[value].initial, targets, seen)
    return value.op is not None and any(_reads_lazily(lowering, v, targets, seen) for v in value.op.operands)
