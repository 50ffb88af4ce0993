"""The sweep `layers`: the small language model without some of its blocks."""

from __future__ import annotations

from collections.abc import Sequence

from graphwright.tools.bench.models.rows import ROWS

from .forward import Calls, ForwardSweep
from .frame import RIVALS, UNCHANGED, Setting
from .workloads import language_calls, next_token_quality

CALIBRATION, HELD_OUT = 2, 4
"""Calls to decide on, and calls to measure with."""

WAYS = {
    "influence": "score=influence",
    "leave-one-out": "score=leave-one-out",
    "leave-one-out, greedy": "score=leave-one-out,greedy=true",
    "attention, influence": "score=influence,unit=attention",
}


def _calls() -> tuple[Calls, Calls]:
    calls = language_calls(CALIBRATION + HELD_OUT)
    return calls[:CALIBRATION], calls[CALIBRATION:]


def _settings(quick: bool) -> Sequence[Setting]:
    ways = dict(list(WAYS.items())[:1]) if quick else WAYS
    counts = (1, 2) if quick else (1, 2, 3, 4)
    dropped = [
        Setting(str(count), (f"drop-layers:drop={count},{options}",), series)
        for series, options in ways.items()
        for count in counts
    ]
    return [UNCHANGED, *dropped, *RIVALS]


LAYERS = ForwardSweep(
    name="layers",
    title="small language model, 256 tokens of prefill: blocks left out",
    y="nll_change",
    row=ROWS["prefill-256"],
    calls=_calls,
    quality=next_token_quality,
    chosen=_settings,
)
