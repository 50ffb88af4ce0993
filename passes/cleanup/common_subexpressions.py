"""Computing equal values once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.program import Program
from graphwright.passes.base import Context, Decision, Fidelity, Refusal
from graphwright.passes.local import LocalPass, Places, is_random


@dataclass(frozen=True, kw_only=True)
class CommonSubexpressions(LocalPass):
    """Let calls with the same operation and the same arguments share one value.

    Before: `%a = relu(%x); %b = relu(%x); %c = add(%a, %b)`

    After: `%a = relu(%x); %c = add(%a, %a)`

    Applies when: operation and arguments are equal, arguments that are themselves equal computations included.

    Declines when: the operation draws random numbers.
    """

    name = "common-subexpressions"
    fidelity = Fidelity.EXACT

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the calls that repeat an earlier one."""
        first: dict[Any, fx.Node] = {}
        same: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            if node.op not in ("call_function", "get_attr") or is_random(node):
                continue
            keep = first.setdefault(_key(node, same), node)
            if keep is node:
                continue
            same[node] = keep
            yield Decision(node.name, f"use %{keep.name}", "the same computation", {"keep": keep.name})

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Return the value to keep."""
        return places[detail["keep"]]


def _key(node: fx.Node, same: dict[fx.Node, fx.Node]) -> Any:
    def walk(value: Any) -> Any:
        if isinstance(value, fx.Node):
            value = same.get(value, value)
            known = value.meta.get("val")
            # Sizes are equal where their expressions are.
            return known.node.expr if isinstance(known, torch.SymInt) else value
        if isinstance(value, list | tuple):
            return tuple(walk(item) for item in value)
        # 1, 1.0 and True are equal, but not to type promotion.
        return (type(value).__name__, value)

    return (node.op, node.target, walk(node.args), tuple((k, walk(v)) for k, v in sorted(node.kwargs.items())))
