"""How a value looks while a chunk of it is being computed.

A tensor is never held whole in registers. It is evaluated at a *chunk*: per dimension a base index and a width, a power of
two. The lanes of a chunk run row-major over its dimensions. What evaluation returns is the simplest of these forms:

- `Uniform`: the same in all lanes (also every scalar of the kernel);
- `Affine`: an integer, base + sum of stride * lane index;
- `Vector`: an LLVM vector;
- `Pointer`: a base address and an offset that is one of the three above.

Keeping indices symbolic is what makes a load of consecutive elements a vector load rather than a gather.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .emit import Text
from .fp8 import FORMATS

INTEGER_BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64}
BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "ptr": 8}
BYTES |= dict.fromkeys(FORMATS, 1)
"""Bytes of an element in memory."""

MAX_DIVISOR = 1 << 20


@dataclass(frozen=True, slots=True)
class Coord:
    """Part of a chunk along one dimension: indices base .. base + width - 1."""

    base: int | Text
    width: int = 1
    divisor: int = 1
    """A known divisor of a symbolic base."""


Coords = tuple[Coord, ...]


def widths_of(coords: Coords) -> tuple[int, ...]:
    """Widths of the dimensions that have lanes."""
    return tuple(c.width for c in coords if c.width > 1)


def lanes_of(coords: Coords) -> int:
    """Number of lanes of a chunk."""
    return math.prod(c.width for c in coords)


@dataclass(frozen=True, slots=True)
class Uniform:
    """One value for all lanes: a Python number when known, else an SSA name."""

    value: int | float | Text
    element: str
    divisor: int = 1
    """A known divisor of an integer SSA value."""
    nonnegative: bool = False
    """Whether an integer SSA value is known not to be negative."""

    @property
    def is_constant(self) -> bool:
        """Whether the value is known now."""
        return not isinstance(self.value, str)

    @property
    def known_divisor(self) -> int:
        """The largest known divisor (a power of two for constants)."""
        if isinstance(self.value, int):
            return (self.value & -self.value) or MAX_DIVISOR
        return self.divisor

    @property
    def is_nonnegative(self) -> bool:
        """Whether an integer is known not to be negative."""
        return self.value >= 0 if isinstance(self.value, int) else self.nonnegative


@dataclass(frozen=True, slots=True)
class Affine:
    """An integer base + sum(stride * lane index), one stride per dimension with lanes."""

    base: Uniform
    strides: tuple[Uniform, ...]
    widths: tuple[int, ...]
    element: str


@dataclass(frozen=True, slots=True)
class Vector:
    """An LLVM vector, lanes row-major over `widths`."""

    text: Text
    element: str
    widths: tuple[int, ...]

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return math.prod(self.widths)


Number = Uniform | Affine | Vector


@dataclass(frozen=True, slots=True)
class Pointer:
    """An address: `base` plus `offset` elements; without a base, `offset` is the address itself in bytes."""

    base: Text | None
    offset: Number
    pointee: str

    @property
    def element(self) -> str:
        """Always "ptr"."""
        return "ptr"


Val = Uniform | Affine | Vector | Pointer


def wrap(value: int, element: str) -> int:
    """Reduce an integer to the signed range of its type (i1 to 0 or 1)."""
    bits = INTEGER_BITS[element]
    value &= (1 << bits) - 1
    if bits > 1 and value >> (bits - 1):
        value -= 1 << bits
    return value
