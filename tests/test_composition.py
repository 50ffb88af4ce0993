"""Any two passes that approximate, one after the other: they compose, or the second refuses and says why."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from graphwright.ir.printer import print_program
from graphwright.ir.program import Program
from graphwright.ir.verifier import verify
from graphwright.pipeline import run_passes

MODELS = ("bert", "llama")


@pytest.fixture(scope="module")
def tried_pairs(captured: Callable[[str], Program], families: dict[str, Any], trials: ModuleType) -> Callable[[str], Any]:
    """Return what runs pairs on a family, by the family's name."""
    return functools.cache(lambda name: trials.Pairs(families[name], run_passes(captured(name))))


@pytest.fixture(scope="module")
def cells(root: Path) -> dict[tuple[str, str], str]:
    """The models on which pairs compose, as docs/passes/README.md has it."""
    page = (root / "docs" / "passes" / "README.md").read_text().partition("<!-- pairs")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", page, re.MULTILINE)]
    return {(row[0], column): cell for row in rows[2:] for column, cell in zip(rows[0][1:], row[1:], strict=True)}


@pytest.mark.parametrize("model", MODELS)
def test_pairs_compose_or_refuse(
    model: str,
    lossy_pair: tuple[str, str],
    tried_pairs: Callable[[str], Any],
    cells: dict[tuple[str, str], str],
    trials: ModuleType,
) -> None:
    """The second pass finds places in what the first has made, or says why not; the page says which of the two."""
    (first, second), found = lossy_pair, tried_pairs(model)
    program = found.after(first, second)
    plan = None if program is None else found.plan(second, program)
    composes = found.does(first) and isinstance(plan, trials.Plan) and bool(plan.decisions)
    assert (model in cells[first, second].split(", ")) == composes
    if program is None or isinstance(plan, str):
        return
    assert plan.decisions or plan.refusals
    assert all(refusal.reason for refusal in plan.refusals)
    before = print_program(program)
    result = trials.tried(second).apply(program, plan)
    assert print_program(program) == before
    if not plan.decisions:
        assert print_program(result) == before
        return
    verify(result)
    inputs = found.family.sample(2, sum(trials.CHUNKS) if result.states else 20, 3)
    run = (lambda p: trials.run_chunks(p, inputs["input_ids"])) if result.states else (lambda p: trials.run_forward(p, inputs))
    for new, old in zip(run(result), run(program), strict=True):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert bool(new.isfinite().all())
