"""Tables of handlers, one entry an operation. A module adds operations by decorating functions; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Op, Value
    from .values import Coords, Val

F = TypeVar("F")

Evaluator = Callable[["Lowering", "Op", "Value", "Coords"], "Val"]
Elementwise = Callable[["Lowering", "Op", "list[Val]"], "Val"]
Statement = Callable[["Lowering", "Op"], None]

EVALUATORS: dict[str, Evaluator] = {}
"""Operations computed chunk by chunk where they are needed, that move elements: given the chunk of the result wanted."""

ELEMENTWISE: dict[str, Elementwise] = {}
"""Operations computed chunk by chunk where they are needed, lane by lane: given their operands at the same chunk."""

MATERIALISERS: dict[str, Statement] = {}
"""Operations whose results are computed whole, into buffers, before anything uses them. No side effects."""

STATEMENTS: dict[str, Statement] = {}
"""Operations with side effects or control flow, executed where they stand."""


def evaluator(*names: str) -> Callable[[Evaluator], Evaluator]:
    """Register a function in `EVALUATORS`."""
    return _adder(EVALUATORS, names)


def elementwise(*names: str) -> Callable[[Elementwise], Elementwise]:
    """Register a function in `ELEMENTWISE`."""
    return _adder(ELEMENTWISE, names)


def materialiser(*names: str) -> Callable[[Statement], Statement]:
    """Register a function in `MATERIALISERS`."""
    return _adder(MATERIALISERS, names)


def statement(*names: str) -> Callable[[Statement], Statement]:
    """Register a function in `STATEMENTS`."""
    return _adder(STATEMENTS, names)


def _adder(table: dict[str, F], names: tuple[str, ...]) -> Callable[[F], F]:
    def add(function: F) -> F:
        for name in names:
            if name in table:
                raise ValueError(f"two handlers for {name}")
            table[name] = function
        return function

    return add
