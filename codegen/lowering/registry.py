"""The table of loop lowerings: operation -> function from an output index to a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from graphwright.codegen.indexing import Index
from graphwright.codegen.values import Value, Values, held_dtype


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

    def largest(self, expression: Index) -> Index | None:
        """Return the largest that an index can be, None if it is not known or may be negative."""

    def below(self, value: Index, bound: Any) -> bool:
        """Whether a size is less than another whatever the dimensions are."""

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

LOOKUPS: dict[Any, Lowering] = {}
"""Operations that read where a tensor of indices says; in loops only where the indices follow from the element's own index."""

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
    for table in (POINTWISE, VIEWS, GENERATORS, REDUCTIONS, LOOKUPS):
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


def operands(
    reader: Reader, index: tuple[Index, ...], args: Sequence[Any], dtype: torch.dtype, *, rounded: bool = False
) -> list[Value]:
    """Return operands, broadcast to an index of the result, in the dtype that numbers of `dtype` are computed in.

    Args:
        reader: knows their values.
        index: of the result.
        args: nodes and plain numbers.
        dtype: common to all of them.
        rounded: round plain numbers to `dtype`, as PyTorch does for some operations before it computes in float32.
    """
    if rounded and held_dtype(dtype) is not dtype:
        args = [float(torch.tensor(arg, dtype=dtype)) if isinstance(arg, int | float) else arg for arg in args]
    return [reader.values.cast(reader.broadcast(arg, index), held_dtype(dtype)) for arg in args]
