"""One matrix product for linear layers that read the same value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.errors import PlanError
from graphwright.ir.program import Program, calls
from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan, Refusal
from graphwright.passes.local import Places, erase_unused

from .split_bias import LINEAR, bias_of

aten = torch.ops.aten

HEAVY = (LINEAR, aten.matmul.default, aten.bmm.default, aten.scaled_dot_product_attention.default, dialect.attention)
"""Between linear layers that are fused, no other of these may lie: their results would wait in memory for long."""


@dataclass(frozen=True, kw_only=True)
class FuseProjections(Pass):
    """Compute linear layers that read the same value (query, key and value; gate and up) as one, and slice the result.

    Before: `%q = linear(%x, weights["q"]); %k = linear(%x, weights["k"])`

    After: `%f = linear(%x, weights["fused"]); %q = slice(%f, -1, 0, 32); %k = slice(%f, -1, 32, 48)`

    Applies when: linear layers read one value. Where only some have a bias, the others get one of zeros.

    Declines when: a weight is used elsewhere too (tied weights), which would then be stored twice.
    Declines when: another matrix product lies between them.
    Declines when: the weights differ in dtype.

    Fidelity: a product of another size may sum in another order.

    Args:
        minimum: the least number of linear layers to fuse, at least 2.
    """

    name = "fuse-projections"
    fidelity = Fidelity.CLOSE

    minimum: int = 2

    def plan(self, program: Program, context: Context) -> Plan:
        """Group the linear layers by the value that they read."""
        found = list(self._find(program))
        return Plan(
            self.name,
            tuple(item for item in found if isinstance(item, Decision)),
            tuple(item for item in found if isinstance(item, Refusal)),
        )

    def _find(self, program: Program) -> Iterator[Decision | Refusal]:
        readers: dict[str, int] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr":
                readers[str(node.target)] = readers.get(str(node.target), 0) + len(node.users)
        for group in _groups(program):
            if len(group) < 2:
                continue
            refused = {node: reason for node in group if (reason := _reason(node, readers)) is not None}
            for node, reason in refused.items():
                yield Refusal(node.name, reason)
            kinds: dict[torch.dtype, list[fx.Node]] = {}
            for node in (node for node in group if node not in refused):
                weight = node.args[1]
                assert isinstance(weight, fx.Node)
                kinds.setdefault(weight.meta["val"].dtype, []).append(node)
            if len(kinds) > 1:
                yield Refusal(group[0].name, "the weights differ in dtype")
            for members in kinds.values():
                if len(members) >= max(self.minimum, 2):
                    names = [node.name for node in members]
                    why = f"they read the same value %{members[0].all_input_nodes[0].name}"
                    yield Decision(members[0].name, f"fuse {len(members)} linear layers", why, {"members": names})

    def apply(self, program: Program, plan: Plan) -> Program:
        """Return the program with each group computed as one.

        Raises:
            PlanError: the members do not read the same value.
        """
        result = program.copy()
        places = Places(result.graph, self.name)
        for decision in plan.decisions:
            members = [places[name] for name in decision.detail["members"]]
            if len({node.args[0] for node in members}) != 1 or any(node.target is not LINEAR for node in members):
                raise PlanError(f"{self.name}: {', '.join(decision.detail['members'])} are not linear layers of one value")
            _fuse(result, members)
        return result


def _groups(program: Program) -> Iterator[list[fx.Node]]:
    """Yield linear layers of the same value with no other matrix product between them."""
    group: list[fx.Node] = []
    for node in calls(program.graph, *HEAVY):
        if group and (node.target is not LINEAR or node.args[0] is not group[0].args[0]):
            yield group
            group = []
        if node.target is LINEAR:
            group.append(node)
    if group:
        yield group


def _reason(node: fx.Node, readers: dict[str, int]) -> str | None:
    for parameter in node.args[1:]:
        if parameter is None:
            continue
        if not isinstance(parameter, fx.Node) or parameter.op != "get_attr":
            return "its weight is computed"
        if readers[str(parameter.target)] > 1:
            return f"the weight {parameter.target!r} is used elsewhere too"
    return None


def _fuse(program: Program, members: list[fx.Node]) -> None:
    first, x = members[0], members[0].args[0]
    assert isinstance(x, fx.Node)
    with program.graph.inserting_before(first), torch.no_grad():
        weight = program.weight(_name(members, 1), torch.cat([_value(program, node.args[1]) for node in members]))
        arguments = [x, weight]
        biased = [node for node in members if bias_of(node) is not None]
        if biased:
            biases = [_bias(program, node) for node in members]
            arguments.append(program.weight(_name(biased, 2), torch.cat(biases)))
        fused = program.call(LINEAR, *arguments, like=first)
        start, last = 0, fused.meta["val"].dim() - 1
        for node in members:
            size = node.meta["val"].shape[-1]
            part = program.call(aten.slice.Tensor, fused, last, start, start + size, like=node)
            node.replace_all_uses_with(part)
            start += size
    erase_unused(program, members)


def _bias(program: Program, node: fx.Node) -> torch.Tensor:
    bias = bias_of(node)
    weight = _value(program, node.args[1])
    return weight.new_zeros(weight.shape[0]) if bias is None else _value(program, bias)


def _value(program: Program, node: object) -> torch.Tensor:
    assert isinstance(node, fx.Node)
    return program.weights[str(node.target)].detach()


def _name(members: list[fx.Node], argument: int) -> str:
    """Return a name such as "layers.0.attention.q_proj+k_proj+v_proj.weight"."""
    paths = [str(node.args[argument].target).split(".") for node in members]  # type: ignore[union-attr]
    common = 0
    while all(len(path) > common + 1 and path[common] == paths[0][common] for path in paths):
        common += 1
    middle = "+".join(".".join(path[common:-1]) or path[-1] for path in paths)
    return ".".join([*paths[0][:common], middle, paths[0][-1]])
