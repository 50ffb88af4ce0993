"""Small questions about nodes, from which the raising passes are made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphwright.ir.program import Program
from graphwright.passes.cleanup.redundant_casts import CAST, is_exact_cast
from graphwright.passes.local import is_random

aten = torch.ops.aten

ADD = (aten.add.Tensor, aten.add.Scalar)
SUB = (aten.sub.Tensor, aten.sub.Scalar)
MUL = (aten.mul.Tensor, aten.mul.Scalar)
DIV = (aten.div.Tensor, aten.div.Scalar)
NEG = (aten.neg.default,)


def is_call(node: Any, *targets: Any) -> bool:
    """Return whether a node calls one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def dtype_of(node: fx.Node) -> torch.dtype:
    """Return the dtype of a node's tensor."""
    dtype = node.meta["val"].dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def without_casts(node: Any) -> Any:
    """Return the value before casts that lose nothing."""
    while is_call(node, CAST) and is_exact_cast(dtype_of(node.args[0]), dtype_of(node)):
        node = node.args[0]
    return node


def number(program: Program, value: Any) -> float | None:
    """Return a number given as such, or as a tensor without dimensions that only weights and numbers decide; else None."""
    if isinstance(value, bool | int | float):
        return float(value)
    found = _scalar(program, value, 4) if isinstance(value, fx.Node) else None
    return None if found is None or found.is_complex() else float(found)


def _scalar(program: Program, node: fx.Node, depth: int) -> torch.Tensor | None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 0:
        return None
    if node.op == "get_attr":
        return program.weights[str(node.target)]
    if node.op != "call_function" or depth == 0 or is_random(node) or "empty" in str(node.target):
        return None
    known: dict[fx.Node, torch.Tensor] = {}
    for source in node.all_input_nodes:
        found = _scalar(program, source, depth - 1)
        if found is None:
            return None
        known[source] = found
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    with torch.no_grad():
        result: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def either_order(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Yield the two operands of a sum or product in both orders."""
    if node.kwargs or len(node.args) != 2:
        return
    yield node.args[0], node.args[1]
    yield node.args[1], node.args[0]


def with_number(program: Program, node: Any, *targets: Any) -> tuple[fx.Node, float] | None:
    """Return node and number of a call of `targets`, commutative ones, between a node and a number."""
    if not is_call(node, *targets):
        return None
    for value, other in either_order(node):
        found = number(program, other)
        if found is not None and isinstance(value, fx.Node):
            return value, found
    return None


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the one node that uses `node`, once; None if there are others, or none."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if user.op == "call_function" and user.all_input_nodes.count(node) == 1 else None


def reduces_last(node: fx.Node) -> bool:
    """Return whether a reduction goes over the last dimension alone and keeps it with size 1."""
    source: Any = node.args[0]
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    dims = dims if isinstance(dims, list | tuple) else [dims]
    return (
        len(dims) == 1
        and isinstance(dims[0], int)
        and dims[0] % source.meta["val"].dim() == source.meta["val"].dim() - 1
        and bool(keep)
    )
