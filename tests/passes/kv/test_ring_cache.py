"""Caches of windows: which layers get them, that nothing changes but memory, and that memory is given back."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import graphwright
from graphwright.ir import dialect
from graphwright.ir.errors import OptionError, PlanError
from graphwright.ir.program import calls
from graphwright.ir.verifier import verify
from graphwright.passes.base import Context
from graphwright.passes.kv.ring_cache import RingCache
from graphwright.pipeline import DEFAULT_PASSES, run_passes
from graphwright.runtime.kv_cache import KVCache, cache_bytes

WINDOW = 5
NAMES = ["mistral", pytest.param("gemma3", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def derived(captured):
    """Return a family's program with caches, by name."""

    @functools.cache
    def make(family: str):
        return run_passes(captured(family), [*DEFAULT_PASSES, "cached-decode", "dead-code"])

    return make


@pytest.fixture(scope="module")
def generators(built, families):
    """Return a family's model compiled to generate, without and with rings."""

    @functools.cache
    def make(family: str):
        sample = families[family].sample(2, 9, 0)
        return [
            graphwright.compile(built(family), **sample, check=False, generate=True, passes=passes)
            for passes in ([], ["ring-cache"])
        ]

    return make


def ringed(program, edit=lambda plan: plan, **options):
    """Return the program after the pass, verified."""
    step = RingCache(**options)
    result = step.apply(program, edit(step.plan(program, Context())))
    verify(result)
    return result


def with_detail(plan, **detail):
    """Return the plan with its first decision changed."""
    first, *others = plan.decisions
    return dataclasses.replace(plan, decisions=(dataclasses.replace(first, detail={**first.detail, **detail}), *others))


def decoded(program, ids: torch.Tensor, parts: list[int]) -> torch.Tensor:
    """Return the scores of all tokens, which come in parts; states are full of NaN at first."""
    states = [tensor.fill_(torch.nan) for tensor in KVCache(program.signature, len(ids), ids.shape[1]).tensors.values()]
    module, scores, past = program.module(), [], 0
    for part in ids.split(parts, 1):
        with torch.no_grad():
            results = module(part, torch.full((len(ids),), past), *states)
        states = [results[at] for at in program.states.values()]
        scores.append(results[0])
        past += part.shape[1]
    return torch.cat(scores, 1)


def prompts(batch: int, tokens: int) -> torch.Tensor:
    """Return random tokens."""
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def test_layers_with_a_window_get_rings(derived) -> None:
    """All layers of Mistral; of Gemma 3 those that are local, and the other is refused with its mask."""
    step = RingCache()
    assert [d.detail["slots"] for d in step.plan(derived("mistral"), Context()).decisions] == [WINDOW, WINDOW]
    plan = step.plan(derived("gemma3"), Context())
    assert [d.detail["layer"] for d in plan.decisions] == [0]
    assert [r.reason for r in plan.refusals] == [
        "layer 1: its attention has no window, and may see tokens however far back: q - k >= 0"
    ]
    result = ringed(derived("gemma3"))
    targets = [node.target for node in calls(result.graph)]
    assert targets.count(dialect.kv_ring_attention) == targets.count(dialect.kv_attention) == 1
    assert targets.count(dialect.kv_append) == 2


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize("parts", [[40], [20, 1, 19], [3, 4, 1, 1, 1, 12, 18]])
def test_scores_are_those_of_caches_for_all_tokens(derived, name, parts) -> None:
    """A prompt longer than the window, parts of it shorter and longer, and token by token."""
    ids = prompts(2, 40)
    expected = decoded(derived(name), ids, [40])
    got = decoded(ringed(derived(name)), ids, parts)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_plan_alone_is_no_change(derived) -> None:
    """Without decisions the program stays the same object; the given program is never changed."""
    program = derived("mistral")
    before = str(program.graph)
    assert ringed(program, edit=lambda plan: dataclasses.replace(plan, decisions=())) is program
    ringed(program)
    assert str(program.graph) == before


@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokens_are_generated(generators, name) -> None:
    """Prompts shorter and longer than the window, several at a time, and padded ones as if they were alone."""
    plain, rings = generators(name)
    for batch, tokens in ((1, 1), (2, 3), (3, 31)):
        ids = prompts(batch, tokens)
        expected = plain.generate(ids, max_new_tokens=20)
        assert torch.equal(rings.generate(ids, max_new_tokens=20), expected)
    mask = torch.ones(3, 31, dtype=torch.long)
    mask[0, :29] = mask[1, 7:] = 0
    got = rings.generate(ids, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(got, plain.generate(ids, attention_mask=mask, max_new_tokens=20))


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_tokens(generators, name) -> None:
    """A ring takes the window's bytes and no more, as they are allocated; the other layers take what they took."""
    token, others = 2 * 2 * 8 * 4, int(name == "gemma3")
    plain, rings = generators(name)
    assert plain.generator.cache_bytes.per_token == 2 * token
    assert rings.generator.cache_bytes.per_token == others * token
    assert rings.generator.cache_bytes.per_sequence == (2 - others) * WINDOW * token
    for room in (256, 1024):
        held = KVCache(rings.generator.step.signature, 3, room)
        assert held.nbytes == 3 * (others * room + (2 - others) * WINDOW) * token


@pytest.mark.parametrize("name", NAMES)
def test_long_answers_make_room(generators, name, monkeypatch) -> None:
    """Rings keep what they have while other layers' caches grow."""
    from graphwright.runtime import generation, kv_cache

    plain, rings = generators(name)
    ids = prompts(2, 7)
    expected = plain.generate(ids, max_new_tokens=40)
    monkeypatch.setattr(kv_cache, "STEP", 8)
    monkeypatch.setattr(generation, "FIRST_ROOM", 1)
    rings.generator.release()
    assert torch.equal(rings.generate(ids, max_new_tokens=40), expected)


def test_a_saved_model_keeps_its_rings(generators, tmp_path) -> None:
    """Where no state depends on the number of tokens, too."""
    _, rings = generators("mistral")
    rings.save(tmp_path / "model.gw")
    loaded = graphwright.load(tmp_path / "model.gw")
    ids = prompts(2, 9)
    assert torch.equal(loaded.generate(ids, max_new_tokens=12), rings.generate(ids, max_new_tokens=12))
    assert loaded.generator.cache_bytes == rings.generator.cache_bytes


def test_layers_can_be_chosen(derived) -> None:
    """The others keep their caches, and nothing is said of them; a layer that is not there is an error."""
    result = ringed(derived("mistral"), layers=(1,))
    assert sorted(result.states) == ["k_cache_0", "k_ring_1", "v_cache_0", "v_ring_1"]
    bytes_of = cache_bytes(result.signature)
    assert bytes_of.per_token > 0
    assert bytes_of.per_sequence > 0
    with pytest.raises(OptionError, match="layers must be 0 to 1, got 2"):
        RingCache(layers=(2,)).plan(derived("mistral"), Context())
    with pytest.raises(OptionError, match="counted from 0, got -1"):
        RingCache(layers=(-1,))


def test_plans_edited_by_hand_are_obeyed(derived) -> None:
    """A ring may have more slots than the window, and computes the same."""
    program, ids = derived("mistral"), prompts(2, 40)
    result = ringed(program, edit=lambda plan: with_detail(plan, slots=9))
    assert [spec.shape[2] for spec in result.signature.tensors[2:]] == [9, 9, WINDOW, WINDOW]
    expected = decoded(program, ids, [40])
    torch.testing.assert_close(decoded(result, ids, [11] * 3 + [7]), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plan: with_detail(plan, slots=WINDOW - 1), "sees 5 tokens, and the decision gives it slots=4"),
        (lambda plan: with_detail(plan, slots="5"), "slots='5'"),
        (
            lambda plan: dataclasses.replace(
                plan, decisions=(dataclasses.replace(plan.decisions[0], where="kv_append_default"),)
            ),
            "is no attention over a cache",
        ),
        (lambda plan: dataclasses.replace(plan, decisions=plan.decisions * 2), "twice"),
    ],
)
def test_plans_that_do_not_fit(derived, edit, message) -> None:
    """A ring that is too small, a place that is none, and a place named twice are errors."""
    with pytest.raises(PlanError, match=message):
        ringed(derived("mistral"), edit=edit)


def test_what_has_no_window_is_refused(captured, derived) -> None:
    """A program without caches, layers that see everything, and caches that are rings already."""
    step = RingCache()
    assert [r.reason for r in step.plan(captured("mistral"), Context()).refusals] == ["the program has no caches"]
    plan = step.plan(derived("llama"), Context())
    assert not plan.decisions
    assert len(plan.refusals) == 2
    again = step.plan(ringed(derived("mistral")), Context())
    assert not again.decisions
    assert all("another format already" in refusal.reason for refusal in again.refusals)


def test_a_window_of_all_positions_is_refused(derived) -> None:
    """There is nothing to win where the model has no more positions than the window."""
    program = derived("mistral").copy()
    for high, refused in ((WINDOW, True), (WINDOW + 1, False)):
        program.dimensions["capacity"] = dataclasses.replace(program.dimensions["capacity"], high=high)
        plan = RingCache().plan(program, Context())
        assert bool(plan.refusals) is refused
        if refused:
            assert "no smaller than the 5 positions" in plan.refusals[0].reason
