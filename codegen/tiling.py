"""How a kernel walks over its rows and columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

PROGRAM_ELEMENTS = 8192
"""A program on a CPU takes about this many elements, so that its work hides the cost of handing it out."""

LONGEST_ROW = 16384
"""Rows up to this length are taken whole; longer ones, and those whose length is not known, in a loop."""

LOOP_BLOCK = 1024
SHORTEST_ROW = 64
"""Shorter rows are taken several at a time."""

TILE_ELEMENTS = 1024


@dataclass(frozen=True)
class Segment:
    """Columns that are computed at a time.

    Args:
        start: the first.
        size: how many, a power of two.
        stop: one past the last that counts; 0 where only the call tells.
    """

    start: int
    size: int
    stop: int

    @property
    def masked(self) -> bool:
        """Whether some columns are past the end."""
        return self.start + self.size > self.stop


@dataclass(frozen=True)
class Tiling:
    """How a kernel walks.

    Args:
        mode: "flat": over all elements, in blocks; "rows": row by row; "tiles": several rows at a time; "loop": row by row, and
            along each row in blocks.
        segments: the columns of a row, for "rows" and "tiles".
        rows: rows per program.
        block: elements per block, for "flat" and "loop".
    """

    mode: Literal["flat", "rows", "tiles", "loop"]
    segments: tuple[Segment, ...] = ()
    rows: int = 1
    block: int = 0


def choose(columns: Any, flat: bool, single: bool, cuts: Iterable[int], on_cuda: bool) -> Tiling:
    """Return how to walk.

    Args:
        columns: length of a row.
        flat: whether each element can be found by its position among all.
        single: whether there is only one row.
        cuts: columns at which the rows had better be cut.
        on_cuda: whether the kernel runs on a GPU.
    """
    if flat:
        return Tiling("flat", block=1024 if on_cuda else PROGRAM_ELEMENTS)
    if not isinstance(columns, int) or columns > LONGEST_ROW:
        return Tiling("loop", block=LOOP_BLOCK)
    pieces = tuple(segments(columns, sorted({c for c in cuts if 0 < c < columns})))
    if columns >= SHORTEST_ROW or single:
        return Tiling("rows", pieces, 1 if on_cuda or single else max(1, PROGRAM_ELEMENTS // columns))
    widest = max(piece.size for piece in pieces)
    return Tiling("tiles", pieces, max(1, TILE_ELEMENTS // widest))


def segments(columns: int, cuts: list[int]) -> Iterable[Segment]:
    """Yield segments that cover the columns and begin anew at each cut."""
    edges = [0, *cuts, columns]
    for start, stop in pairwise(edges):
        while start < stop:
            rest = stop - start
            # The largest power of two that fits; the last few columns share one masked piece.
            size = 1 << (rest.bit_length() - 1) if rest >= 16 else 1 << (rest - 1).bit_length()
            yield Segment(start, size, min(start + size, stop))
            start += size
