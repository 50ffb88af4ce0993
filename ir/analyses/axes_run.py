"""One run of the axes analysis through a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir.analyses import axes_lookups, axes_products, axes_reductions, axes_rules
from graphwright.ir.analyses.axes_products import ATTENTION, FUSED_ATTENTION
from graphwright.ir.analyses.axes_registry import CONTENT_FREE, POINTWISE, RULES, SIZED, arguments, op_name
from graphwright.ir.analyses.axes_seeds import is_constant
from graphwright.ir.analyses.axes_state import Dims, Factor, Label, Mixes, Region, State, Value, has, is_tensor

RULE_FILES = (axes_lookups, axes_products, axes_reductions, axes_rules)
"""The modules whose import registers the rules."""


@dataclass(frozen=True)
class Mixing:
    """Why an operation mixes tokens.

    Args:
        kind: "attention" (queries against the keys of other tokens), "reduce", "scan" (running sums and the like), "window"
            (convolution, pooling), "select" (takes some tokens, joins more), "move" (roll, flip, pad), "view" (splits or
            scrambles the axis), "gather", "sort", "pairs" (an element of two tokens that no attention contracts), "meet"
            (two axes at one place), "position", "length" (the number of tokens used as a value), "unknown" (no rule).
        reason: a sentence for people.
    """

    kind: str
    reason: str

    def __str__(self) -> str:
        return self.reason


class Run:
    """Takes the labels through the graph, one node after the other.

    Args:
        graph: the graph.
        state: with the sizes known, and the seeds in `main`.
        roots: dimensions of the nodes that the labels start from.
    """

    def __init__(self, graph: fx.Graph, state: State, roots: dict[fx.Node, Dims]) -> None:
        self.graph, self.state, self.roots = graph, state, roots
        self.mixing: dict[fx.Node, Mixing] = {}
        self.index_mixing: dict[fx.Node, Mixing] = {}
        self.weighted: set[fx.Node] = set()
        self.of_all: set[fx.Node] = set()
        """Nodes of the index domain whose value depends on all tokens or on their number, and that have no token axis."""
        self.relevant = _reaching_values(graph)

    def analyse(self) -> None:
        """Visit every node in order, then judge what can only be judged at the end."""
        for node in self.graph.nodes:
            self._visit(node)
        self._check_regions()
        self._check_output()
        for node, region in self.state.region_of.items():
            region.nodes.append(node)

    def _visit(self, node: fx.Node) -> None:
        state = self.state
        operands = node.all_input_nodes
        value = node.meta.get("val")
        reads = [] if node.op == "call_function" and op_name(node) in CONTENT_FREE else operands
        if any(n in state.main for n in reads):
            state.main.add(node)
        is_weight = is_constant(node, self.graph) and isinstance(value, torch.Tensor) and value.dtype.is_floating_point
        if is_weight or any(n in self.weighted for n in reads):
            self.weighted.add(node)
        if node.op == "output" or not isinstance(value, torch.Tensor | tuple | list):
            return
        if node in self.roots or not operands or node.op in ("placeholder", "get_attr"):
            state.values[node] = self.roots.get(node) or state.by_shape(node)
            if node not in self.roots and not operands and self._has_tokens(node):
                state.generators.add(node)
            return
        tensors = [n for n in operands if n in state.values]
        try:
            state.values[node] = self._apply(node, tensors)
        except Mixes as found:
            self._report(node, Mixing(found.kind, str(found)))
            state.values[node] = self._after_mixing(node, tensors)
        if node in state.attention:
            self._report(node, Mixing("attention", "attention over the token axis"))
        if self._has_tokens(node) and not any(self._has_tokens(n) for n in tensors):
            state.generators.add(node)
        self._track(node, tensors)

    def _apply(self, node: fx.Node, tensors: list[fx.Node]) -> Value:
        state, name = self.state, op_name(node)
        if node in state.main | self.weighted and any(n in self.of_all for n in tensors):
            raise Mixes("length", "uses a value made of all tokens or of their number")
        labelled = any(self._is_labelled(n) for n in tensors)
        function = RULES.get(name)
        if name not in SIZED and any(state.holds_length(n) for n in self._values(node, name)):
            raise Mixes("length", "the number of tokens is used as a value")
        if not labelled and name != "getitem":
            # Rules are still asked where the length comes in through a shape or a range.
            return function(state, node, arguments(node)) if function and name in SIZED and tensors else state.by_shape(node)
        if function is None:
            raise Mixes("unknown", f"no rule for {node.target}")
        return function(state, node, arguments(node))

    @staticmethod
    def _values(node: fx.Node, name: str) -> list[fx.Node]:
        """Return the nodes among the arguments that may be numbers used as values."""
        a = arguments(node)
        if name in ("full", "new_full"):
            return [v for v in (a.get("fill_value"),) if isinstance(v, fx.Node)]
        if name == "arange":
            return [v for v in (a.get("start"), a.get("step")) if isinstance(v, fx.Node)]
        if name in ("zeros", "ones", "empty", "rand", "randn", "linspace", "eye"):
            return []
        return node.all_input_nodes

    def _has_tokens(self, node: fx.Node) -> bool:
        value = self.state.values[node]
        return any(has(dims, Label.TOKEN) for dims in ([value] if isinstance(value, tuple) else value))

    def _is_labelled(self, node: fx.Node) -> bool:
        value = self.state.values[node]
        return any(has(dims, *Label) for dims in ([value] if isinstance(value, tuple) else value))

    def _is_index(self, node: fx.Node) -> bool:
        return node not in self.weighted and (node not in self.state.main or node not in self.relevant)

    def _report(self, node: fx.Node, mixing: Mixing) -> None:
        if self._is_index(node) and mixing.kind != "attention":
            self.index_mixing[node] = mixing
        else:
            self.mixing[node] = mixing

    def _after_mixing(self, node: fx.Node, tensors: list[fx.Node]) -> Value:
        """Return dimensions for the result of a mixing operation: of an operand of the same shape, or from the shape."""
        state = self.state
        if is_tensor(node):
            for n in tensors:
                if is_tensor(n) and state.shape(n) == state.shape(node) and has(state.dims(n), Label.TOKEN):
                    return tuple(
                        tuple(Factor(None if f.label is Label.KEY else f.label, f.size) for f in dim) for dim in state.dims(n)
                    )
        return state.by_shape(node)

    def _track(self, node: fx.Node, tensors: list[fx.Node]) -> None:
        """Note what else follows the values: regions of scores, and index values made of all tokens."""
        state = self.state
        inside = [n for n in tensors if n in state.region_of]
        closes = any(node in region.closing for region in state.regions)
        if inside and not closes and node not in self.mixing:
            value = state.values[node]
            dims = value if isinstance(value, tuple) else value[0]
            if has(dims, Label.KEY) or any(has(state.dims(n), Label.KEY) for n in inside):
                regions = {id(state.region_of[n]): state.region_of[n] for n in inside}
                first, *others = regions.values()
                for other in others:
                    first.opening += other.opening
                    state.regions.remove(other)
                    state.region_of.update({n: first for n, r in state.region_of.items() if r is other})
                state.region_of[node] = first
        made = node in self.index_mixing or any(n in self.of_all for n in tensors)
        if made and self._is_index(node) and not self._has_tokens(node):
            self.of_all.add(node)

    def _check_regions(self) -> None:
        """Report scores that do anything but end in the closing product of their region."""
        state = self.state
        for region in state.regions:
            if not region.closing:
                for node in region.opening:
                    self._report(node, Mixing("pairs", "the product pairs tokens, and no product with values ends it"))
        for node, region in state.region_of.items():
            if region.closing and self._leaks(node, region):
                self._report(node, Mixing("pairs", "attention scores are used outside of the attention"))

    def _leaks(self, node: fx.Node, region: Region) -> bool:
        state, inner = self.state, POINTWISE | {"getitem"}
        for user in node.users:
            if user not in self.relevant or user in region.closing:
                continue
            if state.region_of.get(user) is region:
                continue
            alone = all(state.region_of.get(n) is region for n in user.all_input_nodes if self._is_labelled(n))
            if user.op == "output" or op_name(user) not in inner or not alone or self._leaks(user, region):
                return True
        return False

    def _check_output(self) -> None:
        for node in self.graph.output_node().all_input_nodes:
            value = self.state.values.get(node, ())
            for dims in [value] if isinstance(value, tuple) else value:
                if has(dims, Label.ROWS, Label.AGGREGATE) and node not in self.mixing:
                    self.mixing[node] = Mixing(
                        "sort", "rows leave the graph in the order of a sort, or as counts over all rows"
                    )


def _reaching_values(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that reach an output otherwise than as the mask of an attention."""
    relevant: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "output" and node not in relevant:
            continue
        relevant.add(node)
        if node.op == "call_function" and op_name(node) in (*ATTENTION, *FUSED_ATTENTION):
            relevant.update(n for n in list(arguments(node).values())[:3] if isinstance(n, fx.Node))
        else:
            relevant.update(node.all_input_nodes)
    return relevant
