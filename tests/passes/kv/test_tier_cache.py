"""Caches in two tiers: which layers, in which format, and what comes of it."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import graphwright
from graphwright.ir import dialect
from graphwright.ir.errors import OptionError, PlanError
from graphwright.ir.printer import print_program
from graphwright.ir.program import calls
from graphwright.ir.verifier import verify
from graphwright.passes.base import Context
from graphwright.passes.kv.tier_cache import TierCache
from graphwright.passes.registry import format_pass, parse_pass
from graphwright.pipeline import DEFAULT_PASSES, run_passes
from graphwright.runtime.kv_cache import KVCache, cache_bytes

SMALL = {"group_size": 8, "residual": 8}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Let models this small be computed by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def derived(captured, raised):
    """Return the program with caches of a family, or of a toy, by name."""

    @functools.cache
    def make(name: str = "llama", toy: bool = False):
        if toy:
            return run_passes(raised(name), ["cached-decode", "dead-code"])
        return run_passes(captured(name), [*DEFAULT_PASSES, "cached-decode", "dead-code"])

    return make


def tiered(program, edit=lambda plan: plan, **options):
    """Return the program after the pass, verified."""
    step = TierCache(**{**SMALL, **options})
    result = step.apply(program, edit(step.plan(program, Context())))
    verify(result)
    return result


def attentions(program) -> list[str]:
    """Return the attentions over caches, in order."""
    names = [getattr(node.target, "_opname", "") for node in calls(program.graph)]
    return [name for name in names if name.endswith("attention")]


def decoded(program, ids: torch.Tensor, parts: list[int]) -> torch.Tensor:
    """Return the scores of all tokens, which come in parts."""
    cache = KVCache(program.signature, len(ids), ids.shape[1])
    states, module, scores, past = list(cache.tensors.values()), program.module(), [], 0
    for part in ids.split(parts, 1):
        with torch.no_grad():
            results = module(part, torch.full((len(ids),), past), *states)
        states = [results[at] for at in program.states.values()]
        scores.append(results[0])
        past += part.shape[1]
    return torch.cat(scores, 1)


def tokens(count: int = 72, batch: int = 2) -> torch.Tensor:
    """Return random tokens."""
    return torch.randint(3, 97, (batch, count), generator=torch.Generator().manual_seed(count))


PARTS = [40, 1, 15, 16]


def test_keys_and_values_of_all_layers(derived) -> None:
    """Every attention reads two tiers, states are exchanged, nothing is kept twice, and a second run changes nothing."""
    program = derived()
    before = print_program(program)
    result = tiered(program)
    assert print_program(program) == before
    assert attentions(result) == ["kv_tiered_attention"] * len(attentions(program))
    assert not list(calls(result.graph, dialect.kv_append, dialect.kv_attention))
    assert len(result.states) == 6 * len(program.states)
    for node in calls(result.graph, dialect.kv_tiered_append):
        found = {
            name: node.kwargs[name] for name in ("low_bits", "fine_bits", "residual", "group_size", "promoted", "balanced")
        }
        assert found == {"low_bits": 2, "fine_bits": 6, "residual": 8, "group_size": 8, "promoted": 2, "balanced": True}
    again = TierCache(**SMALL).plan(result, Context())
    assert again.decisions == ()
    assert all("of another format already" in refusal.reason for refusal in again.refusals)


def test_all_important_ones_as_they_are_is_the_identity(derived) -> None:
    """Nothing is rewritten, and the refusals say why."""
    program = derived()
    step = TierCache(important=1, high=16)
    plan = step.plan(program, Context())
    assert plan.decisions == ()
    assert all("every token would be kept as it is" in refusal.reason for refusal in plan.refusals)
    assert step.apply(program, plan) is program


def test_tokens_of_a_call_and_the_newest_are_exact(derived) -> None:
    """A sequence within the residual window, and a prompt that starts one, give what they give without the pass."""
    program, ids = derived(), tokens()
    wide = tiered(program, residual=72)
    torch.testing.assert_close(decoded(wide, ids, PARTS), decoded(program, ids, PARTS), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded(tiered(program), ids, [72]), decoded(program, ids, [72]), rtol=1e-4, atol=1e-5)


def test_errors_fall_as_budgets_grow(derived) -> None:
    """With more bits, more important tokens and more exact ones, scores are nearer to the exact ones."""
    program, ids = derived(), tokens()
    wanted = decoded(program, ids, PARTS)

    def error(**options) -> float:
        return float((decoded(tiered(program, **options), ids, PARTS) - wanted).norm())

    by_low = [error(low_bits=bits, important=0) for bits in (2, 3, 4)]
    assert by_low[0] > by_low[1] > by_low[2] > 0
    by_high = [error(important=1, high=bits) for bits in (3, 5, 8)]
    assert by_high[0] > 2 * by_high[1] > 4 * by_high[2] > 0
    by_share = [error(important=share) for share in (0, 0.5, 1)]
    assert by_share[0] > by_share[1] > 5 * by_share[2] > 0
    by_layers = [error(layers=layers) for layers in (None, (1,), ())]
    assert by_layers[0] > by_layers[1] > by_layers[2] == 0


def test_bytes_are_those_that_are_allocated(derived) -> None:
    """What decisions say is what the tensors take, at any capacity; a smaller share and fewer bits take fewer bytes."""
    program = derived()
    exact, taken = cache_bytes(program.signature), []
    settings = [{"important": 0}, {}, {"important": 1 / 32, "group_size": 32}, {"low_bits": 3, "high": 4}, {"high": 16}]
    for options in settings:
        step = TierCache(**{**SMALL, **options})
        plan = step.plan(program, Context())
        result = step.apply(program, plan)
        found = cache_bytes(result.signature)
        assert found.per_token == sum(decision.detail["bytes_per_token"] for decision in plan.decisions)
        assert found.per_sequence == sum(decision.detail["bytes_per_sequence"] for decision in plan.decisions)
        for room in (100, 600):
            cache = KVCache(result.signature, 3, room)
            assert cache.nbytes == 3 * (found.per_token * cache.capacity + found.per_sequence)
            assert cache.nbytes == sum(tensor.nbytes for tensor in cache.tensors.values())
        taken.append(found.per_token)
    assert taken[0] < taken[1] < taken[4] < exact.per_token
    assert taken[0] < taken[2] < taken[1]


def test_options_as_text(derived) -> None:
    """All of them come back, and layers can be chosen."""
    step = parse_pass(
        "tier-cache:low_bits=3,high=6,important=0.5,residual=16,group_size=16,balance=false,decay=0.5,window=9,layers=1"
    )
    assert parse_pass(format_pass(step)) == step
    (decision,) = step.plan(derived(), Context()).decisions
    assert decision.detail == {
        **{"layer": 1, "low_bits": 3, "fine_bits": 3, "residual": 16, "group_size": 16, "promoted": 8},
        **{"balanced": False, "decay": 0.5, "window": 9},
        **{name: decision.detail[name] for name in ("bytes_per_token", "bytes_per_sequence")},
    }
    result = step.apply(derived(), step.plan(derived(), Context()))
    assert attentions(result) == ["kv_attention", "kv_tiered_attention"]
    assert next(calls(result.graph, dialect.kv_tiered_mass)).kwargs["window"] == 9
    assert next(calls(result.graph, dialect.kv_tiered_append)).kwargs["decay"] == 0.5
    with pytest.raises(OptionError, match="layers must be 0 to 1, got 2"):
        TierCache(layers=(2,)).plan(derived(), Context())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_bits": 5}, "low_bits must be 2, 3 or 4, got 5"),
        ({"low_bits": 3, "high": 3}, "high must be 4 to 8, or 16 for the model's dtype, got 3"),
        ({"high": 9}, "got 9"),
        ({"important": 1.5}, "important must be 0 to 1, got 1.5"),
        ({"important": 0.01}, "important=0.01 of groups of 32 tokens is less than one: give 0, or at least 0.03125"),
        ({"group_size": 64}, "group_size must be 8, 16 or 32, got 64"),
        ({"residual": -1}, "residual must be at least 0, got -1"),
        ({"decay": 1.2}, "decay must be above 0 and at most 1, got 1.2"),
        ({"window": -2}, "window must be at least 0, got -2"),
    ],
)
def test_options_out_of_range(options, message) -> None:
    """Each is an error that says what may stand there."""
    with pytest.raises(OptionError, match=f"tier-cache: .*{message}"):
        TierCache(**options)


def test_plans_edited_by_hand_are_obeyed(derived) -> None:
    """Another format, and a decision that is taken out."""

    def edit(plan):
        last = plan.decisions[-1]
        detail = {**last.detail, "low_bits": 4, "fine_bits": 0, "promoted": 3, "residual": 24, "balanced": False}
        return dataclasses.replace(plan, decisions=(dataclasses.replace(last, detail=detail),))

    result = tiered(derived(), edit)
    assert attentions(result) == ["kv_attention", "kv_tiered_attention"]
    append = next(calls(result.graph, dialect.kv_tiered_append))
    assert (append.kwargs["low_bits"], append.kwargs["promoted"], append.kwargs["balanced"]) == (4, 3, False)
    assert append.args[7].meta["val"].shape[2] == 24 + 8


FORM = {
    "low_bits": 2,
    "fine_bits": 6,
    "residual": 8,
    "group_size": 8,
    "promoted": 2,
    "balanced": True,
    "decay": 1.0,
    "window": 0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"where": "nowhere"}, "names %nowhere, which is not in the graph"),
        ({"where": "a product"}, "cannot be kept in two tiers: it is no attention over a cache"),
        ({"detail": {"low_bits": 4}}, "does not say 'fine_bits'"),
        ({"detail": {**FORM, "low_bits": 5}}, "is of no format: low_bits must be 2, 3 or 4, got 5"),
        ({"detail": {**FORM, "promoted": 9}}, "promoted must be 0 to 8, got 9"),
        ({"detail": {**FORM, "window": "few"}}, "is of no format: invalid literal"),
        ({"detail": {**FORM, "window": -1}}, "window must be at least 0, got -1"),
        ({"detail": {**FORM, "decay": 0}}, "decay must be above 0 and at most 1, got 0"),
    ],
)
def test_plans_that_do_not_fit(derived, change, message) -> None:
    """A plan for another program, or of no format, is an error that says why."""
    program = derived()
    name = next(node.name for node in calls(program.graph) if node.target._opname == "linear")
    change = {**change, **({"where": name} if change.get("where") == "a product" else {})}

    def edit(plan):
        return dataclasses.replace(plan, decisions=(dataclasses.replace(plan.decisions[0], **change),))

    with pytest.raises(PlanError, match=message):
        tiered(program, edit)


def test_a_program_without_caches_is_refused(captured) -> None:
    """Which says so."""
    plan = TierCache().plan(captured("llama"), Context())
    assert [refusal.reason for refusal in plan.refusals] == ["the program has no caches"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("window", "hides more than later tokens"),
        ("sinks and window", "hides more than later tokens"),
        ("slopes", "has a bias, and attention over two tiers has none"),
    ],
)
def test_other_masks_are_refused(derived, kind, reason) -> None:
    """The layer keeps its cache, and the reason says what its attention does."""
    plan = TierCache(**SMALL).plan(derived(kind, toy=True), Context())
    assert plan.decisions == ()
    assert all(reason in refusal.reason for refusal in plan.refusals)
    assert TierCache(**SMALL).plan(derived("plain", toy=True), Context()).decisions


def test_codes_that_do_not_fill_bytes_are_refused(derived, monkeypatch) -> None:
    """Heads of a size that is no multiple of what a byte holds keep their cache."""
    from graphwright.passes.kv.cache_format import Site

    monkeypatch.setattr(Site, "value_size", property(lambda site: 6))
    plan = TierCache(low_bits=3, **SMALL).plan(derived(), Context())
    assert plan.decisions == ()
    assert all("values of 6 features do not fill whole bytes at 3 bits" in refusal.reason for refusal in plan.refusals)


def test_caches_that_others_read_are_refused(derived) -> None:
    """The layer keeps its cache, and the reason names what is read."""
    program = derived().copy()
    node = next(calls(program.graph, dialect.kv_attention))
    with program.graph.inserting_after(node):
        more = program.call(torch.ops.aten.relu.default, node.args[1])
    program.output.args = ((*program.results, more),)
    plan = TierCache(**SMALL).plan(program, Context())
    assert [decision.detail["layer"] for decision in plan.decisions] == [1]
    (refusal,) = plan.refusals
    assert (refusal.where, "is read by others too" in refusal.reason) == (node.name, True)


def test_generating(built, families, tmp_path) -> None:
    """Prompts of different lengths are continued as alone, near to what the exact cache gives, and so by what was saved."""
    model, sample = built("llama"), families["llama"].sample(2, 9, 0)
    text = "tier-cache:group_size=8,residual=8,important=1"
    compiled = graphwright.compile(model, passes=[text], check=False, generate=True, **sample)
    exact = graphwright.compile(model, check=False, generate=True, **sample)
    ids = tokens(40)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20}
    got = compiled.generate(ids, **options)
    assert torch.equal(compiled.generate(ids, **options), got)
    alone = compiled.generate(ids[1:, 17:], max_new_tokens=20)
    assert torch.equal(got[1, 40:], alone[0, 23:])
    agree = (got[:, 40:] == exact.generate(ids, **options)[:, 40:]).cumprod(1).sum(1)
    assert (agree >= 8).all()
    compiled.save(tmp_path / "model.gw")
    assert torch.equal(graphwright.load(tmp_path / "model.gw").generate(ids, **options), got)
    (record,) = [record for record in compiled.report.decoding if record.pass_name == "tier-cache"]
    assert len(record.plan.decisions) == 2


def test_caches_grow(built, families) -> None:
    """More room on the way does not change what is generated."""
    from graphwright.runtime.session import Session

    compiled = graphwright.compile(
        built("llama"),
        passes=["tier-cache:group_size=8,residual=8"],
        check=False,
        generate=True,
        **families["llama"].sample(2, 9, 0),
    )
    step, ids = compiled.generator.step, tokens(60)
    scores = []
    for growing in (False, True):
        session = Session(step, 2, 60)
        rows = []
        for at in range(60):
            if growing and at == 45:
                session.cache.grow(session.cache.capacity + 1)
                session._call = None
            session.ids[:, 0] = ids[:, at]
            rows.append(session.advance(at + 1, 60).clone())
        scores.append(torch.cat(rows, 1))
    assert torch.equal(*scores)
