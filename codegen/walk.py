"""The geometry of a kernel: its rows and columns, how it walks over them, and what they are called in its text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy

from .indexing import Index, Quotient, contiguous_strides
from .tiling import Segment, choose
from .values import COLUMN, Value

ROW = sympy.Symbol("row", integer=True, nonnegative=True)


def offsets_of(values: Iterable[Value]) -> list[Index]:
    """Return the index expressions that values hold."""
    found: list[Index] = []
    for value in values:
        if value.kind == "load":
            found.append(value.payload[1])
        elif value.kind == "index":
            found.append(value.payload)
        elif value.kind == "less":
            found.extend(value.payload)
    return found


class Walk:
    """How a kernel walks over its rows and columns.

    Args:
        order: the values that it computes.
        stores: the offset of each store, and whether it is one per column.
        outer: index variable and size of each dimension of the rows, outermost first.
        columns: length of a row.
        on_cuda: whether the kernel is for a GPU.
    """

    def __init__(
        self,
        order: Sequence[Value],
        stores: Sequence[tuple[Index, bool]],
        outer: Sequence[tuple[sympy.Symbol, Any]],
        columns: Any,
        on_cuda: bool,
    ) -> None:
        self.outer = [(symbol, size) for symbol, size in outer if size != 1]
        self.columns = columns
        self.rows_at = dict(zip([s for s, _ in self.outer], contiguous_strides([n for _, n in self.outer]), strict=True))
        self.offsets = [*offsets_of(order), *(offset for offset, _ in stores)]
        self._position = sympy.expand(sum((s * n * columns for s, n in self.rows_at.items()), sympy.Integer(0)) + COLUMN)
        whole = all(varies for _, varies in stores) and not any(v.kind in ("reduce", "less") for v in order)
        flat = whole and all(self._is_flat(offset) for offset in self.offsets)
        self.tiling = choose(columns, flat, not self.outer, _cuts(order), on_cuda)

    def _is_flat(self, offset: Index) -> bool:
        """Whether an offset follows from the position among all elements."""
        return sympy.expand(offset - self._position).free_symbols.isdisjoint(self.variables) or self.is_fixed(offset)

    @property
    def variables(self) -> set[sympy.Symbol]:
        """The index variables."""
        return {COLUMN, *self.rows_at}

    def is_fixed(self, expression: Index) -> bool:
        """Whether an expression is the same for all elements."""
        return bool(expression.free_symbols.isdisjoint(self.variables))

    def in_rows(self, expression: Index) -> Index:
        """Return an expression with the row's number in place of index variables, as far as they stand for it together.

        In a flat kernel the column counts all elements.
        """
        if self.is_fixed(expression):
            return expression
        if self.tiling.mode == "flat":
            return sympy.expand(expression - self._position + COLUMN)
        if expression.free_symbols.isdisjoint(self.rows_at):
            return expression
        last = self.outer[-1][0]
        others = sum((s * n for s, n in self.rows_at.items() if s != last), sympy.Integer(0))
        return sympy.expand(expression.xreplace({last: ROW - others}))

    # -- columns

    def shape(self, segment: Segment | None) -> str:
        """Return the shape of a value that there is one of for each column."""
        size = "BLOCK" if self.tiling.mode in ("flat", "loop") else str(segment.size if segment else 1)
        return f"ROWS, {size}" if self.tiling.mode == "tiles" else size

    def column_name(self, segment: Segment) -> str:
        """Return what a segment's columns are called."""
        return "col" if len(self.tiling.segments) <= 1 else f"col{self.tiling.segments.index(segment)}"

    def inside(self, segment: Segment) -> str:
        """Return the name of the mask of the columns that count."""
        masked = [s for s in self.tiling.segments if s.masked]
        return f"inside{masked.index(segment)}" if len(masked) > 1 else "inside"

    def column_lines(self, segment: Segment) -> list[str]:
        """Return the lines that make a segment's columns, and their mask."""
        name = self.column_name(segment)
        columns = f"{segment.start} + tl.arange(0, {segment.size})" if segment.start else f"tl.arange(0, {segment.size})"
        lines = [f"{name} = ({columns})[None, :]" if self.tiling.mode == "tiles" else f"{name} = {columns}"]
        if segment.masked:
            lines.append(f"{self.inside(segment)} = {name} < {segment.stop}")
        return lines

    def known(self, condition: Value, segment: Segment | None) -> bool | None:
        """Return whether a condition holds in all columns of a segment, or in none; None if it is not known."""
        if condition.kind == "constant":
            return bool(condition.payload)
        if condition.kind == "op" and condition.payload == "not":
            known = self.known(condition.args[0], segment)
            return None if known is None else not known
        if condition.kind != "less" or segment is None or self.tiling.mode in ("flat", "loop"):
            return None
        left, right = condition.payload
        difference = sympy.expand(right - left)
        if not _is_linear(difference):
            return None
        ends = [difference.subs(COLUMN, c) for c in (segment.start, segment.stop - 1)]
        if min(ends) > 0:
            return True
        return False if max(ends) <= 0 else None


def _is_linear(expression: Index) -> bool:
    """Whether an expression of the column alone rises or falls all along."""
    return bool(expression.free_symbols == {COLUMN}) and not expression.has(Quotient)


def _cuts(order: Iterable[Value]) -> set[int]:
    """Return the columns at which comparisons of the column with a number change."""
    cuts = set()
    for value in order:
        if value.kind == "less":
            left, right = value.payload
            difference = sympy.expand(right - left)
            slope = difference.coeff(COLUMN)
            if _is_linear(difference) and abs(slope) == 1:
                # `right - left > 0` changes at that column, or after it if it rises.
                zero = int(difference.as_coeff_Add()[0] * -slope)
                cuts.add(zero + 1 if slope == 1 else zero)
    return cuts
