"""Replacing tables whose entries follow from their index by the operation that makes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.program import Program
from graphwright.passes.base import Context, Decision, Fidelity, Refusal
from graphwright.passes.local import LocalPass, Places

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class KnownTables(LocalPass):
    """Make integer tables anew instead of reading them, where their entries are a linear function of their index.

    Models keep such tables as buffers: the positions 0, 1, 2, ... or token types that are all 0. Once their entries are known,
    lookups by them need no memory, and lookups in an embedding by them become plain reads of its rows.

    Before: `%rows = embedding(weights["table"], slice(weights["position_ids"], 1, 0, tokens))`

    After: `%rows = embedding(weights["table"], slice(reshape(arange(512), [1, 512]), 1, 0, tokens))`

    Applies when: an integer or bool weight of two or more elements is the same everywhere, or changes by the same step along
    one dimension and not along the others.

    Declines when: the table has another form.
    """

    name = "known-tables"
    fidelity = Fidelity.EXACT

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the tables."""
        for node in program.graph.nodes:
            if node.op != "get_attr":
                continue
            table = program.weights[str(node.target)]
            if table.dtype.is_floating_point or table.dtype.is_complex or table.numel() < 2:
                continue
            form = linear_form(table)
            if form is None:
                yield Refusal(node.name, "its entries are no linear function of one index")
            else:
                start, step, dim = form
                what = f"all {start}" if step == 0 else f"{start} + {step} * index along dimension {dim}"
                yield Decision(node.name, "make anew", f"its entries are {what}", {"start": start, "step": step, "dim": dim})

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Insert what makes the table."""
        table = program.weights[str(node.target)]
        shape, dtype, device = list(table.shape), table.dtype, table.device
        start, step, dim = detail["start"], detail["step"], detail["dim"]
        if step == 0:
            value = bool(start) if dtype is torch.bool else start
            return program.call(aten.full.default, shape, value, dtype=dtype, device=device, like=node)
        stop = start + step * shape[dim]
        made = program.call(aten.arange.start_step, start, stop, step, dtype=dtype, device=device, like=node)
        if len(shape) > 1:
            along = [n if k == dim else 1 for k, n in enumerate(shape)]
            made = program.call(aten.reshape.default, made, along, like=node)
            if along != shape:
                made = program.call(aten.expand.default, made, shape, like=node)
        return made


def linear_form(table: torch.Tensor) -> tuple[int, int, int] | None:
    """Return start, step and dimension of a table of integers with entries start + step * index along that dimension.

    The step is 0 where all entries are the same; None where the table has another form.
    """
    start = int(table.reshape(-1)[0])
    for dim, size in enumerate(table.shape):
        if size < 2:
            continue
        step = int(table.select(dim, 1).reshape(-1)[0]) - start
        if step != 0 and table.dtype is torch.bool:
            continue
        along = [1] * table.dim()
        along[dim] = size
        expected = (start + step * torch.arange(size, device=table.device)).reshape(along)
        if bool((table == expected).all()):
            return start, step, dim
        if step != 0:
            return None
    return None
