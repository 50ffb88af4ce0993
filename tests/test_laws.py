"""The laws of passes that approximate: nothing is lost at the degenerate setting, and less is lost as the budget grows.

A LOSSY pass of the registry without laws fails `test_every_lossy_pass_has_laws`: a new method brings its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

from graphwright.ir.errors import PlanError
from graphwright.ir.printer import print_program
from graphwright.ir.program import Program
from graphwright.ir.verifier import verify
from graphwright.passes.base import Fidelity, Plan
from graphwright.passes.registry import parse_pass, pass_class, pass_names
from graphwright.pipeline import run_passes

ROUNDING = 1e-5
"""Largest error, of norms, of a setting that changes nothing but the order of sums."""

SEEDS = (3, 4)
"""Of the calls of a workload."""

CHUNKS = (64, 1, 7)
"""Tokens of the calls of a program with caches: a prompt, single tokens, and more at once."""


@dataclass(frozen=True)
class Law:
    """What is known of a pass without having measured it.

    Args:
        family: the model that the workload is for.
        identity: options at which the pass computes the original.
        ladders: options by growing budget; the error of each is no more than that of the one before it.
        tokens: tokens of a call of the workload.
    """

    family: str
    identity: tuple[str, ...]
    ladders: tuple[tuple[str, ...], ...]
    tokens: int = 30


LAWS: dict[str, Law] = {
    "drop-layers": Law("llama", ("drop=0", "keep_ratio=1"), (("drop=2", "drop=1", "drop=0"),)),
    "merge-tokens": Law("bert", ("r=0", "ratio=1"), (("r=8", "r=4", "r=2", "r=0"), ("ratio=0.5", "ratio=0.75", "ratio=1"))),
    "vertical-slash": Law(
        "llama",
        ("minimum_tokens=201", "vertical=200,slash=200,minimum_tokens=2"),
        (tuple(f"vertical={n},slash={n},minimum_tokens=2" for n in (30, 60, 100, 200)),),
        tokens=200,
    ),
    "window-attention": Law(
        "llama",
        ("window=30", "window=20,sinks=10", "block=30"),
        (("window=2", "window=6", "window=18", "window=30"), ("block=3", "block=10", "block=30")),
    ),
    "quantize-cache": Law(
        "llama",
        ("bits=16", "bits=2,residual=128"),
        (
            tuple(f"bits={bits},group_size=16,residual=16" for bits in (2, 4, 8, 16)),
            tuple(f"bits=2,group_size=16,residual={tokens}" for tokens in (16, 32, 80)),
        ),
    ),
    "tier-cache": Law(
        "llama",
        ("residual=128", "high=16,important=1"),
        (
            tuple(f"group_size=8,residual=8,important={share}" for share in (0, 0.25, 0.5, 1)),
            tuple(f"group_size=8,residual=8,important=1,high={bits}" for bits in (3, 5, 8, 16)),
            tuple(f"group_size=8,residual={tokens},important=0" for tokens in (8, 24, 72)),
        ),
    ),
}
"""By the name of the pass."""

LOSSY = [name for name in pass_names() if pass_class(name).fidelity is Fidelity.LOSSY]
LAWFUL = [name for name in LOSSY if name in LAWS]


@dataclass
class Workload:
    """A program and calls of it, with what it computes.

    Args:
        program: what passes are applied to.
        run: computes all results of all calls.
        expected: what `run` finds of the program itself.
    """

    program: Program
    run: Callable[[Program], list[torch.Tensor]]
    expected: list[torch.Tensor]

    def error(self, program: Program) -> float:
        """Return the norm of all differences relative to the norm of all results."""
        found = self.run(program)
        lost = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, self.expected, strict=True))
        return float((lost / sum(float(b.double().square().sum()) for b in self.expected)) ** 0.5)


@pytest.fixture(scope="module")
def workload(captured: Callable[[str], Program], families: dict[str, Any], trials: ModuleType) -> Callable[[str], Workload]:
    """Return the workload of a pass by its name."""

    @functools.cache
    def make(family: str, tokens: int, *, with_caches: bool) -> Workload:
        program = run_passes(captured(family))
        if with_caches:
            program = trials.with_caches(program)
        inputs = [families[family].sample(2, sum(CHUNKS) if with_caches else tokens, seed) for seed in SEEDS]

        def run(changed: Program) -> list[torch.Tensor]:
            if with_caches:
                return [part for call in inputs for part in trials.run_chunks(changed, call["input_ids"], CHUNKS)]
            return [part for call in inputs for part in trials.run_forward(changed, call)]

        return Workload(program, run, run(program))

    def find(name: str) -> Workload:
        law = LAWS[name]
        return make(law.family, law.tokens, with_caches=trials.needs_caches(trials.tried(name)))

    return find


@pytest.fixture(scope="module")
def changed(
    workload: Callable[[str], Workload], families: dict[str, Any], trials: ModuleType
) -> Callable[[str, str], tuple[Plan, Program]]:
    """Return the plan and the program of a pass's workload, by the pass's name and options."""

    @functools.cache
    def make(name: str, options: str) -> tuple[Plan, Program]:
        step, program = parse_pass(f"{name}:{options}"), workload(name).program
        plan = step.plan(program, trials.calibration(families[LAWS[name].family]))
        result = step.apply(program, plan)
        verify(result)
        return plan, result

    return make


def test_every_lossy_pass_has_laws() -> None:
    """A pass that approximates says here at which settings it loses nothing, and along which it loses less."""
    assert [name for name in LOSSY if name not in LAWS] == []


@pytest.mark.parametrize(("name", "options"), [(name, o) for name in LAWFUL for o in LAWS[name].identity])
def test_identity(name: str, options: str, workload: Callable[[str], Workload], changed: Callable[..., Any]) -> None:
    """A degenerate setting computes the original: bit for bit where the plan is empty, else up to rounding."""
    plan, result = changed(name, options)
    assert workload(name).error(result) <= (ROUNDING if plan.decisions else 0)


@pytest.mark.parametrize(
    ("name", "ladder"),
    [
        pytest.param(name, ladder, marks=[pytest.mark.slow] if number else [])
        for name in LAWFUL
        for number, ladder in enumerate(LAWS[name].ladders)
    ],
)
def test_error_falls_as_the_budget_grows(
    name: str, ladder: tuple[str, ...], workload: Callable[[str], Workload], changed: Callable[..., Any]
) -> None:
    """Of two budgets the larger one loses no more, and the least one loses something."""
    errors = [workload(name).error(changed(name, options)[1]) for options in ladder]
    assert errors[0] > 10 * ROUNDING
    assert all(more <= less for less, more in itertools.pairwise(errors)), dict(zip(ladder, errors, strict=True))


@pytest.mark.parametrize("name", LAWFUL)
def test_an_edited_plan_is_obeyed(name: str, workload: Callable[[str], Workload], changed: Callable[..., Any]) -> None:
    """Decisions that are taken out of a plan are not carried out, and a plan without any is the identity."""
    options = LAWS[name].ladders[0][0]
    plan, whole = changed(name, options)
    step, program = parse_pass(f"{name}:{options}"), workload(name).program
    assert len(plan.decisions) >= 2
    part = step.apply(program, dataclasses.replace(plan, decisions=plan.decisions[:1]))
    verify(part)
    assert len({print_program(made) for made in (program, part, whole)}) == 3
    assert 0 < workload(name).error(part) != workload(name).error(whole)
    assert print_program(step.apply(program, dataclasses.replace(plan, decisions=()))) == print_program(program)


@pytest.mark.parametrize("name", LAWFUL)
def test_a_plan_that_does_not_fit(name: str, workload: Callable[[str], Workload], changed: Callable[..., Any]) -> None:
    """A decision about a node that is not there, one twice, or one without its detail, is an error that names the pass."""
    options = LAWS[name].ladders[0][0]
    plan, _ = changed(name, options)
    step, program = parse_pass(f"{name}:{options}"), workload(name).program
    first = plan.decisions[0]
    for wrong in ([dataclasses.replace(first, where="nowhere")], [dataclasses.replace(first, detail={})], [first, first]):
        with pytest.raises(PlanError, match=name):
            step.apply(program, dataclasses.replace(plan, decisions=tuple(wrong)))
