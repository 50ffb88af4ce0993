"""Shapes and dtypes of calls, inferred once for equal arguments: the layers of a model ask the same questions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

_MEMO = "graphwright_inferred"
"""Attribute of a fake mode: what was inferred in it, by target and arguments."""

CHECKED = "graphwright_checked"
"""Key in a node's meta: what its value was last inferred from, so that only what changed is inferred again."""


def infer_value(node: fx.Node, mode: Any) -> Any:
    """Return what a call gives for the values of its arguments: fake tensors, symbolic numbers.

    Args:
        node: the call; its inputs have `meta["val"]`.
        mode: the fake mode that the inputs' tensors belong to.
    """
    memo = mode.__dict__.setdefault(_MEMO, {})
    key = call_key(node)
    if key not in memo:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        # Operations made of others need Python's dispatcher to see symbolic sizes through.
        with mode, enable_python_dispatcher(), torch.no_grad():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        if has_new_symbols(value):
            # Every inference makes new symbols for sizes that depend on values.
            return value
        memo[key] = value
    return memo[key]


def mark_checked(node: fx.Node) -> None:
    """Note that a node's value agrees with its operation and arguments."""
    node.meta[CHECKED] = (call_key(node), describe(node.meta["val"]))


def is_checked(node: fx.Node) -> bool:
    """Return whether nothing changed since the node was marked."""
    return node.meta.get(CHECKED) == (call_key(node), describe(node.meta["val"]))


def call_key(node: fx.Node) -> Any:
    """Return what decides the shape and dtype of a call: its target and its arguments, nodes by what is known of them."""
    return (node.target, _walk(node.args), _walk(node.kwargs))


def describe(value: Any) -> Any:
    """Return shape, dtype and device of a tensor, the expression of a number; a tuple of these for several."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device, tuple(_size(n) for n in value.shape))
    if isinstance(value, list | tuple):
        return tuple(describe(item) for item in value)
    return (type(value).__name__, _size(value))


def has_new_symbols(value: Any) -> bool:
    """Return whether a value has sizes that depend on what tensors hold."""
    if isinstance(value, torch.Tensor):
        return any(has_new_symbols(n) for n in value.shape)
    if isinstance(value, list | tuple):
        return any(has_new_symbols(item) for item in value)
    symbols = value.node.expr.free_symbols if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else ()
    return any(is_data_dependent(symbol) for symbol in symbols)


def is_data_dependent(symbol: Any) -> bool:
    """Return whether a symbol stands for a number that depends on what tensors hold."""
    name = str(symbol.name)
    return name.startswith(("u", "zuf")) and name.lstrip("zuf").isdigit()


def _size(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def _walk(argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return ("node", describe(argument.meta["val"]))
    if isinstance(argument, list | tuple):
        return tuple(_walk(item) for item in argument)
    if isinstance(argument, dict):
        return tuple((key, _walk(item)) for key, item in sorted(argument.items()))
    # 1, 1.0 and True are equal, but not to type promotion.
    return (type(argument).__name__, argument)
