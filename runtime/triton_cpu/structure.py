"""Conversion of branches between blocks (cf) into nested scf.if, so that every region has a single block.

Triton's front end makes such branches of `return` statements that are not at the end of a function. They never go
backwards, so control flow is a directed acyclic graph of blocks, which is rebuilt here without copying any block: both
sides of a branch become the sides of an scf.if up to the blocks that both reach (its joins). Where a side may leave by
several ways (to a join, to one further out, or by returning), the scf.if yields a flag per way, and the join goes into
an scf.if on its flag.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import UnsupportedError
from .ttir import Block, Function, Op, Type, Value

_I1 = Type((), "i1")
_RETURN = Block()
"""Stands for leaving the region, among the blocks that control may go to."""


def structure(function: Function) -> None:
    """Rewrite every region of several blocks, the function's own included, into one block with scf.if.

    Before:
        cf.cond_br %c, ^bb1, ^bb2
        ^bb1: tt.return
        ^bb2: tt.store %p, %v; tt.return
    After:
        scf.if %c { scf.yield } else { tt.store %p, %v; scf.yield }
        tt.return

    Raises:
        UnsupportedError: branches go backwards.
    """
    changed = len(function.blocks) > 1
    if changed:
        function.blocks = [_Region(function.blocks).single_block()]
    for op in list(function.walk()):
        for k, region in enumerate(op.regions):
            if len(region) > 1:
                op.regions[k] = [_Region(region).single_block()]
                changed = True
    if changed:
        relink(function)


def relink(function: Function) -> None:
    """Set all that operations, blocks and values know about their places: parents, uses, positions."""
    position = 0

    def visit(block: Block, parent: Op | None) -> None:
        nonlocal position
        block.parent = parent
        for k, value in enumerate(block.args):
            value.op, value.index, value.block, value.uses = None, k, block, []
        for op in block.ops:
            op.block, op.position = block, position
            position += 1
            for k, value in enumerate(op.results):
                value.op, value.index, value.block, value.uses = op, k, block, []
            # Values can be defined further on only between blocks, which single blocks rule out.
            for value in op.operands:
                value.uses.append(op)
            for region in op.regions:
                for inner in region:
                    visit(inner, op)

    for block in function.blocks:
        visit(block, None)


def substitute(op: Op, values: dict[Value, Value]) -> None:
    """Replace operands by the values they map to, in `op` and everything nested in it."""
    for inner in op.walk():
        inner.operands = [values.get(value, value) for value in inner.operands]
        if inner.successors:
            inner.successors = [(to, [values.get(v, v) for v in passed]) for to, passed in inner.successors]


@dataclass
class _Outcome:
    """Where control may go after some code, with the values it passes there.

    Exactly one of the flags is true; the last way has none where there are others.
    """

    passed: dict[Block, list[Value]]
    flags: dict[Block, Value] = field(default_factory=dict)


def _only_returns(block: Block) -> bool:
    return len(block.ops) == 1 and not block.ops[0].successors


class _Region:
    """One region of several blocks."""

    def __init__(self, blocks: list[Block]) -> None:
        self._entry = blocks[0]
        self._order: dict[Block, int] = {}
        """Reachable blocks with their rank in topological order."""
        self._values: dict[Value, Value] = {}
        self._names = 0
        self._sort()
        terminator = next(b.terminator for b in self._order if not b.terminator.successors)
        self._return_name = terminator.name
        self._types = {block: [value.type for value in block.args] for block in self._order}
        self._types[_RETURN] = [value.type for value in terminator.operands]
        self._order[_RETURN] = len(self._order)

    def single_block(self) -> Block:
        """Return the entry block, with all the code of the region in it."""
        out = Block()
        outcome = self._emit(self._entry, self._entry.args, frozenset(), out)
        out.ops.append(Op(self._return_name, outcome.passed[_RETURN], line=self._entry.terminator.line))
        self._entry.ops = out.ops
        return self._entry

    def _sort(self) -> None:
        finished: list[Block] = []
        state: dict[Block, bool] = {}
        stack = [(self._entry, iter(self._entry.terminator.successors))]
        state[self._entry] = False
        while stack:
            block, rest = stack[-1]
            for target, _ in rest:
                if target not in state:
                    state[target] = False
                    stack.append((target, iter(target.terminator.successors)))
                    break
                if not state[target]:
                    raise UnsupportedError("branches that go backwards", block.terminator.line)
            else:
                state[block] = True
                finished.append(block)
                stack.pop()
        self._order = {block: rank for rank, block in enumerate(reversed(finished))}

    def _reach(self, start: Block, stops: frozenset[Block]) -> set[Block]:
        """Return the blocks that control may go through from `start` on, up to but without `stops`."""
        found: set[Block] = set()
        work = [start]
        while work:
            block = work.pop()
            if block not in found and block not in stops:
                found.add(block)
                work += [target for target, _ in block.terminator.successors]
        return found

    def _joins(self, left: Block, right: Block, stops: frozenset[Block]) -> list[Block]:
        """Return the blocks to emit after a branch to `left` or `right`: no other common block is reached around them.

        A common block that several joins lead to is one itself. Blocks that only return are none: they have no code
        that could be copied, and returning at once saves a flag.
        """
        from_left, from_right = self._reach(left, stops), self._reach(right, stops)
        common = [block for block in from_left & from_right if not _only_returns(block)]
        common.sort(key=self._order.__getitem__)
        leads: dict[Block, set[Block | None]] = {block: set() for block in common}
        for block in (from_left | from_right) - set(common):
            for target, _ in block.terminator.successors:
                if target in leads:
                    leads[target].add(None)
        joins = []
        for block in common:
            if block is left or block is right or None in leads[block] or len(leads[block]) > 1:
                joins.append(block)
                leads[block] = {block}
            for target, _ in block.terminator.successors:
                if target in leads:
                    leads[target] |= leads[block]
        return joins

    def _emit(self, block: Block, args: list[Value], stops: frozenset[Block], out: Block) -> _Outcome:
        """Append the code from `block` on to `out`, up to `stops` and the return."""
        if block in stops:
            return _Outcome({block: args})
        self._values.update(zip(block.args, args, strict=True))
        if _only_returns(block):
            return _Outcome({_RETURN: [self._values.get(value, value) for value in block.terminator.operands]})
        for op in block.ops:
            substitute(op, self._values)
        last = block.terminator
        out.ops += block.ops[:-1]
        if not last.successors:
            return _Outcome({_RETURN: last.operands})
        if len(last.successors) == 1:
            return self._emit(*last.successors[0], stops, out)
        left, right = last.successors
        joins = self._joins(left[0], right[0], stops)
        until = stops.union(joins)
        outcome = self._branch(
            last.operands[0],
            lambda side: self._emit(*left, until, side),
            lambda side: self._emit(*right, until, side),
            out,
            last.line,
        )
        for k, join in enumerate(joins):
            outcome = self._continue(outcome, join, stops.union(joins[k + 1 :]), out, last.line)
        return outcome

    def _continue(self, outcome: _Outcome, join: Block, stops: frozenset[Block], out: Block, line: str) -> _Outcome:
        """Append the code from `join` on, which runs if the outcome is to go there."""
        if len(outcome.passed) == 1:
            return self._emit(join, outcome.passed[join], stops, out)
        flag = self._flag(outcome, join, out)
        passed = outcome.passed.pop(join)
        outcome.flags.pop(join, None)
        return self._branch(flag, lambda side: self._emit(join, passed, stops, side), lambda side: outcome, out, line)

    def _branch(
        self,
        condition: Value,
        then: Callable[[Block], _Outcome],
        otherwise: Callable[[Block], _Outcome],
        out: Block,
        line: str,
    ) -> _Outcome:
        """Append an scf.if, whose results are the flags and the values that its sides pass on."""
        op = Op("scf.if", [condition], line=line)
        sides = [Block(parent=op), Block(parent=op)]
        outcomes = [then(sides[0]), otherwise(sides[1])]
        ways = sorted({way for outcome in outcomes for way in outcome.passed}, key=self._order.__getitem__)
        yielded: list[list[Value]] = [[], []]

        def result(values: list[Value]) -> Value:
            if values[0] is values[1]:
                return values[0]
            for operands, value in zip(yielded, values, strict=True):
                operands.append(value)
            op.results.append(Value(self._name(), values[0].type))
            return op.results[-1]

        merged = _Outcome({})
        for way in ways:
            if way is not ways[-1]:
                merged.flags[way] = result([self._flag(o, way, s) for o, s in zip(outcomes, sides, strict=True)])
            merged.passed[way] = [
                result([
                    o.passed[way][k] if way in o.passed else self._new(s, "ub.poison", type_)
                    for o, s in zip(outcomes, sides, strict=True)
                ])
                for k, type_ in enumerate(self._types[way])
            ]  # fmt: skip
        for side, operands in zip(sides, yielded, strict=True):
            side.ops.append(Op("scf.yield", operands, line=line))
        op.regions = [[side] for side in sides]
        out.ops.append(op)
        return merged

    def _flag(self, outcome: _Outcome, way: Block, out: Block) -> Value:
        """Return whether control goes a way, computed in `out` where no flag says it."""
        if way in outcome.flags:
            return outcome.flags[way]
        if way not in outcome.passed or len(outcome.passed) == 1:
            return self._new(out, "arith.constant", _I1, value=int(way in outcome.passed))
        flag = self._new(out, "arith.constant", _I1, value=1)
        for other in outcome.passed:
            if other is not way:
                flag = self._new(out, "arith.xori", _I1, [flag, outcome.flags[other]])
        return flag

    def _new(self, out: Block, name: str, type_: Type, operands: list[Value] | None = None, **attrs: int) -> Value:
        op = Op(name, operands or [], dict(attrs), [Value(self._name(), type_)])
        out.ops.append(op)
        return op.result

    def _name(self) -> str:
        self._names += 1
        return f"%cf{self._names}"
