"""From the graph that torch.compile traces to a program."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from graphwright.ir.containers import Constant, Container, Leaf, Structure
from graphwright.ir.errors import CaptureError
from graphwright.ir.program import Dimension, Program, dimension_symbol
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec

from .normal_form import normalise
from .plain_graph import ASSERTIONS

aten = torch.ops.aten

ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
"""What torch calls for attention, by device; the first result is the attention."""

LARGEST = 2**31
"""A bound above says nothing."""


ARITHMETIC = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
"""What takes a number in the place of a tensor."""

CASTS = {aten._to_copy.default, torch.ops.prims.convert_element_type.default}


def program_of(traced: fx.GraphModule, fixed: Mapping[int, torch.Tensor | float]) -> Program:
    """Return the program of a traced graph. Its inputs are the tensors that are not fixed, in order.

    Args:
        traced: a functional graph of ATen operations with a fake value in `meta["val"]` of each node.
        fixed: the placeholders, by number, that always are these weights, or tensors that hold these numbers.

    Raises:
        CaptureError: the graph holds something that a program cannot.
    """
    return _Importer(traced, fixed).run()


class _Importer:
    def __init__(self, traced: fx.GraphModule, fixed: Mapping[int, torch.Tensor | float]) -> None:
        self.traced = traced
        self.fixed = fixed
        self.graph = fx.Graph()
        self.weights: dict[str, torch.Tensor] = {}
        self.values: dict[fx.Node, Any] = {}
        self.inputs: list[fx.Node] = []
        # Nodes of which the first result stands for all.
        self.whole: set[fx.Node] = set()
        # Nodes whose values are numbers.
        self.numbers: set[fx.Node] = set()

    def run(self) -> Program:
        placeholders = [node for node in self.traced.graph.nodes if node.op == "placeholder"]
        for index, node in enumerate(placeholders):
            if index not in self.fixed and isinstance(node.meta["val"], torch.Tensor):
                self.values[node] = self._placeholder(node)
        if not self.inputs:
            raise CaptureError("the graph takes no tensor but weights: its values never change")
        named, dimensions = self._dimensions()
        for index, node in enumerate(placeholders):
            if index in self.fixed:
                given = self.fixed[index]
                self.values[node] = self._weight(node, given) if isinstance(given, torch.Tensor) else given
            elif node not in self.values:
                self.values[node] = self._number(node)
        results = ()
        for node in self.traced.graph.nodes:
            if node.op == "get_attr":
                self.values[node] = self._constant(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                results = self._mapped(node.args[0])
        self.graph.output(tuple(results))
        program = Program(self.graph, self.weights, None, dimensions, named)  # type: ignore[arg-type]
        program.signature = self._signature(program)
        normalise(program)
        self.graph.lint()
        return program

    def _placeholder(self, node: fx.Node) -> fx.Node:
        made = self.graph.placeholder(node.name)
        made.meta["val"] = node.meta["val"]
        self.inputs.append(made)
        return made

    def _dimensions(self) -> tuple[dict[sympy.Symbol, sympy.Expr], dict[str, Dimension]]:
        """Return the names of the symbols in the inputs' shapes, which are torch's own, and the dimensions."""
        used: set[sympy.Symbol] = set()
        bare: set[sympy.Symbol] = set()
        ranges: Any = {}
        for size in self._input_sizes():
            expression = size.node.expr
            used |= expression.free_symbols
            bare |= {expression} if expression.is_Symbol else set()
            ranges = size.node.shape_env.var_to_range
        if used - bare:
            names = ", ".join(sorted(map(str, used - bare)))
            raise CaptureError(f"{names}: no input has this number as a size, so that it cannot be known")
        dimensions = {}
        for symbol in sorted(used, key=str):
            allowed = ranges.get(symbol)
            low = int(allowed.lower) if allowed is not None and allowed.lower.is_Integer else 0
            high = int(allowed.upper) if allowed is not None and allowed.upper.is_Integer else LARGEST
            dimensions[str(symbol)] = Dimension(str(symbol), max(low, 0), high if high < LARGEST else None)
        return {symbol: dimension_symbol(str(symbol)) for symbol in used}, dimensions

    def _input_sizes(self) -> Iterator[torch.SymInt]:
        for node in self.inputs:
            yield from (size for size in node.meta["val"].shape if isinstance(size, torch.SymInt))

    def _number(self, node: fx.Node) -> Any:
        """Return what a placeholder that is no tensor stands for: a size of an input, or a plain number."""
        value = node.meta["val"]
        if isinstance(value, bool | int | float) or value is None:
            return value
        for given in self.inputs:
            for dim, size in enumerate(given.meta["val"].shape):
                if isinstance(value, torch.SymInt) and isinstance(size, torch.SymInt) and size.node.expr == value.node.expr:
                    made = self.graph.call_function(aten.sym_size.int, (given, dim))
                    made.meta["val"] = size
                    return made
        raise CaptureError(
            f"the argument {node.name} is a number that is no size of an input: pass it as a tensor, or let torch.compile take "
            "it as a constant"
        )

    def _weight(self, node: fx.Node, tensor: torch.Tensor) -> fx.Node:
        if tensor.layout != torch.strided:
            raise CaptureError(f"{node.name}: a {tensor.layout} weight; only dense ones can be compiled")
        self.weights[node.name] = tensor.detach()
        made = self.graph.create_node("get_attr", node.name, (), {})
        made.meta["val"] = node.meta["val"]
        return made

    def _constant(self, node: fx.Node) -> Any:
        found: Any = self.traced
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if not isinstance(found, torch.Tensor):
            return found
        if "val" not in node.meta:
            mode = self.inputs[0].meta["val"].fake_mode
            node.meta["val"] = mode.from_tensor(found, static_shapes=True)
        return self._weight(node, found)

    def _mapped(self, value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: self.values[node])

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        if target in ASSERTIONS:
            return
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"{getattr(target, '__name__', target)} cannot be compiled yet")
        first = node.args[0] if node.args else None
        if target is operator.getitem and isinstance(first, fx.Node) and first in self.whole:
            self.values[node] = self.values[first]
            return
        target, args, kwargs = self._with_numbers(node) or self._composed(node)
        if target is None:
            self.values[node] = args
            return
        made = self.graph.create_node("call_function", target, self._mapped(args), self._mapped(kwargs), name=node.name)
        made.meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
        made.meta["val"] = node.meta.get("val") if target is node.target else node.meta["val"][0]
        self.values[node] = made

    def _with_numbers(self, node: fx.Node) -> tuple[Any, Any, Any] | None:
        """Let a call whose arguments are known numbers take them as such; None for any other call.

        A cast of a number is that number, with None for the operation. Where a tensor is needed the number becomes a weight.
        """
        known = {n: self.values[n] for n in node.all_input_nodes if n.op == "placeholder" or n in self.numbers}
        known = {n: value for n, value in known.items() if isinstance(value, float)}
        if not known:
            return None
        if node.target in CASTS and node.meta["val"].is_floating_point():
            self.numbers.add(node)
            return None, known[node.all_input_nodes[0]], {}
        tensors = [n for n in node.args[:2] if isinstance(n, fx.Node) and n not in known]
        if node.target in ARITHMETIC and tensors and tensors[0].meta["val"].dtype == node.meta["val"].dtype:
            args = list(node.args)
            if args[0] in known and node.target in (aten.add.Tensor, aten.mul.Tensor):
                args[:2] = args[1::-1]
            return node.target, tuple(args), node.kwargs
        for number, value in known.items():
            self.values[number] = self._weight(number, torch.tensor(value, dtype=number.meta["val"].dtype))
        return None

    def _composed(self, node: fx.Node) -> tuple[Any, Any, Any]:
        """Return a call with the operation that the user's code asked for, where torch has taken it apart."""
        target: Any = node.target
        if target not in ATTENTION and target is not aten.native_layer_norm.default:
            return target, node.args, node.kwargs
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
            return target, node.args, node.kwargs
        names = [argument.name for argument in target._schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        self.whole.add(node)
        if target not in ATTENTION:
            return aten.layer_norm.default, (*node.args, False), {}
        query, key = given["query"].meta["val"], given["key"].meta["val"]
        args = (
            given["query"],
            given["key"],
            given["value"],
            given.get("attn_mask", given.get("attn_bias")),
            given.get("dropout_p", 0.0),
            given.get("is_causal", False),
        )
        kwargs: dict[str, Any] = {"scale": given["scale"]} if given.get("scale") is not None else {}
        if query.shape[1] != key.shape[1]:
            kwargs["enable_gqa"] = True
        return aten.scaled_dot_product_attention.default, args, kwargs

    def _signature(self, program: Program) -> Signature:
        names = [node.name for node in self.inputs]
        specs = tuple(
            TensorSpec(n.name, n.meta["val"].dtype, str(n.meta["val"].device), tuple(_text(s) for s in program.shape(n)))
            for n in self.inputs
        )
        results: list[Structure] = []
        for index, result in enumerate(program.results):
            results.append(Leaf(index) if isinstance(result, fx.Node) else Constant(result))
        return Signature(
            tuple(Parameter(name, "positional_only") for name in names),
            {name: Leaf(index) for index, name in enumerate(names)},
            specs,
            {name: Range(d.low, d.high) for name, d in program.dimensions.items()},
            Container("tuple", "", (), tuple(results)),
        )


def _text(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)
