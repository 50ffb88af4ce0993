"""Programs with caches: what they are derived from, what is refused, and that they compute the same."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from graphwright.ir import dialect
from graphwright.ir.errors import PassError, PlanError
from graphwright.ir.fixing import fix_dimension
from graphwright.ir.program import calls
from graphwright.ir.verifier import verify
from graphwright.passes.base import Context
from graphwright.passes.kv.cached_decode import CachedDecode
from graphwright.passes.kv.last_token import LastToken
from graphwright.passes.kv.self_check import check_derived

WORDS = 97


def planned(program):
    """Return the plan for a program."""
    return CachedDecode().plan(program, Context())


def derived(program, **options):
    """Return the program with caches."""
    step = CachedDecode(**options)
    return step.apply(program, step.plan(program, Context()))


def empty_caches(program, batch: int, capacity: int) -> list[torch.Tensor]:
    """Return caches whose slots hold NaN."""
    shapes = [[batch, *(n if isinstance(n, int) else capacity for n in spec.shape[1:])] for spec in program.signature.tensors]
    names = [spec.name for spec in program.signature.tensors]
    return [torch.full(shape, torch.nan) for shape, name in zip(shapes, names, strict=True) if name in program.states]


ACCEPTED = [
    "plain",
    "table",
    "table of positions",
    "waves",
    "before or own",
    "window",
    "sinks and window",
    "triangle",
    "slopes",
]


@pytest.mark.parametrize("kind", ACCEPTED)
def test_token_by_token_gives_what_the_plain_program_gives(raised, kind) -> None:
    """One token at a time, from empty caches that hold NaN, gives the scores of the whole sequence at once."""
    program = derived(raised(kind))
    verify(program)
    ids = torch.randint(0, WORDS, (2, 13), generator=torch.Generator().manual_seed(3))
    expected = raised(kind).reference(ids)
    module, caches, scores = program.module(), empty_caches(program, 2, 13), []
    for position in range(13):
        with torch.no_grad():
            new, *caches = module(ids[:, position : position + 1], torch.full((2,), position), *caches)
        scores.append(new)
    torch.testing.assert_close(torch.cat(scores, 1), expected, atol=1e-4, rtol=1e-4)


REFUSED = {
    "mean": "mixes tokens: reduces over the token axis",
    "running sum": "mixes tokens: .*cumsum",
    "shift": "mixes tokens: a slice",
    "roll": "mixes tokens: .*roll",
    "flip": "mixes tokens: .*flip",
    "scrambling view": "mixes tokens: a view splits or moves",
    "length as a factor": "the number of tokens is used as a value",
    "length in a tensor": "of all tokens or of their number",
    "end of a table": "depends on the length",
    "positions from the end": "does not follow from its position",
    "last position": "of all tokens or of their number",
    "random numbers": "does not follow from its position",
    "one step ahead": "the attention is not causal: q - k \\+ 1 >= 0",
    "reversed": "depends on the number of tokens",
    "prefix": "the attention is not causal",
    "both ways": "the attention is not causal",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_causal_decoder_is_refused(raised, kind) -> None:
    """The refusal names the operation and the line of the model, and nothing is changed."""
    plan = planned(raised(kind))
    assert plan.decisions == ()
    (refusal,) = plan.refusals
    assert re.search(REFUSED[kind], refusal.reason), refusal.reason
    assert "conftest.py" in refusal.reason
    assert CachedDecode().apply(raised(kind), plan) is raised(kind)


def test_a_program_without_attention_is_refused(builder) -> None:
    """There is nothing to keep."""
    made = builder()
    x = made.input("x", "batch", "tokens", 8)
    program = made.program(made.call(torch.ops.aten.relu.default, x))
    assert "no attention" in planned(program).refusals[0].reason


def test_several_inputs_with_tokens_are_refused(builder) -> None:
    """Only the mask and the positions are known to be the same for every sequence."""
    from types import SimpleNamespace

    made = builder()
    first, second = (made.input(name, "batch", "tokens", 8) for name in ("x", "y"))
    program = made.program(made.call(torch.ops.aten.add.Tensor, first, second))
    with program.graph.inserting_before(program.output):
        q = program.call(torch.ops.aten.unsqueeze.default, first, 1)
        program.call(dialect.attention, q, q, q, [], None, predicate="q - k >= 0", scale=1.0)
    program.signature = SimpleNamespace(tensors=[SimpleNamespace(name="x"), SimpleNamespace(name="y")])
    assert "must hold the tokens; the inputs are x, y" in planned(program).refusals[0].reason


def test_the_derived_program_has_states(raised) -> None:
    """Each attention gets two caches, which are inputs and, with the new entries, results; a second run changes nothing."""
    program = derived(raised("plain"))
    assert [spec.name for spec in program.signature.tensors] == ["input_ids", "past", "k_cache_0", "v_cache_0"]
    assert program.states == {"k_cache_0": 1, "v_cache_0": 2}
    assert len(list(calls(program.graph, dialect.kv_append))) == 2
    assert list(calls(program.graph, dialect.attention)) == []
    assert planned(program).decisions == ()
    assert program.copy().states == program.states


def test_tables_limit_the_capacity(raised) -> None:
    """There are no more slots than positions in a table; without one there is no limit."""
    assert derived(raised("table")).dimensions["capacity"].high == 64
    assert derived(raised("plain")).dimensions["capacity"].high is None


def test_a_plan_for_another_program_is_an_error(raised) -> None:
    """What a plan says of an attention must be what the attention is."""
    plan = planned(raised("plain"))
    (decision,) = plan.decisions
    other = dataclasses.replace(decision, detail={**decision.detail, "predicate": "q - k - 1 >= 0"})
    with pytest.raises(PlanError, match="other attentions"):
        CachedDecode().apply(raised("plain"), dataclasses.replace(plan, decisions=(other,)))
    with pytest.raises(PlanError, match="does not say 'predicate'"):
        CachedDecode().apply(raised("plain"), dataclasses.replace(plan, decisions=(dataclasses.replace(decision, detail={}),)))


def test_the_check_finds_a_program_that_computes_something_else(raised) -> None:
    """A wrong mask, and positions that start anew in each call, are found."""
    wrong_mask = derived(raised("plain"), check=False)
    for node in calls(wrong_mask.graph, dialect.kv_attention):
        node.kwargs = {**node.kwargs, "predicate": "q - k >= 0 & k - q + 3 >= 0"}
    with pytest.raises(PassError, match="computes something else"):
        check_derived(raised("plain"), wrong_mask)
    wrong_place = derived(raised("table"), check=False)
    (past,) = (node for node in wrong_place.inputs if node.name == "past")
    (column,) = (user for user in past.users if user.target is torch.ops.aten.unsqueeze.default)
    with wrong_place.graph.inserting_after(column):
        zeros = wrong_place.call(torch.ops.aten.zeros_like.default, column)
    column.replace_all_uses_with(zeros, delete_user_cb=lambda user: user is not zeros)
    with pytest.raises(PassError, match="computes something else"):
        check_derived(raised("table"), wrong_place)


def test_a_dimension_is_fixed(raised) -> None:
    """With one token, sizes and the signature say so, and the given program stays."""
    program = derived(raised("plain"))
    single = fix_dimension(program, "tokens", 1)
    verify(single)
    assert single.signature.tensors[0].shape == ("batch", 1)
    assert "tokens" not in single.dimensions
    assert program.signature.tensors[0].shape == ("batch", "tokens")


def test_one_token_of_each_sequence_is_kept(raised) -> None:
    """The product with the vocabulary is computed for the token that the call names."""
    program = derived(raised("plain"))
    step = LastToken()
    plan = step.plan(program, Context())
    short = step.apply(program, plan)
    verify(short)
    assert step.plan(short, Context()).decisions == ()
    ids = torch.randint(0, WORDS, (2, 7))
    whole, *_ = program.module()(ids, torch.zeros(2, dtype=torch.int64), *empty_caches(program, 2, 8))
    last = torch.tensor([6, 3])
    kept, *_ = short.module()(ids, torch.zeros(2, dtype=torch.int64), *empty_caches(program, 2, 8), last)
    assert kept.shape == (2, 1, WORDS)
    torch.testing.assert_close(kept[:, 0], whole[torch.arange(2), last])
    assert step.plan(raised("plain"), Context()).refusals[0].reason == "the program has no caches"
