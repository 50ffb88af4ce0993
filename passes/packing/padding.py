"""What is known of values where a mask says that there is no token."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.axes_registry import op_name
from graphwright.ir.analyses.index_eval import evaluate
from graphwright.ir.analyses.index_text import parse
from graphwright.ir.ops.attention import operand_type

Number = bool | int | float

HIDING = -10000.0
"""A score that is less than others by as much has no weight beside them, in any dtype that a softmax is computed in."""

_SAME = ("expand", "unsqueeze", "squeeze", "view", "permute", "transpose", "clone", "alias", "contiguous", "detach")
_COMPUTED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
    "mul": operator.mul,
    "sub": operator.sub,
    "rsub": lambda a, b: b - a,
}


def hidden_element(predicate: str, bias: str, dtype: torch.dtype) -> int | None:
    """Return the element, 0 or 1, of the mask in0[b, k] that hides a key, where an attention's mask does no more than that.

    Args:
        predicate: of the attention, true where a key is seen; "" for always.
        bias: what it adds to the scores; "" for nothing. A large negative number hides.
        dtype: of the mask.

    Returns:
        None if predicate or bias depend on anything else, such as positions, or hide all or nothing.
    """
    states = []
    seen = _on_elements(predicate, dtype) if predicate else [True, True]
    added = _on_elements(bias, dtype) if bias else [0.0, 0.0]
    if seen is None or added is None:
        return None
    for is_seen, number in zip(seen, added, strict=True):
        hides = not is_seen or number <= HIDING
        if not hides and number != 0:
            return None
        states.append(hides)
    return states.index(True) if sorted(states) == [False, True] else None


def _on_elements(text: str, dtype: torch.dtype) -> list[Any] | None:
    """Return the values of an expression for the elements 0 and 1 of in0[b, k]; None if it depends on anything else."""
    expression = parse(text, {"in0": operand_type(dtype)})
    element = ix.load("in0", (ix.var("b"), ix.var("k")), operand_type(dtype))
    if any(leaf is not element and leaf.kind != "const" for leaf in _leaves(expression)):
        return None
    index = {"b": torch.tensor([0]), "k": torch.tensor([0, 1])}
    return evaluate(expression, index, {"in0": torch.tensor([[0, 1]]).to(dtype)}, {}).expand(2).tolist()


def _leaves(expression: ix.Expr) -> list[ix.Expr]:
    """Return the elements, variables and constants of an expression; not what an element's index is made of."""
    if expression.kind == "load" or not expression.operands:
        return [expression]
    return [leaf for operand in expression.operands for leaf in _leaves(operand)]


def value_at_padding(node: Any, mask: fx.Node, hidden: int) -> Number | None:
    """Return what a tensor certainly is at every position where there is no token; None if that is not known.

    Args:
        node: a tensor, or a number.
        mask: the mask.
        hidden: its element where there is no token.
    """
    if isinstance(node, bool | int | float):
        return node
    if node is mask:
        return hidden
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    name, args = op_name(node), node.args
    if name in _SAME:
        return value_at_padding(args[0], mask, hidden)
    if name == "to":
        value = value_at_padding(args[0], mask, hidden)
        return value if value is None or node.meta["val"].dtype is not torch.bool else bool(value)
    if name in ("full", "full_like"):
        return value_at_padding(args[1], mask, hidden)
    if name in ("logical_not", "bitwise_not") and node.meta["val"].dtype is torch.bool:
        value = value_at_padding(args[0], mask, hidden)
        return None if value is None else not value
    if name in ("where", "masked_fill"):
        condition, yes, no = args if name == "where" else (args[1], args[2], args[0])
        chosen = value_at_padding(condition, mask, hidden)
        return None if chosen is None else value_at_padding(yes if chosen else no, mask, hidden)
    if name in _COMPUTED and not node.kwargs and len(args) == 2:
        first, second = (value_at_padding(arg, mask, hidden) for arg in args)
        if name == "mul" and 0 in (first, second):
            return 0
        return None if first is None or second is None else _COMPUTED[name](first, second)
    return None
