"""Loops and branches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import dot
from . import scalars as s
from .buffers import Buffer
from .carried import bind, classify, finish, start
from .emit import LLVM_TYPES, Text
from .registry import elementwise, statement
from .values import Pointer, Uniform, Val

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
