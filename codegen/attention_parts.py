"""Cutting the columns of a head into pieces of a power of two, which is all that Triton's tiles can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LARGEST_DIM = 256
SMALLEST_PART = 16
"""A product takes at least so many columns."""


@dataclass(frozen=True)
class Part:
    """A piece of the columns of a head.

    Args:
        start: its first column.
        size: columns of its tiles, a power of two.
        used: how many of them exist.
    """

    start: int
    size: int
    used: int

    @property
    def columns(self) -> str:
        """Triton text of the numbers of its columns, [1, size]."""
        numbers = f"tl.arange(0, {self.size})"
        return f"({self.start} + {numbers})[None, :]" if self.start else f"{numbers}[None, :]"

    def mask(self, rows: str | None = None) -> str:
        """Triton text of the argument that masks a load or store where its columns end, or `rows`, an i1, is false."""
        terms = [rows] if rows else []
        if self.used < self.size:
            terms.append(f"{self.columns} < {self.start + self.used}")
        return f", mask={both(terms)}" if terms else ""


def both(terms: Sequence[str]) -> str:
    """Triton text of the conjunction of conditions."""
    return terms[0] if len(terms) == 1 else " & ".join(f"({term})" for term in terms)


def cut(dim: int) -> tuple[Part, ...]:
    """Cut `dim` columns into one or two parts, whichever makes less work: 80 is 64 and 16, 112 is 128 with a mask."""
    whole = _power_of_two(dim)
    first = whole // 2
    rest = _power_of_two(dim - first)
    if first < SMALLEST_PART or first + rest >= whole:
        return (Part(0, whole, dim),)
    return Part(0, first, first), Part(first, rest, dim - first)


def _power_of_two(n: int) -> int:
    return max(SMALLEST_PART, 1 << max(n - 1, 0).bit_length())
