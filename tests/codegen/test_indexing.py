"""Arithmetic on indices: what is simplified has the same value, also with the division that rounds towards 0."""

from __future__ import annotations

import itertools
import math

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.codegen.indexing import (
    Ranges,
    contiguous_strides,
    flat,
    is_positive,
    product,
    size_text,
    text,
    unflatten,
)
from graphwright.ir.errors import LoweringError

BATCH, TOKENS = (sympy.Symbol(n, integer=True, positive=True) for n in ("batch", "tokens"))


def variables(shape: tuple[int, ...], stem: str = "i") -> list[sympy.Symbol]:
    return [sympy.Symbol(f"{stem}{k}", integer=True, nonnegative=True) for k in range(len(shape))]


def truncated(written: str, values: dict[str, int]) -> int:
    """Evaluate a text as a kernel does: division rounds towards 0, and must not be asked to round anything negative."""

    class Number(int):
        def __add__(self, o: int) -> Number:
            return Number(int(self) + int(o))

        __radd__ = __add__

        def __sub__(self, o: int) -> Number:
            return Number(int(self) - int(o))

        def __rsub__(self, o: int) -> Number:
            return Number(int(o) - int(self))

        def __mul__(self, o: int) -> Number:
            return Number(int(self) * int(o))

        __rmul__ = __mul__

        def __neg__(self) -> Number:
            return Number(-int(self))

        def __floordiv__(self, o: int) -> Number:
            return Number(math.trunc(int(self) / int(o)))

        def __mod__(self, o: int) -> Number:
            return Number(math.fmod(int(self), int(o)))

    return int(eval(written, {name: Number(v) for name, v in values.items()}))


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Draw the shape of a tensor, and permutations and shapes that it is given in turn."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=5))
    shape = tuple(sizes)
    orders, shapes = [], []
    for _ in range(draw(st.integers(1, 2))):
        order = tuple(draw(st.permutations(range(len(shape)))))
        moved = [shape[d] for d in order]
        joined: list[int] = []
        for size in moved:
            if joined and draw(st.booleans()):
                joined[-1] *= size
            else:
                joined.append(size)
        orders.append(order)
        shape = tuple(joined)
        shapes.append(shape)
    return tuple(sizes), orders, shapes


@settings(deadline=None, max_examples=60)
@given(reshapes())
def test_indices_through_views_find_the_element(case: tuple) -> None:
    """An index taken through permutations and reshapes, as text, is that of the element that the views show there."""
    start, orders, shapes = case
    final = shapes[-1]
    symbols = variables(final)
    ranges = Ranges(dict(zip(symbols, map(sympy.Integer, final), strict=True)))
    before = [start, *shapes[:-1]]
    index = tuple(symbols)
    for old, order, new in reversed(list(zip(before, orders, shapes, strict=True))):
        moved = tuple(old[d] for d in order)
        parts = unflatten(flat(index, new), moved, ranges)
        back = [sympy.Integer(0)] * len(old)
        for position, dim in enumerate(order):
            back[dim] = parts[position]
        index = tuple(back)
    written = text(flat(index, start))

    for at in itertools.product(*map(range, final)):
        expected = at
        for old, order, new in reversed(list(zip(before, orders, shapes, strict=True))):
            moved = [old[d] for d in order]
            position = sum(i * int(s) for i, s in zip(expected, contiguous_strides(new), strict=True))
            parts = [position // int(s) % n for n, s in zip(moved, contiguous_strides(moved), strict=True)]
            out = [0] * len(old)
            for place, dim in enumerate(order):
                out[dim] = parts[place]
            expected = tuple(out)
        wanted = sum(i * int(s) for i, s in zip(expected, contiguous_strides(start), strict=True))
        assert truncated(written, {str(s): v for s, v in zip(symbols, at, strict=True)}) == wanted


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ((BATCH, TOKENS, 12, 32), (BATCH, TOKENS, 384)),
        ((BATCH, TOKENS, 384), (BATCH, TOKENS, 12, 32)),
        ((BATCH * TOKENS, 384), (BATCH, TOKENS, 12, 32)),
        ((BATCH, TOKENS, 384), (BATCH * TOKENS, 384)),
    ],
)
def test_a_reshape_of_what_lies_in_order_needs_no_division(new: tuple, old: tuple) -> None:
    """Taken apart and put together again, an index is what it was, with symbolic sizes as well."""
    symbols = variables(new)
    ranges = Ranges(dict(zip(symbols, map(sympy.sympify, new), strict=True)))
    there = flat(tuple(symbols), new)
    assert sympy.expand(flat(unflatten(there, old, ranges), old) - there) == 0


def test_a_size_is_positive_only_if_it_is_for_all_sizes() -> None:
    """Sizes are at least 1, and a difference of two is not known to be positive."""
    assert is_positive(BATCH * TOKENS + 1)
    assert is_positive(2 * BATCH - 1)
    assert not is_positive(BATCH - 1)
    assert not is_positive(BATCH - TOKENS)


def test_texts() -> None:
    """Sizes are written with integer arithmetic."""
    assert size_text(sympy.Integer(7)) == 7
    assert size_text(product([BATCH, TOKENS, 384])) == "batch * tokens * 384"
    assert text(TOKENS - BATCH) == "tokens - batch"
    assert text(TOKENS**2) == "tokens * tokens"
    with pytest.raises(LoweringError, match="cannot be computed"):
        text(sympy.sqrt(BATCH))
