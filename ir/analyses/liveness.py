"""When values are needed, and how much memory a program holds at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from graphwright.ir.program import Program

from .cost import bytes_of_value


@dataclass(frozen=True)
class Interval:
    """The nodes, numbered in the graph's order, from the one that makes a value to the last that uses it."""

    start: int
    end: int


def live_intervals(program: Program) -> dict[fx.Node, Interval]:
    """Return when each computed tensor is needed. Inputs and weights, which the caller holds, are left out.

    A result lives to the output node; a value that nothing uses lives at its own node only.
    """
    position = {node: at for at, node in enumerate(program.graph.nodes)}
    return {
        node: Interval(at, max((position[user] for user in node.users), default=at))
        for node, at in position.items()
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor | list | tuple)
    }


def peak_bytes(program: Program, sizes: Mapping[str, int]) -> int:
    """Return the most bytes that computed values take at once when every node has a result of its own.

    Args:
        program: what is run, node by node.
        sizes: size by the dimension's name.
    """
    change: dict[int, int] = {}
    for node, interval in live_intervals(program).items():
        size = bytes_of_value(program, node.meta["val"])
        if isinstance(size, sympy.Expr):
            size = int(size.subs({symbol: sizes[symbol.name] for symbol in size.free_symbols}))
        change[interval.start] = change.get(interval.start, 0) + size
        change[interval.end + 1] = change.get(interval.end + 1, 0) - size
    held = peak = 0
    for at in sorted(change):
        held += change[at]
        peak = max(peak, held)
    return peak
