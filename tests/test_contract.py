"""What every pass of the registry promises, on every family of models: it is applied and right, or it refuses and says why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from graphwright.ir.inference import CHECKED
from graphwright.ir.printer import print_program
from graphwright.ir.program import Program
from graphwright.ir.verifier import verify
from graphwright.passes.base import Context, Fidelity, Pass, Plan
from graphwright.passes.registry import format_pass, parse_pass, pass_class, pass_names
from graphwright.pipeline import DEFAULT_PASSES, run_passes

TOLERANCE = 1e-5
"""Largest difference over largest value that a CLOSE pass may make."""

SHARP = {"t5": 1e-4, "deberta-v2": 1e-4}
"""Random weights make these so sensitive that rounding elsewhere shows more."""

ROUNDED_BY_LAYOUT = {("mixtral", "constant-folding"), ("qwen3-moe", "constant-folding")}
"""Where an exact pass stores a weight in another layout, and PyTorch's grouped products round by the layout."""


TWICE = {"bert", "convnet", "attention-causal"}
"""The families on which passes plan and apply twice."""


@pytest.fixture(scope="module")
def ready(captured: Callable[[str], Program]) -> Callable[[str], Program]:
    """Return a family's program after what is done to every model, by name."""
    return functools.cache(lambda name: run_passes(captured(name)))


@pytest.fixture(scope="module")
def cached(ready: Callable[[str], Program], trials: ModuleType) -> Callable[[str], Program | None]:
    """Return a family's program with caches by name; None if it has none."""
    return functools.cache(lambda name: trials.with_caches(ready(name)))


@pytest.fixture(scope="module")
def find_program(
    captured: Callable[[str], Program],
    ready: Callable[[str], Program],
    cached: Callable[[str], Program | None],
    trials: ModuleType,
) -> Callable[[Pass, str], Program | None]:
    """Return the program of a family that a pass is for; None if there is none."""

    def find(step: Pass, family: str) -> Program | None:
        if trials.needs_caches(step):
            return cached(family)
        return captured(family) if trials.needs_capture(step) else ready(family)

    return find


def check_refusals(program: Program, plan: Plan) -> None:
    """Assert that refusals are about nodes of the program, or all of it, and give a reason."""
    names = {node.name for node in program.graph.nodes} | {""}
    for refusal in plan.refusals:
        assert refusal.where in names
        assert len(refusal.reason.split()) >= 2, refusal


@pytest.mark.parametrize("name", pass_names())
def test_applied_or_refused(
    family: str,
    name: str,
    find_program: Callable[[Pass, str], Program | None],
    families: dict[str, Any],
    trials: ModuleType,
) -> None:
    """A pass changes no program, plans alike twice, does what a plan says that was kept as JSON, and keeps what it promises."""
    step = trials.tried(name)
    program = find_program(step, family)
    if program is None:
        pytest.skip("the model cannot be run token by token")
    context = trials.calibration(families[family])
    before, weights = print_program(program), dict(program.weights)
    plan = step.plan(program, context)
    check_refusals(program, plan)
    # What every compilation runs need not say that there was nothing to do; what a user asks for must.
    assert plan.decisions or plan.refusals or trials.needs_capture(step)
    if family in TWICE:
        assert step.plan(program, context) == plan
        assert print_program(step.apply(program, plan)) == print_program(step.apply(program, trials.through_json(plan)))
    result = step.apply(program, trials.through_json(plan))
    assert print_program(program) == before
    assert program.weights.keys() == weights.keys()
    assert all(program.weights[key] is value for key, value in weights.items())
    if not plan.decisions:
        assert print_program(result) == before
        return
    assert print_program(result) != before
    for node in result.graph.nodes:
        node.meta.pop(CHECKED, None)
    verify(result)
    check_values(step, program, result, family, families, trials)
    check_second_run(step, result, context)


def check_values(
    step: Pass, program: Program, result: Program, family: str, families: dict[str, Any], trials: ModuleType
) -> None:
    """Assert that a program computes what it did before, as far as the pass promises."""
    inputs = families[family].sample(2, sum(trials.CHUNKS) if result.states else 9, 3)
    if result.states:
        # A derived program has one input with tokens; a mask is not among its inputs, and lets all of them through.
        (tokens,) = (t for key, t in inputs.items() if key in ("input_ids", "x"))
        found = trials.run_chunks(result, tokens)
        if program.states:
            expected = trials.run_chunks(program, tokens)
            if step.name == "last-token":
                expected = [part[:, -1:] for part in expected]
        else:
            full = {**inputs, **({"attention_mask": torch.ones_like(tokens)} if "attention_mask" in inputs else {})}
            (whole,) = trials.run_forward(program, full)
            expected = list(whole.split(trials.CHUNKS, dim=1))
    else:
        found, expected = trials.run_forward(result, inputs), trials.run_forward(program, inputs)
    if result.signature.packing is not None:
        # What is computed of padding is 0, and nobody reads it.
        found, expected = ([part[inputs["attention_mask"] != 0] for part in parts] for parts in (found, expected))
    for new, old in zip(found, expected, strict=True):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert bool(new.isfinite().all()) or not new.is_floating_point()
    if step.fidelity is Fidelity.EXACT and (family, step.name) not in ROUNDED_BY_LAYOUT:
        assert all(torch.equal(new, old) for new, old in zip(found, expected, strict=True))
    elif step.fidelity is not Fidelity.LOSSY:
        assert trials.distance(found, expected) <= SHARP.get(family, TOLERANCE)


def check_second_run(step: Pass, result: Program, context: Context) -> None:
    """Assert that a pass that keeps values is done after one run, and that a lossy one can run again."""
    # Calls of a packed program, or of one with caches, are not those of the model.
    is_like_the_model = result.signature.packing is None and not result.states
    second = step.plan(result, context if is_like_the_model else Context())
    check_refusals(result, second)
    assert second.decisions or second.refusals or step.name in DEFAULT_PASSES
    if step.fidelity is not Fidelity.LOSSY:
        assert second.decisions == ()
    if second.decisions:
        verify(step.apply(result, second))


@pytest.mark.parametrize("name", pass_names())
def test_text_round_trip(name: str, trials: ModuleType) -> None:
    """The text of a pass, at its defaults and as it is tried, makes an equal pass."""
    for step in {trials.tried(name), *([] if name in trials.TEXTS else [parse_pass(name)])}:
        assert parse_pass(format_pass(step)) == step
        assert step.name == name


@pytest.mark.parametrize("name", pass_names())
def test_says_what_it_is(name: str) -> None:
    """A pass documents what it does before it is used: the parts of its docstring, and where it is from if it approximates."""
    cls = pass_class(name)
    text = cls.__doc__ or ""
    parts = ["Before:", "After:", "Applies when:", "Declines when:", "Fidelity:"] if cls.fidelity is Fidelity.LOSSY else []
    assert [part for part in parts if part not in text] == []
    assert cls.source or cls.fidelity is not Fidelity.LOSSY


@pytest.mark.parametrize("name", [n for n in pass_names() if pass_class(n).stage.value == "decode"])
def test_a_pass_for_caches_refuses_a_program_without(name: str, ready: Callable[[str], Program], trials: ModuleType) -> None:
    """A pass for programs with caches says so where it is given another."""
    plan = trials.tried(name).plan(ready("llama"), Context())
    assert plan.decisions == ()
    assert plan.refusals
