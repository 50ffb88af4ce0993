"""Sizes in a graph: one node for each size that its calls use."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from graphwright.ir.program import Program

SymbolicValue = torch.SymInt | torch.SymFloat | torch.SymBool

_BINARY = {FloorDiv: operator.floordiv, Mod: operator.mod, PythonMod: operator.mod}


def size_key(size: Any) -> int | sympy.Expr:
    """Return a number, or the expression of a symbolic one: equal for equal sizes."""
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def shape_key(node: Any) -> tuple[int | sympy.Expr, ...]:
    """Return the shape of a node's value, comparable."""
    return tuple(size_key(size) for size in node.meta["val"].shape)


class Sizes:
    """The nodes of a graph whose values are sizes, by expression."""

    def __init__(self, program: Program) -> None:
        self.graph = program.graph
        self.nodes: dict[sympy.Expr, fx.Node] = {}
        placeholders = program.inputs
        with self.graph.inserting_after(placeholders[-1]):
            for placeholder in reversed(placeholders):
                shape = placeholder.meta["val"].shape
                for dim in reversed(range(len(shape))):
                    if isinstance(shape[dim], torch.SymInt) and shape[dim].node.expr.is_Symbol:
                        node = self.graph.call_function(torch.ops.aten.sym_size.int, (placeholder, dim))
                        node.meta["val"] = shape[dim]
                        self.nodes[shape[dim].node.expr] = node
        self.numbers: dict[fx.Node, Any] = {}

    def visit(self, node: fx.Node) -> bool:
        """Use the one node of a size for another with the same value; return whether `node` is a size."""
        value = node.meta.get("val")
        if not isinstance(value, SymbolicValue):
            return False
        expression = value.node.expr
        if expression.is_number:
            self.numbers[node] = _number(expression)
            return True
        known = self.nodes.setdefault(expression, node)
        if known is not node:
            node.replace_all_uses_with(known)
        return True

    def settle(self, node: fx.Node) -> None:
        """Put numbers for the arguments that turned out to be such."""
        if any(n in self.numbers for n in node.all_input_nodes):
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.numbers.get(n, n))

    def shape(self, node: fx.Node) -> list[int | fx.Node] | None:
        """Return the shape of a node's value as arguments for a call; None if a size cannot be had."""
        sizes = [self.of(size) for size in node.meta["val"].shape]
        return None if any(size is None for size in sizes) else sizes  # type: ignore[return-value]

    def of(self, size: Any) -> int | fx.Node | None:
        """Return a size as an argument for a call at the graph's insertion point; None if it cannot be had."""
        key = size_key(size)
        return key if isinstance(key, int) else self.emit(key)

    def emit(self, expression: Any) -> int | fx.Node | None:
        """Return the node of an expression of sizes, inserted if it is new; None if it holds something unknown."""
        if expression.is_Integer:
            return int(expression)
        if expression in self.nodes:
            return self.nodes[expression]
        if expression.is_Add or expression.is_Mul:
            function: Any = operator.add if expression.is_Add else operator.mul
        elif expression.func in _BINARY:
            function = _BINARY[expression.func]
        elif expression.func in (Max, Min):
            function = torch.sym_max if expression.func is Max else torch.sym_min
        elif expression.is_Pow and expression.exp.is_Integer and expression.exp > 0:
            function = operator.mul
        else:
            return None
        terms = [expression.base] * int(expression.exp) if expression.is_Pow else list(expression.args)
        values = [self.emit(term) for term in terms]
        if any(value is None for value in values):
            return None
        result: Any = values[0]
        for value in values[1:]:
            node = self.graph.call_function(function, (result, value))
            node.meta["val"] = function(_value(result), _value(value))
            result = node
        self.nodes[expression] = result
        return result  # type: ignore[no-any-return]


def _value(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, fx.Node) else size


def _number(expression: Any) -> Any:
    if expression in (sympy.true, sympy.false):
        return bool(expression)
    return int(expression) if expression.is_Integer else float(expression)
