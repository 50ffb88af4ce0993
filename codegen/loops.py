"""Reading a graph element by element: the value of a node at an index, computed from what is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphwright.ir.errors import LoweringError
from graphwright.ir.program import Program

from .indexing import Index, Ranges, is_positive, product, unflatten
from .lowering import REDUCED_DIMS, lowering_of
from .values import COLUMN, Value, Values, held_dtype

MOST_VALUES = 4000
"""A kernel with more values than this is cut: something in it is computed again and again."""


class NeedsStore(Exception):
    """A node cannot be computed inside another kernel, and has to be stored first."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


class NeedsExternal(Exception):
    """A node that looked like a loop operation has no loop lowering after all."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


@dataclass(frozen=True)
class Stored:
    """Where a node's value lies in memory.

    Args:
        buffer: the buffer's name.
        strides: in elements.
        offset: of the first element, in elements.
        dtype: of the elements.
    """

    buffer: str
    strides: tuple[Any, ...]
    offset: Any
    dtype: torch.dtype


class GraphReader:
    """Computes the value of a node at an index.

    Args:
        program: the program that the nodes are of.
        stored: node -> where it lies; these are loaded, all others computed.
        inside: nodes that the kernel itself stores, and therefore computes although they are in `stored`.
        ranges: of the index variables.
        columns: the number of columns of the kernel's rows.
    """

    def __init__(
        self,
        program: Program,
        stored: Mapping[fx.Node, Stored],
        inside: frozenset[fx.Node],
        ranges: Ranges,
        columns: Any,
    ) -> None:
        self.program = program
        self.values = Values(ranges)
        self._stored = stored
        self._inside = inside
        self._columns = columns
        self._conditions: tuple[Value, ...] = ()
        self._memo: dict[Any, Value] = {}

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        """Return the shape of a node."""
        return self.program.shape(node)

    def size(self, value: Any) -> Any:
        """Return a number, a symbolic number, or the node of one, as a size."""
        return self.program.size(value)

    def value(self, arg: Any, index: Sequence[Index]) -> Value:
        """Return the value of a node, or of a plain number, at an index of its own shape.

        Raises:
            NeedsStore: the node is a reduction that this kernel cannot make.
            LoweringError: nothing is known of its operation.
        """
        if not isinstance(arg, fx.Node):
            dtype = torch.bool if isinstance(arg, bool) else torch.int64 if isinstance(arg, int) else torch.float32
            return self.values.constant(arg, dtype)
        if not isinstance(arg.meta["val"], torch.Tensor):
            return self.values.index(self.size(arg))
        at = tuple(index)
        key = (arg, at, self._conditions)
        if key not in self._memo:
            self._memo[key] = self._compute(arg, at)
        return self._memo[key]

    def _compute(self, node: fx.Node, index: tuple[Index, ...]) -> Value:
        stored = self._stored.get(node)
        if stored is not None and node not in self._inside:
            offset = sum((i * s for i, s in zip(index, stored.strides, strict=True)), sympy.sympify(stored.offset))
            return self.values.load(stored.buffer, sympy.expand(offset), stored.dtype, self._conditions)
        lowering = lowering_of(node)
        if lowering is None:
            raise LoweringError(f"{node.name}: nothing stores {node.target}, and it cannot be computed in a loop")
        if node.target in REDUCED_DIMS:
            source: Any = node.args[0]
            outer = index[: source.meta["val"].dim() - len(REDUCED_DIMS[node.target](node))]
            if any(self.values.depends(i) for i in outer):
                raise NeedsStore(node)
        try:
            value = lowering(self, node, index)
        except LoweringError as error:
            raise NeedsExternal(node) from error
        if len(self.values) > MOST_VALUES:
            raise NeedsStore(node)
        # Eager rounds every result to its dtype; within a kernel only a change of dtype does.
        return self.values.cast(value, held_dtype(node.meta["val"].dtype))

    def broadcast(self, arg: Any, index: Sequence[Index]) -> Value:
        """Return the value of a node at an index of a shape that it is broadcast to."""
        if not isinstance(arg, fx.Node) or not isinstance(arg.meta["val"], torch.Tensor):
            return self.value(arg, ())
        shape = self.shape(arg)
        own = index[len(index) - len(shape) :] if shape else ()
        return self.value(arg, tuple(sympy.Integer(0) if n == 1 else i for i, n in zip(own, shape, strict=True)))

    def largest(self, expression: Index) -> Index | None:
        """Return the largest that an index can be, None if it is not known or may be negative."""
        if any(term.as_coeff_Mul()[0].is_negative for term in sympy.Add.make_args(expression)):
            return None
        return self.values.ranges.largest(expression)

    def below(self, value: Index, bound: Any) -> bool:
        """Whether a size is less than another whatever the dimensions are."""
        room = sympy.expand(bound - value)
        for dimension in self.program.dimensions.values():
            # The larger the dimension, the smaller the room: it counts with the most that it may be.
            if dimension.high is not None and room.coeff(dimension.symbol).is_negative:
                room = sympy.expand(room.xreplace({dimension.symbol: sympy.Integer(dimension.high)}))
        return is_positive(room)

    def reduce(self, kind: str, node: fx.Node, sizes: Sequence[Any], body: Callable[[tuple[Index, ...]], Value]) -> Value:
        """Return a reduction of `body` over trailing dimensions of these sizes.

        Raises:
            NeedsStore: the kernel's rows are of another length.
        """
        count = product(sizes)
        if sympy.expand(count - self._columns) != 0:
            raise NeedsStore(node)
        inner = (COLUMN,) if len(sizes) == 1 else unflatten(COLUMN, sizes, self.values.ranges)
        with self._whole_row():
            return self.values.reduce(kind, body(inner), count)

    @contextmanager
    def _whole_row(self) -> Iterator[None]:
        """Forget what is known of the column: a reduction takes all of them, wherever its result is used."""
        before, ranges = self._conditions, self.values.ranges
        sizes = ranges.sizes
        self._conditions = tuple(c for c in before if not c.varies)
        if self._columns is not None:
            ranges.sizes = {**sizes, COLUMN: self._columns}
        try:
            yield
        finally:
            self._conditions, ranges.sizes = before, sizes

    @contextmanager
    def under(self, condition: Value) -> Iterator[None]:
        """Make loads only where `condition` holds."""
        before, sizes = self._conditions, self.values.ranges.sizes
        if condition.kind != "constant":
            self._conditions = (*before, condition)
        if condition.kind == "less" and condition.payload[0] in sizes and condition.payload[1].is_Integer:
            self.values.ranges.sizes = {**sizes, condition.payload[0]: condition.payload[1]}
        try:
            yield
        finally:
            self._conditions, self.values.ranges.sizes = before, sizes


def strided(program: Program, node: fx.Node, base: fx.Node, stored: Stored) -> Stored | None:
    """Return where a view of a stored node lies, None if its elements are not at even distances in ascending order.

    Args:
        program: the program.
        node: the view.
        base: the stored node that it is a view of.
        stored: where that lies.
    """
    shape = program.shape(node)
    symbols = [sympy.Symbol(f"i{k}", integer=True, nonnegative=True) for k in range(len(shape))]
    index = [sympy.Integer(0) if n == 1 else s for s, n in zip(symbols, shape, strict=True)]
    ranges = Ranges(dict(zip(symbols, shape, strict=True)))
    reader = GraphReader(program, {base: stored}, frozenset(), ranges, None)
    value = reader.value(node, index)
    if value.kind != "load" or value.args:
        return None
    offset = value.payload[1]
    strides: list[Any] = []
    for symbol, size in zip(symbols, shape, strict=True):
        stride = offset.coeff(symbol)
        strides.append(sympy.Integer(1) if size == 1 and not strides else stride)
        offset = sympy.expand(offset - stride * symbol)
        if stride.free_symbols & set(symbols):
            return None
    if offset.free_symbols & set(symbols) or any(stride.as_coeff_Mul()[0].is_negative for stride in strides):
        return None
    return Stored(stored.buffer, tuple(strides), offset, stored.dtype)
