"""The algebra of index expressions: simplifying, substituting and printing never change a value."""

from __future__ import annotations

import copy
import doctest
import pickle
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.index import Expr, Facts
from graphwright.ir.analyses.index_eval import IndexEvaluationError
from graphwright.ir.analyses.index_text import IndexSyntaxError

LENGTH = 6
Q, K = ix.var("q"), ix.var("k")
FACTS = ix.NO_FACTS.known("s", ix.ONE, None)
FACTS = FACTS.known("q", ix.ZERO, ix.subtract(ix.var("s"), ix.ONE)).known("k", ix.ZERO, ix.subtract(ix.var("s"), ix.ONE))
TYPES: Mapping[str, ix.Type] = {"flag": "bool", "slope": "float"}

quick = settings(max_examples=150, deadline=None, derandomize=True)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "in0": torch.randint(-2, 3, (LENGTH,), generator=generator),
        "flag": torch.rand(LENGTH, generator=generator) < 0.5,
        "slope": torch.randn(LENGTH, generator=generator),
    }


def grid() -> dict[str, Tensor]:
    return {"q": torch.arange(LENGTH)[:, None], "k": torch.arange(LENGTH)[None, :]}


def value(e: Expr, **more: Tensor) -> Tensor:
    return ix.evaluate(e, {**grid(), **more}, tensors(), {"s": LENGTH}).expand(LENGTH, LENGTH)


class Pair:
    """An expression and the tensor it must evaluate to, computed beside it by plain torch."""

    def __init__(self, e: Expr, expected: Tensor) -> None:
        self.e, self.expected = e, expected


def leaves(facts: Facts) -> st.SearchStrategy[Pair]:
    fixed = [
        Pair(Q, grid()["q"]),
        Pair(K, grid()["k"]),
        Pair(ix.var("s"), torch.tensor(LENGTH)),
        Pair(ix.load("in0", [K]), tensors()["in0"][grid()["k"]]),
    ]
    return st.sampled_from(fixed) | st.integers(-4, 4).map(lambda n: Pair(ix.const(n), torch.tensor(n)))


def integers(depth: int, facts: Facts) -> st.SearchStrategy[Pair]:
    if depth == 0:
        return leaves(facts)
    inner = integers(depth - 1, facts)
    return st.one_of(
        leaves(facts),
        st.tuples(inner, inner).map(lambda p: Pair(ix.add(p[0].e, p[1].e), p[0].expected + p[1].expected)),
        st.tuples(inner, inner).map(lambda p: Pair(ix.subtract(p[0].e, p[1].e), p[0].expected - p[1].expected)),
        st.tuples(inner, inner).map(lambda p: Pair(ix.multiply(p[0].e, p[1].e), p[0].expected * p[1].expected)),
        st.tuples(inner, st.integers(1, 5)).map(
            lambda p: Pair(ix.floor_divide(p[0].e, p[1], facts), torch.div(p[0].expected, p[1], rounding_mode="floor"))
        ),
        st.tuples(inner, st.integers(1, 5)).map(lambda p: Pair(ix.modulo(p[0].e, p[1], facts), p[0].expected % p[1])),
        st.tuples(inner, inner).map(lambda p: Pair(ix.minimum(p[0].e, p[1].e, facts), p[0].expected.minimum(p[1].expected))),
        st.tuples(inner, inner).map(lambda p: Pair(ix.maximum(p[0].e, p[1].e, facts), p[0].expected.maximum(p[1].expected))),
        inner.map(lambda p: Pair(ix.absolute(p.e, facts), p.expected.abs())),
        bools(depth - 1, facts).map(lambda p: Pair(ix.to_int(p.e), p.expected.long())),
        st.tuples(bools(depth - 1, facts), inner, inner).map(
            lambda p: Pair(
                ix.where(p[0].e, p[1].e, p[2].e, facts=facts), torch.where(p[0].expected, p[1].expected, p[2].expected)
            )
        ),
    )


def bools(depth: int, facts: Facts) -> st.SearchStrategy[Pair]:
    number = integers(max(depth - 1, 0), facts)
    torch_operations = {"lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne}
    compared = st.tuples(st.sampled_from(sorted(torch_operations)), number, number).map(
        lambda p: Pair(ix.compare(p[0], p[1].e, p[2].e, facts), torch_operations[p[0]](p[1].expected, p[2].expected))
    )
    flag = st.just(Pair(ix.load("flag", [Q], "bool"), tensors()["flag"][grid()["q"]]))
    if depth == 0:
        return compared | flag
    inner = bools(depth - 1, facts)
    return st.one_of(
        compared,
        flag,
        inner.map(lambda p: Pair(ix.not_(p.e, facts), ~p.expected)),
        st.lists(inner, min_size=2, max_size=3).map(
            lambda ps: Pair(ix.and_(*(p.e for p in ps), facts=facts), torch.stack([p.expected.expand(6, 6) for p in ps]).all(0))
        ),
        st.lists(inner, min_size=2, max_size=3).map(
            lambda ps: Pair(ix.or_(*(p.e for p in ps), facts=facts), torch.stack([p.expected.expand(6, 6) for p in ps]).any(0))
        ),
        st.tuples(inner, inner, inner).map(
            lambda p: Pair(
                ix.where(p[0].e, p[1].e, p[2].e, facts=facts), torch.where(p[0].expected, p[1].expected, p[2].expected)
            )
        ),
    )


def floats(depth: int) -> st.SearchStrategy[Pair]:
    slope = st.just(Pair(ix.load("slope", [Q], "float"), tensors()["slope"][grid()["q"]]))
    number = st.sampled_from([0.0, 1.0, -1.0, 0.5, float("-inf"), -3e38]).map(lambda x: Pair(ix.const(x), torch.tensor(x)))
    whole = integers(1, FACTS).map(lambda p: Pair(ix.to_float(p.e), p.expected.float()))
    if depth == 0:
        return slope | number | whole
    inner = floats(depth - 1)
    operations = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "min": torch.minimum}
    return st.one_of(
        slope,
        whole,
        st.tuples(st.sampled_from(sorted(operations)), inner, inner).map(
            lambda p: Pair(ix.binary(p[0], p[1].e, p[2].e, FACTS), operations[p[0]](p[1].expected, p[2].expected))
        ),
        st.tuples(bools(1, FACTS), inner, inner).map(
            lambda p: Pair(
                ix.where(p[0].e, p[1].e, p[2].e, facts=FACTS), torch.where(p[0].expected, p[1].expected, p[2].expected)
            )
        ),
        inner.map(lambda p: Pair(ix.float_absolute(p.e, FACTS), p.expected.abs())),
        inner.map(lambda p: Pair(ix.round_to("bfloat16", p.e), p.expected.bfloat16().float())),
    )


@quick
@given(integers(3, FACTS))
def test_integers_keep_their_value(pair: Pair) -> None:
    """Integer arithmetic simplified under facts evaluates as torch does it."""
    assert torch.equal(value(pair.e), pair.expected.expand(LENGTH, LENGTH))


@quick
@given(bools(3, FACTS))
def test_bools_keep_their_value(pair: Pair) -> None:
    """Comparisons and logic simplified under facts evaluate as torch does them."""
    assert torch.equal(value(pair.e), pair.expected.expand(LENGTH, LENGTH))


@quick
@given(floats(2))
def test_floats_keep_their_value(pair: Pair) -> None:
    """Float arithmetic evaluates as float32 does, infinities and NaN included."""
    torch.testing.assert_close(value(pair.e), pair.expected.expand(LENGTH, LENGTH), rtol=1e-5, atol=1e-5, equal_nan=True)


@quick
@given(integers(2, ix.NO_FACTS) | bools(2, ix.NO_FACTS) | floats(2))
def test_text_is_read_back(pair: Pair) -> None:
    """Parsing an expression's text gives the same object."""
    assert ix.parse(str(pair.e), TYPES) is pair.e


@quick
@given(bools(2, ix.NO_FACTS), integers(1, ix.NO_FACTS))
def test_substitution_keeps_the_value(pair: Pair, index: Pair) -> None:
    """Putting an expression for a variable evaluates as the variable with the expression's value."""
    shifted = value(index.e).clamp(0, LENGTH - 1)
    clamped = ix.minimum(ix.maximum(index.e, ix.ZERO), ix.const(LENGTH - 1))
    expected = ix.evaluate(pair.e, {**grid(), "q": shifted}, tensors(), {"s": LENGTH}).expand(LENGTH, LENGTH)
    assert torch.equal(value(ix.substitute(pair.e, {"q": clamped})), expected)


@quick
@given(integers(2, FACTS))
def test_bounds_hold(pair: Pair) -> None:
    """No value is outside the bounds."""
    low, high = ix.lower(pair.e, FACTS), ix.upper(pair.e, FACTS)
    assert low is None or int(pair.expected.min()) >= low
    assert high is None or int(pair.expected.max()) <= high


@quick
@given(integers(2, FACTS))
def test_sums_keep_their_value(pair: Pair) -> None:
    """A running sum over k up to q is torch's cumsum, and so is its text."""
    body = ix.substitute(pair.e, {"k": ix.var("over")}, FACTS.known("over", ix.ZERO, Q))
    e = ix.sum_("over", Q, body, FACTS)
    rows = pair.expected.expand(LENGTH, LENGTH)
    expected = (rows * (grid()["k"] <= grid()["q"])).sum(1, keepdim=True)
    assert torch.equal(value(e), expected.expand(LENGTH, LENGTH))
    assert torch.equal(value(ix.parse(str(e), TYPES)), expected.expand(LENGTH, LENGTH))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("k <= q", "q - k >= 0"),
        ("not (k > q)", "q - k >= 0"),
        ("q - k > -1", "q - k >= 0"),
        ("k < q | k == q", "q - k >= 0"),
        ("k <= q & k >= q", "k - q == 0"),
        ("2*q - 2*k + 1 >= 0", "q - k >= 0"),
        ("2*q == 2*k + 1", "False"),
        ("k <= q & k <= q + 3", "q - k >= 0"),
        ("k <= q & k > q", "False"),
        ("k <= q & (k > q | in0[k] == 1)", "q - k >= 0 & in0[k] - 1 == 0"),
        ("abs(q - k) <= 2", "k - q + 2 >= 0 & q - k + 2 >= 0"),
        ("where(q >= k, True, False)", "q - k >= 0"),
        ("int(flag[q]) == 0", "not (flag[q])"),
        ("q//2//3", "q//6"),
        ("(6*q + 4*k + 5)//2", "3*q + 2*k + 2"),
        ("q >= s", "False"),
        ("k//8 + q//8 < 0", "False"),
        ("(1.0 - float(flag[q]))*-inf", "where(flag[q], nan, -inf)"),
        ("float(q) > 2.5", "q - 3 >= 0"),
        ("sum(j <= q, 1)", "q + 1"),
        ("sum(j <= q, where(j == 0, 3, 1))", "q + 3"),
        ("where(q == 0, q, 5)", "where(q == 0, 0, 5)"),
        ("sum(j <= q, in0[j]) == sum(i <= q, in0[i])", "True"),
        ("(q + 1)*(q - 1)", "q*q - 1"),
        ("where(flag[q], 0.0, -inf) == 0.0", "flag[q]"),
        ("min(q, 3) >= k", "-k + 3 >= 0 & q - k >= 0"),
    ],
)
def test_canonical_forms(text: str, expected: str) -> None:
    """Equal expressions written differently come out as one."""
    e = ix.parse(text, TYPES, FACTS)
    assert e is ix.parse(expected, TYPES, FACTS)
    assert str(e) == str(ix.parse(expected, TYPES))


def test_a_packed_sequence_folds_away() -> None:
    """The segments that positions counted by one have are all the first: the comparison disappears."""
    over = FACTS.known("j", ix.ZERO, Q)
    steps = ix.where(ix.eq0(ix.var("j"), over), ix.ONE, ix.subtract(ix.var("j"), ix.subtract(ix.var("j"), ix.ONE)))
    new = ix.to_int(ix.compare("ne", steps, ix.ONE, over))
    segment = ix.sum_("j", Q, new, FACTS)
    assert ix.compare("eq", segment, ix.substitute(segment, {"q": K}, FACTS), FACTS) is ix.TRUE


def test_bound_variables_are_not_captured() -> None:
    """A sum put into another sum keeps its own variable."""
    inner = ix.parse("sum(j <= q, in0[j])")
    outer = ix.parse("sum(j0 <= k, in0[j0]*q)")
    e = ix.substitute(outer, {"q": inner})
    expected = value(outer, q=value(inner))
    assert torch.equal(value(e), expected)
    assert str(e) == "sum(j1 <= k, in0[j1]*sum(j0 <= q, in0[j0]))"


def test_expressions_stay_one_object_when_copied() -> None:
    """Copies and pickles of an expression are the expression."""
    e = ix.parse("where(flag[q], q//2, sum(j <= q, in0[j])) >= k", TYPES)
    assert copy.deepcopy(e) is e
    assert pickle.loads(pickle.dumps(e)) is e


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q +", "expected a value, found the end"),
        ("q ? k", "cannot read '\\? k'"),
        ("q // k", "whole number of 1 or more"),
        ("q & k", "logic on <int"),
        ("sin(q)", "there is no function sin of 1 operands"),
        ("q k", "expected the end, found 'k'"),
        ("where(q >= 0, 1, 1.5)", "different types"),
    ],
)
def test_syntax_errors_say_what_is_wrong(text: str, message: str) -> None:
    """Text outside the grammar is refused with what was expected."""
    with pytest.raises(IndexSyntaxError, match=message):
        ix.parse(text)


def test_the_example_of_the_module() -> None:
    """The module's docstring says what happens."""
    assert doctest.testmod(ix).failed == 0
    assert doctest.testmod(ix).attempted


def test_evaluation_needs_every_variable_and_tensor() -> None:
    """What is missing is named, with what was given."""
    with pytest.raises(IndexEvaluationError, match="the variable 'q'; given: none"):
        ix.evaluate(Q)
    with pytest.raises(IndexEvaluationError, match="the tensor 'in0'; given: none"):
        ix.evaluate(ix.load("in0", [ix.ZERO]))
    with pytest.raises(IndexEvaluationError, match="1 dimensions"):
        ix.evaluate(ix.load("in0", [ix.ZERO, ix.ZERO]), None, tensors())
