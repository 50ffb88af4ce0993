"""Caches in few bits: which layers, in which format, and what comes of it."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from graphwright.ir import dialect
from graphwright.ir.errors import OptionError, PassError, PlanError
from graphwright.ir.printer import print_program
from graphwright.ir.program import calls
from graphwright.ir.verifier import verify
from graphwright.passes.base import Context
from graphwright.passes.kv.cache_budget import choose
from graphwright.passes.kv.quantize_cache import QuantizeCache
from graphwright.passes.registry import format_pass, parse_pass
from graphwright.pipeline import DEFAULT_PASSES, run_passes
from graphwright.runtime.kv_cache import KVCache, cache_bytes

SMALL = {"group_size": 16, "residual": 16}
TOKENS = 96


@pytest.fixture(scope="module")
def derived(captured):
    """Return a family's program with caches, by name."""

    @functools.cache
    def make(family: str = "llama"):
        return run_passes(captured(family), [*DEFAULT_PASSES, "cached-decode", "dead-code"])

    return make


def quantised(program, calibration=(), edit=lambda plan: plan, **options):
    """Return the program after the pass, verified."""
    step = QuantizeCache(**options)
    result = step.apply(program, edit(step.plan(program, Context(tuple(calibration)))))
    verify(result)
    return result


def targets(program) -> list[str]:
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


def tokens(count: int = TOKENS, batch: int = 2) -> torch.Tensor:
    """Return random tokens."""
    return torch.randint(3, 97, (batch, count), generator=torch.Generator().manual_seed(count))


def test_keys_and_values_of_all_layers(derived) -> None:
    """Every attention reads codes, states are exchanged, and a second run changes nothing."""
    program = derived()
    before = print_program(program)
    result = quantised(program, **SMALL)
    assert print_program(program) == before
    assert targets(result) == ["kv_quantized_attention"] * len(targets(program))
    assert not list(calls(result.graph, dialect.kv_append, dialect.kv_attention))
    assert len(result.states) == 4 * len(program.states)
    for node in calls(result.graph, dialect.kv_quantized_append):
        assert (node.kwargs["bits"], node.kwargs["group"]) == (4, 16)
    again = QuantizeCache(**SMALL).plan(result, Context())
    assert again.decisions == ()
    assert all("of another format already" in refusal.reason for refusal in again.refusals)


def test_sixteen_bits_are_the_identity(derived) -> None:
    """Nothing is rewritten, alone or among others."""
    program = derived()
    plan = QuantizeCache(bits=16).plan(program, Context())
    assert (plan.decisions, plan.refusals) == ((), ())
    assert QuantizeCache(bits=16).apply(program, plan) is program
    assert targets(quantised(program, bits=(16, 8), **SMALL)) == ["kv_attention", "kv_quantized_attention"]


def test_tokens_within_the_residual_window_are_exact(derived) -> None:
    """A sequence that is not longer, and a prompt that starts one, give what they give without the pass."""
    program = derived()
    result = quantised(program, bits=2, group_size=16, residual=128)
    ids = tokens(100)
    for parts in ([100], [60, 40]):
        torch.testing.assert_close(decoded(result, ids, parts), decoded(program, ids, parts), rtol=1e-4, atol=1e-5)
    rough = quantised(program, bits=2, **SMALL)
    torch.testing.assert_close(decoded(rough, ids, [100]), decoded(program, ids, [100]), rtol=1e-4, atol=1e-5)


def test_errors_fall_as_bits_and_the_window_grow(derived) -> None:
    """With more bits, and with more tokens kept as they are, scores are nearer to the exact ones."""
    program, ids = derived(), tokens()
    parts = [48, 24, 24]
    wanted = decoded(program, ids, parts)

    def error(**options) -> float:
        return float((decoded(quantised(program, **options), ids, parts) - wanted).norm())

    by_bits = [error(bits=bits, **SMALL) for bits in (2, 4, 8)]
    assert by_bits[0] > 2 * by_bits[1] > 4 * by_bits[2] > 0
    by_window = [error(bits=2, group_size=16, residual=residual) for residual in (0, 16, 48)]
    assert by_window[0] > by_window[1] > by_window[2] > 0
    by_layers = [error(bits=2, layers=layers, **SMALL) for layers in (None, (1,), ())]
    assert by_layers[0] > by_layers[1] > by_layers[2] == 0


def test_bytes_are_those_that_are_allocated(derived) -> None:
    """What decisions say is what the tensors take; fewer bits take fewer bytes."""
    program = derived()
    exact = cache_bytes(program.signature)
    taken = []
    for bits in (2, 4, 8):
        step = QuantizeCache(bits=bits, group_size=32, residual=64)
        plan = step.plan(program, Context())
        result = step.apply(program, plan)
        found = cache_bytes(result.signature)
        assert found.per_token == sum(decision.detail["bytes_per_token"] for decision in plan.decisions)
        assert found.per_sequence == sum(decision.detail["bytes_per_sequence"] for decision in plan.decisions)
        cache = KVCache(result.signature, 3, 500)
        assert cache.nbytes == 3 * (found.per_token * cache.capacity + found.per_sequence)
        assert cache.nbytes == sum(tensor.nbytes for tensor in cache.tensors.values())
        taken.append(found.per_token)
    assert taken[0] < taken[1] < taken[2] < exact.per_token
    wide = cache_bytes(quantised(program, parameters="float32").signature)
    assert wide.per_token > cache_bytes(quantised(program).signature).per_token


def test_bits_and_layers_can_be_given_one_by_one(derived) -> None:
    """As text too; a list that does not fit the program is an error that says how many layers there are."""
    step = parse_pass("quantize-cache:bits=8+2,residual=32")
    assert step.bits == (8, 2)
    assert parse_pass(format_pass(step)) == step
    plan = step.plan(derived(), Context())
    assert [(d.detail["layer"], d.detail["bits"]) for d in plan.decisions] == [(0, 8), (1, 2)]
    plan = parse_pass("quantize-cache:layers=1").plan(derived(), Context())
    assert [(d.detail["layer"], d.detail["bits"]) for d in plan.decisions] == [(1, 4)]
    with pytest.raises(OptionError, match="bits are given for 3 layers, and the program has 2"):
        QuantizeCache(bits=(8, 4, 4)).plan(derived(), Context())
    with pytest.raises(OptionError, match="layers must be 0 to 1, got 2"):
        QuantizeCache(layers=(2,)).plan(derived(), Context())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be 2, 4, 8 or 16, got 3"),
        ({"bits": (8, 5)}, "got 5"),
        ({"group_size": 24}, "group_size must be a power of two from 16 to 256, got 24"),
        ({"group_size": 8}, "got 8"),
        ({"residual": 100}, "residual must be a multiple of group_size, 32, and at least 0, got 100"),
        ({"residual": -32}, "got -32"),
        ({"candidates": (8, 3)}, "bits must be 2, 4, 8, got 3"),
        ({"budget_bytes_per_token": 0}, "budget_bytes_per_token must be above 0"),
        ({"parameters": "bfloat16"}, "parameters must be float16 or float32"),
    ],
)
def test_options_out_of_range(options, message) -> None:
    """Each is an error that says what may stand there."""
    with pytest.raises(OptionError, match=f"quantize-cache: .*{message}"):
        QuantizeCache(**options)


def test_plans_edited_by_hand_are_obeyed(derived) -> None:
    """Another number of bits, and a decision that is taken out."""

    def edit(plan):
        last = plan.decisions[-1]
        return dataclasses.replace(
            plan, decisions=(dataclasses.replace(last, detail={**last.detail, "bits": 8, "residual": 64}),)
        )

    result = quantised(derived(), edit=edit, **SMALL)
    assert targets(result) == ["kv_attention", "kv_quantized_attention"]
    append = next(calls(result.graph, dialect.kv_quantized_append))
    assert append.kwargs["bits"] == 8
    assert append.args[3].meta["val"].shape[2] == 64 + 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"where": "nowhere"}, "names %nowhere, which is not in the graph"),
        ({"where": "linear_default"}, "cannot be kept in 4 bits: it is no attention over a cache"),
        ({"detail": {"bits": 4}}, "does not say 'group_size'"),
        ({"detail": {"bits": 5, "group_size": 16, "residual": 16, "parameters": "float16"}}, "is of no format: bits must be"),
        ({"detail": {"bits": 4, "group_size": 16, "residual": 7, "parameters": "float16"}}, "residual must be a multiple"),
    ],
)
def test_plans_that_do_not_fit(derived, change, message) -> None:
    """A plan for another program, or of no format, is an error that says why."""
    program = derived()
    name = next(node.name for node in calls(program.graph) if node.target._opname == "linear")
    change = {**change, **({"where": name} if change.get("where") == "linear_default" else {})}

    def edit(plan):
        return dataclasses.replace(plan, decisions=(dataclasses.replace(plan.decisions[0], **change),))

    with pytest.raises(PlanError, match=message):
        quantised(program, edit=edit, **SMALL)


def test_a_program_without_caches_is_refused(captured) -> None:
    """Which says so."""
    plan = QuantizeCache().plan(captured("llama"), Context())
    assert [refusal.reason for refusal in plan.refusals] == ["the program has no caches"]


def test_caches_that_others_read_are_refused(derived) -> None:
    """The layer keeps its cache, and the reason names what is read."""
    program = derived().copy()
    node = next(calls(program.graph, dialect.kv_attention))
    with program.graph.inserting_after(node):
        more = program.call(torch.ops.aten.relu.default, node.args[1])
    program.output.args = ((*program.results, more),)
    plan = QuantizeCache(**SMALL).plan(program, Context())
    assert [decision.detail["layer"] for decision in plan.decisions] == [1]
    (refusal,) = plan.refusals
    assert (refusal.where, "is read by others too" in refusal.reason) == (node.name, True)


def test_layers_whose_sizes_do_not_fit_are_refused(derived, monkeypatch) -> None:
    """Values that have no equal groups of channels keep their cache."""
    from graphwright.passes.kv import cache_format

    monkeypatch.setattr(cache_format, "LEAST_CHANNELS", 512)
    plan = QuantizeCache(**SMALL).plan(derived(), Context())
    assert plan.decisions == ()
    assert all("have no equal groups of at least 512 channels" in refusal.reason for refusal in plan.refusals)


def test_a_budget_is_met_by_what_layers_cost(derived) -> None:
    """Every layer has a score for each format, the bytes are within the budget, and less room costs more."""
    program, ids = derived(), tokens()
    exact, eight, four = (
        cache_bytes(p.signature).per_token
        for p in (program, quantised(program, bits=8, **SMALL), quantised(program, bits=4, **SMALL))
    )
    calibration = [((), {"input_ids": ids})]
    divergences = []
    for budget in (exact, (exact + eight) / 2, (eight + four) / 2, four):
        step = QuantizeCache(budget_bytes_per_token=budget, **SMALL)
        plan = step.plan(program, Context(tuple(calibration)))
        assert cache_bytes(step.apply(program, plan).signature).per_token <= budget
        for decision in plan.decisions:
            scores = decision.detail["scores"]
            assert 0 < scores["8"] < scores["4"]
        if budget == exact:
            assert plan.decisions == ()
        divergences.append(sum(decision.detail["scores"][str(decision.detail["bits"])] for decision in plan.decisions))
    assert divergences == sorted(divergences)
    assert step.plan(program, Context(tuple(calibration))) == plan


def test_the_cheapest_choice_is_taken_first() -> None:
    """What saves most for what it adds goes first, a layer may go down twice, and layers that mind stay."""
    costs = [{16: 100.0, 8: 50.0, 4: 25.0}] * 3
    scores = [{8: 0.01, 4: 5.0}, {8: 0.2, 4: 0.3}, {8: 9.0, 4: 9.0}]
    assert choose(costs, scores, 300) == [16, 16, 16]
    assert choose(costs, scores, 250) == [8, 16, 16]
    assert choose(costs, scores, 200) == [8, 4, 16]
    assert choose(costs, scores, 75) == [4, 4, 4]


@pytest.mark.parametrize(
    ("budget", "calibration", "error", "message"),
    [
        (10.0, [((), {"input_ids": tokens()})], OptionError, "10 bytes per token cannot be met: .* the caches take"),
        (100.0, [], PassError, "there are none: compile with calibration"),
        (100.0, [((), {"input_ids": tokens(20)})], PassError, "has 20 tokens; tokens are quantised when 48 are there"),
        (100.0, [((), {"other": tokens()})], PassError, "calibration call 0 has no input_ids"),
        (
            100.0,
            [((), {"input_ids": tokens(), "attention_mask": torch.zeros(2, TOKENS)})],
            PassError,
            "without padding has 0 tokens",
        ),
    ],
)
def test_budgets_that_cannot_be_decided(derived, budget, calibration, error, message) -> None:
    """Too small a budget, no calibration, or none that says anything: the error says what to do."""
    with pytest.raises(error, match=f"quantize-cache: .*{message}"):
        QuantizeCache(budget_bytes_per_token=budget, **SMALL).plan(derived(), Context(tuple(calibration)))


def test_layers_of_other_formats_keep_them(derived) -> None:
    """Windows in rings go before, and layers without one are quantised beside them; the scores are near the exact ones."""
    program = derived("gemma3")
    ringed = run_passes(program, ["ring-cache"])
    result = quantised(ringed, bits=8, **SMALL)
    kinds = targets(result)
    assert {"kv_ring_attention", "kv_quantized_attention"} == set(kinds)
    plan = QuantizeCache(bits=8, **SMALL).plan(ringed, Context())
    assert [decision.detail["layer"] for decision in plan.decisions] == [
        layer for layer, kind in enumerate(kinds) if kind == "kv_quantized_attention"
    ]
    assert len(plan.refusals) == kinds.count("kv_ring_attention")
    ids = tokens(80)
    wanted, found = (decoded(p, ids, [40, 20, 20]) for p in (program, result))
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3
