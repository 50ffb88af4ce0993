"""The step of a lookup of rows by numbers that only the call knows: a kernel that checks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir.program import Program
from graphwright.runtime.schedule import KernelStep

from .external import view_of
from .indexing import contiguous_strides, product, size_text
from .loops import Stored
from .provenance import provenance_of
from .sources import KernelSources
from .steps import Place, StepMaker

aten = torch.ops.aten

ROWS = 32
"""Rows that one program copies."""

_LONGEST_BLOCK = 1024
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8)

LOOKUP = '''\
@triton.jit
def {name}(
    p_table, p_rows, p_out, count, rows, table_row, table_column,
    columns: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Copy ROWS rows of a table, each the one that its number says."""
    first = tl.program_id(0) * ROWS
    o_n = tl.arange(0, BLOCK)
    for i in range(first, tl.minimum(first + ROWS, count)):
        row = tl.load(p_rows + i).to(tl.int64)
        tl.device_assert((row >= 0) & (row < rows), "index out of range: the table has no such row")
        for column in tl.static_range(0, columns, BLOCK):
            inside = column + o_n < columns
            x = tl.load(p_table + row * table_row + (column + o_n) * table_column, mask=inside)
            tl.store(p_out + i.to(tl.int64) * columns + column + o_n, x, mask=inside)
'''


def _applies(node: fx.Node) -> bool:
    """Whether the kernel makes a lookup: on a GPU a number out of range would end the process's use of it."""
    table = node.args[0].meta["val"]  # type: ignore[union-attr]
    columns = table.shape[1]
    return table.device.type == "cpu" and table.dtype in _DTYPES and isinstance(columns, int) and columns > 0


def _steps(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    tensors: tuple[Any, ...] = (*node.args[:2], node)
    table, numbers = tensors[:2]
    rows, columns = program.shape(table)
    count = size_text(product(program.shape(numbers)))
    provenance = provenance_of([node])
    return (
        KernelStep(
            node.name,
            sources.add("embedding", LOOKUP, provenance),
            (-(-count // ROWS) if isinstance(count, int) else f"({count} + {ROWS - 1}) // {ROWS}",),
            (
                *(view_of(place(t), program.shape(t)) for t in tensors),
                count,
                size_text(rows),
                *map(size_text, place(table).strides),
            ),
            # Without it the numbers would not be checked.
            {
                "columns": int(columns),
                "ROWS": ROWS,
                "BLOCK": min(1 << max(int(columns) - 1, 0).bit_length(), _LONGEST_BLOCK),
                "debug": 1,
            },
            tuple(dict.fromkeys(place(t).buffer for t in tensors[:2])),
            (place(node).buffer,),
            provenance,
        ),
    )


def _accepts(reader: fx.Node, arg: fx.Node, stored: Stored, shape: tuple[Any, ...]) -> bool:
    if arg is reader.args[0]:
        return True
    expected = contiguous_strides(shape)
    return all(n == 1 or found == wanted for n, found, wanted in zip(shape, stored.strides, expected, strict=True))


MAKERS = {aten.embedding.default: StepMaker(make=_steps, accepts=_accepts, applies=_applies)}
"""Operation -> what makes its steps."""
