"""Tiles that a loop reads once, fetched into the cache before they are needed.

A load with `eviction_policy="evict_first"` says that nothing will be read again soon. Such data seldom is in a core's caches,
and a kernel that walks over it would wait for every line. So where a tile is read, the tile behind it in memory is fetched:
into the first-level cache, because the next few hundred cycles are all there is until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import direct, masks
from .buffers import storage_type
from .values import BYTES

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Op

LINE_BYTES = 64
_FIRST_LEVEL = 3


def fetch_behind(lowering: Lowering, op: Op) -> None:
    """Fetch what lies behind a tile that is read once, if its rows follow each other evenly.

    It may be past the end of the tensor: fetching does not fault.

    Args:
        lowering: of the kernel.
        op: a load, about to be lowered.
    """
    if op.attrs.get("evict") != "evict_first" or len(op.results[0].shape) != 2:
        return
    pointers, (rows, columns) = op.operands[0], op.results[0].shape
    if op.results[0].type.is_pointer or not masks.is_affine(lowering, pointers):
        return
    lowering.prepare(pointers)
    e, size = lowering.e, BYTES[op.results[0].element]
    with e.scope():
        found = direct.corner(lowering, pointers)
        if found is None or lowering.plan.layout.strides(pointers)[1] != 1:
            return
        base, first, step = found
        start = e.address(storage_type(op.results[0].element), base, first)
        pitch = e.combine((step, size))
        with e.loop(rows, 2 * rows, 1) as loop:
            row = e.address("i8", start, e.combine((loop.index, pitch)))
            for line in range(0, columns * size, LINE_BYTES):
                operands = [("ptr", e.address("i8", row, line)), ("i32", "0"), ("i32", str(_FIRST_LEVEL)), ("i32", "1")]
                e.call("void", "llvm.prefetch.p0", operands)
