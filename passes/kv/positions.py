"""The part of a graph that says where tokens stand: what of it there is, and how it is computed for later tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.axes import Axes
from graphwright.ir.analyses.axes_registry import CONTENT_FREE, op_name
from graphwright.ir.analyses.index import Expr
from graphwright.ir.analyses.index_call import Inexpressible, is_one, size_expression
from graphwright.ir.analyses.index_functions import IndexFunctionError, IndexFunctions
from graphwright.ir.program import Program

from .refusing import NotCausal

TOKEN = "token"
"""The variable that stands for a token's position."""


class Positions:
    """Finds the nodes with a token axis whose elements follow from the token's position alone.

    Such a node can be computed for tokens after those of earlier calls: its element at `token` is an expression of `token`,
    in which the number of tokens does not occur.

    Args:
        program: the plain program.
        axes: of its graph.

    Raises:
        NotCausal: a node brings a token axis in that no expression of the position is known for, or a value depends on the
            number of tokens.
    """

    def __init__(self, program: Program, axes: Axes) -> None:
        assert axes.token_size is not None
        self.program, self.axes = program, axes
        self.tokens = axes.token_size
        self._functions = IndexFunctions(self._facts())
        self.expressions: dict[fx.Node, Expr] = {}
        for node in program.graph.nodes:
            if node.op == "call_function" and node not in axes.main and self.token_dims(node):
                self._visit(node)
        for node in axes.generators:
            # What is made of tokens has its token axis from them, by way of a sort or of an operation that mixes them.
            if node not in self.expressions and node not in axes.main and node.op != "placeholder":
                raise NotCausal(node, f"{node.target} makes a value for each token that does not follow from its position")
        for node, mixing in axes.index_mixing.items():
            if node not in self.expressions:
                raise NotCausal(node, f"{node.target}: {mixing.reason}")

    def token_dims(self, node: fx.Node) -> list[int]:
        """Return the dimensions of a tensor whose size depends on the number of tokens."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return []
        shape: list[Any] = list(value.shape)
        sizes = [n.node.expr if isinstance(n, torch.SymInt) else None for n in shape]
        return [d for d, size in enumerate(sizes) if size is not None and size.has(*self.tokens.free_symbols)]

    def frontier(self) -> Iterator[fx.Node]:
        """Yield the nodes that are to be computed from positions, because something else reads them."""
        for node in self.expressions:
            if any(user not in self.expressions for user in node.users):
                yield node

    def count(self) -> int | None:
        """Return how many positions there are in the tables that positions are looked up in; None for no limit."""
        limits = []
        for node in self.frontier():
            e = self.expressions[node]
            tables = [(user.args[0], e) for user in node.users if op_name(user) == "embedding" and user.args[1] is node]
            found = [(table.meta["val"].shape[0], index) for table, index in tables]  # type: ignore[union-attr]
            found += [pair for load in _loads_in(e) for pair in zip(self._sizes(load), load.operands, strict=True)]
            for size, index in found:
                constant, terms = ix.parts(index) if index.type == "int" else (0, {})
                if terms == {ix.var(TOKEN): 1}:
                    limits.append(int(size) - constant)
        return min(limits, default=None)

    def _sizes(self, load: Expr) -> tuple[Any, ...]:
        return tuple(self._functions.loads[str(load.value)].meta["val"].shape)

    def loads(self, e: Expr) -> dict[str, fx.Node]:
        """Return the weights that an expression reads, by the names that it has for them."""
        return {name: self._functions.loads[name] for name in sorted(ix.loads_of(e))}

    def resolve(self, node: fx.Node, indices: tuple[Expr, ...]) -> Expr:
        """Return the element of any node.

        Raises:
            IndexFunctionError: it has none.
        """
        return self._functions.at(node, indices)

    def _facts(self) -> ix.Facts:
        return ix.NO_FACTS.known("token", ix.ZERO, None).known(str(self.tokens), ix.ONE, None)

    def _visit(self, node: fx.Node) -> None:
        operands = [n for n in node.all_input_nodes if self.token_dims(n)]
        reads_weight = any(n.op == "get_attr" for n in node.all_input_nodes)
        inside = all(n in self.expressions for n in operands) and not (operands and reads_weight)
        e = self._expression(node) if inside else None
        if e is not None:
            self.expressions[node] = e
        elif not operands and op_name(node) not in CONTENT_FREE and not self._counts_rows(node):
            raise NotCausal(node, f"{node.target} makes a value for each token that does not follow from its position")

    def _counts_rows(self, node: fx.Node) -> bool:
        """Return whether an axis is that of all rows of the batch, which are no positions."""
        shape: Any = node.meta["val"].shape
        return any(shape[d].node.expr != self.tokens for d in self.token_dims(node))

    def _expression(self, node: fx.Node) -> Expr | None:
        shape: Any = node.meta["val"].shape
        dims = self.token_dims(node)
        if len(dims) != 1 or shape[dims[0]].node.expr != self.tokens:
            return None
        indices = [ix.var(TOKEN) if d == dims[0] else ix.ZERO if is_one(n) else ix.var(f"i{d}") for d, n in enumerate(shape)]
        for d, size in enumerate(shape):
            if indices[d].text == f"i{d}":
                self._functions.facts = self._functions.facts.known(
                    f"i{d}", ix.ZERO, ix.subtract(size_expression(size), ix.ONE)
                )
        try:
            e = self._functions.at(node, indices)
        except (IndexFunctionError, Inexpressible):
            return None
        known = {TOKEN, *(f"i{d}" for d, n in enumerate(shape) if isinstance(n, int))}
        if not e.free <= known or ix.contains(e, "sum"):
            return None
        if any(node.op != "get_attr" for node in self.loads(e).values()):
            return None
        return e


def _loads_in(e: Expr) -> Iterator[Expr]:
    if e.kind == "load":
        yield e
    for operand in e.operands:
        yield from _loads_in(operand)
