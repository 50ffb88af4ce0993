"""What the rules of the axes analysis share: labels, factors, and the state of one run."""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx


class Label(enum.Enum):
    """What an index along a dimension, or along one factor of it, counts."""

    BATCH = "batch"
    TOKEN = "token"
    KEY = "key"
    """Tokens a second time: the columns of attention scores."""
    ROWS = "rows"
    """All rows of the batch in the order that a sort gave them."""
    AGGREGATE = "aggregate"
    """Counts over all rows, such as how many rows each expert gets."""


@dataclass(frozen=True)
class Factor:
    """One factor of a dimension's size.

    Args:
        label: what it counts; None for features, heads and all else that no token depends on.
        size: how many; an integer or an expression of symbolic sizes.
    """

    label: Label | None
    size: sympy.Expr


Dim = tuple[Factor, ...]
"""The factors of a dimension from the outermost to the innermost; their sizes multiply to its size. Empty for size 1."""
Dims = tuple[Dim, ...]
Value = Dims | list[Dims]
"""The dimensions of a tensor, or of each of several results."""


class Mixes(Exception):
    """A rule found that the operation mixes tokens."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass
class Region:
    """An attention written out as products: opened by `queries @ keys^T`, closed by `probabilities @ values`.

    Args:
        opening: the products that pair tokens; several where scores are sums of products.
        closing: the products that contract the keys.
        nodes: the opening products and what is done to the scores, in the graph's order.
    """

    opening: list[fx.Node]
    closing: list[fx.Node] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)


def labels(dim: Dim) -> tuple[Label, ...]:
    """Return the labels of a dimension, outermost first, without what has none."""
    return tuple(factor.label for factor in dim if factor.label is not None)


def has(dims: Iterable[Dim], *wanted: Label) -> bool:
    """Return whether any factor of any of the dimensions has one of the labels."""
    return any(factor.label in wanted for dim in dims for factor in dim)


def is_tensor(node: Any) -> bool:
    """Return whether an argument is a node whose value is a tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


@functools.cache
def divide(dividend: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    """Return the quotient of two sizes, or None where it is not a size: a polynomial with whole coefficients."""
    quotient = dividend / divisor
    if quotient.has(sympy.Add):
        quotient = sympy.cancel(quotient)
    return quotient if sympy.denom(sympy.together(quotient)) == 1 else None


class State:
    """One run of the analysis: sizes, what is known of each node so far, and the regions and permutations found.

    Args:
        sizes: the label of each size that alone names it: the symbols of batch and length.
        same: symbol to the symbol that stands for it, where inputs have symbols of their own for one size.
        token_size: the length, if known.
    """

    def __init__(
        self, sizes: dict[sympy.Expr, Label], same: dict[sympy.Expr, sympy.Expr], token_size: sympy.Expr | None
    ) -> None:
        self.sizes, self.same, self.token_size = sizes, same, token_size
        self.batch_size: sympy.Expr | None = None
        self.values: dict[fx.Node, Value] = {}
        self.main: set[fx.Node] = set()
        self.region_of: dict[fx.Node, Region] = {}
        self.regions: list[Region] = []
        self.attention: list[fx.Node] = []
        self.generators: set[fx.Node] = set()
        self.permutations: dict[fx.Node, Dim] = {}
        self.inverses: dict[fx.Node, Dim] = {}

    def size(self, value: Any) -> sympy.Expr:
        """Return a size as an expression of the symbols that stand for all that are the same."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, torch.SymInt | torch.SymFloat):
            return sympy.sympify(value.node.expr).xreplace(self.same)
        return sympy.sympify(value)

    def shape(self, node: fx.Node) -> list[sympy.Expr]:
        """Return the shape of a node's tensor."""
        return [self.size(n) for n in node.meta["val"].shape]

    def dim(self, size: sympy.Expr) -> Dim:
        """Return a dimension about which its size is all that is known."""
        return () if size == 1 else (Factor(self.sizes.get(size), size),)

    def parts(self, node: fx.Node) -> list[Dims]:
        """Return the dimensions of each of a node's results from the shapes alone."""
        value = self.by_shape(node)
        return value if isinstance(value, list) else [value]

    def by_shape(self, node: fx.Node) -> Value:
        """Return a node's dimensions from its shape alone."""
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            return tuple(self.dim(self.size(n)) for n in value.shape)
        return [tuple(self.dim(self.size(n)) for n in one.shape) if isinstance(one, torch.Tensor) else () for one in value]

    def dims(self, node: fx.Node) -> Dims:
        """Return the dimensions of a node that is one tensor."""
        value = self.values.get(node)
        if value is None:
            value = self.values[node] = self.by_shape(node)
        return value if isinstance(value, tuple) else value[0]

    def holds_length(self, value: Any) -> bool:
        """Return whether an argument is a number that depends on the length."""
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.SymInt | torch.SymFloat):
            return False
        return self.token_size is not None and self.size(value).has(*(self.token_size.free_symbols or {sympy.Dummy()}))

    def demand_free(self, dims: Dims, where: Iterable[int], kind: str, what: str, allowed: tuple[Label, ...] = ()) -> None:
        """Raise `Mixes` if one of the dimensions carries a label that is not allowed there."""
        for d in where:
            bad = [label for label in labels(dims[d]) if label not in allowed]
            if bad:
                raise Mixes(kind, f"{what} over the {'/'.join(label.value for label in bad)} axis (dimension {d})")

    def broadcast(self, operands: Sequence[tuple[fx.Node | None, Dims]], rank: int) -> Dims:
        """Return the dimensions of an elementwise result, noting the operands that bring positions in.

        Raises:
            Mixes: two different labels meet, or activations of two tokens meet in one element.
        """
        result: list[Dim] = []
        for i in range(rank):
            chosen: Dim = ()
            for _, dims in operands:
                j = i - rank + len(dims)
                if j >= 0 and dims[j]:
                    chosen = self._meet(chosen, dims[j])
            result.append(chosen)
            if has([chosen], Label.TOKEN):
                for node, dims in operands:
                    j = i - rank + len(dims)
                    if node is not None and j >= 0 and dims[j] and not labels(dims[j]):
                        self.generators.add(node)
        together = [d for d in result if has([d], Label.TOKEN, Label.ROWS)]
        if len(together) > 1 and any(node in self.main for node, _ in operands):
            seen = max(sum(has([d], Label.TOKEN, Label.ROWS) for d in dims) for _, dims in operands)
            if seen < len(together):
                raise Mixes("pairs", "an element is made of two tokens")
        if has(result, Label.AGGREGATE) and has(result, Label.TOKEN, Label.ROWS, Label.BATCH):
            raise Mixes("reduce", "counts over all tokens meet single tokens")
        return tuple(result)

    @staticmethod
    def _meet(one: Dim, other: Dim) -> Dim:
        a, b = labels(one), labels(other)
        if not a or not b:
            return one if a or (not b and one) else other
        if a == b:
            return one
        # A key-side operand of attention scores: what it says of a token, it says of that token as a key.
        if {a, b} == {(Label.KEY,), (Label.TOKEN,)}:
            return one if a == (Label.KEY,) else other
        raise Mixes("meet", f"the {'/'.join(x.value for x in a)} axis meets the {'/'.join(x.value for x in b)} axis")

    def regroup(self, dims: Dims, shape: Sequence[sympy.Expr]) -> Dims:
        """Return the dimensions after a view: the same factors in the same order, in other groups.

        Since every factor keeps what is outside and inside of it, a labelled factor keeps its stride; a view that splits
        one, or that puts a boundary where none can be, moves tokens.

        Raises:
            Mixes: a labelled factor would be split.
        """
        rest: list[Factor] = []
        for factor in (f for dim in dims for f in dim):
            if rest and rest[-1].label is None and factor.label is None:
                factor = Factor(None, rest.pop().size * factor.size)
            rest.append(factor)
        result: list[Dim] = []
        for position, size in enumerate(shape):
            taken: list[Factor] = []
            while size != 1:
                quotient = divide(size, rest[0].size) if rest and rest[0].size != 0 else None
                if quotient is not None:
                    taken.append(rest.pop(0))
                    size = quotient
                    continue
                inner = divide(rest[0].size, size) if rest and rest[0].label is None and size != 0 else None
                if inner is None:
                    if not has(dims, *Label):
                        return tuple(self.dim(n) for n in shape)
                    raise Mixes("view", f"a view splits or moves a labelled axis (dimension {position} of the result)")
                taken.append(Factor(self.sizes.get(size), size))
                rest[0] = Factor(self.sizes.get(inner), inner)
                size = sympy.Integer(1)
            result.append(tuple(taken))
        return tuple(result)


def normalise_dim(dim: int, rank: int) -> int:
    """Return a dimension counted from the front."""
    return dim % rank if rank else 0
