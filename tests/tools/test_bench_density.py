"""The sweeps of attention over fewer keys: their settings, and the kernels on queries and keys made by hand."""

from __future__ import annotations

import pytest
import torch

from graphwright.passes.registry import as_passes
from graphwright.tools.bench.models import measure
from graphwright.tools.bench.sweeps import density, density_kernel
from graphwright.tools.bench.sweeps.density_kernel import KERNELS, planted
from graphwright.tools.bench.sweeps.frame import Setting


def test_settings_are_sparse_at_their_length() -> None:
    """Every setting of a length attends to fewer keys there: none is dense for its minimum."""
    for sweep, tokens in ((density.DENSITY_1024, 1024), (density.DENSITY_2048, 2048), (density.DENSITY, 4096)):
        for setting in sweep.settings(False)[1:]:
            (step,) = as_passes(setting.passes)
            assert getattr(step, "minimum_tokens", 0) <= tokens
            assert (getattr(step, "window", None) or 0) < tokens


def test_kernels_are_timed_against_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense kernel is 1 and exact; with more columns and diagonals the error is less; all keys are no error."""
    monkeypatch.setattr(measure, "SETTLE_S", 0.0)
    monkeypatch.setattr(measure, "SAMPLE_S", 0.0)
    monkeypatch.setattr(density_kernel, "tell", lambda text: None)
    series = "320 tokens"
    passes = "vertical-slash:vertical={0},slash={0},minimum_tokens=2"
    settings = [
        Setting("dense", (), series),
        *(Setting(str(n), (passes.format(n),), series) for n in (30, 320)),
        Setting("nothing", ("vertical-slash:density=0.5",), series),
    ]
    dense, few, every, nothing = KERNELS.run(settings, 3, torch.get_num_threads())
    assert (dense.quality["error"], dense.cost["time_ratio"]) == (0.0, 1.0)
    assert few.quality["error"] > 0.01 > 1e-5 > every.quality["error"]
    assert all(outcome.cost["time_us"] > 0 for outcome in (dense, few, every))
    assert "there are none" in nothing.problem


def test_what_is_planted_is_attended_to() -> None:
    """Heads look at the first keys, and back at a distance of their own."""
    q, k, _ = planted(700)
    weights = torch.softmax(
        (q @ k.repeat_interleave(2, 1).mT / 8.0).masked_fill(torch.ones(700, 700).triu(1).bool(), -torch.inf), -1
    )
    for head in range(density_kernel.HEADS):
        far = weights[0, head].diagonal(-(head + 1) * 100).mean()
        assert far > 10 * weights[0, head].diagonal(-(head + 1) * 100 - 7).mean()
        assert weights[0, head, 600:, :4].mean() > 5 * weights[0, head, 600:, 4:500].mean()
