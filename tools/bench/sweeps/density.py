"""The sweeps `density`: the small language model with attention over fewer keys, for prompts of several lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from graphwright.tools import reference
from graphwright.tools.bench.models.rows import ROWS, Inputs

from .forward import Calls, ForwardSweep
from .frame import UNCHANGED, Setting
from .workloads import next_token_quality

HELD_OUT = 3
"""Sequences to measure with; one other is decided on, and another timed."""

WINDOWS = ((64, 16), (256, 16), (512, 16), (1024, 16))
"""Window and sinks."""

PAIRS = ((30, 30), (30, 64), (64, 128), (100, 256))
"""Columns and diagonals, the same for all heads."""

DENSITIES = (0.2, 0.4, 0.6)
"""Ratios of tiles that patterns are searched for."""


def _calls(tokens: int) -> tuple[Calls, Calls]:
    """Return the call that patterns are searched on, and those to measure with, of other text."""
    rows = reference.held_out_ids((2 + HELD_OUT) * tokens).reshape(-1, 1, tokens)
    calls = [{"input_ids": ids} for ids in rows]
    return calls[1:2], calls[2:]


def _settings(tokens: int, quick: bool) -> Sequence[Setting]:
    # Also where it does not pay: what it costs there is wanted.
    least = f"minimum_tokens={tokens // 2}"
    windows = [
        Setting(f"{window} + {sinks}", (f"window-attention:window={window},sinks={sinks}",), "window + sinks")
        for window, sinks in WINDOWS
        if window + sinks < tokens
    ]
    pairs = [
        Setting(f"{vertical}, {slash}", (f"vertical-slash:vertical={vertical},slash={slash},{least}",), "columns, diagonals")
        for vertical, slash in PAIRS
    ]
    searched = [
        Setting(f"density {density}", (f"vertical-slash:density={density},{least}",), "searched") for density in DENSITIES
    ]
    if quick:
        return [UNCHANGED, windows[0], pairs[0], searched[0]]
    return [UNCHANGED, *windows, *pairs, *searched]


def _sweep(name: str, tokens: int) -> ForwardSweep:
    def inputs(ragged: bool) -> Inputs:
        return {"input_ids": reference.held_out_ids(tokens)[None]}

    return ForwardSweep(
        name=name,
        title=f"small language model, {tokens} tokens of prefill: attention over fewer keys",
        y="nll_change",
        row=dataclasses.replace(ROWS["prefill-1024"], name=f"prefill-{tokens}", inputs=inputs),
        calls=lambda: _calls(tokens),
        quality=next_token_quality,
        chosen=lambda quick: _settings(tokens, quick),
    )


DENSITY_1024 = _sweep("density-1024", 1024)
DENSITY_2048 = _sweep("density-2048", 2048)
DENSITY = _sweep("density", 4096)
