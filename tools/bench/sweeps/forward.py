"""Sweeps over the forward pass of a model: every setting compiled, its results compared, all timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import torch

import graphwright
from graphwright.ir.analyses.cost_lines import program_cost
from graphwright.ir.analyses.roofline import Prediction, predict
from graphwright.ir.errors import GraphwrightError, PassError
from graphwright.ir.program import Program
from graphwright.passes.base import Context
from graphwright.passes.depth.units import sizes_of
from graphwright.passes.registry import as_passes
from graphwright.pipeline import run_passes
from graphwright.runtime.machine import this_machine
from graphwright.tools.bench.models.measure import error_of, reason, refuse_strays, rounds
from graphwright.tools.bench.models.rivals import RIVALS, Case, Run, forget_compiled
from graphwright.tools.bench.models.rows import Row, first_output, real_positions

from .frame import UNCHANGED, Outcome, Setting

Calls = Sequence[Mapping[str, Any]]
"""Named arguments of calls."""

Quality = Callable[[Calls, Sequence[torch.Tensor], Sequence[torch.Tensor]], Mapping[str, float]]
"""(calls, first outputs of the unchanged model, first outputs) -> numbers."""


@dataclass(frozen=True, kw_only=True)
class ForwardSweep:
    """A sweep over settings of passes on one model's forward pass.

    The costs are `time_us`, `time_ratio` and `flops`; times are also predicted, from flops, bytes and what this machine can do.

    Args:
        name: as given on the command line.
        title: one line on what is swept.
        y: the key of `quality` that a picture shows.
        row: the model, and the inputs that are timed.
        calls: returns sample calls for the passes, and others that quality is measured on.
        quality: what is measured on these.
        chosen: quick -> the settings.
    """

    name: str
    title: str
    y: str
    row: Row
    calls: Callable[[], tuple[Calls, Calls]]
    quality: Quality
    chosen: Callable[[bool], Sequence[Setting]]
    x: str = field(default="time_ratio", init=False)

    def settings(self, quick: bool) -> Sequence[Setting]:
        """Return what is run; less of it if quick."""
        return self.chosen(quick)

    def run(self, settings: Sequence[Setting], repeat: int, threads: int) -> Iterator[Outcome]:
        """Compile, compare and time all settings, then yield what was found of each."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            forget_compiled()
            yield from _Forward(self, threads).run(settings, repeat)
        finally:
            torch.set_num_threads(before)


class _Forward:
    """One run of a sweep."""

    def __init__(self, sweep: ForwardSweep, threads: int) -> None:
        self.sweep, self.threads = sweep, threads
        tell("capturing")
        self.case = Case(sweep.row, sweep.row.load(), sweep.row.inputs(False), threads)
        samples, self.held_out = sweep.calls()
        self.context = Context(tuple(samples))
        # Sizes of 1 would be taken for constants.
        sample: dict[str, Any] = {name: torch.cat([tensor, tensor]) for name, tensor in self.case.inputs.items()}
        self.program = run_passes(graphwright.capture(self.case.model, **sample))
        with torch.no_grad():
            self.expected = [first_output(self.case.model(**call)) for call in self.held_out]
            self.wanted = first_output(self.case.model(**self.case.inputs))

    def run(self, settings: Sequence[Setting], repeat: int) -> Iterator[Outcome]:
        """Yield what is found, in the order of the settings."""
        runs: dict[str, Run] = {}
        found: dict[str, Outcome] = {}
        base_us = self._prediction(self.program).time_us
        for setting in settings:
            tell(setting.name)
            # Whatever keeps a setting from running is its result, and the others are still worth measuring.
            try:
                made = self._rival(setting) if setting.rival else self._ours(setting, base_us)
                if self.threads == 1:
                    refuse_strays(made[1])
            except Exception as error:  # noqa: BLE001
                found[setting.name] = Outcome(setting, problem=problem_of(error))
            else:
                found[setting.name], runs[setting.name] = made
        unchanged = self._base(settings, runs)
        samples, _ = rounds(runs, self.threads, repeat, tell)
        for setting in settings:
            outcome = found[setting.name]
            if setting.name in samples:
                # The median of ratios within a round: what disturbs one disturbs its neighbours too.
                ratio = statistics.median(a / b for a, b in zip(samples[setting.name], samples[unchanged], strict=True))
                times = {"time_us": statistics.median(samples[setting.name]) * 1e6, "time_ratio": ratio}
                outcome = Outcome(setting, outcome.quality, {**times, **outcome.cost}, outcome.predicted)
            yield outcome

    def _base(self, settings: Sequence[Setting], runs: dict[str, Run]) -> str:
        """Return the name of the unchanged program's run, which is added if the settings have none."""
        for setting in settings:
            if not setting.rival and not setting.passes and setting.name in runs:
                return setting.name
        runs[UNCHANGED.name] = self._ours(UNCHANGED, 1.0)[1]
        return UNCHANGED.name

    def _rival(self, setting: Setting) -> tuple[Outcome, Run]:
        run = RIVALS[setting.rival](self.case)
        error_of(run(), self.wanted, real_positions(self.case.inputs))
        quality = self.sweep.quality(self.held_out, self.expected, self.expected)
        return Outcome(setting, quality, {"flops": float(self._prediction(self.program).flops)}), run

    def _ours(self, setting: Setting, base_us: float) -> tuple[Outcome, Run]:
        program = run_passes(self.program, as_passes(setting.passes), self.context)
        for record in program.records[len(self.program.records) :]:
            if not record.plan.decisions:
                reasons = "; ".join(refusal.reason for refusal in record.plan.refusals) or "nothing of the kind is there"
                raise PassError(f"{record.options} did nothing: {reasons}")
        compiled = graphwright.compile(program)
        outputs = [first_output(compiled(**call)) for call in self.held_out]
        quality = self.sweep.quality(self.held_out, self.expected, outputs)
        foretold = self._prediction(program)
        inputs: dict[str, Any] = dict(self.case.inputs)
        predicted = {"time_us": foretold.time_us, "time_ratio": foretold.time_us / base_us}
        outcome = Outcome(setting, quality, {"flops": float(foretold.flops)}, predicted)
        return outcome, lambda: first_output(compiled(**inputs))

    def _prediction(self, program: Program) -> Prediction:
        """Return how long a call takes on this machine, as the cost analysis says."""
        sizes = sizes_of(program, program.signature.flatten((), dict(self.case.inputs)))
        return predict(program_cost(program), sizes, this_machine())


def tell(text: str) -> None:
    """Show on standard error what is being done now."""
    click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)


def problem_of(error: Exception) -> str:
    """Return why a setting has no numbers."""
    return str(error) if isinstance(error, GraphwrightError) else reason(error)
