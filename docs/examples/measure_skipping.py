"""What skipping inactive activations costs and saves: `python docs/examples/measure_skipping.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from skip_inactive import SkipInactive
from torch import nn
from torch.nn import functional

import graphwright
from graphwright.passes.base import Context
from graphwright.pipeline import run_passes
from graphwright.tools import reference
from graphwright.tools.bench.sweeps.workloads import language_calls, next_token_quality

RATIOS = (0.0, 0.25, 0.5, 0.75, 0.9)


class FeedForward(nn.Module):
    """A gated feed-forward."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(features, hidden, bias=False), nn.Linear(features, hidden, bias=False)
        self.down = nn.Linear(hidden, features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., features]."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


def loss_rises(ratios: Sequence[float], calls: int = 2) -> list[float]:
    """Return by how many nats per token the loss of the small language model rises, for each ratio."""
    model = reference.load_language_model()
    model.config.use_cache = False
    samples, held_out = language_calls(2 * calls)[:calls], language_calls(2 * calls)[calls:]
    program = run_passes(graphwright.capture(model, **samples[0]))
    expected = [program.reference(**call)["logits"] for call in held_out]
    rises = []
    for ratio in ratios:
        step = SkipInactive(ratio=ratio)
        changed = step.apply(program, step.plan(program, Context(tuple(samples))))
        found = [changed.reference(**call)["logits"] for call in held_out]
        rises.append(next_token_quality(held_out, expected, found)["nll_change"])
    return rises


def times_us(ratios: Sequence[float], features: int, hidden: int, rounds: int = 31) -> list[float]:
    """Return the median CPU time of a feed-forward for one token in microseconds, for each ratio, all timed in turns."""
    torch.manual_seed(0)
    model = FeedForward(features, hidden).eval()
    x, samples = torch.randn(1, 1, features), [{"x": torch.randn(1, 1, features)} for _ in range(16)]
    made = [
        graphwright.compile(model, x=x, dynamic=False, passes=[SkipInactive(ratio=ratio)], calibration=samples)
        for ratio in ratios
    ]
    times: list[list[float]] = [[] for _ in made]
    for _ in range(rounds + 1):
        for compiled, found in zip(made, times, strict=True):
            started = time.thread_time()
            compiled(x=x)
            found.append(time.thread_time() - started)
    return [statistics.median(found[1:]) * 1e6 for found in times]


def main(ratios: Sequence[float] = RATIOS, features: int = 2048, hidden: int = 8192) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| skipped | rise of the loss | one token | times as fast |\n|---:|---:|---:|---:|")
    times = times_us(ratios, features, hidden)
    for ratio, rise, found in zip(ratios, loss_rises(ratios), times, strict=True):
        print(f"| {ratio:.0%} | {rise + 0.0:.3f} | {found / 1e3:.2f} ms | {times[0] / found:.2f} |")


if __name__ == "__main__":
    main()
