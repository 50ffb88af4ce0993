"""Sizes as texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphwright.ir.errors import ArtifactError
from graphwright.runtime.sizes import compile_sizes, evaluate_size, size_names

expressions = st.recursive(
    st.integers(0, 999).map(str) | st.sampled_from(["batch", "tokens", "n_1"]),
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner)
        | st.builds("{}({}, {})".format, st.sampled_from(["max", "min"]), inner, inner)
        | inner.map("-{}".format)
    ),
    max_leaves=12,
)
dimensions = st.fixed_dictionaries({name: st.integers(0, 10**6) for name in ("batch", "tokens", "n_1")})


@given(expressions, dimensions)
def test_values_are_those_of_python(text, values):
    """A size means what it means in Python."""
    try:
        expected = eval(text, {}, dict(values))
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            evaluate_size(text, values)
        return
    assert evaluate_size(text, values) == expected


def test_many_sizes_at_once():
    """One function evaluates all texts; numbers are not in its table."""
    table = compile_sizes([3, "n*2", "n*2", "max(n, 7, k)"], ["n", "k"])
    assert table({"n": 5, "k": 1}) == {"n*2": 10, "max(n, 7, k)": 7}
    assert compile_sizes([], [])({}) == {}


def test_names_of_a_size():
    """The dimensions that a size depends on; functions are none."""
    assert size_names(7) == frozenset()
    assert size_names("max(a, 3) + b // a") == {"a", "b"}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "n.bit_length()",
        "n ** n",
        "n / 2",
        "n if n else 1",
        "lambda: 1",
        "[n][0]",
        "max(n)",
        "max(*n)",
        "max(n, key=n)",
        "max",
        "abs(n)",
        "n = 1",
        "n; n",
        "",
        "1.5",
        "True",
        "'n'",
        "n n",
        "n\0",
        "missing + 1",
        "(" * 300 + "n" + ")" * 300,
        "n+" * 5000 + "n",
    ],
)
def test_anything_else_is_refused(text):
    """Whatever is not arithmetic of dimensions is an error before any of it runs."""
    with pytest.raises(ArtifactError):
        compile_sizes([text], ["n"])


@pytest.mark.parametrize("name", ["max", "__builtins__", "a b", "", "1a", "lambda"])
def test_names_that_cannot_be_dimensions(name):
    """A dimension's name is an identifier, and not that of a function."""
    with pytest.raises(ArtifactError, match="cannot be the name of a dimension"):
        compile_sizes(["1"], [name])
