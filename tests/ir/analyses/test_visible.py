"""How many pairs of a query and a key an attention computes."""

from __future__ import annotations

import pytest
import sympy
import torch

from graphwright.ir.analyses.index_eval import evaluate
from graphwright.ir.analyses.index_text import parse
from graphwright.ir.analyses.visible import visible_pairs

S, T = sympy.Symbol("S", integer=True, positive=True), sympy.Symbol("T", integer=True, positive=True)


def counted(predicate, queries, keys):
    if not predicate:
        return queries * keys
    variables = {"q": torch.arange(queries)[:, None], "k": torch.arange(keys)}
    return int(evaluate(parse(predicate), variables, {}).expand(queries, keys).sum())


@pytest.mark.parametrize(
    "predicate",
    [
        "",
        "q - k >= 0",
        "q - k >= 0 & 4 - q + k >= 0",
        "q - k >= 0 & (4 - q + k >= 0 | 1 - k >= 0)",
        "3 - q + k >= 0 & 3 + q - k >= 0",
    ],
)
@pytest.mark.parametrize("length", [1, 4, 5, 33, 200])
def test_as_many_as_are_seen(predicate, length) -> None:
    """Causality, windows and sinks give the number of visible pairs; windows to both sides all but what the ends cut off."""
    found = visible_pairs(predicate, {}, T, T)
    value = int(found.subs(T, length)) if isinstance(found, sympy.Expr) else found
    expected = counted(predicate, length, length)
    tolerance = 16 if predicate.startswith("3 -") else 0
    assert expected <= value <= expected + tolerance


def test_chunks() -> None:
    """Within chunks half of the pairs are causal."""
    found = visible_pairs("q - k >= 0 & q // 8 - k // 8 == 0", {}, T, T)
    assert int(found.subs(T, 32)) == counted("q - k >= 0 & q // 8 - k // 8 == 0", 32, 32)


def test_queries_that_come_after_keys() -> None:
    """With keys before the first query's own, only the later half of the square is missing."""
    assert int(visible_pairs("q - k >= 0", {}, 1, 100)) == 100
    assert int(visible_pairs("q - k >= 0 & 9 - q + k >= 0", {}, 1, 100)) == 10


def test_what_is_not_told_counts_as_visible() -> None:
    """A predicate about what tensors hold hides nothing."""
    assert visible_pairs("in0[b, k] == 1", {"in0": "int"}, S, T) == S * T
