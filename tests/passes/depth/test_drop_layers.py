"""Leaving out layers: what is chosen, what is left, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphwright
from graphwright.ir.analyses.cost import cost_of_program
from graphwright.ir.errors import OptionError, PassError, PlanError
from graphwright.ir.printer import print_program
from graphwright.ir.verifier import verify
from graphwright.passes.base import Context, Plan
from graphwright.passes.depth.drop_layers import DropLayers
from graphwright.passes.registry import format_pass, parse_pass
from graphwright.pipeline import run_passes

UNITS = ("block", "attention", "feed-forward")


def numbers(plan: Plan) -> list[int]:
    """The blocks that a plan is about, in its order."""
    return [int(decision.what.rpartition("block ")[2]) for decision in plan.decisions]


def without(model, unit: str, gone: list[int]):
    """The model without layers or branches, made in PyTorch."""
    result = copy.deepcopy(model)
    if unit == "block":
        result.layers = nn.ModuleList(layer for k, layer in enumerate(result.layers) if k not in gone)
    else:
        for k in gone:
            result.layers[k].off.add(unit)
    return result


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (1 - F.cosine_similarity(one.double(), other.double(), dim=-1)).mean().item()


def entropy(model, context) -> float:
    with torch.no_grad():
        pairs = [(model(call["ids"])[:, :-1].flatten(0, 1), call["ids"][:, 1:].flatten()) for call in context.calibration]
    return torch.cat([F.cross_entropy(*pair, reduction="none") for pair in pairs]).double().mean().item()


@pytest.mark.parametrize("form", ["pre", "post", "parallel"])
@pytest.mark.parametrize("unit", UNITS)
def test_what_is_left_is_the_model_without(make, context, tokens, form, unit) -> None:
    """The program computes what the model does with the layers or branches taken out in PyTorch."""
    model, program = make(form)
    step = DropLayers(drop=2, unit=unit)
    plan = step.plan(program, context)
    assert len(plan.decisions) == 2
    result = step.apply(program, plan)
    verify(result)
    given = tokens(7, 2, 23)
    with torch.no_grad():
        expected = without(model, unit, numbers(plan))(given)
    assert ((result.reference(given) - expected).abs().max() / expected.abs().max()).item() < 1e-6
    assert (result.reference(given) - program.reference(given)).abs().max() > 1e-3


@pytest.mark.parametrize("unit", UNITS)
def test_after_the_default_passes(make, context, tokens, unit) -> None:
    """Blocks are found in a program whose operations were recognised and fused."""
    model, program = make("pre")
    result = run_passes(program, [*graphwright.pipeline.DEFAULT_PASSES, DropLayers(drop=1, unit=unit)], context)
    (decision,) = (numbers(result.records[-1].plan),)
    given = tokens(8)
    with torch.no_grad():
        expected = without(model, unit, decision)(given)
    assert ((result.reference(given) - expected).abs().max() / expected.abs().max()).item() < 1e-5


def test_influence_is_that_of_the_stream(make, context) -> None:
    """Without `greedy`, scores are 1 - cosine similarity of what enters and leaves a block; the least go first."""
    model, program = make("pre")
    with torch.no_grad():
        streams = [model.streams(call["ids"]) for call in context.calibration]
    want = [sum(distance(s[k], s[k + 1]) for s in streams) / len(streams) for k in range(4)]
    plan = DropLayers(drop=3).plan(program, context)
    order = sorted(range(4), key=lambda k: want[k])
    assert numbers(plan) == order[:3]
    assert [d.detail["score"] for d in plan.decisions] == pytest.approx([want[k] for k in order[:3]], rel=1e-4)
    assert plan.refusals[0].reason == f"block {order[3]} stays: influence {want[order[3]]:.3g}"


def test_influence_is_taken_again(make, context) -> None:
    """With `greedy`, the second score is of the model without the first unit."""
    model, program = make("pre")
    plan = DropLayers(drop=2, greedy=True).plan(program, context)
    left = without(model, "block", numbers(plan)[:1])
    with torch.no_grad():
        streams = [left.streams(call["ids"]) for call in context.calibration]
    want = min(sum(distance(s[k], s[k + 1]) for s in streams) / len(streams) for k in range(3))
    assert plan.decisions[1].detail["score"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("unit", UNITS)
def test_leave_one_out_is_the_loss_without(make, context, unit) -> None:
    """The score is how much the next token's cross entropy rises when one unit goes; the least goes first."""
    model, program = make("pre")
    base = entropy(model, context)
    want = [entropy(without(model, unit, [k]), context) - base for k in range(4)]
    (decision,) = DropLayers(drop=1, unit=unit, score="leave-one-out").plan(program, context).decisions
    assert decision.detail["loss"] == "next-token"
    assert decision.detail["score"] == pytest.approx(min(want), abs=1e-5)
    assert decision.detail["loss_increase"] == pytest.approx(min(want), abs=1e-5)
    assert decision.what.endswith(f"block {want.index(min(want))}")


def test_loss_without_causality_is_of_the_results(make, context) -> None:
    """Where logits depend on later tokens there is no next token to predict: the results are compared."""
    model, program = make("pre", causal=False)
    (decision,) = DropLayers(drop=1).plan(program, context).decisions
    assert decision.detail["loss"] == "cosine"
    left = without(model, "block", [int(decision.what[-1])])
    with torch.no_grad():
        want = [distance(model(call["ids"]), left(call["ids"])) for call in context.calibration]
    assert decision.detail["loss_increase"] == pytest.approx(sum(want) / 2, rel=1e-3)


@pytest.mark.parametrize("option", [{"drop": 0}, {"keep_ratio": 1.0}, {}])
def test_leaving_out_nothing_is_the_identity(make, tokens, option) -> None:
    """The plan is empty, needs no calibration, and its program gives the same bits."""
    _, program = make("pre")
    step = DropLayers(**option)
    plan = step.plan(program, Context())
    assert plan.decisions == ()
    result = step.apply(program, plan)
    assert print_program(result) == print_program(program)
    assert torch.equal(result.reference(tokens(3)), program.reference(tokens(3)))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("score", ["influence", "leave-one-out"])
def test_error_grows_along_the_plan(make, context, unit, score) -> None:
    """On one workload, the more of the plan's order is left out, the farther the results are from the model's."""
    _, program = make("post", causal=False)
    step = DropLayers(drop=4, unit=unit, score=score)
    plan = step.plan(program, context)
    found = [decision.detail["loss_increase"] for decision in plan.decisions]
    assert found == sorted(found)
    assert 0 < found[0] < found[-1]


def test_a_block_that_does_nothing_goes_first(make, context, tokens) -> None:
    """Its influence and the loss's increase are 0, and without it the results have the same bits."""
    model = copy.deepcopy(make("pre")[0])
    with torch.no_grad():
        for parameter in (*model.layers[2].out.parameters(), *model.layers[2].down.parameters()):
            parameter.zero_()
    program = graphwright.capture(model, tokens(0), check=False)
    step = DropLayers(drop=1)
    plan = step.plan(program, context)
    assert numbers(plan) == [2]
    assert plan.decisions[0].detail["score"] == plan.decisions[0].detail["loss_increase"] == 0
    assert torch.equal(step.apply(program, plan).reference(tokens(6)), program.reference(tokens(6)))
    everything = DropLayers(drop=4, score="leave-one-out").plan(program, context)
    assert everything.decisions[numbers(everything).index(2)].detail["score"] == 0


def test_keep_ratio_rounds_towards_keeping(make, context) -> None:
    """At least the given part stays."""
    _, program = make("pre")
    counts = {ratio: len(DropLayers(keep_ratio=ratio).plan(program, context).decisions) for ratio in (0.75, 0.6, 0.5, 0.3)}
    assert counts == {0.75: 1, 0.6: 1, 0.5: 2, 0.3: 2}


@pytest.mark.parametrize("score", ["influence", "leave-one-out"])
def test_budget_holds(make, context, score) -> None:
    """The loss rises by no more than the budget, and by more with the next unit, which is said."""
    model, program = make("pre")
    steps = DropLayers(drop=4, score=score).plan(program, context)
    rises = [decision.detail["loss_increase"] for decision in steps.decisions]
    budget = max(1e-6, (max(rises[:2]) + max(rises)) / 2)
    plan = DropLayers(budget=budget, score=score).plan(program, context)
    expected = list(itertools.takewhile(lambda rise: rise <= budget, rises))
    assert [d.detail["loss_increase"] for d in plan.decisions] == expected
    assert 2 <= len(expected) < 4
    (over,) = [refusal for refusal in plan.refusals if "the budget is" in refusal.reason]
    assert over.where == steps.decisions[len(expected)].where
    left = entropy(without(model, "block", numbers(plan)), context) - entropy(model, context)
    assert left <= budget + 1e-5


def test_weights_and_costs_go(make, context) -> None:
    """Weights of what is left out leave the program; bytes and operations fall by what the plan says."""
    _, program = make("pre")
    sizes = {"batch": 3, "tokens": 17}
    for unit in UNITS:
        step = DropLayers(drop=2, unit=unit)
        plan = step.plan(program, context)
        result = step.apply(program, plan)

        def saved(name: str, plan: Plan = plan) -> int:
            return sum(decision.detail[f"saved_{name}"] for decision in plan.decisions)

        held = [sum(w.nbytes for w in p.weights.values()) for p in (program, result)]
        costs = [cost_of_program(p).at(sizes) for p in (program, result)]
        assert held[0] - held[1] == saved("weight_bytes") > 0
        assert costs[0].flops - costs[1].flops == saved("flops") > 0
        assert costs[0].moved_bytes - costs[1].moved_bytes == saved("moved_bytes") > 0


def test_an_edited_plan_is_obeyed(make, context, tokens) -> None:
    """Decisions can be taken out and put in another order; blocks that follow each other among them."""
    model, program = make("pre")
    step = DropLayers(drop=4)
    plan = step.plan(program, context)
    given = tokens(5)
    for chosen in ([1], [3, 0], [1, 2], [2, 1], [3, 2, 1, 0]):
        decisions = tuple(plan.decisions[numbers(plan).index(k)] for k in chosen)
        result = step.apply(program, dataclasses.replace(plan, decisions=decisions))
        verify(result)
        with torch.no_grad():
            expected = without(model, "block", chosen)(given)
        assert ((result.reference(given) - expected).abs().max() / expected.abs().max()).item() < 1e-6


def test_a_second_run_leaves_out_more(make, context) -> None:
    """Each run counts anew."""
    _, program = make("pre")
    once = run_passes(program, ["drop-layers:drop=1"], context)
    twice = run_passes(once, ["drop-layers:drop=1"], context)
    at_once = run_passes(program, ["drop-layers:drop=2,greedy=true"], context)
    assert print_program(twice) == print_program(at_once)


def test_planning_changes_nothing(make, context) -> None:
    """The program is left alone, and the plan is the same twice."""
    _, program = make("pre")
    before, weights = print_program(program), dict(program.weights)
    step = DropLayers(drop=2, score="leave-one-out")
    plan = step.plan(program, context)
    assert step.plan(program, context) == plan
    step.apply(program, plan)
    assert print_program(program) == before
    assert program.weights == weights
    assert parse_pass(format_pass(step)) == step


def test_padding_counts_for_nothing(captured, families) -> None:
    """What stands where the attention mask is 0 changes no score and no loss."""
    program = captured("bert")
    calls = [families["bert"].sample(4, 30, seed) for seed in (1, 2)]
    others = copy.deepcopy(calls)
    for call in others:
        call["input_ids"][call["attention_mask"] == 0] = 5
    step = DropLayers(drop=1, unit="feed-forward")
    plans = [step.plan(program, Context(tuple(given))) for given in (calls, others)]
    one, other = (plan.decisions[0] for plan in plans)
    assert (one.where, one.detail["loss"]) == (other.where, "cosine")
    for name in ("score", "loss_increase"):
        assert one.detail[name] == pytest.approx(other.detail[name], rel=1e-4)
    with pytest.raises(PassError, match=r"have 220 tokens, and at least 221 are wanted"):
        DropLayers(drop=1, minimum_tokens=221).plan(program, Context(tuple(calls)))


class Caching(nn.Module):
    """Hands out what its second block's attention computes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys: list[torch.Tensor] = []
        hook = self.inner.layers[1].qkv.register_forward_hook(lambda module, given, result: keys.append(result))
        logits = self.inner(ids)
        hook.remove()
        return logits, keys[0]


def test_a_block_that_is_read_elsewhere_stays(make, context, tokens) -> None:
    """Where keys are among the results, their block is refused with the reason, and its feed-forward branch is not."""
    model, _ = make("pre")
    program = graphwright.capture(Caching(copy.deepcopy(model)), tokens(0), check=False)
    plan = DropLayers(drop=3).plan(program, context)
    assert sorted(numbers(plan)) == [0, 2, 3]
    assert "block 1: %" in plan.refusals[0].reason
    assert "is a result of the model or is read outside of it" in plan.refusals[0].reason
    with pytest.raises(PassError, match=r"drop=4 of unit=block, and there are 3 that can go, and 1 more that cannot"):
        DropLayers(drop=4).plan(program, context)
    assert len(DropLayers(drop=4, unit="feed-forward").plan(program, context).decisions) == 4


def test_models_without_blocks_are_refused(captured, families) -> None:
    """There is a reason instead of a decision."""
    plan = DropLayers(drop=1).plan(captured("convnet"), Context((families["convnet"].sample(2, 7, 0),)))
    assert plan.decisions == ()
    assert plan.refusals[0].reason == "no residual blocks were found: there is nothing to leave out"


def test_calibration_is_needed(make, tokens) -> None:
    """None, too little, and calls of another model are errors that say what to do."""
    _, program = make("pre")
    step = DropLayers(drop=1)
    with pytest.raises(PassError, match=r"there are none: compile with calibration=\[...\]"):
        step.plan(program, Context())
    with pytest.raises(PassError, match="the 1 calibration calls have 63 tokens, and at least 64 are wanted"):
        step.plan(program, Context((((tokens(0, 3, 21),), {}),)))
    assert step.plan(program, Context((((tokens(0, 4, 16),), {}),))).decisions
    with pytest.raises(PassError, match=r"calibration call 1 is not what the model takes: .*'idz'"):
        step.plan(program, Context(({"ids": tokens(0)}, {"idz": tokens(0)})))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": -1}, "drop must be at least 0, got -1"),
        ({"keep_ratio": 0.0}, r"keep_ratio must be in \(0, 1\], got 0.0"),
        ({"keep_ratio": 1.5}, r"keep_ratio must be in \(0, 1\], got 1.5"),
        ({"keep_ratio": math.nan}, r"keep_ratio must be in \(0, 1\], got nan"),
        ({"budget": 0.0}, "budget must be above 0 and finite"),
        ({"budget": math.nan}, "budget must be above 0 and finite"),
        ({"drop": 1, "budget": 0.1}, "drop and budget each say how much to leave out"),
        ({"minimum_tokens": 0}, "minimum_tokens must be at least 1"),
        ({"unit": "atention"}, "Did you mean 'attention'"),
        ({"score": "loss"}, "there is no score 'loss'"),
    ],
)
def test_options_out_of_range(options, message) -> None:
    """Options are checked when the pass is made."""
    with pytest.raises(OptionError, match=message):
        DropLayers(**options)


def test_more_than_there_are_is_an_error(make, context) -> None:
    """The number is never cut down to what there is."""
    _, program = make("pre")
    with pytest.raises(PassError, match=r"drop=5 of unit=attention, and there are 4 that can go"):
        DropLayers(drop=5, unit="attention").plan(program, context)


def test_plans_that_do_not_fit(make, context) -> None:
    """Nodes that are missing, named twice, of another shape or of later are named."""
    _, program = make("pre")
    step = DropLayers(drop=4)
    plan = step.plan(program, context)
    first = plan.decisions[numbers(plan).index(0)]

    def apply(*decisions) -> None:
        step.apply(program, Plan(step.name, decisions))

    with pytest.raises(PlanError, match="names %gone, which is not in the graph"):
        apply(dataclasses.replace(first, where="gone"))
    with pytest.raises(PlanError, match="does not say what to `keep`"):
        apply(dataclasses.replace(first, detail={}))
    with pytest.raises(PlanError, match=f"names %{first.where} twice"):
        apply(first, first)
    later = plan.decisions[numbers(plan).index(3)].where
    with pytest.raises(PlanError, match="it is not computed before it"):
        apply(dataclasses.replace(first, detail={"keep": later}))
    wide = program.results[0].name
    with pytest.raises(PlanError, match=f"%{first.detail['keep']} is .* and %{wide} is "):
        apply(dataclasses.replace(first, where=wide))


def test_compiled_end_to_end(make, context, tokens) -> None:
    """`compile` with sample calls leaves the block out of the kernels, the weights and the results."""
    model, program = make("pre")
    plain = graphwright.compile(program)
    calls = [((call["ids"],), {}) for call in context.calibration]
    compiled = graphwright.compile(program, passes=["drop-layers:drop=1"], calibration=calls)
    plan = compiled.report.records[-1].plan
    given = tokens(4)
    with torch.no_grad():
        expected = without(model, "block", numbers(plan))(given)
    assert ((compiled(given) - expected).abs().max() / expected.abs().max()).item() < 1e-5
    saved = plan.decisions[0].detail["saved_weight_bytes"]
    assert plain.memory.weight_bytes - compiled.memory.weight_bytes == saved > 0
