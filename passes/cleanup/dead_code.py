"""Removal of what nothing uses."""

from __future__ import annotations

from dataclasses import dataclass

from graphwright.ir.errors import PlanError
from graphwright.ir.program import Program
from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan
from graphwright.passes.local import Places


@dataclass(frozen=True, kw_only=True)
class DeadCode(Pass):
    """Remove nodes whose values no result depends on, and weights that no node reads.

    Before: `%a = linear(%x, weights["w"]); %b = relu(%x); return %b`

    After: `%b = relu(%x); return %b`, and no weight `w`

    Applies when: a node has no path to a result.

    Declines when: the node is an input: inputs are the program's signature.
    """

    name = "dead-code"
    fidelity = Fidelity.EXACT

    def plan(self, program: Program, context: Context) -> Plan:
        """List the nodes that no result needs, last first."""
        needed = {program.output}
        decisions = []
        for node in reversed(program.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
            elif node.op != "placeholder":
                decisions.append(Decision(node.name, "remove", "no result depends on it"))
        read = {node.target for node in needed if node.op == "get_attr"}
        unread = sorted(set(program.weights) - read)
        if unread:
            decisions.append(Decision("", "remove weights", "no needed node reads them", {"weights": unread}))
        return Plan(self.name, tuple(decisions))

    def apply(self, program: Program, plan: Plan) -> Program:
        """Return the program without the plan's nodes and weights.

        Raises:
            PlanError: a node is still used, or a weight still read.
        """
        result = program.copy()
        places = Places(result.graph, self.name)
        for decision in plan.decisions:
            if decision.where:
                node = places[decision.where]
                if node.users:
                    raise PlanError(f"{self.name}: %{node.name} is used by {', '.join(f'%{u.name}' for u in node.users)}")
                result.graph.erase_node(node)
            for name in decision.detail.get("weights", ()):
                if any(node.op == "get_attr" and node.target == name for node in result.graph.nodes):
                    raise PlanError(f"{self.name}: the weight {name!r} is still read")
                result.weights.pop(name, None)
        return result
