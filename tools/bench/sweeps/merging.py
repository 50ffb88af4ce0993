"""The sweep `merging`: the sentence encoder with fewer tokens from block to block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from graphwright.ir.errors import InputError
from graphwright.tools import reference
from graphwright.tools.bench.models.rows import Inputs, Row

from .forward import Calls, ForwardSweep
from .frame import RIVALS, UNCHANGED, Setting
from .workloads import sentence_quality

BATCH, TOKENS = 8, 256
"""A call: texts, and tokens of each, none of them padding."""

HELD_OUT = 16
"""Calls to measure quality with; the one that is timed is of other text."""

SERIES: dict[str, tuple[str, Sequence[str]]] = {
    "keys": ("r={}", ("8", "16", "24", "32")),
    "tokens": ("r={},metric=tokens", ("8", "16", "24", "28", "32")),
    "tokens, not in the last block": ("r={},metric=tokens,last=4", ("26", "30", "34")),
    "tokens, decreasing": ("ratio={},metric=tokens,schedule=decreasing", ("0.7", "0.5")),
}
"""Name -> options with a place for what varies, and what varies."""

QUICK = "tokens"


def long_texts(calls: int) -> list[Inputs]:
    """Return calls of docstrings that have TOKENS tokens or more, and are cut to so many.

    Args:
        calls: number of calls, each of other texts.

    Raises:
        InputError: there are not as many; the standard library is another one.
    """
    tokenizer = reference.load_minilm_tokenizer()
    # A token is hardly ever shorter than a character and a half.
    texts = (document.text for document in reference.each_docstring() if len(document.text) > 1.5 * TOKENS)
    rows = (tokenizer(text, truncation=True, max_length=TOKENS)["input_ids"] for text in texts)
    found = list(itertools.islice((row for row in rows if len(row) == TOKENS), calls * BATCH))
    if len(found) < calls * BATCH:
        raise InputError(f"{calls * BATCH} docstrings of {TOKENS} tokens are wanted, and the standard library has {len(found)}")
    ids = torch.tensor(found).reshape(calls, BATCH, TOKENS)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


def _calls() -> tuple[Calls, Calls]:
    return (), long_texts(HELD_OUT)


def _settings(quick: bool) -> Sequence[Setting]:
    made = [
        Setting(value, (f"merge-tokens:{options.format(value)}",), series)
        for series, (options, values) in SERIES.items()
        if series == QUICK or not quick
        for value in values
    ]
    return [UNCHANGED, *made, *RIVALS]


MERGING = ForwardSweep(
    name="merging",
    title="sentence encoder, 8 texts of 256 tokens: tokens merged",
    y="cosine",
    row=Row(
        name=f"minilm-{BATCH}x{TOKENS}",
        load=reference.load_minilm,
        inputs=lambda ragged: long_texts(HELD_OUT + 1)[-1],
        varying=(0, 1),
        bar=1.0,
        quick=False,
    ),
    calls=_calls,
    quality=sentence_quality,
    chosen=_settings,
)
