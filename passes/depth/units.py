"""What can be left out of a model: blocks, or their attention or feed-forward branches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from graphwright.ir.analyses.blocks import Block, Branch, find_blocks
from graphwright.ir.analyses.cost import Cost, cost_of_node
from graphwright.ir.analyses.reach import Reach
from graphwright.ir.program import Program
from graphwright.ir.records import Refusal
from graphwright.passes.local import bytes_of

Kind = Literal["block", "attention", "feed-forward"]

_BRANCHES: dict[str, str] = {"attention": "attention", "feed-forward": "feed_forward"}
STREAM_RANK = 3
"""A residual stream is [batch, tokens, features]."""


@dataclass(frozen=True)
class Unit:
    """Something that can be left out. Nodes are meant by their names, which stay when others are left out.

    Args:
        label: such as "block 3", counted from 0.
        where: what is replaced: the block's output, or the addition that takes the branch in.
        keep: what stands in its place.
        before: the stream that the unit reads.
        added: what is added to `before`, for a branch that is summed with another one before the stream; "" otherwise, where
            the stream after the unit is `where`.
    """

    label: str
    where: str
    keep: str
    before: str
    added: str = ""


def find_units(program: Program, kind: Kind) -> tuple[list[Unit], list[Refusal]]:
    """Return the units of a kind in the graph's order, and those that cannot be left out with the reasons."""
    blocks = find_blocks(program.graph)
    if not blocks:
        return [], [Refusal("", "no residual blocks were found: there is nothing to leave out")]
    reach = Reach(program.graph)
    units: list[Unit] = []
    refusals: list[Refusal] = []
    for index, block in enumerate(blocks):
        for label, where, keep, inside, unit in _candidates(block, index, kind, reach):
            reason = _reason(program, where, keep, inside)
            if reason is None:
                units.append(unit)
            else:
                refusals.append(Refusal(where.name, f"{label}: {reason}"))
    if not units and not refusals:
        refusals.append(Refusal("", f"none of the {len(blocks)} blocks has a branch of the kind {kind}"))
    return units, refusals


def _candidates(
    block: Block, index: int, kind: Kind, reach: Reach
) -> Iterable[tuple[str, fx.Node, fx.Node | None, tuple[fx.Node, ...], Unit]]:
    """Yield label, node to replace, its replacement (None if there is none), what goes, and the unit."""
    if kind == "block":
        label, inside = f"block {index}", reach.between(block.input, block.output)
        yield label, block.output, block.input, inside, Unit(label, block.output.name, block.input.name, block.input.name)
        return
    found = [branch for branch in block.branches if branch.kind == _BRANCHES[kind]]
    for number, branch in enumerate(found):
        label = f"{kind} of block {index}" + (f", number {number}" if len(found) > 1 else "")
        keep = _other_operand(branch, reach)
        parallel = sum(other.add is branch.add for other in block.branches) > 1
        before, added = (branch.input, branch.contribution.name) if parallel else (keep or branch.input, "")
        unit = Unit(label, branch.add.name, (keep or branch.add).name, before.name, added)
        yield label, branch.add, keep, branch.nodes, unit


def _other_operand(branch: Branch, reach: Reach) -> fx.Node | None:
    """Return the operand of a branch's addition that does not depend on the branch; None unless there is one."""
    others = [node for node in branch.add.all_input_nodes if not reach.leads(branch.contribution, node)]
    return others[0] if len(others) == 1 else None


def _reason(program: Program, where: fx.Node, keep: fx.Node | None, inside: Iterable[fx.Node]) -> str | None:
    """Return why something cannot be left out; None if it can."""
    if keep is None:
        return "nothing is left of the addition without it"
    reason = why_not_in_place(program, where, keep)
    if reason is not None:
        return reason
    if where.meta["val"].dim() != STREAM_RANK:
        return f"the stream %{where.name} has {where.meta['val'].dim()} dimensions, and not [batch, tokens, features]"
    alive = live_nodes(program, {where: keep})
    kept = next((node for node in inside if node is not where and node in alive), None)
    if kept is not None:
        return f"%{kept.name}, which it computes, is a result of the model or is read outside of it"
    return None


def why_not_in_place(program: Program, where: fx.Node, keep: fx.Node) -> str | None:
    """Return why one value cannot stand in another's place for its type; None if it can."""
    one, other = where.meta.get("val"), keep.meta.get("val")
    if getattr(one, "dtype", None) != getattr(other, "dtype", None) or not hasattr(one, "shape"):
        return f"%{keep.name} has another dtype than %{where.name}"
    if program.shape(where) != program.shape(keep):
        shapes = [", ".join(map(str, program.shape(node))) for node in (keep, where)]
        return f"%{keep.name} is [{shapes[0]}] and %{where.name} is [{shapes[1]}]"
    return None


def live_nodes(program: Program, instead: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """Return the nodes that the results need where each key of `instead` is replaced by its value."""
    pending, seen = [program.output], {program.output}
    while pending:
        for source in pending.pop().all_input_nodes:
            while source in instead:
                source = instead[source]
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return seen


class Savings:
    """What is saved by leaving things out, at given sizes.

    Args:
        program: what is counted.
        sizes: size by the dimension's name.
    """

    def __init__(self, program: Program, sizes: Mapping[str, int]) -> None:
        self._program, self._sizes = program, sizes
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._costs: dict[fx.Node, Cost] = {}

    def of(self, units: Iterable[Unit]) -> dict[str, int]:
        """Return `flops` and `moved_bytes` of a call, and `weight_bytes`, that go with units together."""
        instead = {self._nodes[unit.where]: self._nodes[unit.keep] for unit in units}
        gone = live_nodes(self._program, {}) - (rest := live_nodes(self._program, instead))
        read = {str(node.target) for node in rest if node.op == "get_attr"}
        lost = {str(node.target) for node in gone if node.op == "get_attr"} - read
        cost = sum((self._cost(node) for node in gone if node.op == "call_function"), Cost())
        weight_bytes = sum(bytes_of(self._program.weights[name]) for name in lost)
        return {"flops": int(cost.flops), "moved_bytes": int(cost.moved_bytes), "weight_bytes": weight_bytes}

    def _cost(self, node: fx.Node) -> Cost:
        if node not in self._costs:
            self._costs[node] = cost_of_node(self._program, node).at(self._sizes)
        return self._costs[node]


def sizes_of(program: Program, tensors: Iterable[Any]) -> dict[str, int]:
    """Return the program's dimensions in a call of flat tensors."""
    sizes: dict[str, int] = {}
    for node, tensor in zip(program.inputs, tensors, strict=True):
        for size, number in zip(program.shape(node), tensor.shape, strict=True):
            if str(size) in program.dimensions:
                sizes[str(size)] = int(number)
    return sizes
