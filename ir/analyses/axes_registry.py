"""The registry of the axes analysis's rules, and operations by one name whatever their spelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir.analyses.axes_state import State, Value

Rule = Callable[[State, fx.Node, dict[str, Any]], Value]

RULES: dict[str, Rule] = {}
SIZED: set[str] = set()
"""Operations whose integer arguments are sizes or ranges, so that a length among them is not a value."""
POINTWISE: set[str] = set()

CONTENT_FREE = frozenset(
    [
        "sym_size", "sym_numel", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full",
        "new_empty",
    ]
)  # fmt: skip
"""Operations that read the shape of their operand, not what is in it."""

_SPELLINGS = {
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor", "_to_copy": "to", "convert_element_type": "to",
    "reshape": "view", "_unsafe_view": "view", "_softmax": "softmax", "_log_softmax": "log_softmax", "swapaxes": "transpose",
    "native_dropout": "dropout", "constant_pad_nd": "pad", "split_with_sizes": "split", "concat": "cat",
}  # fmt: skip


def op_name(node: fx.Node) -> str:
    """Return the operation's name without overload, in one spelling: "add", "view", "graphwright.attention", "getitem"."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target))
    name = target._schema.name.split("::")[1]
    if not name.endswith("__"):
        name = name.removesuffix("_")
    name = _SPELLINGS.get(name, name)
    return name if target.namespace in ("aten", "prims") else f"{target.namespace}.{name}"


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the node's arguments by their names in the operation's schema, defaults included."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def rule(*names: str, sized: bool = False) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operations.

    Args:
        names: as `op_name` spells them.
        sized: whether integers among the arguments are sizes, so that the length may be one of them.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
            if sized:
                SIZED.add(name)
        return function

    return register
