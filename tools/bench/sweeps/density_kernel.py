"""The sweep `density-kernel`: the kernels of sparse attention against our dense one, on queries and keys made by hand."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import graphwright
from graphwright.ir.program import Program
from graphwright.passes.registry import as_passes
from graphwright.pipeline import run_passes
from graphwright.tools.bench.models.measure import refuse_strays, rounds
from graphwright.tools.bench.models.rivals import Run

from .forward import problem_of, tell
from .frame import Outcome, Setting

HEADS, KEY_HEADS, SIZE = 4, 2, 64

LENGTHS = (4096, 16384, 32768)

PAIRS = ((30, 64), (100, 256), (500, 700))
"""Columns and diagonals; also the sinks and the window of an A-shape of about as many keys."""


class Attention(torch.nn.Module):
    """Causal attention."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the attention of queries [B, H, T, D] over keys and values [B, Hk, T, D]."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@dataclass(frozen=True)
class KernelSweep:
    """Time of one attention, its lists included, against the error of its result.

    Queries attend to near keys, to the first ones and, by head, to some keys far back or at one far distance. The cost is
    `time_us` and `time_ratio`, of the time of the dense kernel at the same length; the quality `error`, the norm of the
    difference from the dense result relative to its norm.

    Args:
        name: as given on the command line.
        title: one line on what is swept.
        x: the key of the cost that a picture shows.
        y: the key of the quality.
    """

    name: str = "density-kernel"
    title: str = f"causal attention of {HEADS} heads of {SIZE}, 4096 to 32768 tokens: kernels over fewer keys"
    x: str = "time_ratio"
    y: str = "error"

    def settings(self, quick: bool) -> Sequence[Setting]:
        """Return what is run; less of it if quick."""
        found = []
        for tokens in LENGTHS[:1] if quick else LENGTHS:
            series = f"{tokens} tokens"
            found.append(Setting("dense", (), series))
            for vertical, slash in PAIRS[:1] if quick else PAIRS:
                # A block reaches past what was chosen: the A-shape gets the 64 keys too.
                shape = f"window-attention:window={slash + 64},sinks={vertical}"
                listed = f"vertical-slash:vertical={vertical},slash={slash},minimum_tokens=2"
                found += [
                    Setting(f"A-shape {vertical} + {slash}", (shape,), series),
                    Setting(f"{vertical}, {slash}", (listed,), series),
                ]
        return found

    def run(self, settings: Sequence[Setting], repeat: int, threads: int) -> Iterator[Outcome]:
        """Compile and time all settings of one length in turns, then yield what was found of each."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            sample = planted(128, 2)
            dynamic = {name: {0: "batch", 2: "tokens"} for name in "qkv"}
            program = run_passes(graphwright.capture(Attention(), *sample, dynamic=dynamic))
            for series in dict.fromkeys(setting.series for setting in settings):
                yield from _length(program, [s for s in settings if s.series == series], repeat, threads)
        finally:
            torch.set_num_threads(before)


def planted(tokens: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries [B, H, T, D], keys and values [B, Hk, T, D] with columns, diagonals and near keys that are attended to."""
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(batch, HEADS, tokens, SIZE, generator=generator)
    k, v = (torch.randn(batch, KEY_HEADS, tokens, SIZE, generator=generator) for _ in range(2))
    codes = F.normalize(torch.randn(tokens, SIZE, generator=generator), dim=-1) * 9.0
    k += codes
    for head in range(HEADS):
        for distance in (1, 2, 5, (head + 1) * tokens // 7):
            q[:, head, distance:] += codes[: tokens - distance] * 0.7
    mark = F.normalize(torch.randn(SIZE, generator=generator), dim=-1)
    q += mark * 5.0
    k[:, :, torch.randint(0, tokens, (12,), generator=generator)] += mark * 9.0
    k[:, :, :4] += mark * 9.0
    return q, k, v


def _length(program: Program, settings: Sequence[Setting], repeat: int, threads: int) -> Iterator[Outcome]:
    tokens = int(settings[0].series.partition(" ")[0])
    inputs = planted(tokens)
    runs: dict[str, Run] = {}
    problems: dict[str, str] = {}
    for setting in settings:
        tell(setting.name)
        # Whatever keeps a setting from running is its result, and the others are still worth measuring.
        try:
            compiled = graphwright.compile(run_passes(program, as_passes(setting.passes)))
            run: Run = functools.partial(compiled, *inputs)
            if threads == 1:
                refuse_strays(run)
        except Exception as error:  # noqa: BLE001
            problems[setting.name] = problem_of(error)
        else:
            runs[setting.name] = run
    results = {name: run() for name, run in runs.items()}
    samples, _ = rounds(runs, threads, repeat, tell)
    dense = next((s.name for s in settings if not s.passes and s.name in samples), "")
    for setting in settings:
        if setting.name in problems or not dense:
            yield Outcome(setting, problem=problems.get(setting.name, "the dense kernel has no result"))
            continue
        lost = float((results[setting.name] - results[dense]).norm() / results[dense].norm())
        ratio = statistics.median(a / b for a, b in zip(samples[setting.name], samples[dense], strict=True))
        times = {"time_us": statistics.median(samples[setting.name]) * 1e6, "time_ratio": ratio}
        yield Outcome(setting, {"error": lost}, times)


KERNELS = KernelSweep()
