"""Running passes: plan, apply, verify, record."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from graphwright.ir.errors import OptionError, VerifyError
from graphwright.ir.printer import print_program
from graphwright.passes.base import Decision, Fidelity, Pass, Plan
from graphwright.pipeline import DEFAULT_PASSES, run_passes

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Breaks(Pass):
    """A pass with a bug: the first call's arguments no longer fit what its node says."""

    name = "breaks"
    fidelity = Fidelity.EXACT

    def plan(self, program, context):
        return Plan(self.name, (Decision("", "break it"),))

    def apply(self, program, plan):
        result = program.copy()
        node = next(n for n in result.graph.nodes if n.op == "call_function" and n.target is aten.relu.default)
        node.target = aten.sum.default
        return result


def test_records_say_what_was_done(captured) -> None:
    """One record a pass, in order, with the plan, the counts and the time; those that changed nothing too."""
    program = captured("convnet")
    result = run_passes(program, ["dead-code", "split-bias", "dead-code"], keep_text=True)
    assert [record.options for record in result.records] == ["dead-code", "split-bias", "dead-code"]
    first, second, _ = result.records
    assert (first.plan.decisions, first.text) == ((), "")
    assert second.nodes_after == second.nodes_before + len(second.plan.decisions) > second.nodes_before
    assert second.text == print_program(result)
    assert second.time_us > 0


def test_the_program_is_left_alone(captured) -> None:
    """Neither a pass that changes something nor none at all lets the result share the graph."""
    program = captured("convnet")
    before = print_program(program)
    for passes in ([], ["dead-code"], DEFAULT_PASSES):
        result = run_passes(program, passes)
        assert result.graph is not program.graph
        assert print_program(program) == before
        assert program.records == []


def test_a_pass_with_a_bug_is_caught(captured) -> None:
    """The error names the rule, the node and the pass."""
    with pytest.raises(VerifyError, match="shape at %") as raised:
        run_passes(captured("convnet"), [Breaks()])
    assert any("after the pass breaks" in note for note in raised.value.__notes__)


def test_unknown_passes_are_refused_at_once(captured) -> None:
    """A typing error late in the list stops before anything runs."""
    with pytest.raises(OptionError, match="Did you mean 'dead-code'"):
        run_passes(captured("convnet"), ["split-bias", "ded-code"])


def test_default_passes_are_idempotent_and_close(captured, families) -> None:
    """The standard pipeline changes nothing the second time, and no value by more than rounding."""
    program = captured("llama")
    result = run_passes(program)
    again = run_passes(result)
    assert print_program(again) == print_program(result)
    inputs = families["llama"].sample(3, 11, 5)
    expected, got = program.reference(**inputs).logits, result.reference(**inputs).logits
    assert ((expected - got).abs().max() / expected.abs().max()).item() < 1e-5
