"""Sizes as texts."""

from __future__ import annotations

import pytest
import sympy

from graphwright.ir.errors import OptionError
from graphwright.ir.program import dimension_symbol
from graphwright.ir.size_texts import expression_of, names_in, number_of, text_of_size

b, t = dimension_symbol("batch"), dimension_symbol("tokens")

SIZES = [
    7,
    b * t**2 * 40 + 3 * t,
    t * (t + 1) * sympy.Rational(1, 2),
    sympy.floor(t / 32) * b,
    sympy.Max(t - 5, 0) + sympy.Min(t, 4),
    -b + 3 * t,
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_round_trip(size) -> None:
    """A text gives the expression that it was made of, and its numbers."""
    text = text_of_size(size)
    assert sympy.simplify(expression_of(text) - size) == 0
    for numbers in ({"batch": 3, "tokens": 7}, {"batch": 1, "tokens": 33}):
        expected = sympy.sympify(size).subs({b: numbers["batch"], t: numbers["tokens"]})
        assert number_of(text, numbers) == int(expected)


def test_names() -> None:
    """The names are those of dimensions, without functions."""
    assert names_in("Max(batch, 3)*tokens") == {"batch", "tokens"}


@pytest.mark.parametrize(
    "text", ["__import__('os')", "batch.real", "[batch]", "9**99999999", "batch**tokens", "lambda: 0", "", "(" * 300]
)
def test_what_is_no_arithmetic_is_refused(text) -> None:
    """A file cannot make anything else run than arithmetic, nor a number that fills the memory."""
    with pytest.raises(OptionError, match="is no size"):
        number_of(text, {"batch": 2, "tokens": 3})


def test_a_missing_size_is_named() -> None:
    """The error says which dimension has no size, and how to give one."""
    with pytest.raises(OptionError, match=r"depends on tokens: .*--size tokens=N"):
        number_of("batch*tokens", {"batch": 2})
