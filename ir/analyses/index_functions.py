"""The nodes of a graph as index functions: what one element of a node's tensor is.

    functions = IndexFunctions(facts)
    functions.at(mask, (b, ZERO, q, k))     # an expression over b, q and k
    functions.loads                         # the tensors it reads, named in0, in1, ...

The walk goes up from a node only as far as the element asked for needs. A node that has no rule, or whose rule cannot
express it, is read instead: its element becomes a load of the node's own tensor, so that everything has an expression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses import index_rules, index_views  # noqa: F401 - they register their rules
from graphwright.ir.analyses.index import Expr, Facts
from graphwright.ir.analyses.index_call import RULES, Indices, Inexpressible, is_one, make_call, size_expression
from graphwright.ir.analyses.index_constants import Function, describe
from graphwright.ir.errors import GraphwrightError

_HALVES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_FLOATS = {*_HALVES, torch.float32, torch.float64}
_INTEGERS = {torch.int64: 63, torch.int32: 31, torch.int16: 15, torch.int8: 7, torch.uint8: 8}
_INEXACT = ("log", "exp", "sqrt", "div", "mul", "add")


class IndexFunctionError(GraphwrightError):
    """A value of a graph can neither be expressed by indices nor be read."""


class IndexFunctions:
    """The index functions of a graph's nodes.

    Args:
        facts: what is known of the variables that indices are made of, and of sizes.
        constants: the values of nodes that never change, so that a causal table, say, is seen for what it is.
        for_kernels: leave only what a kernel computes exactly for one element: sums over a tensor, and integers made
            from a rounded logarithm or product, are read instead.
        names: names for loads, which come before in0, in1, ... made up for the rest.
    """

    def __init__(
        self,
        facts: Facts = ix.NO_FACTS,
        *,
        constants: Mapping[fx.Node, Tensor] | None = None,
        for_kernels: bool = False,
        names: Mapping[fx.Node, str] | None = None,
    ) -> None:
        self.facts = facts
        self.constants = constants or {}
        self.for_kernels = for_kernels
        self._names: dict[fx.Node, str] = dict(names or {})
        self._memo: dict[tuple[fx.Node, Indices], Expr] = {}
        self._opaque: set[fx.Node] = set()
        self._described: dict[fx.Node, Function | None] = {}

    @property
    def loads(self) -> dict[str, fx.Node]:
        """Name -> the node whose tensor is read, in the order of first use."""
        return {name: node for node, name in self._names.items()}

    def at(self, node: fx.Node, indices: Sequence[Expr]) -> Expr:
        """Return the element of `node` at `indices`.

        Args:
            node: a node with a tensor of bools, integers or floats as its meta["val"].
            indices: one integer expression for each dimension, in range.

        Raises:
            IndexFunctionError: the tensor has another dtype, or the node's value is not a tensor.
        """
        key = (node, tuple(indices))
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = self._at(node, key[1])
        return found

    def _at(self, node: fx.Node, indices: Indices) -> Expr:
        if node in self.constants:
            if node not in self._described:
                self._described[node] = describe(self.constants[node])
            described = self._described[node]
            if described is not None:
                return described(indices)
        if node.op == "call_function" and node not in self._opaque:
            try:
                call = make_call(node)
                rule = RULES.get(call.name)
                if rule is not None:
                    return rule(self, call, indices)
            except Inexpressible:
                # Its other elements are read as well, so that equal indices keep giving equal expressions.
                self._opaque.add(node)
        return self._read(node, indices)

    def _read(self, node: fx.Node, indices: Indices) -> Expr:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise IndexFunctionError(f"index functions: {node.format_node()} is not a tensor, so it cannot be read by index")
        kind: ix.Type | None = None
        if value.dtype == torch.bool:
            kind = "bool"
        elif value.dtype in _INTEGERS or value.dtype in _FLOATS:
            kind = "int" if value.dtype in _INTEGERS else "float"
        if kind is None:
            raise IndexFunctionError(
                f"index functions: {node.format_node()} has elements of type {value.dtype}; "
                "only bools, integers and floats of 16 bits or more can be read"
            )
        name = self._names.setdefault(node, f"in{len(self._names)}")
        return ix.load(name, indices, kind)

    # ---- what rules use

    def operand(self, argument: Any, indices: Indices) -> Expr:
        """Return an operand of a pointwise operator: a node, broadcast to `indices`, or a number."""
        if isinstance(argument, fx.Node):
            value = argument.meta.get("val")
            if not isinstance(value, Tensor):
                return self.size(argument)
            own = indices[len(indices) - value.dim() :]
            return self.at(argument, tuple(ix.ZERO if is_one(n) else i for n, i in zip(value.shape, own, strict=True)))
        if isinstance(argument, bool | int | float):
            return ix.const(argument)
        raise Inexpressible(f"the operand {argument!r}")

    def size(self, argument: Any) -> Expr:
        """Return a size or another integer argument: a number, a symbolic number or a node of either."""
        value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
        if isinstance(value, int | torch.SymInt | sympy.Expr):
            return size_expression(value)
        raise Inexpressible(f"the integer {argument!r}")

    def cast(self, e: Expr, target: torch.dtype, source: torch.dtype | None = None) -> Expr:
        """Return `e` converted to a dtype; `source` is its own, None where it has not been rounded yet."""
        if source == target:
            return e
        if target == torch.bool:
            return ix.to_bool(e, self.facts)
        if target in _INTEGERS:
            return self._to_integer(e, target)
        if target not in _FLOATS:
            raise Inexpressible(f"values of type {target}")
        e = ix.to_float(e)
        if target in _HALVES:
            return ix.round_to(_HALVES[target], e)
        if torch.float64 in (source, target) and source not in (torch.float32, *_HALVES) and not _is_exact(e):
            raise Inexpressible("arithmetic in float64")
        return e

    def _to_integer(self, e: Expr, target: torch.dtype) -> Expr:
        e = ix.truncate(e, self.facts)
        if _INTEGERS[target] < 31:
            low, high = ix.lower(e, self.facts), ix.upper(e, self.facts)
            if low is None or high is None or low < (0 if target == torch.uint8 else -128) or high >= 2 ** _INTEGERS[target]:
                raise Inexpressible(f"integers that may not fit {target}")
        if self.for_kernels and _truncates_inexact(e):
            raise Inexpressible("an integer made from a rounded value")
        return e

    def wrap(self, index: Expr, size: Expr) -> Expr:
        """Return a position counted from the front, for one that may be negative: counted from the end."""
        low, high = ix.lower(index, self.facts), ix.upper(index, self.facts)
        if low is not None and low >= 0:
            return index
        from_end = ix.add(index, size)
        if high is not None and high < 0:
            return from_end
        return ix.where(ix.ge0(index, self.facts), index, from_end, facts=self.facts)

    def bound_variable(self, size: Expr) -> str:
        """Return a new variable that goes over 0, 1, ..., size - 1."""
        name = f"over{len(self.facts.ranges)}"
        self.facts = self.facts.known(name, ix.ZERO, ix.subtract(size, ix.ONE))
        return name


def _is_exact(e: Expr) -> bool:
    if e.kind == "where":
        return all(map(_is_exact, e.operands[1:]))
    return e.kind == "const" or ix.as_integer(e) is not None


def _truncates_inexact(e: Expr) -> bool:
    if e.kind == "call" and e.value == "trunc":
        return _is_inexact(e.operands[0])
    return any(map(_truncates_inexact, e.operands))


def _is_inexact(e: Expr) -> bool:
    return (e.kind == "call" and e.value in _INEXACT) or any(map(_is_inexact, e.operands))
