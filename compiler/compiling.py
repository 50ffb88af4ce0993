"""Compiling: from a PyTorch model, or a program, to something that runs it faster."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from graphwright.codegen.lower import lower
from graphwright.ir.analyses.cost_lines import program_cost
from graphwright.ir.errors import OptionError
from graphwright.ir.printer import print_program
from graphwright.ir.program import Program
from graphwright.passes.base import Context, Pass, Stage
from graphwright.runtime.executable import Executable
from graphwright.runtime.schedule import Schedule

from .capturing import capture
from .compiled import PLAIN, Compiled, Report
from .generating import Derived, compile_generator, ending_of
from .pipeline import DEFAULT_PASSES, run_passes
from .recipe import Mark, Recipe, mark_of, recipe_of
from .sampling import Dynamic
from .watch import Watch


def compile(
    model: torch.nn.Module | Program,
    *args: Any,
    passes: Iterable[Pass | str] = (),
    dynamic: Dynamic = None,
    check: bool = True,
    keep_text: bool = False,
    calibration: Sequence[Any] = (),
    recipe: Recipe | str | os.PathLike[str] | None = None,
    generate: bool = False,
    **kwargs: Any,
) -> Compiled:
    """Compile a model.

    Args:
        model: any module, or a program that was captured before.
        args: arguments of a sample call, as the model takes them; none for a program.
        passes: what to do beyond what is done to every model: passes, or texts such as "fuse-projections:minimum=3". They run
            after recognition and clean-up; those that rewrite caches, such as "quantize-cache", run on the program with caches
            that `generate` asks for.
        dynamic: which sizes may differ from call to call; see `capture`.
        check: compare the capture with the model at other sizes than the sample's.
        keep_text: keep the printed program after every pass in the report.
        calibration: further sample calls, for passes that decide by what a model computes: each (args, kwargs), or a dict of
            named arguments.
        recipe: passes with their options, or the path of a file of them; those of `passes` run after them.
        generate: also make what `Compiled.generate` runs, with keys and values in a cache. The model must be a causal decoder.
        kwargs: named arguments of the sample call.

    Returns:
        What runs the model.

    Raises:
        CaptureError: the model cannot be captured.
        OptionError: a pass or an option is unknown, a pass rewrites caches and `generate` does not ask for any, or the recipe
            was made for another model.
        PassError: a pass cannot do what it was asked to, or the model cannot be run token by token.
        LoweringError: an operation can neither be generated nor called.
    """
    clock = _Clock()
    asked = recipe_of(recipe, passes)
    plain, cached = by_stage(asked.passes, generate)
    program = model if isinstance(model, Program) else capture(model, *args, dynamic=dynamic, check=check, **kwargs)
    clock.stop("capture")
    mark = mark_of(program, "" if isinstance(model, Program) else type(model).__name__)
    asked.check(mark)
    asked = Recipe(asked.passes, Mark(mark.name or (asked.model.name if asked.model else ""), mark.weights))
    device = next((w.device.type for w in program.weights.values()), "cpu")
    context = Context(tuple(calibration), device)
    program = run_passes(program, [*DEFAULT_PASSES, *plain], context, keep_text=keep_text)
    clock.stop("passes")
    schedule = lower(program, device=device)
    clock.stop("lower")
    executable = Executable(schedule, program.weights, program.signature)
    clock.stop("load")
    derived = None
    if generate:
        derived = compile_generator(program, context, executable, ending_of(model), cached, keep_text=keep_text)
        clock.stop("generator")
    report = _report(program, schedule, clock.times_us, derived)
    watch = Watch(executable.shared_weights(program.weights))
    graphs = {} if derived is None else {name: print_program(made) for name, made in derived.programs.items()}
    generator = None if derived is None else derived.generator
    return Compiled(executable, print_program(program), report, asked.to_toml(), generator, watch, graphs)


def by_stage(passes: Iterable[Pass], generate: bool) -> tuple[list[Pass], list[Pass]]:
    """Return the passes for the model's own program and those for the program with caches, each in order."""
    plain: list[Pass] = []
    cached: list[Pass] = []
    for step in passes:
        (cached if step.stage is Stage.DECODE else plain).append(step)
    if cached and not generate:
        names = ", ".join(dict.fromkeys(step.name for step in cached))
        raise OptionError(
            f"{names}: the caches that it rewrites are there only in a model that is compiled to generate: compile it with "
            f"generate=True (on the command line: --generate)"
        )
    return plain, cached


def _report(program: Program, schedule: Schedule, times_us: Mapping[str, int], derived: Derived | None) -> Report:
    steps: dict[str, int] = {}
    for step in schedule.steps:
        kind = type(step).__name__.removesuffix("Step").lower()
        steps[kind] = steps.get(kind, 0) + 1
    programs = {PLAIN: program, **(derived.programs if derived is not None else {})}
    return Report(
        notes=tuple(program.notes),
        records=tuple(program.records),
        kernels=len(schedule.kernels),
        steps=steps,
        times_us=times_us,
        decoding=derived.records if derived is not None else (),
        prefill=derived.prefill if derived is not None else (),
        costs={name: program_cost(made) for name, made in programs.items()},
    )


class _Clock:
    def __init__(self) -> None:
        self.times_us: dict[str, int] = {}
        self._last = time.perf_counter_ns()

    def stop(self, name: str) -> None:
        """Say what the time since the last stop was for."""
        now = time.perf_counter_ns()
        self.times_us[name] = (now - self._last) // 1000
        self._last = now
