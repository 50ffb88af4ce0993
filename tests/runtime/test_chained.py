"""Steps that run one after the other without going back to Python."""

from __future__ import annotations

import pytest

from graphwright.runtime.chained import BoundStep, alone, chained
from graphwright.runtime.schedule import CallStep


def step(name: str) -> CallStep:
    return CallStep(name, "aten::add.Tensor", (), {}, ())


def test_steps_without_links_run_alone() -> None:
    """What only Python can run stays a call of its own, in order."""
    seen: list[str] = []
    bound = [BoundStep(step(name), lambda name=name: seen.append(name)) for name in "abc"]
    runs = chained(bound, [])
    assert [run.steps[0].name for run in runs] == ["a", "b", "c"]
    for run in runs:
        run.run()
    assert seen == ["a", "b", "c"]


def test_a_run_tells_its_step() -> None:
    """A failing run can be asked which step it was."""

    def fail() -> None:
        raise ValueError("no")

    run = alone(step("x"), fail)
    with pytest.raises(ValueError, match="no"):
        run.run()
    assert run.running().name == "x"


def test_neighbours_join(example_model) -> None:
    """Kernels and products next to each other are one call, and it computes what they do one by one."""
    compiled, inputs, expected = example_model
    compiled(**inputs)
    (plan,) = compiled._executable._plans.values()
    assert len(plan.chained) < len(plan.runs)
    assert [s.name for run in plan.chained for s in run.steps] == [s.name for s in plan.steps]
    profile = compiled.profile(**inputs, repeat=1)
    assert len(profile.rows) == len(plan.steps)
    result = compiled(**inputs)
    assert (result - expected).abs().max() < 1e-5


@pytest.fixture
def example_model():
    """A small compiled model with products and kernels, a call of it, and the result."""
    import torch

    import graphwright

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.GELU(), torch.nn.Linear(32, 8), torch.nn.LayerNorm(8))
    x = torch.randn(5, 24)
    with torch.no_grad():
        return graphwright.compile(model, input=x), {"input": x}, model(x)
