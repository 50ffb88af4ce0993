"""Removal of what nothing uses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from graphwright.ir.errors import PlanError

aten = torch.ops.aten


def test_removes_what_no_result_needs(builder, run) -> None:
    """Nodes without a path to a result go, with the weights that only they read."""
    b = builder()
    x = b.input("x", "batch", 4)
    b.call(aten.exp.default, b.call(aten.linear.default, x, b.weight("w", torch.ones(3, 4))))
    outcome = run("dead-code", b.program(b.call(aten.relu.default, x)))
    assert outcome.operations == ["aten.relu.default"]
    assert outcome.after.weights == {}
    assert set(outcome.before.weights) == {"w"}
    outcome.check(torch.randn(3, 4))


def test_keeps_inputs(builder, run) -> None:
    """An input that nothing uses stays: it is part of the signature."""
    b = builder()
    x, _ = b.input("x", 2), b.input("unused", 3)
    outcome = run("dead-code", b.program(b.call(aten.relu.default, x)))
    assert len(outcome.after.inputs) == 2
    assert outcome.plan.decisions == ()


def test_an_edited_plan_is_obeyed(builder, run) -> None:
    """Only what the plan lists is removed, and a node that is used is not."""
    b = builder()
    x = b.input("x", 2)
    b.call(aten.exp.default, b.call(aten.neg.default, x))
    program = b.program(x)
    outcome = run("dead-code", program, lambda plan: dataclasses.replace(plan, decisions=plan.decisions[:1]))
    assert outcome.operations == ["aten.neg.default"]
    with pytest.raises(PlanError, match="%neg_default is used by %exp_default"):
        run("dead-code", program, lambda plan: dataclasses.replace(plan, decisions=plan.decisions[1:]))
