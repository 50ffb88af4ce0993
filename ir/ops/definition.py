"""How an operation of the dialect is defined: schema, reference in plain PyTorch, shape rule and cost, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

NAMESPACE = "graphwright"

FlopsFormula = Callable[["Program", "fx.Node"], "int | sympy.Expr"]
"""The floating point operations of one call, in the program's dimensions."""

# PyTorch's own annotations are incomplete here.
_LIBRARY: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_DEFINED: dict[str, Operation] = {}
_BY_TARGET: dict[Any, Operation] = {}


@dataclass(frozen=True)
class Operation:
    """An operation of the dialect.

    Args:
        name: without the namespace, such as "rms_norm".
        target: what a node calls.
        reference: its meaning in plain PyTorch.
        flops: how much it computes.
    """

    name: str
    target: Any
    reference: Callable[..., torch.Tensor]
    flops: FlopsFormula


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any], flops: FlopsFormula) -> Any:
    """Define an operation and return its overload, which nodes call.

    Args:
        schema: such as "glu(Tensor gate, Tensor up, str activation) -> Tensor"; nothing may be changed in place.
        reference: computes it; called with the schema's arguments.
        fake: computes its shape and dtype from fake tensors.
        flops: its cost.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    target = getattr(getattr(torch.ops, NAMESPACE), name).default
    _DEFINED[name] = _BY_TARGET[target] = Operation(name, target, reference, flops)
    return target


def operations() -> Mapping[str, Operation]:
    """Return the operations that are defined so far, by name; `graphwright.ir.dialect` defines them all."""
    return _DEFINED


def find_operation(target: Any) -> Operation | None:
    """Return the operation that a node calls; None if it is none of the dialect."""
    return _BY_TARGET.get(target)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which norms and softmax of values of `dtype` are computed: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def expect(condition: Any, message: str) -> None:
    """Raise if arguments of an operation do not fit; a condition on a dimension becomes a fact about it."""
    torch._check(condition, lambda: message)  # type: ignore[no-untyped-call]
