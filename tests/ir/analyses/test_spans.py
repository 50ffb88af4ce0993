"""Spans: what masks say of positions, and that nothing is lost of what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.index_eval import evaluate
from graphwright.ir.analyses.masks import recognise
from graphwright.ir.analyses.spans import Spans, spans_of

FACTS = ix.NO_FACTS
for name in "bhqk":
    FACTS = FACTS.known(name, ix.ZERO, None)

SINKS = "not (k - 4 >= 0 & q - k - 8 >= 0)"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "causal": ("q - k >= 0", {"causal": True}),
    "window": ("q - k >= 0 & k - q + 6 >= 0", {"causal": True, "window": 7}),
    "a-shape": (f"q - k >= 0 & {SINKS}", {"causal": True, "window": 8, "sinks": 4}),
    "a-shape in a wider window": (f"q - k >= 0 & {SINKS} & k - q + 19 >= 0", {"causal": True, "window": 8, "sinks": 4}),
    "a-shape in a narrower window": (f"q - k >= 0 & {SINKS} & k - q + 4 >= 0", {"causal": True, "window": 5, "sinks": 0}),
    "two a-shapes": (f"q - k >= 0 & {SINKS} & not (k - 9 >= 0 & q - k - 3 >= 0)", {"causal": True}),
    "symmetric": (f"{SINKS} & not (q - 4 >= 0 & k - q - 8 >= 0)", {"window": 8, "right_window": 8, "sinks": 4, "free": 4}),
    "right alone": ("not (q - 4 >= 0 & k - q - 8 >= 0) & q - k + 15 >= 0", {"right_window": 8, "free": 4}),
    "same chunk": ("q // 8 - k // 8 == 0", {"chunk": 8, "chunks_behind": 0, "chunks_ahead": 0}),
    "near chunks": ("k//8 - q//8 + 1 >= 0 & q//8 - k//8 + 2 >= 0", {"chunk": 8, "chunks_behind": 1, "chunks_ahead": 2}),
    "causal chunks": ("q - k >= 0 & k//8 - q//8 + 1 >= 0", {"causal": True, "chunk": 8, "chunks_behind": 1}),
    "two sizes of chunks": ("q // 8 - k // 8 == 0 & k // 12 - q // 12 >= 0", {}),
    "parity": ("q - k >= 0 & (q + k) - 2 * ((q + k) // 2) == 0", {"causal": True}),
    "far chunks only": ("q//8 - k//8 - 1 >= 0", {"chunk": None}),
}


@pytest.mark.parametrize("name", CASES)
def test_spans_say_what_the_predicate_says(name: str) -> None:
    """The forms are told, and all conditions together are the predicate for every query and key."""
    text, expected = CASES[name]
    form = recognise(ix.parse(text, {}, FACTS), None, (), True, FACTS)
    spans = spans_of(form)
    assert {key: getattr(spans, key) for key in expected} == expected
    length = 45
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    zero = torch.zeros(1, 1, dtype=torch.int64)
    variables = {"q": q, "k": k, "b": zero, "h": zero}
    wanted = evaluate(form.predicate, variables, {}).expand(length, length)
    assert torch.equal(rebuilt(spans, q, k) & evaluate(spans.rest, variables, {}), wanted)
    if name in ("a-shape", "symmetric", "same chunk", "near chunks", "causal chunks"):
        assert spans.rest is ix.TRUE


def test_another_diagonal_has_no_spans() -> None:
    """A mask that is causal from another diagonal is left as it is."""
    form = recognise(ix.parse("q - k + n >= 0", {}, FACTS), None, (), True, FACTS)
    assert spans_of(form) == Spans(form.predicate)


def rebuilt(spans: Spans, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return what the spans without the rest let a query see."""
    seen = torch.ones(len(q), k.shape[1], dtype=torch.bool)
    if spans.causal:
        seen &= k <= q
    if spans.window is not None:
        seen &= (k > q - spans.window) | (k < spans.sinks)
    if spans.right_window is not None:
        seen &= (k < q + spans.right_window) | (q < spans.free)
    if spans.chunks_behind is not None:
        seen &= k // spans.chunk >= q // spans.chunk - spans.chunks_behind
    if spans.chunks_ahead is not None:
        seen &= k // spans.chunk <= q // spans.chunk + spans.chunks_ahead
    return seen
