"""A captured model: an executable graph, its weights, and how it is called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy
import torch
from torch import fx

from .errors import VerifyError
from .inference import infer_value, mark_checked

if TYPE_CHECKING:
    from .records import PassRecord
    from .signature import Signature

Size: TypeAlias = int | sympy.Expr
"""A size: a number, or an expression of the program's dimensions."""


@dataclass(frozen=True)
class Dimension:
    """A size that may differ from call to call.

    Args:
        name: such as "batch" or "tokens"; also the name of its sympy symbol in sizes.
        low: the least it may be.
        high: the most it may be; None for no limit.
    """

    name: str
    low: int = 0
    high: int | None = None

    @property
    def symbol(self) -> sympy.Symbol:
        """The symbol that stands for it in sizes."""
        return dimension_symbol(self.name)


def dimension_symbol(name: str) -> sympy.Symbol:
    """Return the symbol of the dimension called `name`."""
    return sympy.Symbol(name, integer=True, positive=True)


@dataclass(eq=False)
class Program:
    """An executable graph of a model.

    Placeholders are the tensors that a call passes, in flat order; a `get_attr` node reads the weight that its target names;
    every other node but the output calls an operation that has a reference in plain PyTorch, so that the graph runs as it
    stands. Values are functional: no node changes a tensor. Strides carry no meaning: a node stands for values only, so that
    what merely lays memory out anew is a no-op. `meta["val"]` of each node is a fake tensor (or a symbolic number) with its
    shape and dtype.

    Args:
        graph: the nodes. The output node's first argument is the tuple of results in flat order.
        weights: parameters, buffers and constants by the name that `get_attr` nodes use; tied weights have one name. A rewrite
            shares them, never copies.
        signature: how a call's arguments become the placeholders, and the results what the model returned.
        dimensions: the sizes that may vary, by name.
        named: symbol of the shape environment -> the size it stands for, in symbols of `dimensions`.
        records: what was done to the model so far, oldest first.
        notes: what a user should know of the capture, such as a dimension that turned out to be fixed.
        states: what is kept from call to call: placeholder -> the number of the result that is its value for the next call.
    """

    graph: fx.Graph
    weights: dict[str, torch.Tensor]
    signature: Signature
    dimensions: dict[str, Dimension] = field(default_factory=dict)
    named: dict[sympy.Symbol, sympy.Expr] = field(default_factory=dict)
    records: list[PassRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    states: dict[str, int] = field(default_factory=dict)

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders, in flat order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The output node."""
        output: fx.Node = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        return output

    @property
    def results(self) -> tuple[Any, ...]:
        """The results in flat order: nodes, or plain values that the model returns whatever its input."""
        return tuple(self.output.args[0])  # type: ignore[arg-type]

    def size(self, value: Any) -> Size:
        """Return a number or a symbolic number (or its expression) as a size in the program's dimensions."""
        if isinstance(value, bool | int):
            return int(value)
        if isinstance(value, fx.Node):
            value = value.meta["val"]
            if isinstance(value, int):
                return value
        expression = value.node.expr if isinstance(value, torch.SymInt) else sympy.sympify(value)
        result = expression.xreplace(self.named)
        return int(result) if result.is_Integer else result

    def shape(self, node: fx.Node) -> tuple[Size, ...]:
        """Return the shape of a node's value in the program's dimensions."""
        return tuple(self.size(n) for n in node.meta["val"].shape)

    def copy(self) -> Program:
        """Return a program that can be rewritten without changing this one; weights are shared."""
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, values)
        copied = graph.output(output)
        copied.meta = dict(self.output.meta)
        return Program(
            graph,
            dict(self.weights),
            self.signature,
            dict(self.dimensions),
            dict(self.named),
            list(self.records),
            list(self.notes),
            dict(self.states),
        )

    def module(self) -> fx.GraphModule:
        """Return the graph as a module that takes and returns flat tensors; weights are shared."""
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        return fx.GraphModule({name: self.weights[name] for name in used}, self.graph)

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph node by node in plain PyTorch, called as the model is called."""
        with torch.no_grad():
            results = self.module()(*self.signature.flatten(args, kwargs))
        return self.signature.unflatten(results)

    def drop_unused(self) -> int:
        """Remove nodes whose values nothing uses, and weights that no node reads; return how many nodes went.

        Placeholders stay: they are the program's signature.
        """
        removed = 0
        for node in reversed(self.graph.nodes):
            if node.op in ("call_function", "get_attr") and not node.users:
                self.graph.erase_node(node)
                removed += 1
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        for name in set(self.weights) - used:
            del self.weights[name]
        return removed

    # -- building nodes

    def call(self, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """Insert a call at the graph's insertion point, with its value's shape and dtype.

        Args:
            target: an operation.
            args: its arguments.
            like: the node whose place in the user's model the new one takes over.
            kwargs: its named arguments.
        """
        node = self.graph.call_function(target, args, kwargs)
        self.infer(node)
        if like is not None:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from"):
                if key in like.meta:
                    node.meta[key] = like.meta[key]
        return node

    def weight(self, name: str, value: torch.Tensor) -> fx.Node:
        """Insert a node that reads a new weight; the name is made unique."""
        unique, count = name, 1
        while unique in self.weights:
            unique, count = f"{name}_{count}", count + 1
        self.weights[unique] = value
        return self.read_weight(unique)

    def read_weight(self, name: str) -> fx.Node:
        """Insert a node that reads the weight called `name`."""
        node = self.graph.create_node("get_attr", name, (), {})
        node.meta["val"] = self.fake_mode.from_tensor(self.weights[name], static_shapes=True)
        return node

    def infer(self, node: fx.Node) -> None:
        """Set `meta["val"]` of a call from those of its arguments.

        Raises:
            VerifyError: the operation does not accept the arguments.
        """
        try:
            node.meta["val"] = infer_value(node, self.fake_mode)
        except Exception as error:
            from .diagnostics import at_node

            raise at_node(VerifyError(f"{node.format_node()}: {error}"), self, node) from error
        mark_checked(node)

    @property
    def fake_mode(self) -> Any:
        """The mode in which shapes are inferred."""
        for node in self.graph.nodes:
            mode = getattr(node.meta.get("val"), "fake_mode", None)
            if mode is not None:
                return mode
        raise VerifyError("the graph has no tensor: there is nothing to compute")


def calls(graph: fx.Graph, *targets: Any) -> Iterator[fx.Node]:
    """Yield the calls of any of `targets`, in order; all calls if none is given."""
    wanted = set(targets)
    for node in list(graph.nodes):
        if node.op == "call_function" and (not wanted or node.target in wanted):
            yield node


def replace(node: fx.Node, new: fx.Node) -> None:
    """Let every user of `node` use `new`, and erase `node`."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
