"""Loops and branches. Tensors carried round a loop live in buffers, or stay symbolic where they only step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import dot
from . import scalars as s
from .analysis import _lane_by_lane
from .arithmetic import choose
from .buffers import Buffer
from .casts import as_number
from .effects import check_lanes
from .emit import LLVM_TYPES, Text
from .errors import UnsupportedError
from .lowering import Induction
from .registry import ELEMENTWISE, elementwise, evaluator, statement
from .values import Coord, Coords, Number, Pointer, Uniform, Val

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Block, Op, Value


@elementwise("tt.get_program_id")
def program_id(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Index of the program along an axis of the grid."""
    return Uniform(f"%pid{op.attrs['axis']}", "i32", 1, True)


@elementwise("tt.get_num_programs")
def num_programs(lowering: Lowering, op: Op, args: list[Val]) -> Val:
    """Size of the grid along an axis."""
    return Uniform(f"%np{op.attrs['axis']}", "i32", 1, True)


@statement("scf.yield", "scf.condition", "tt.return", "gpu.barrier", "ttg.barrier")
def nothing(lowering: Lowering, op: Op) -> None:
    """Terminators are read by what they end; a barrier inside a sequential program does nothing."""


@statement("llvm.intr.assume")
def assume(lowering: Lowering, op: Op) -> None:
    """Tell LLVM what the kernel's author knows."""
    condition = op.operands[0]
    if not condition.shape:
        lowering.e.call("void", "llvm.assume", [("i1", s.text(lowering.scalar(condition)))])


def hoist(lowering: Lowering, op: Op) -> None:
    """Materialise before a loop or branch what its regions read from outside."""
    for value in lowering.plan.outside_uses.get(op, ()):
        lowering.prepare(value)
    dot.hoist_operands(lowering, op)


# -- values carried round a loop -------------------------------------------------------------------------------------


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
    for c, y in pending:
        if y in arguments:
            # A rotation: the old value of another argument must survive that argument's own update.
            _copy_out(lowering, y)
        elif y not in lowering.buffers:
            reads_others = _reads_lazily(lowering, y, arguments - {c.argument}, set())
            if reads_others or not _lane_by_lane(y, c.argument, {}):
                lowering.materialise(y)
    for c, y in pending:
        buffer = lowering.buffers[c.argument]
        source = lowering.rotated.get(y)

        if source is None:
            lowering.store_all(buffer, y)
        else:
            lowering.copy_buffer(source, buffer)
    lowering.rotated.clear()


def _copy_out(lowering: Lowering, value: Value) -> None:
    old = lowering.buffers[value]
    copy = lowering.new_buffer(old.shape, old.element, old.lane)
    lowering.copy_buffer(old, copy)
    lowering.rotated[value] = copy


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


# -- operations --------------------------------------------------------------------------------------------------------


@statement("scf.for")
def for_loop(lowering: Lowering, op: Op) -> None:
    """A counted loop."""
    e, body = lowering.e, op.body
    hoist(lowering, op)
    lower, upper, step = (lowering.scalar(v) for v in op.operands[:3])
    index, arguments, produced = body.args[0], body.args[1:], body.terminator.operands
    carried = [classify(lowering, a, i, y, symbolic=True) for a, i, y in zip(arguments, op.operands[3:], produced, strict=True)]
    phis = start(lowering, carried)
    kind = LLVM_TYPES[index.element]
    unsigned = bool(op.attrs.get("unsigned", False))
    bounds = [x.value for x in (lower, upper, step)]
    with e.loop(*bounds, type=kind, carried=phis, unsigned=unsigned) as loop:  # type: ignore[arg-type]
        divisor = math.gcd(lower.known_divisor, step.known_divisor)
        lowering.environment[index] = Uniform(loop.index, index.element, divisor, lower.is_nonnegative)
        bind(lowering, carried, arguments, loop.phis)
        with lowering.region():
            dot.find_in_place(lowering, carried, produced)
            lowering.block(body)
            loop.next = finish(lowering, carried, produced)
    bind(lowering, carried, op.results, loop.results)


@statement("scf.while")
def while_loop(lowering: Lowering, op: Op) -> None:
    """A loop that runs its first region, tests, and runs its second region."""
    e = lowering.e
    before, after = op.regions[0][0], op.regions[1][0]
    hoist(lowering, op)
    produced = after.terminator.operands
    carried = [classify(lowering, a, i, y, symbolic=False) for a, i, y in zip(before.args, op.operands, produced, strict=True)]
    phis = start(lowering, carried)
    entry, head, body, done = e.current, e.fresh_label("W"), e.fresh_label("B"), e.fresh_label("D")
    names = [e.fresh("p") for _ in phis]
    forwarded = before.terminator.operands[1:]
    kept = {}
    for result, value in zip(op.results, forwarded, strict=True):
        if result.shape and value not in before.args:
            kept[result] = lowering.new_buffer(result.shape, result.element, lowering.plan.layout.lane(result))
    e.jump(head)
    e.label(head)
    at = len(e.lines)
    e.lines.extend("" for _ in phis)
    bind(lowering, carried, before.args, names)
    with e.scope():
        saved = dict(lowering.buffers)
        lowering.block(before)
        for result, value in zip(op.results, forwarded, strict=True):
            if result in kept:
                lowering.prepare(value)
                lowering.store_all(kept[result], value)
        for targets in (after.args, op.results):
            for target, value, result in zip(targets, forwarded, op.results, strict=True):
                _alias(lowering, target, value, kept.get(result))
                if result in kept or value in lowering.buffers:
                    saved[target] = lowering.buffers[target]
        e.branch(s.text(lowering.scalar(before.terminator.operands[0])), body, done)
        e.label(body)
        with e.scope():
            lowering.block(after)
            following = finish(lowering, carried, produced)
        latch = e.current
        e.jump(head)
        lowering.buffers = saved
    for k, ((kind, first), name, text) in enumerate(zip(phis, names, following, strict=True)):
        e.lines[at + k] = f"  {name} = phi {kind} [{first}, %{entry}], [{text}, %{latch}]"
    e.label(done)


def _alias(lowering: Lowering, target: Value, value: Value, buffer: Buffer | None) -> None:
    """Make `target` stand for `value`."""
    if not target.shape:
        lowering.environment[target] = lowering.environment[value]
    elif buffer is not None:
        lowering.buffers[target] = buffer
    elif value in lowering.buffers:
        lowering.buffers[target] = lowering.buffers[value]
        lowering.plan.layout.decide(target, lowering.buffers[value].lane)
    else:
        lowering.inductions[target] = lowering.inductions[value]


@statement("scf.if")
def branch(lowering: Lowering, op: Op) -> None:
    """Run one of two regions; tensors that they yield go into buffers made beforehand."""
    e = lowering.e
    hoist(lowering, op)
    condition = lowering.scalar(op.operands[0])
    buffers = {r: lowering.new_buffer(r.shape, r.element, lowering.plan.layout.lane(r)) for r in op.results if r.shape}
    if condition.is_constant:
        chosen = 0 if int(condition.value) & 1 else 1
        if chosen < len(op.regions) and op.regions[chosen]:
            with lowering.region():
                values = _run(lowering, op.regions[chosen][0], op, buffers)
            lowering.environment.update(zip([r for r in op.results if not r.shape], values, strict=True))
        for r, buffer in buffers.items():
            lowering.buffers[r] = buffer
        return
    labels, done = [e.fresh_label("then"), e.fresh_label("else")], e.fresh_label("end")
    e.branch(s.text(condition), *labels)
    outcomes: list[tuple[str, list[Val]]] = []
    for k, label in enumerate(labels):
        e.label(label)
        with lowering.region():
            has_body = k < len(op.regions) and bool(op.regions[k])
            values = _run(lowering, op.regions[k][0], op, buffers) if has_body else []
            values = [_settled(lowering, x) for x in values]
            outcomes.append((e.current, values))
        e.jump(done)
    e.label(done)
    (label_a, values_a), (label_b, values_b) = outcomes
    for r, a, b in zip([r for r in op.results if not r.shape], values_a, values_b, strict=True):
        kind = LLVM_TYPES["i64" if isinstance(a, Pointer) else r.element]
        texts = [_plain(x) for x in (a, b)]
        phi = e.op(f"phi {kind} [{texts[0]}, %{label_a}], [{texts[1]}, %{label_b}]")
        lowering.environment[r] = (
            Pointer(None, Uniform(phi, "i64"), str(r.type.pointee)) if r.type.is_pointer else Uniform(phi, r.element)
        )
    for r, buffer in buffers.items():
        lowering.buffers[r] = buffer


def _settled(lowering: Lowering, x: Val) -> Val:
    """A scalar whose operand needs no further instructions."""
    if isinstance(x, Pointer):
        return Pointer(None, s.absolute(lowering.e, x), x.pointee)
    return x


def _plain(x: Val) -> Text:
    number = x.offset if isinstance(x, Pointer) else x
    assert isinstance(number, Uniform)
    return s.text(number)


def _run(lowering: Lowering, block: Block, op: Op, buffers: dict[Value, Buffer]) -> list[Val]:
    """Lower a branch; store the tensors it yields, return its scalars."""
    lowering.block(block)
    scalars: list[Val] = []
    for r, y in zip(op.results, block.terminator.operands, strict=True):
        if not r.shape:
            scalars.append(lowering.environment[y])
            continue
        lowering.prepare(y)
        lowering.store_all(buffers[r], y)
    return scalars


def apply_region(lowering: Lowering, block: Block, args: list[Val], active: Number | None = None) -> list[Val]:
    """Apply a region of scalar operations (a combine function) to lanes; branches in it become selections.

    Args:
        lowering: the kernel.
        block: the region's body.
        args: values of its arguments.
        active: lanes whose results are used, for its assertions; None for all.
    """
    lowering.environment.update(zip(block.args, args, strict=True))
    outer, lowering.active = lowering.active, active
    results = _evaluate(lowering, block)
    lowering.active = outer
    return results


@evaluator("tt.map_elementwise")
def map_elementwise(lowering: Lowering, op: Op, value: Value, coords: Coords) -> Val:
    """A function of scalars applied to each element of tensors."""
    if int(op.attrs.get("pack", 1)) != 1:
        raise UnsupportedError("tl.map_elementwise that takes several elements at a time", op.line)
    results = apply_region(lowering, op.body, [lowering.eval(v, coords) for v in op.operands])
    for other, result in zip(op.results, results, strict=True):
        lowering.e.scopes[-1][(other, coords)] = result
    return results[value.index]


def _evaluate(lowering: Lowering, block: Block) -> list[Val]:
    for op in block.ops[:-1]:
        if op.name == "scf.if":
            condition = as_number(lowering.environment[op.operands[0]])
            then, otherwise = (_evaluate(lowering, r[0]) if r else [] for r in op.regions)
            for r, a, b in zip(op.results, then, otherwise, strict=True):
                lowering.environment[r] = choose(lowering, condition, a, b, r.type.pointee)
        elif op.name == "tt.assert":
            check_lanes(lowering, op, as_number(lowering.environment[op.operands[0]]))
        elif op.name == "arith.constant":
            lowering.environment[op.result] = s.constant(op.attrs["value"], op.result.element)
        else:
            lowering.environment[op.result] = lowering.elementwise(op, [lowering.environment[v] for v in op.operands])
    return [lowering.environment[v] for v in block.terminator.operands]
