"""Removal of casts that change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.program import Program, calls
from graphwright.passes.base import Context, Decision, Fidelity, Refusal
from graphwright.passes.local import LocalPass, Places

CAST = torch.ops.prims.convert_element_type.default


def is_exact_cast(source: torch.dtype, target: torch.dtype) -> bool:
    """Return whether every value of `source` is one of `target`: floats with enough digits and range, wide enough integers."""
    if source == target or source == torch.bool:
        return True
    if source.is_complex or target.is_complex or target == torch.bool:
        return False
    if source.is_floating_point:
        if not target.is_floating_point:
            return False
        mine, other = torch.finfo(source), torch.finfo(target)
        return other.eps <= mine.eps and other.max >= mine.max and other.smallest_normal * other.eps <= mine.tiny * mine.eps
    low, high = torch.iinfo(source).min, torch.iinfo(source).max
    if target.is_floating_point:
        digits = 2 / torch.finfo(target).eps
        return max(-low, high) <= min(digits, torch.finfo(target).max)
    return torch.iinfo(target).min <= low and high <= torch.iinfo(target).max


@dataclass(frozen=True, kw_only=True)
class RedundantCasts(LocalPass):
    """Remove casts to the dtype that a value has already, and detours of casts that lose nothing on the way.

    Before: `%a = convert_element_type(%x, f32); %b = convert_element_type(%a, bf16)` with x in bf16

    After: `%x`

    Applies when: the dtype does not change.
    Applies when: a cast of a cast, the first to a dtype that holds every value of the original one.

    Declines when: the first of two casts rounds.
    """

    name = "redundant-casts"
    fidelity = Fidelity.EXACT

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the casts that can start from an earlier value."""
        for node in calls(program.graph, CAST):
            source = _argument(node)
            while source.target is CAST and is_exact_cast(_argument(source).meta["val"].dtype, source.meta["val"].dtype):
                source = _argument(source)
            target = node.meta["val"].dtype
            if source.meta["val"].dtype == target:
                yield Decision(node.name, f"use %{source.name}", f"it is {target} already", {"source": source.name})
            elif source is not _argument(node):
                yield Decision(node.name, f"cast %{source.name}", "nothing is lost on the way", {"source": source.name})
            elif source.target is CAST:
                yield Refusal(node.name, f"%{source.name} rounds to {source.meta['val'].dtype} first")

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Return the earlier value, cast where its dtype is another."""
        source = places[detail["source"]]
        dtype = node.meta["val"].dtype
        return source if source.meta["val"].dtype == dtype else program.call(CAST, source, dtype, like=node)


def _argument(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source
