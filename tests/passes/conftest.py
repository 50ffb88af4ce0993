"""Programs built by hand, and what tests of passes have in common."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphwright.ir.program import Program, calls
from graphwright.ir.verifier import verify
from graphwright.passes.base import Context, Pass, Plan
from graphwright.passes.registry import parse_pass


@pytest.fixture(scope="session")
def builder() -> Any:
    """The class that builds programs node by node."""
    name = "graphwright_tests_builder"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parents[1] / "builder.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].Builder


class Outcome:
    """What a pass did to a program, with checks that all passes share."""

    def __init__(self, step: Pass, program: Program, plan: Plan) -> None:
        self.step, self.before, self.plan = step, program, plan
        self.after = step.apply(program, plan)
        verify(self.after)

    @property
    def operations(self) -> list[str]:
        """The operations called afterwards, in order, without sizes."""
        return [str(n.target) for n in calls(self.after.graph) if n.target is not torch.ops.aten.sym_size.int]

    @property
    def reasons(self) -> list[str]:
        """Why places were left alone."""
        return [refusal.reason for refusal in self.plan.refusals]

    def check(self, *inputs: torch.Tensor, tolerance: float = 0.0) -> None:
        """Compare the results before and after: bitwise, or by the largest difference over the largest value."""
        with torch.no_grad():
            for old, new in zip(self.before.reference(*inputs), self.after.reference(*inputs), strict=True):
                assert old.dtype == new.dtype
                assert old.shape == new.shape
                if tolerance == 0.0:
                    assert torch.equal(old, new)
                else:
                    assert not new.isnan().any()
                    error = (old.double() - new.double()).abs().max() / old.double().abs().max().clamp_min(1e-30)
                    assert error <= tolerance


@pytest.fixture
def run() -> Callable[..., Outcome]:
    """Return a function that plans and applies a pass, given as text, and returns the outcome."""

    def outcome(text: str, program: Program, edit: Callable[[Plan], Plan] = lambda plan: plan) -> Outcome:
        step = parse_pass(text)
        return Outcome(step, program, edit(step.plan(program, Context())))

    return outcome
