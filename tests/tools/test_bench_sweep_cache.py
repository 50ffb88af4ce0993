"""The sweep over formats of caches, on a tiny model."""

from __future__ import annotations

import pytest
import torch

from graphwright.passes.registry import parse_pass
from graphwright.tools import reference
from graphwright.tools.bench.sweeps import cache
from graphwright.tools.bench.sweeps.frame import UNCHANGED, Setting, find_sweep


def test_settings_are_passes() -> None:
    """Every text is a pass with options in their range; names differ; less is run if quick."""
    sweep = find_sweep("cache")
    every, few = sweep.settings(False), sweep.settings(True)
    for setting in every:
        for text in setting.passes:
            parse_pass(text)
    assert len({setting.name for setting in every}) == len(every)
    assert set(few) < set(every)


def test_formats_are_compared(built, monkeypatch) -> None:
    """The unchanged model loses nothing, fewer bits take fewer bytes, and what cannot be done is said."""
    monkeypatch.setattr(reference, "load_language_model", lambda: built("llama"))
    draw = torch.Generator().manual_seed(0)
    monkeypatch.setattr(reference, "held_out_ids", lambda count: torch.randint(3, 97, (count,), generator=draw))
    for name, value in {"TOKENS": 128, "PROMPT": 64, "CHUNK": 32, "HELD_OUT": 2, "ROWS": 2, "CONTEXTS": (40, 90)}.items():
        monkeypatch.setattr(cache, name, value)
    small = "group_size=16,residual=16"
    settings = [
        UNCHANGED,
        Setting("8", (f"quantize-cache:bits=8,{small}",)),
        Setting("tight", (f"quantize-cache:budget_bytes_per_token=10,{small}",)),
    ]
    unchanged, eight, tight = cache.CACHE.run(settings, repeat=2, threads=1)
    assert (unchanged.quality["nll_change"], unchanged.quality["kl"]) == (0, 0)
    assert 0 < eight.quality["kl"] < 1e-3
    assert eight.cost["cache_bytes_per_token"] < unchanged.cost["cache_bytes_per_token"] == 256
    assert eight.cost["cache_bytes_per_sequence"] == 2 * 2 * 32 * 16 * 4
    assert all(outcome.cost[f"step_us_{count}"] > 0 for outcome in (unchanged, eight) for count in (40, 90))
    assert "cannot be met" in tight.problem
    assert eight.quality["nll_change_percent"] == pytest.approx(100 * eight.quality["nll_change"] / 4.57, rel=0.2)
