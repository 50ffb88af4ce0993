"""The table of loop lowerings: operation -> function from an output index to a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from graphwright.codegen.indexing import Index
from graphwright.codegen.values import Value, Values


class Reader(Protocol):
    """What a lowering may ask for."""

    values: Values

    def value(self, arg: Any, index: Sequence[Index]) -> Value:
        """Return the value of a node, or of a plain number, at an index of its own shape."""

    def broadcast(self, arg: Any, index: Sequence[Index]) -> Value:
        """Return the value of a node at an index of a shape that it is broadcast to."""

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        """Return the shape of a node."""

    def size(self, value: Any) -> Any:
        """Return a number, a symbolic number, or the node of one, as a size."""

    def reduce(self, kind: str, node: fx.Node, sizes: Sequence[Any], body: Callable[[tuple[Index, ...]], Value]) -> Value:
        """Return a reduction of `body` over trailing dimensions of these sizes."""

    def under(self, condition: Value) -> Any:
        """Return a context in which loads are made only where `condition` holds."""


Lowering = Callable[[Reader, fx.Node, tuple[Index, ...]], Value]

POINTWISE: dict[Any, Lowering] = {}
"""Operations whose result at an index depends on their operands at that index."""

VIEWS: dict[Any, Lowering] = {}
"""Operations that only say where in their operand an element comes from. They are never stored for their own sake."""

GENERATORS: dict[Any, Lowering] = {}
"""Operations whose result follows from the index alone."""

REDUCTIONS: dict[Any, Lowering] = {}
"""Operations that take whole rows of their first operand."""

REDUCED_DIMS: dict[Any, Callable[[fx.Node], Sequence[int]]] = {}
"""For each of REDUCTIONS: the dimensions of the first operand that it takes whole."""


def register(table: dict[Any, Lowering], *targets: Any) -> Callable[[Lowering], Lowering]:
    """Return a decorator that enters a lowering for all of `targets`."""

    def enter(lowering: Lowering) -> Lowering:
        for target in targets:
            table[target] = lowering
        return lowering

    return enter


def lowering_of(node: fx.Node) -> Lowering | None:
    """Return the loop lowering of a call, None if there is none."""
    for table in (POINTWISE, VIEWS, GENERATORS, REDUCTIONS):
        if node.target in table:
            return table[node.target]
    return None


def arguments(node: fx.Node) -> Mapping[str, Any]:
    """Return a call's arguments by the names of the operation's schema, with defaults."""
    target: Any = node.target
    bound: dict[str, Any] = {}
    for k, parameter in enumerate(target._schema.arguments):
        if k < len(node.args):
            bound[parameter.name] = node.args[k]
        elif parameter.name in node.kwargs:
            bound[parameter.name] = node.kwargs[parameter.name]
        else:
            bound[parameter.name] = parameter.default_value
    return bound


def dtype_of(node: fx.Node) -> torch.dtype:
    """Return the dtype of a node's value."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
