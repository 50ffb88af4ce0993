"""The blocks analysis: the residual stream of a model, the branches that add to it, and the blocks that they repeat in.

Only structure decides. An addition belongs to a residual stream if one operand depends, through a product with weights, on the
other: what a branch computed from the stream is added back to it. Additions that hand the stream on to each other form a
chain, with norms in between or without; the chain's pattern of attention and feed-forward branches cuts it into blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from graphwright.ir.analyses.axes import Axes, analyse_axes
from graphwright.ir.analyses.axes_products import ATTENTION, FUSED_ATTENTION
from graphwright.ir.analyses.axes_registry import arguments, op_name
from graphwright.ir.analyses.axes_seeds import is_constant
from graphwright.ir.analyses.axes_state import is_tensor
from graphwright.ir.analyses.reach import Reach

_PASSING = frozenset(["to", "contiguous", "alias", "clone", "detach", "dropout", "type_as"])
"""Operations that hand the stream on as it is, apart from its type."""

Kind = Literal["attention", "feed_forward", "other"]


@dataclass(frozen=True)
class Branch:
    """One branch of a block: what is computed from the residual stream and added to it.

    Args:
        kind: "attention"; "feed_forward" (two or more products with weights, token by token); or "other".
        input: the node of the stream that the branch reads.
        contribution: the node that is added.
        add: the addition that takes the contribution in: to the stream, or to the contribution of a parallel branch.
        nodes: the branch's operations from after the input to the contribution, in the graph's order.
    """

    kind: Kind
    input: fx.Node
    contribution: fx.Node
    add: fx.Node
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Block:
    """One block of a residual stream.

    Args:
        input: the stream that enters; the output of the block before.
        output: the stream that leaves: the last addition, or the norm behind it where norms are on the stream.
        branches: in the graph's order.
        nodes: all operations from after the input to the output, and those that nothing else uses, in the graph's order.
        weights: the parameters and other constants that the nodes use, in the order of first use.
        form: a digest of the structure: equal for blocks that differ in nothing but their weights' values and in what they
            are given from outside, such as masks.
    """

    input: fx.Node
    output: fx.Node
    branches: tuple[Branch, ...]
    nodes: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    form: str

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of the branches."""
        return tuple(branch.kind for branch in self.branches)


@dataclass(frozen=True)
class _Step:
    """One addition to the stream: `add = entry + contribution`."""

    add: fx.Node
    entry: fx.Node
    contribution: fx.Node


def find_blocks(graph: fx.Graph, axes: Axes | None = None) -> tuple[Block, ...]:
    """Find the residual blocks of a model.

    Args:
        graph: as `torch.export` makes it, with `meta["val"]` on every node.
        axes: of the same graph, to tell what mixes tokens; analysed if None.

    Returns:
        The blocks in the graph's order; of an encoder and a decoder first the one's, then the other's. Empty if there is no
        residual stream.
    """
    if axes is None:
        axes = analyse_axes(graph)
        if not axes.attention_nodes:
            axes = analyse_axes(graph, seed_from="attention")
    return _Finder(graph, axes).find()


class _Finder:
    def __init__(self, graph: fx.Graph, axes: Axes) -> None:
        self.graph, self.axes = graph, axes
        self.reach = Reach(graph)
        self.constant = {n for n in graph.nodes if is_constant(n, graph)}
        for node in graph.nodes:
            if node.op == "call_function" and node.all_input_nodes and set(node.all_input_nodes) <= self.constant:
                self.constant.add(node)
        self.products = {n for n in graph.nodes if n.op == "call_function" and n not in self.constant and self._is_product(n)}
        self.attention = {n for n in graph.nodes if n.op == "call_function" and op_name(n) in (*ATTENTION, *FUSED_ATTENTION)}
        self.attention.update(axes.attention_nodes)

    def find(self) -> tuple[Block, ...]:
        blocks: list[Block] = []
        for chain in self._chains(self._steps()):
            entries = [step.entry for step in chain]
            branches = [self._branches(step, entries[: i + 1]) for i, step in enumerate(chain)]
            lengths = _lengths([tuple(branch.kind for branch in found) for found in branches])
            entries.append(self._leaves(chain, len(chain) - lengths[-1]))
            first = 0
            for length in lengths:
                taken = [branch for found in branches[first : first + length] for branch in found]
                blocks.append(self._block(entries[first], entries[first + length], taken))
                first += length
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        return tuple(sorted(blocks, key=lambda block: order[block.output]))

    def _is_product(self, node: fx.Node) -> bool:
        """Return whether a node multiplies activations by a weight of two or more dimensions."""
        if op_name(node) in ("embedding", "index", "gather", "add", "mul", "cat", "expand"):
            return False
        return any(
            n in self.constant and is_tensor(n) and n.meta["val"].dim() > 1 and n.meta["val"].dtype.is_floating_point
            for n in node.all_input_nodes
        )

    def _strip(self, node: fx.Node) -> fx.Node:
        while node.op == "call_function" and (op_name(node) in _PASSING or self._is_whole_slice(node)):
            node = node.all_input_nodes[0]
        return node

    @staticmethod
    def _is_whole_slice(node: fx.Node) -> bool:
        return op_name(node) in ("slice", "view") and _shape_text(node) == _shape_text(node.all_input_nodes[0])

    def _steps(self) -> dict[fx.Node, _Step]:
        """Return the additions of something computed from the stream to the stream, by the addition."""
        steps: dict[fx.Node, _Step] = {}
        for node in self.graph.nodes:
            if node.op != "call_function" or op_name(node) != "add" or len(node.all_input_nodes) != 2:
                continue
            if arguments(node).get("alpha", 1) != 1 or not all(is_tensor(n) for n in node.all_input_nodes):
                continue
            if not all(_same_shape(n, node) for n in node.all_input_nodes):
                continue
            for stream, contribution in (node.all_input_nodes, node.all_input_nodes[::-1]):
                entry = self._strip(stream)
                # Of a parallel branch that is added second, the stream is what the first one read.
                reads = [entry] + ([steps[entry].entry] if entry in steps else [])
                if any(self._computes(read, contribution) for read in reads):
                    steps[node] = _Step(node, entry, self._strip(contribution))
                    break
        return steps

    def _computes(self, start: fx.Node, end: fx.Node) -> bool:
        return any(n in self.products for n in self.reach.between(start, end))

    def _chains(self, steps: dict[fx.Node, _Step]) -> list[list[_Step]]:
        """Return the additions in runs that hand the stream on, without those that lie inside of another's branch.

        An addition that nothing is linked to and that others lie inside of, as where a model's input is added to its result, is
        left out in favour of those.
        """
        inside = {s.add: set(self.reach.between(s.entry, s.contribution)) & steps.keys() for s in steps.values()}
        inner = set().union(*inside.values())
        chains: dict[fx.Node, list[_Step]] = {}
        for step in steps.values():
            if step.add not in inner:
                before = self._added_before(step.entry, steps)
                chain = chains.pop(before, []) if before is not None else []
                chains[step.add] = [*chain, step]
        result = []
        for chain in chains.values():
            # In the graph's order, which a set does not keep.
            within = {add: step for add, step in steps.items() if any(add in inside[outer.add] for outer in chain)}
            result += self._chains(within) if len(chain) == 1 and within else [chain]
        return result

    def _added_before(self, entry: fx.Node, steps: dict[fx.Node, _Step]) -> fx.Node | None:
        """Return the one addition that a stream comes from without a product with weights on the way."""
        pending, seen, found = [entry], {entry}, set()
        while pending:
            node = pending.pop()
            if node in steps:
                found.add(node)
                continue
            if node in self.products or node in self.attention:
                continue
            for n in node.all_input_nodes:
                if n not in seen and n not in self.constant and is_tensor(n):
                    seen.add(n)
                    pending.append(n)
        return found.pop() if len(found) == 1 else None

    def _leaves(self, chain: list[_Step], start: int) -> fx.Node:
        """Return where the stream leaves a chain whose last block starts at the given step.

        That is the last addition, or the like of what lies between the blocks before: a norm on the stream, a view.
        """
        last, at = chain[-1].add, start or len(chain) - 1
        if at == 0 or chain[at].entry is chain[at - 1].add:
            return last
        wanted = self._digest(chain[at - 1].add, chain[at].entry)
        after = (n for n in self.graph.nodes if n is not last and self.reach.leads(last, n) and is_tensor(n))
        return next((n for n in after if self._digest(last, n) == wanted), last)

    def _branches(self, step: _Step, entries: Sequence[fx.Node]) -> list[Branch]:
        """Return the branches of one addition: two if it adds the sum of an attention and a feed-forward branch."""
        if op_name(step.contribution) == "add":
            parts = [self._strip(n) for n in step.contribution.all_input_nodes if is_tensor(n)]
            found = [self._branch(part, step.contribution, entries) for part in parts]
            if sorted(branch.kind for branch in found) == ["attention", "feed_forward"]:
                order = {node: i for i, node in enumerate(self.graph.nodes)}
                return sorted(found, key=lambda branch: order[branch.contribution])
        return [self._branch(step.contribution, step.add, entries)]

    def _branch(self, contribution: fx.Node, add: fx.Node, entries: Sequence[fx.Node]) -> Branch:
        start = next((n for n in reversed(entries) if self.reach.leads(n, contribution)), entries[-1])
        nodes = self.reach.between(start, contribution)
        return Branch(self._kind(nodes), start, contribution, add, nodes)

    def _kind(self, nodes: Iterable[fx.Node]) -> Kind:
        nodes = set(nodes)
        if nodes & self.attention:
            return "attention"
        if len(nodes & self.products) > 1 and not any(n in self.axes.mixing for n in nodes):
            return "feed_forward"
        return "other"

    def _block(self, start: fx.Node, end: fx.Node, branches: list[Branch]) -> Block:
        inside = set(self.reach.between(start, end))
        for node in reversed(self.graph.nodes):
            if node.op == "call_function" and node.users and set(node.users) <= inside and node is not start:
                inside.add(node)
        nodes = tuple(n for n in self.graph.nodes if n in inside)
        weights = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if is_constant(n, self.graph))
        return Block(start, end, tuple(branches), nodes, tuple(weights), self._digest(start, end))

    def _digest(self, start: fx.Node, end: fx.Node) -> str:
        """Return a digest of what is computed between two nodes; weights and what comes from outside count by type only."""
        digests: dict[fx.Node, str] = {start: "input"}
        for node in self.reach.between(start, end):
            if op_name(node) in _PASSING and _type(node) == _type(node.all_input_nodes[0]):
                digests[node] = digests.get(node.all_input_nodes[0], "")
                continue
            text = repr((op_name(node), str(node.target), _plain(dict(arguments(node)), digests), _type(node)))
            digests[node] = hashlib.sha256(text.encode()).hexdigest()
        return digests.get(end, "")


def _plain(value: Any, digests: dict[fx.Node, str]) -> Any:
    """Return an argument as something whose text depends on structure alone."""
    if isinstance(value, fx.Node):
        return digests.get(value) or _type(value)
    if isinstance(value, dict):
        return [(key, _plain(item, digests)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(item, digests) for item in value]
    return str(value)


def _shape_text(node: fx.Node) -> list[str]:
    """Return the sizes as text: comparing symbolic sizes themselves would write guards into their shape environment."""
    return [str(n) for n in node.meta["val"].shape]


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Return whether an operand has its result's shape; two symbolic sizes have to be the same, if written in other ways."""
    a, b = _shape_text(one), _shape_text(other)
    return len(a) == len(b) and all(x == y or not (x.isdigit() or y.isdigit()) for x, y in zip(a, b, strict=True))


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return str([(str(v.dtype), [str(n) for n in v.shape]) if isinstance(v, torch.Tensor) else str(v) for v in values])


def _lengths(kinds: Sequence[tuple[Kind, ...]]) -> list[int]:
    """Return the number of steps of each block: the shortest pattern that the steps repeat, or else up to each attention."""
    for period in range(1, len(kinds)):
        if len(kinds) % period == 0 and all(kinds[i] == kinds[i - period] for i in range(period, len(kinds))):
            return [period] * (len(kinds) // period)
    starts = [i for i in range(1, len(kinds)) if "attention" in kinds[i] and "attention" not in kinds[i - 1]]
    return [end - start for start, end in zip([0, *starts], [*starts, len(kinds)], strict=True)]
