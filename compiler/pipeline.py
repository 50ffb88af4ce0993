"""Running passes over a program: plan, apply, verify, record."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import fx

from graphwright.ir.analyses.cost_lines import Memo, program_cost
from graphwright.ir.errors import VerifyError
from graphwright.ir.inference import mark_checked
from graphwright.ir.printer import print_program
from graphwright.ir.program import Program, calls
from graphwright.ir.records import PassRecord, ProgramCost
from graphwright.ir.verifier import verify
from graphwright.passes.base import Context, Pass
from graphwright.passes.registry import as_passes, format_pass

DEFAULT_PASSES: tuple[str, ...] = (
    "redundant-casts",
    "redundant-layout",
    "common-subexpressions",
    "dead-code",
    "raise-norms",
    "raise-gelu",
    "raise-glu",
    "raise-rotary",
    "raise-attention",
    "redundant-layout",
    "common-subexpressions",
    "constant-folding",
    "known-tables",
    "fuse-projections",
    "split-bias",
    "dead-code",
)
"""What a compilation does to every model, in order; none of it changes values by more than rounding."""


def run_passes(
    program: Program,
    passes: Iterable[Pass | str] = DEFAULT_PASSES,
    context: Context | None = None,
    *,
    keep_text: bool = False,
) -> Program:
    """Return the program after passes; the given one is not changed.

    After every pass that changed something the program is verified. What each did is in the result's `records`.

    Args:
        program: what to start from.
        passes: in order; passes, or texts such as "fuse-projections:minimum=3".
        context: what the passes may use beside the program.
        keep_text: print the program after every pass that changed something, into the record.

    Raises:
        OptionError: a text names an unknown pass or option.
        VerifyError: a pass made a program that breaks a rule; the error names the pass.
    """
    context = context or Context()
    start = program
    for node in calls(program.graph):
        # What a program says of itself when it comes here is trusted: only what passes do is checked.
        mark_checked(node)
    costs = _Costs()
    for step in as_passes(passes):
        program = _run(program, step, context, keep_text, costs)
    return program.copy() if program.graph is start.graph else program


def replay(program: Program, records: Iterable[PassRecord]) -> Iterator[tuple[PassRecord, Program]]:
    """Yield the program as it was after each pass that changed something, by the plans that were recorded.

    Args:
        program: as it was before the first of the passes; it is not changed.
        records: of passes that ran on it, in order.

    Raises:
        OptionError: a pass is unknown here.
        PlanError: the program is another one than the plans were made for.
    """
    for record in records:
        if record.plan.decisions:
            (step,) = as_passes([record.options])
            program = step.apply(program, record.plan)
            yield record, program


class _Costs:
    """What programs cost, each worked out once; operations that stay from one program to the next too."""

    def __init__(self) -> None:
        self._memo: Memo = {}
        self._last: tuple[fx.Graph, ProgramCost] | None = None

    def of(self, program: Program) -> ProgramCost:
        """Return what a program costs."""
        if self._last is None or self._last[0] is not program.graph:
            self._last = (program.graph, program_cost(program, self._memo))
        return self._last[1]


def _run(program: Program, step: Pass, context: Context, keep_text: bool, costs: _Costs) -> Program:
    started = time.perf_counter_ns()
    before = sum(1 for _ in calls(program.graph))
    plan = step.plan(program, context)
    result, text = program, ""
    if plan.decisions:
        result = step.apply(program, plan)
        try:
            verify(result)
        except VerifyError as error:
            error.add_note(f"after the pass {format_pass(step)}")
            raise
        text = print_program(result) if keep_text else ""
    time_us = (time.perf_counter_ns() - started) // 1000
    changed = result is not program
    record = PassRecord(
        pass_name=step.name,
        options=format_pass(step),
        plan=plan,
        nodes_before=before,
        nodes_after=sum(1 for _ in calls(result.graph)),
        time_us=time_us,
        text=text,
        cost_before=costs.of(program) if changed else None,
        cost_after=costs.of(result) if changed else None,
    )
    return replace(result, records=[*result.records, record])
