"""Passes that replace one value by another, node by node."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from graphwright.ir.errors import PlanError
from graphwright.ir.program import Program

from .base import Context, Decision, Pass, Plan, Refusal


class LocalPass(Pass):
    """A pass whose decisions each replace the value of one node, `decision.where`, by a new one."""

    @abstractmethod
    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield what to replace and what to leave, in the order of the graph."""

    @abstractmethod
    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Insert what replaces `node`, in front of it, and return it.

        Args:
            program: the program that is rewritten.
            node: what is to be replaced.
            detail: the decision's.
            places: finds other nodes by the names that the plan uses.
        """

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide what to replace."""
        found = list(self.find(program, context))
        return Plan(
            self.name,
            tuple(item for item in found if isinstance(item, Decision)),
            tuple(item for item in found if isinstance(item, Refusal)),
        )

    def apply(self, program: Program, plan: Plan) -> Program:
        """Return the program with the plan's values replaced, and without the nodes that this left unused.

        Raises:
            PlanError: the plan names a node that is not there, or one twice, or lacks what is needed.
        """
        result = program.copy()
        places = Places(result.graph, plan.pass_name)
        replaced = []
        for decision in plan.decisions:
            node = places.once(decision.where)
            try:
                with result.graph.inserting_before(node):
                    new = self.build(result, node, dict(decision.detail), places)
            except KeyError as error:
                raise PlanError(f"{self.name}: the decision about %{decision.where} does not say {error}") from error
            node.replace_all_uses_with(new)
            places.move(decision.where, new)
            replaced.append(node)
        erase_unused(result, replaced)
        return result


class Places:
    """The nodes of a graph by the names that they had when a plan was made."""

    def __init__(self, graph: fx.Graph, pass_name: str) -> None:
        self._pass_name = pass_name
        self._nodes = {node.name: node for node in graph.nodes}
        self._decided: set[str] = set()

    def __getitem__(self, name: str) -> fx.Node:
        """Return the node, or what has taken its place.

        Raises:
            PlanError: there is no such node.
        """
        node: fx.Node | None = self._nodes.get(name)
        if node is None:
            raise PlanError(f"{self._pass_name}: the plan names %{name}, which is not in the graph: plan again")
        return node

    def once(self, name: str) -> fx.Node:
        """Return the node that a decision is about, or what has taken its place.

        Raises:
            PlanError: there is no such node, or another decision was about it.
        """
        node = self[name]
        if name in self._decided:
            raise PlanError(f"{self._pass_name}: the plan names %{name} twice")
        self._decided.add(name)
        return node

    def move(self, name: str, node: fx.Node) -> None:
        """Let a name stand for another node from now on."""
        old = self._nodes[name]
        for known, place in self._nodes.items():
            if place is old:
                self._nodes[known] = node


def erase_unused(program: Program, nodes: Iterable[fx.Node]) -> None:
    """Erase those of `nodes` that nothing uses, what only they used, and the weights that nothing reads any more."""
    waiting, weights = list(nodes), set()
    erased: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in erased or node.users or node.op in ("placeholder", "output"):
            continue
        waiting.extend(node.all_input_nodes)
        erased.add(node)
        if node.op == "get_attr":
            weights.add(str(node.target))
        program.graph.erase_node(node)
    if weights:
        weights -= {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
        for name in weights:
            del program.weights[name]


def is_random(node: fx.Node) -> bool:
    """Return whether two runs of a node may give different values."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def bytes_of(value: Any) -> int:
    """Return the bytes of a value of static shape, of a tensor or of several."""
    if isinstance(value, torch.Tensor):
        return int(value.numel()) * value.element_size()
    return sum(bytes_of(item) for item in value) if isinstance(value, list | tuple) else 0
