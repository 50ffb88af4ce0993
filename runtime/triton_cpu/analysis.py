"""What must be computed whole before it is used, and where: decided once per kernel, before any code is emitted."""

from __future__ import annotations

from collections import defaultdict

from .layout import Layout, for_argument
from .registry import ELEMENTWISE, MATERIALISERS, STATEMENTS
from .ttir import Block, Function, Op, Value

EXPENSIVE = frozenset(
    f"math.{n}" for n in ("exp", "exp2", "log", "log2", "sin", "cos", "erf", "tanh", "sqrt", "rsqrt", "powf")
) | {"arith.divf", "tt.extern_elementwise", "tt.precise_divf", "tt.precise_sqrt"}
"""Operations worth a buffer when their result is used more than once."""

INTEGER_DIVISIONS = frozenset({"arith.divsi", "arith.divui", "arith.remsi", "arith.remui"})

WRITES = frozenset({"tt.store", "tt.atomic_rmw", "tt.atomic_cas", "tt.descriptor_store"})

MAX_DEPTH = 40
"""Longest chain of operations that is evaluated in one go; longer ones are cut by a buffer."""

RECOMPUTE_LIMIT = 16
"""Operations that may be evaluated again for a further use before a buffer is cheaper."""

_FREE = frozenset({
    "arith.constant", "tt.splat", "tt.make_range", "tt.expand_dims", "tt.broadcast", "tt.trans", "tt.reshape", "tt.addptr",
    "arith.extsi", "arith.extui", "arith.trunci", "tt.bitcast", "arith.bitcast",
})  # fmt: skip


class Plan:
    """Decisions about a kernel.

    `planned` values are computed into a buffer before the nest that needs them; `pinned` ones at their operation, because
    memory may change after it or the way back from a later nest would be long. Everything else is evaluated where it is used.
    """

    def __init__(self, function: Function) -> None:
        self.layout = Layout()
        self.planned: set[Value] = set()
        self.pinned: set[Value] = set()
        self.transposed: set[Op] = set()
        """Products that are computed transposed."""
        self.grouped: set[Op] = set()
        """Products by instructions that take several k at a time."""
        self.outside_uses = uses_by_region(function)
        self._costs: dict[Value, int] = {}
        self._depths: dict[Value, int] = {}
        self._ops = list(function.walk())
        self._ends = {op: max(o.position for o in op.walk()) for op in self._ops if op.regions}
        self._demands: dict[Value, int] = {}
        for op in self._ops:
            if not _in_combine_region(op):
                for result in op.results:
                    if result.shape:
                        self._consider(op, result)
        self._pin_loads()

    def cost(self, value: Value) -> int:
        """Number of operations evaluated to get one chunk of a value, buffers excluded."""
        found = self._costs.get(value)
        if found is None:
            found = 0
            op = value.op
            if op is not None and value.shape and op.name not in MATERIALISERS and op.name not in STATEMENTS:
                own = 0 if op.name in _FREE else 1
                found = own + sum(0 if v in self.planned else self.cost(v) for v in op.operands)
            self._costs[value] = found
        return found

    def _consider(self, op: Op, value: Value) -> None:
        """Decide whether a tensor gets a buffer for the sake of speed. Operands come before their uses."""
        if op.name not in ELEMENTWISE or op.name in _FREE:
            return
        consumers = {u for u in value.uses if not _in_combine_region(u)}
        # One nest evaluates a chunk once, however many of its operations use it.
        repeated = len(consumers) > 1 and self._has_several_roots(value)
        arithmetic = value.element[0] in "fb"
        rank_one = len(value.shape) == 1
        outer = any(_encloses_loop(value, u) for u in consumers)
        cost = self.cost(value)
        if (
            (op.name in EXPENSIVE and (repeated or outer))
            or (op.name in INTEGER_DIVISIONS and rank_one and self._varies(value))
            or (arithmetic and cost > 0 and (_is_spread(value) or (outer and cost > 1)))
            or (arithmetic and rank_one and repeated and cost > 2)
            or (repeated and cost > RECOMPUTE_LIMIT)
            or (outer and cost > RECOMPUTE_LIMIT)
        ):
            self.planned.add(value)
            self._costs.pop(value, None)
        elif (
            cost > 4 * MAX_DEPTH
            or self._depth(value) > MAX_DEPTH
            or (cost > 2 and any(u.name == "tt.reshape" for u in consumers))
        ):
            self.planned.add(value)
            self.pinned.add(value)
            self._costs.pop(value, None)

    def _has_several_roots(self, value: Value) -> bool:
        """Whether more than one nest evaluates a value."""
        roots: set[Op] = set()
        seen: set[Value] = set()
        stack = [value]
        while stack and len(roots) < 2:
            at = stack.pop()
            for use in at.uses:
                if not use.results or use.name in STATEMENTS or use.name in MATERIALISERS:
                    roots.add(use)
                else:
                    stack.extend(r for r in use.results if r not in seen)
                    seen.update(use.results)
        return len(roots) > 1

    def _varies(self, value: Value) -> bool:
        return any(s != 0 for s in self.layout.strides(value))

    def _depth(self, value: Value, limit: int = MAX_DEPTH + 2) -> int:
        """Length of the longest chain of operations behind a value, counted up to `limit`."""
        op = value.op
        if op is None or limit == 0 or value in self.planned or op.name in MATERIALISERS or op.name in STATEMENTS:
            return 0
        if value not in self._depths:
            self._depths[value] = 1 + max((self._depth(v, limit - 1) for v in op.operands), default=0)
        return self._depths[value]

    # -- memory order -------------------------------------------------------------------------------------------------

    def _pin_loads(self) -> None:
        """Pin every load whose result may be asked for after a write that could change it."""
        writes = [op for op in self._ops if op.name in WRITES]
        volatile = [op for op in self._ops if op.name == "tt.load" and op.attrs.get("volatile")]
        self.pinned.update(op.result for op in volatile if op.result.shape)
        if not writes:
            return
        for op in reversed(self._ops):
            for result in op.results:
                self._last_demand(result)
        for op in self._ops:
            if op.name != "tt.load" or not op.result.shape or op.result in self.pinned:
                continue
            last = self._last_demand(op.result)
            between = [w for w in writes if op.position < w.position <= last]
            if between and not (len(between) == 1 and between[0].position == last and self._rewrites(op, between[0])):
                self.pinned.add(op.result)

    def _last_demand(self, value: Value) -> int:
        """Position of the last statement that may evaluate a value, seen from its own block."""
        found = self._demands.get(value)
        if found is None:
            self._demands[value] = -1
            found = max((self._demand_at(value, use) for use in value.uses), default=-1)
            self._demands[value] = found
        return found

    def _demand_at(self, value: Value, use: Op) -> int:
        eager = (
            not use.results
            or use.name in STATEMENTS
            or use.name in MATERIALISERS
            or all(not r.shape or r in self.pinned for r in use.results)
        )
        last = use.position if eager else max(self._last_demand(r) for r in use.results)
        outer: Op | None = use
        while outer is not None and outer.block is not value.block:
            outer = outer.block.parent if outer.block is not None else None
            if outer is not None:
                last = max(last, self._ends.get(outer, outer.position))
        return last

    def _rewrites(self, load: Op, store: Op) -> bool:
        """Whether `store` writes each chunk only after the same chunk of `load` was read.

        Distinct pointer arguments whose elements run the same way are taken to be either the same tensor, element for
        element, or not to overlap.
        """
        if store.name != "tt.store" or load.result.shape != store.operands[0].shape:
            return False
        source, target = load.operands[0], store.operands[0]
        if source is not target:
            if _base(source) in (None, _base(target)):
                return False
            if [step in (0, 1) and step for step in self.layout.strides(source)] != [
                step in (0, 1) and step for step in self.layout.strides(target)
            ]:
                return False
        return all(lane_by_lane(v, load.result) for v in store.operands)


def lane_by_lane(value: Value, source: Value) -> bool:
    """Whether evaluating a chunk of `value` reads `source` at that chunk only, or not at all.

    Scalars and what is computed whole were computed before the nest.
    """
    stack, seen, moved = [value], {value}, []
    while stack:
        at = stack.pop()
        op = at.op
        if at is source or op is None or not at.shape or op.name in MATERIALISERS:
            continue
        if op.name not in ELEMENTWISE and op.name != "tt.load":
            moved.append(at)
            continue
        stack.extend(v for v in op.operands if v not in seen)
        seen.update(op.operands)
    return not _reads(moved, source)


def _reads(values: list[Value], source: Value) -> bool:
    """Whether evaluating one of `values` reads `source`."""
    stack, seen = list(values), set(values)
    while stack:
        at = stack.pop()
        if at is source:
            return True
        op = at.op
        if op is None or not at.shape or op.name in MATERIALISERS:
            continue
        stack.extend(v for v in op.operands if v not in seen)
        seen.update(op.operands)
    return False


def _base(pointer: Value) -> Value | None:
    """The kernel argument that a pointer tensor is derived from, if that is certain."""
    while pointer.op is not None:
        if pointer.op.name not in ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.trans", "tt.bitcast"):
            return None
        pointer = pointer.op.operands[0]
    loop = for_argument(pointer)
    if loop is not None:
        return _base(loop.operands[2 + pointer.index])
    return pointer if pointer.block is not None and pointer.block.parent is None else None


def _is_spread(value: Value) -> bool:
    """Whether a tensor is broadcast to a larger shape, perhaps after getting a dimension of size one."""
    for use in value.uses:
        if use.name == "tt.broadcast":
            return True
        if use.name in ("tt.expand_dims", "tt.reshape") and use.results and _is_spread(use.result):
            return True
    return False


def _encloses_loop(value: Value, use: Op) -> bool:
    """Whether `use` is in a loop that `value` is outside of."""
    block: Block | None = use.block
    while block is not None and block is not value.block:
        parent = block.parent
        if parent is not None and parent.name in ("scf.for", "scf.while"):
            return True
        block = parent.block if parent is not None else None
    return False


def _in_combine_region(op: Op) -> bool:
    block = op.block
    while block is not None and block.parent is not None:
        if block.parent.name in ("tt.reduce", "tt.scan", "tt.map_elementwise"):
            return True
        block = block.parent.block
    return False


def uses_by_region(function: Function) -> dict[Op, list[Value]]:
    """For every operation with regions, the tensors from outside that its regions use."""
    found: dict[Op, list[Value]] = defaultdict(list)
    for op in function.walk():
        for operand in op.operands:
            block = op.block
            while block is not None and block is not operand.block:
                if block.parent is not None and operand.shape:
                    found[block.parent].append(operand)
                block = block.parent.block if block.parent is not None else None
    return found
