"""The calls of a graph as the rules of index functions see them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy
import torch
from torch import Tensor, fx

from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.index import Expr

if TYPE_CHECKING:
    from graphwright.ir.analyses.index_functions import IndexFunctions

Size: TypeAlias = int | torch.SymInt | sympy.Expr | Expr
Indices = tuple[Expr, ...]


class Inexpressible(Exception):
    """A rule cannot express its node, which is then read."""


@dataclass(frozen=True)
class Call:
    """A node as its rule sees it.

    Args:
        node: the node.
        name: the operator's name without namespace and overload: "add" for aten.add_.Tensor too.
        arguments: the operator's arguments by their names in its schema, defaults filled in.
        shape: the result's sizes; of the first result where there are several.
        dtype: the result's dtype; of the first result where there are several.
    """

    node: fx.Node
    name: str
    arguments: Mapping[str, Any]
    shape: tuple[Any, ...]
    dtype: torch.dtype

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    def get(self, argument: str, default: Any = None) -> Any:
        """Return an argument, `default` where the operator has none of this name or it is None."""
        value = self.arguments.get(argument)
        return default if value is None else value


def size_name(symbol: sympy.Symbol) -> str:
    """Return the variable that stands for a symbolic size."""
    # The index variables have names of one letter.
    return f"{symbol}_size" if len(str(symbol)) == 1 else str(symbol)


def size_expression(size: Size) -> Expr:
    """Return a size as an integer expression over variables named as its symbols.

    Raises:
        Inexpressible: it is made of anything but sums, products and divisions by a number.
    """
    if isinstance(size, Expr):
        return size
    if isinstance(size, int):
        return ix.const(size)
    e: Any = sympy.expand(size.node.expr if isinstance(size, torch.SymInt) else size)
    if e.is_Integer:
        return ix.const(int(e))
    if e.is_Symbol:
        return ix.var(size_name(e))
    operands = [size_expression(a) for a in e.args]
    if e.is_Add or e.is_Mul:
        result = operands[0]
        for operand in operands[1:]:
            result = ix.add(result, operand) if e.is_Add else ix.multiply(result, operand)
        return result
    kind = type(e).__name__
    if e.is_Pow and e.exp.is_Integer and e.exp > 0:
        result = ix.ONE
        for _ in range(int(e.exp)):
            result = ix.multiply(result, operands[0])
        return result
    if kind in ("FloorDiv", "Mod", "PythonMod") and isinstance(operands[1].value, int) and operands[1].value > 0:
        return (ix.floor_divide if kind == "FloorDiv" else ix.modulo)(operands[0], operands[1].value)
    if kind in ("Max", "Min"):
        result = operands[0]
        for operand in operands[1:]:
            result = (ix.maximum if kind == "Max" else ix.minimum)(result, operand)
        return result
    raise Inexpressible(f"the size {e}")


def make_call(node: fx.Node) -> Call:
    """Return a call_function node as rules see it.

    Raises:
        Inexpressible: it is not an operator on tensors.
    """
    value = node.meta.get("val")
    if isinstance(value, tuple | list) and value:
        value = value[0]
    if not isinstance(value, Tensor):
        raise Inexpressible("not a tensor")
    if node.target is operator.getitem:
        arguments: dict[str, Any] = {"self": node.args[0], "index": node.args[1]}
        return Call(node, "getitem", arguments, tuple(value.shape), value.dtype)
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        raise Inexpressible(f"the function {target}")
    name = target._schema.name.split("::")[1]
    if name.endswith("_") and not name.startswith("_"):
        # The value of an in-place operator is the operator's; its operand has another value before than after.
        mutated = node.args[0]
        if not isinstance(mutated, fx.Node) or len(mutated.users) > 1 or mutated.op != "call_function":
            raise Inexpressible("an in-place operator on a value that others use")
        name = name[:-1]
    arguments = {}
    for i, argument in enumerate(target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        arguments[argument.name] = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default)
    return Call(node, name, arguments, tuple(value.shape), value.dtype)


def is_one(size: Any) -> bool:
    """Return whether a size is 1 for certain."""
    return isinstance(size, int) and size == 1


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Return the sizes of a node's tensor."""
    return tuple(node.meta["val"].shape)


def dtype_of(argument: Any) -> torch.dtype | None:
    """Return the dtype of an operand, None for a number."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


Rule = Callable[["IndexFunctions", Call, Indices], Expr]

RULES: dict[str, Rule] = {}
"""Operator name -> its rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def replace(indices: Indices, dim: int, index: Expr) -> Indices:
    """Return the indices with another one for the dimension `dim`, counted from the front."""
    return (*indices[:dim], index, *indices[dim + 1 :])
