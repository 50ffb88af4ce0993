"""Computing at compile time what no input decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.program import Program
from graphwright.passes.base import Context, Decision, Fidelity, Refusal
from graphwright.passes.local import LocalPass, Places, bytes_of, is_random


@dataclass(frozen=True, kw_only=True)
class ConstantFolding(LocalPass):
    """Compute values that depend on weights and numbers only, and store them as weights.

    Before: `%a = add(weights["w"], 1.0); %b = mul(%x, %a)`

    After: `%b = mul(%x, weights["folded"])`

    Applies when: a value depends on weights, numbers and generators of static size only.

    Declines when: it would take more than `limit_bytes` and more than the weights that it makes unnecessary.
    Declines when: it is random, or has a size that differs from call to call.

    Args:
        limit_bytes: what a value may take where it replaces no weight of its size; at least 0.
    """

    name = "constant-folding"
    fidelity = Fidelity.EXACT

    limit_bytes: int = 2**20

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the largest constant values."""
        readers: dict[str, set[fx.Node]] = {}
        constant: dict[fx.Node, None] = {}
        cones: dict[fx.Node, set[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr":
                constant[node] = None
                cones[node] = {node}
                readers.setdefault(str(node.target), set()).add(node)
            elif node.op == "call_function" and _may_fold(node) and all(n in constant for n in node.all_input_nodes):
                cone = {node}.union(*(cones[n] for n in node.all_input_nodes))
                size = bytes_of(node.meta["val"])
                if size > max(self.limit_bytes, _freed(program, cone, node, readers)):
                    reason = f"it takes {size} bytes, more than {self.limit_bytes} and than the weights it would replace"
                    yield Refusal(node.name, reason)
                    continue
                constant[node] = None
                cones[node] = cone
        for node in constant:
            if node.op == "call_function" and any(user not in constant for user in node.users):
                size = bytes_of(node.meta["val"])
                yield Decision(node.name, "compute once", "no input decides it", {"size_bytes": size})

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Compute the node's value and return a node that reads it."""
        values: dict[fx.Node, Any] = {}

        def value(of: fx.Node) -> Any:
            if of not in values:
                if of.op == "get_attr":
                    values[of] = program.weights[str(of.target)]
                else:
                    args, kwargs = fx.node.map_arg((of.args, of.kwargs), value)
                    values[of] = of.target(*args, **kwargs)  # type: ignore[operator]
            return values[of]

        with torch.no_grad():
            result = value(node)
        # A view would keep the weight that it looks at alive.
        return program.weight(f"folded_{node.name}", result.detach().clone(memory_format=torch.contiguous_format))


def _may_fold(node: fx.Node) -> bool:
    value = node.meta.get("val")
    # Empty tensors have no values to compute.
    return (
        isinstance(value, torch.Tensor)
        and all(isinstance(n, int) for n in value.shape)
        and isinstance(node.target, torch._ops.OpOverload)
        and not is_random(node)
        and "empty" not in node.target._schema.name
    )


def _freed(program: Program, cone: set[fx.Node], node: fx.Node, readers: dict[str, set[fx.Node]]) -> int:
    """Return the bytes of the weights that nothing but `node` needs."""
    inside = cone - {node}
    total = 0
    for part in inside:
        if part.op == "get_attr" and all(_only_inside(n, cone) for n in readers[str(part.target)]):
            total += bytes_of(program.weights[str(part.target)])
    return total


def _only_inside(node: fx.Node, cone: set[fx.Node]) -> bool:
    """Return whether all that depends on a node up to the cone's tip is in the cone."""
    return all(user in cone for user in node.users)
