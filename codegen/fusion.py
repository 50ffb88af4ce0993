"""Fusion: which values are stored, and which stores one kernel makes.

Every loop operation can be computed wherever its value is needed, so that nothing has to be stored but what operations
outside loops read and what the program returns. More is stored where computing it again would cost more than reading it: where
kernels of different rows or of different stages need it. A stage ends at an operation that is no loop, such as a product.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from graphwright.ir.program import Program

from .indexing import product
from .lowering import GENERATORS, LOOKUPS, POINTWISE, REDUCED_DIMS, REDUCTIONS, VIEWS
from .lowering.lookups import indices_of, is_known

_SUPPORTED = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}


@dataclass(frozen=True)
class Rows:
    """What the kernel that computes a node works on.

    Args:
        count: number of rows.
        columns: length of a row.
        reduced: whether the node has one value per row, not per row and column.
    """

    count: Any
    columns: Any
    reduced: bool = False

    @property
    def shape(self) -> tuple[Any, Any]:
        """The number of rows and their length."""
        return self.count, self.columns


@dataclass(eq=False)
class Unit:
    """What one step computes: stored loop nodes, or one other operation.

    Args:
        nodes: the nodes, in order.
        is_loop: whether a loop kernel computes them.
        before: units that have to run earlier.
    """

    nodes: list[fx.Node]
    is_loop: bool
    before: set[Unit] = field(default_factory=set)


class Fusion:
    """Decides for one program.

    Args:
        program: the program.
        external: nodes that must not be computed in loops although they could be.
    """

    def __init__(self, program: Program, external: Iterable[fx.Node] = ()) -> None:
        self.program = program
        self.external = set(external)
        self._kinds: dict[fx.Node, str] = {}
        self._rows: dict[fx.Node, Rows] = {}
        self._numel: dict[fx.Node, Any] = {}
        self._stages: dict[fx.Node, int] = {}
        for node in program.graph.nodes:
            self._kinds[node] = self._classify(node)

    # -- kinds of nodes

    def kind(self, node: fx.Node) -> str:
        """Return "input", "weight", "size", "view", "generator", "loop", "external" or "output"."""
        return self._kinds[node]

    def _classify(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "get_attr", "output"):
            named = {"placeholder": "input", "get_attr": "weight", "output": "output"}
            return named[node.op]
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
            return "size"
        if node in self.external or not isinstance(value, torch.Tensor) or not self._fits(node):
            return "external"
        if node.target in VIEWS:
            source: Any = node.args[0]
            return "view" if isinstance(source.meta.get("val"), torch.Tensor) else "external"
        if node.target in GENERATORS:
            return "generator"
        if node.target in POINTWISE:
            return "loop"
        if node.target in LOOKUPS:
            return "loop" if is_known(indices_of(node)) else "external"
        return "loop" if node.target in REDUCTIONS and self._trailing(node) else "external"

    def _fits(self, node: fx.Node) -> bool:
        tensors = [node, *node.all_input_nodes]
        values = [n.meta.get("val") for n in tensors]
        return all(v.dtype in _SUPPORTED for v in values if isinstance(v, torch.Tensor)) and not any(
            isinstance(v, list | tuple) for v in values
        )

    def _trailing(self, node: fx.Node) -> bool:
        source: Any = node.args[0]
        rank = source.meta["val"].dim()
        dims = list(REDUCED_DIMS[node.target](node))
        sizes = [n for n in source.meta["val"].shape[rank - len(dims) :] if isinstance(n, int)]
        return bool(dims) and dims == list(range(rank - len(dims), rank)) and 0 not in sizes

    def base(self, node: fx.Node) -> fx.Node:
        """Return what a chain of views is a view of."""
        while self._kinds[node] == "view":
            node = node.args[0]  # type: ignore[assignment]
        return node

    def tensor_args(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors among a node's arguments."""
        return [n for n in node.all_input_nodes if not self._is_size(n)]

    def _is_size(self, node: fx.Node) -> bool:
        return self._kinds[node] == "size"

    # -- rows and stages

    def numel(self, node: fx.Node) -> Any:
        """Return the number of elements of a node's value."""
        if node not in self._numel:
            self._numel[node] = product(self.program.shape(node))
        return self._numel[node]

    def rows(self, node: fx.Node) -> Rows:
        """Return what the kernel that computes a loop node works on."""
        if node not in self._rows:
            self._rows[node] = self._find_rows(node)
        return self._rows[node]

    def _find_rows(self, node: fx.Node) -> Rows:
        if node.target in REDUCED_DIMS and self._kinds[node] == "loop":
            source: Any = node.args[0]
            shape, count = self.program.shape(source), len(REDUCED_DIMS[node.target](node))
            whole = sympy.expand(self.numel(node) - self.numel(source)) == 0
            columns = product(shape[len(shape) - count :])
            return Rows(product(shape[: len(shape) - count]), columns, reduced=not whole or columns == 1)
        if self._kinds[node] == "loop":
            for arg in self.tensor_args(node):
                base = self.base(arg)
                if self._kinds[base] == "loop" and self.rows(base).reduced and self.numel(base) == self.numel(node):
                    return self.rows(base)
        shape = tuple(n for n in self.program.shape(node) if n != 1)
        return Rows(product(shape[:-1]), product(shape[-1:]))

    def stage(self, node: fx.Node) -> int:
        """Return how many operations outside loops lie, one after the other, before a node."""
        if node not in self._stages:
            for earlier in self.program.graph.nodes:
                if earlier not in self._stages:
                    found = 0
                    for arg in earlier.all_input_nodes:
                        after = self._kinds[self.base(arg)] == "external" and self._kinds[earlier] != "external"
                        found = max(found, self._stages[arg] + (after and self._kinds[earlier] != "view"))
                    self._stages[earlier] = found
        return self._stages[node]

    # -- what is stored

    def users(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield the nodes that use a node's value, through views."""
        for user in node.users:
            if self._kinds[user] == "view":
                yield from self.users(user)
            else:
                yield user

    def worth_storing(self, node: fx.Node) -> bool:
        """Whether a loop node that loops use is better stored than computed wherever it is used."""
        users = set(self.users(node))
        if not users or any(self._kinds[u] != "loop" for u in users):
            return False
        mine = (self.stage(node), *self.rows(node).shape)
        theirs = {(self.stage(u), *self.rows(u).shape) for u in users}
        if theirs == {mine}:
            return False
        bases = [self.base(a) for a in self.tensor_args(node)]
        large = [b for b in bases if self._kinds[b] != "generator" and self.numel(b) == self.numel(node)]
        if len(users) == 1 and node.target not in REDUCTIONS:
            (user,) = users
            if self.rows(user).shape == self.rows(node).shape and len(large) <= 1:
                return False
        # What is made from smaller tensors alone is cheaper to make again than to read.
        return bool(large) or node.target in REDUCTIONS or self._is_costly(node)

    def _is_costly(self, node: fx.Node) -> bool:
        return any(word in str(node.target) for word in ("exp", "log", "sin", "cos", "tanh", "erf", "pow", "sqrt", "softplus"))

    # -- what one kernel makes

    def units(self, stored: Iterable[fx.Node], after: Mapping[fx.Node, Iterable[fx.Node]] | None = None) -> list[Unit]:
        """Return the units of a program in an order in which they can run.

        Args:
            stored: the nodes that loops compute and that are stored.
            after: operation outside loops -> earlier ones that it has to run after although it does not read their results.
        """
        wanted, after = set(stored), after or {}
        unit_of: dict[fx.Node, Unit] = {}
        units: list[Unit] = []
        for node in self.program.graph.nodes:
            if node in wanted:
                needed = {unit_of[n] for n in self._reads(node, wanted)}
                unit = self._place(node, needed, units, wanted)
                unit_of[node] = unit
            elif self._kinds[node] == "external":
                needed = {unit_of[n] for n in (*self._reads(node, wanted), *after.get(node, ()))}
                unit_of[node] = unit = Unit([node], False, set(needed))
                for other in needed:
                    unit.before |= other.before
                units.append(unit)
        return self._sorted(units)

    def _reads(self, node: fx.Node, wanted: set[fx.Node]) -> set[fx.Node]:
        """Return the stored nodes and other operations that a node is computed from."""
        found: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        stack = list(node.all_input_nodes)
        while stack:
            other = stack.pop()
            if other in seen:
                continue
            seen.add(other)
            if other in wanted or self._kinds[other] == "external":
                found.add(other)
            else:
                stack.extend(other.all_input_nodes)
        return found

    def _place(self, node: fx.Node, needed: set[Unit], units: list[Unit], wanted: set[fx.Node]) -> Unit:
        shape = self.rows(node).shape
        sources = self._sources(node, wanted)
        for unit in reversed(units):
            if not unit.is_loop or self.rows(unit.nodes[0]).shape != shape or self.stage(unit.nodes[0]) != self.stage(node):
                continue
            if any(unit in other.before for other in needed if other is not unit):
                continue
            related = unit in needed or any(sources & self._sources(n, wanted) for n in unit.nodes)
            if not related:
                continue
            unit.nodes.append(node)
            self._extend(unit, needed - {unit}, units)
            return unit
        made = Unit([node], True)
        units.append(made)
        self._extend(made, needed, units)
        return made

    def _sources(self, node: fx.Node, wanted: set[fx.Node]) -> set[fx.Node]:
        """Return what is stored that a node is computed from; of weights only those that are as large."""
        found: set[fx.Node] = set()
        stack, seen = [node], {node}
        while stack:
            for other in stack.pop().all_input_nodes:
                if other in seen or self._is_size(other):
                    continue
                seen.add(other)
                if other in wanted or self._kinds[other] in ("external", "input", "weight"):
                    found.add(other)
                else:
                    stack.append(other)
        return {n for n in found if self._kinds[n] != "weight" or self.numel(n) == self.numel(node)}

    def _extend(self, unit: Unit, needed: set[Unit], units: list[Unit]) -> None:
        unit.before |= needed
        for other in needed:
            unit.before |= other.before
        for other in units:
            if unit in other.before:
                other.before |= unit.before

    def _sorted(self, units: list[Unit]) -> list[Unit]:
        position: Mapping[fx.Node, int] = {node: k for k, node in enumerate(self.program.graph.nodes)}
        waiting = sorted(units, key=lambda unit: position[unit.nodes[-1]])
        done: list[Unit] = []
        placed: set[Unit] = set()
        while waiting:
            ready = next(unit for unit in waiting if unit.before <= placed)
            waiting.remove(ready)
            done.append(ready)
            placed.add(ready)
        return done


def is_item(node: fx.Node) -> bool:
    """Whether a node takes one result of an operation that has several."""
    return node.target is operator.getitem
