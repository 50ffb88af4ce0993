"""What leaving out layers costs and saves: `python -m graphwright.tools.bench.layers`.

The small language model of the checkout, or MiniLM, loses units one after the other, in the order of each score. The first
part of the text is for calibration, the rest for what is shown: how much the loss rises per number of units left out. With
`--time`, what is left is compiled and timed in turns with the whole.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import TYPE_CHECKING, Any

import click

from graphwright.tools import reference
from graphwright.tools.output import console, progress, table

if TYPE_CHECKING:
    from graphwright.ir.program import Program
    from graphwright.passes.depth.drop_layers import Score
    from graphwright.passes.depth.units import Kind

WAYS: tuple[tuple[Score, bool], ...] = (
    ("influence", False),
    ("influence", True),
    ("leave-one-out", False),
    ("leave-one-out", True),
)
UNITS = ("block", "attention", "feed-forward")
PAIRS = 21


@click.command()
@click.option("--model", type=click.Choice(["language", "minilm"]), default="language", show_default=True)
@click.option("--unit", "units", type=click.Choice(UNITS), multiple=True, default=("block",), show_default=True)
@click.option("--drop", type=click.IntRange(1), default=4, show_default=True, help="Number of units to leave out.")
@click.option("--calibration", type=click.IntRange(1), default=2, show_default=True, help="Calls to decide on.")
@click.option("--held-out", type=click.IntRange(1), default=4, show_default=True, help="Calls to measure with.")
@click.option("--time", "with_time", is_flag=True, help="Compile what is left, and time it on one thread.")
def layers(model: str, units: tuple[Kind, ...], drop: int, calibration: int, held_out: int, with_time: bool) -> None:
    """Show what leaving out layers of a real model costs and saves."""
    import torch

    import graphwright
    from graphwright.passes.base import Context, Plan
    from graphwright.passes.depth.calibrating import Calibration
    from graphwright.passes.depth.drop_layers import DropLayers
    from graphwright.pipeline import run_passes

    torch.set_num_threads(1)
    with progress("capturing"):
        module, calls = _language(calibration + held_out) if model == "language" else _minilm(calibration + held_out)
        program = run_passes(graphwright.capture(module, **calls[0]))
    test = Calibration(program, calls[calibration:], "layers")
    context, rows, speeds = Context(tuple(calls[:calibration])), [], []
    for unit, (score, greedy) in itertools.product(units, WAYS):
        step = DropLayers(drop=drop, unit=unit, score=score, greedy=greedy)
        started = time.thread_time()
        with progress(f"{unit}, {score}"):
            plan = step.plan(program, context)
        seconds = time.thread_time() - started
        parts = [Plan(step.name, plan.decisions[:count]) for count in range(1, drop + 1)]
        rises = [f"{test.increase(step.apply(program, part)):.3f}" for part in parts]
        order = " ".join(decision.what.rpartition(" ")[2] for decision in plan.decisions)
        rows.append([unit, score, "yes" if greedy else "no", order, *rises, f"{seconds:.1f} s"])
        if with_time and (score, greedy) == WAYS[-1]:
            with progress("timing"):
                left = [program, *(step.apply(program, part) for part in parts)]
                speeds += [[unit, *row] for row in _times(left, calls[-1])]
    columns = ["unit", "score", "greedy", "order", *(f"{k} gone" for k in range(1, drop + 1)), "planning"]
    shown = console()
    what = "nats per token" if test.loss == "next-token" else "1 - cosine similarity of the results"
    shown.print(table(f"rise of the loss on held-out text, {what}", columns, rows, right=tuple(columns[4:])))
    if speeds:
        numbers = ["gone", "CPU time", "times as fast", "weights"]
        shown.print(table("one call, one thread", ["unit", *numbers], speeds, right=tuple(numbers)))


def _language(count: int) -> tuple[Any, list[dict[str, Any]]]:
    from graphwright.tools.bench.sweeps.workloads import language_calls

    model = reference.load_language_model()
    # Nobody reads the cache of a plain forward.
    model.config.use_cache = False
    return model, language_calls(count)


def _minilm(count: int) -> tuple[Any, list[dict[str, Any]]]:
    from graphwright.tools.bench.sweeps.workloads import sentence_calls

    return reference.load_minilm(), sentence_calls(count)


def _times(programs: list[Program], call: dict[str, Any]) -> list[list[str]]:
    """Return for each number of units that are gone: it, the time of a call of one row, the ratio, the size of the weights."""
    import graphwright

    models = [graphwright.compile(program) for program in programs]
    call = {key: value[:1] if hasattr(value, "shape") else value for key, value in call.items()}
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(PAIRS + 2):
        for model, found in zip(models, seconds, strict=True):
            started = time.thread_time()
            model(**call)
            found.append(time.thread_time() - started)
    rows = []
    for count, (model, found) in enumerate(zip(models, seconds, strict=True)):
        ratio = statistics.median(a / b for a, b in zip(seconds[0][2:], found[2:], strict=True))
        size = f"{model.memory.weight_bytes / 2**20:.1f} MiB"
        rows.append([str(count), f"{statistics.median(found[2:]) * 1000:.2f} ms", f"{ratio:.2f}", size])
    return rows


if __name__ == "__main__":
    layers()
