"""Passes over programs with caches, and the states that they exchange."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import graphwright
from graphwright.ir import dialect
from graphwright.ir.errors import OptionError
from graphwright.ir.program import Program, calls
from graphwright.ir.verifier import verify
from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan, Stage
from graphwright.passes.kv.last_token import LastToken
from graphwright.passes.kv.states import exchange_states, new_state
from graphwright.pipeline import run_passes


@dataclass(frozen=True, kw_only=True)
class Rename(Pass):
    """Exchange the states of some layers for equal ones of another name."""

    name = "rename"
    fidelity = Fidelity.EXACT
    stage = Stage.DECODE

    layers: tuple[int, ...] = (0,)

    def plan(self, program: Program, context: Context) -> Plan:
        names = [f"{kind}_cache_{layer}" for layer in self.layers for kind in "kv"]
        return Plan(self.name, tuple(Decision(n, "rename") for n in names if n in program.states), ())

    def apply(self, program: Program, plan: Plan) -> Program:
        result = program.copy()
        gone, made = [], {}
        for decision in plan.decisions:
            old = next(node for node in result.inputs if node.name == decision.where)
            state = new_state(result, f"other_{old.name}", old.meta["val"].shape, old.meta["val"].dtype)
            made[state] = next(iter(old.users))
            old.replace_all_uses_with(state)
            gone.append(old)
        exchange_states(result, gone, made)
        return result


@pytest.fixture(scope="module")
def derived(captured):
    """A program with caches."""
    return run_passes(captured("llama"), [*graphwright.pipeline.DEFAULT_PASSES, "cached-decode", "dead-code"])


def test_states_are_exchanged(derived) -> None:
    """The signature, the states and the results tell the new ones; the others stay; values are the same."""
    step = Rename()
    result = step.apply(derived, step.plan(derived, Context()))
    verify(result)
    names = [spec.name for spec in result.signature.tensors]
    assert names == [node.name for node in result.inputs]
    assert names[-2:] == ["other_k_cache_0", "other_v_cache_0"]
    assert "k_cache_0" not in names
    assert "k_cache_1" in names
    shapes = {spec.name: spec.shape for spec in derived.signature.tensors}
    assert result.signature.tensors[-1].shape == shapes["v_cache_0"]
    for name, at in result.states.items():
        assert result.results[at].args[0].name == name
    given = [
        torch.randint(0, 9, [{"batch": 2, "tokens": 5, "capacity": 16}.get(n, n) for n in spec.shape]).to(spec.dtype)
        for spec in derived.signature.tensors
    ]
    given[1] = torch.tensor([3, 0])
    order = [names.index({"k_cache_0": "other_k_cache_0", "v_cache_0": "other_v_cache_0"}.get(n, n)) for n in shapes]
    moved: list = [None] * len(given)
    for at, place in enumerate(order):
        moved[place] = given[at]
    assert torch.equal(result.module()(*moved)[0], derived.module()(*given)[0])


def test_sizes_may_be_formulas_of_the_capacity(derived) -> None:
    """A state of capacity // 32 groups has that as a text in the signature."""
    result = derived.copy()
    cache = next(node for node in result.inputs if node.name == "k_cache_0")
    batch, _, capacity, _ = cache.meta["val"].shape
    state = new_state(result, "scales", (batch, capacity // 32, capacity // 2 * 3, 7), torch.float16)
    exchange_states(result, [], {state: state})
    texts = result.signature.tensors[-1].shape
    assert [eval(str(text), {"batch": 3, "capacity": 256}) for text in texts] == [3, 8, 384, 7]
    assert result.states["scales"] == len(result.results) - 1


def test_a_pass_over_caches_runs_on_the_program_with_caches(built, families, tmp_path) -> None:
    """Its record is in the report beside those that made that program, also in the file; the tokens are the same."""
    model, sample = built("llama"), families["llama"].sample(2, 9, 0)
    ids = next(iter(sample.values()))
    options = {"check": False, "generate": True, **sample}
    plain = graphwright.compile(model, **options)
    compiled = graphwright.compile(model, passes=["dead-code", Rename(layers=(0, 1))], **options)
    assert [record.pass_name for record in compiled.report.decoding][:2] == ["cached-decode", "rename"]
    assert not any(record.pass_name == "rename" for record in compiled.report.records)
    assert len(compiled.report.decoding[1].plan.decisions) == 4
    assert 'name = "rename"' in compiled.recipe
    expected = plain.generate(ids, max_new_tokens=8)
    assert torch.equal(compiled.generate(ids, max_new_tokens=8), expected)
    compiled.save(tmp_path / "renamed.gw")
    loaded = graphwright.load(tmp_path / "renamed.gw")
    assert [r.options for r in loaded.report.decoding] == [r.options for r in compiled.report.decoding]
    assert torch.equal(loaded.generate(ids, max_new_tokens=8), expected)


def test_a_pass_over_caches_needs_caches(built, families) -> None:
    """Asked for without generate=True it is an error that says so."""
    with pytest.raises(OptionError, match=r"rename: the caches that it rewrites .* generate=True"):
        graphwright.compile(built("llama"), passes=[Rename()], check=False, **families["llama"].sample(2, 9, 0))


def test_a_program_for_one_token_says_how_many_count(derived) -> None:
    """Nothing of a plain program with caches counts tokens, and it gets no count."""
    result = LastToken().apply(derived, LastToken().plan(derived, Context()))
    appends = list(calls(result.graph, dialect.kv_append))
    assert appends
    assert all(len(node.args) == 3 for node in appends)
