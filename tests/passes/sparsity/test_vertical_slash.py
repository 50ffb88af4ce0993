"""Columns and diagonals: what is rewritten, what is refused, how patterns are searched, and that it generates."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import graphwright
from graphwright.ir import dialect
from graphwright.ir.errors import OptionError, PassError, PlanError
from graphwright.ir.program import calls
from graphwright.ir.verifier import verify
from graphwright.passes.base import Context, Decision, Plan
from graphwright.passes.kv.cached_decode import CachedDecode
from graphwright.passes.registry import parse_pass
from graphwright.passes.sparsity.searching import Pattern, head_attention, listed_tiles, measure, search
from graphwright.passes.sparsity.tile_cost import break_even, dense_tiles, sparse_tiles
from graphwright.passes.sparsity.vertical_slash import VerticalSlash
from graphwright.pipeline import DEFAULT_PASSES, run_passes

NAME = "vertical-slash"
SPARSE = f"{NAME}:vertical=30,slash=30,minimum_tokens=66"


def program_of(builder, *predicates: str, tokens: int | str = "tokens", **options):
    """Return a program of attentions of one sequence to itself."""
    made = builder()
    q, k, v = (made.input(name, "batch", n, tokens, 8) for name, n in (("q", 4), ("k", 2), ("v", 2)))
    read = [made.weight(f"w{at}", weight) for at, weight in enumerate(options.pop("weights", ()))]
    sink = made.weight("sink", options.pop("sink")) if "sink" in options else None
    found = [
        made.call(dialect.attention, q, k, v, read, sink, scale=0.3, predicate=predicate, **options)
        for predicate in predicates or ("q - k >= 0",)
    ]
    return made.program(*found)


def drawn(tokens: int, batch: int = 2) -> list[torch.Tensor]:
    """Return queries, keys and values of one sequence."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, heads, tokens, 8, generator=generator) for heads in (4, 2, 2)]


def call_of(program, *tensors) -> Context:
    """Return a context with one sample call of a program that takes tensors by position."""

    class Signature:
        def flatten(self, args, kwargs):
            return list(args)

        def unflatten(self, results):
            return tuple(results)

    program.signature = Signature()
    return Context(calibration=((tensors, {}),))


def test_what_is_rewritten(builder, run) -> None:
    """An attention becomes lists and attention over them, with everything that it had."""
    done = run(f"{NAME}:vertical=40,slash=35,minimum_tokens=66", program_of(builder, softcap=2.0))
    (node,) = calls(done.after.graph, dialect.sparse_attention)
    (index,) = calls(done.after.graph, dialect.block_index)
    assert index.kwargs["vertical"] == [40] * 4
    assert index.kwargs["slash"] == [35] * 4
    for made in (node, index):
        assert (made.kwargs["scale"], made.kwargs["softcap"], made.kwargs["minimum_tokens"]) == (0.3, 2.0, 66)
    assert node.kwargs["predicate"] == "q - k >= 0"
    given = drawn(200)
    lists = dialect.block_index(*given[:2], None, vertical=[40] * 4, slash=[35] * 4, fixed=[False] * 4, scale=0.3, softcap=2.0)
    expected = dialect.sparse_attention(*given, *lists, [], None, predicate="q - k >= 0", scale=0.3, softcap=2.0)
    assert torch.equal(done.after.module()(*given)[0], expected)
    done.check(*drawn(65))
    assert not torch.equal(done.before.reference(*given)[0], expected)


REFUSED = {
    "not causal": ({"predicates": [""]}, "it is not causal: a query sees where True"),
    "one step ahead": ({"predicates": ["q - k + 1 >= 0"]}, "it is not causal"),
    "window": ({"predicates": ["q - k >= 0 & k - q + 8 >= 0"]}, "a query sees not all keys before it"),
    "padding": (
        {"predicates": ["q - k >= 0 & in0[k]"], "weights": [torch.ones(99, dtype=torch.bool)]},
        "a query sees not all keys before it",
    ),
    "bias": ({"bias": "in0[h]*float(k)", "weights": [torch.ones(4)]}, "its scores have a bias"),
    "sink": ({"sink": torch.ones(4)}, "a sink takes a share"),
    "short": ({"tokens": 65}, "its 65 tokens are fewer than 66"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_the_reason(builder, run, kind) -> None:
    """What the estimate knows nothing of is left alone, with the reason."""
    options, reason = dict(REFUSED[kind][0]), REFUSED[kind][1]
    done = run(SPARSE, program_of(builder, *options.pop("predicates", ()), **options))
    assert not done.plan.decisions
    assert reason in done.reasons[0]
    done.check(*drawn(20 if options.get("tokens") is None else 65))


def test_more_refusals(builder, run, captured) -> None:
    """Another sequence's keys, types without kernels, programs without attention or with caches are refused."""
    made = builder()
    q, k = made.input("q", "batch", 2, "tokens", 8), made.input("k", "batch", 2, 9, 8)
    cross = made.program(made.call(dialect.attention, q, k, k, [], None, scale=1.0))
    assert run(SPARSE, cross).reasons == ["there are tokens queries and 9 keys: they are not of one sequence"]
    made = builder()
    x = made.input("x", "batch", 2, "tokens", 8, dtype=torch.float64)
    double = made.program(made.call(dialect.attention, x, x, x, [], None, scale=1.0, predicate="q - k >= 0"))
    assert "there are no kernels for 2 heads of 8 and 8 torch.float64" in run(SPARSE, double).reasons[0]
    made = builder()
    assert run(SPARSE, made.program(made.input("x", "batch"))).reasons == ["there is no attention"]
    cached = run_passes(captured("llama"), ["redundant-layout", "raise-attention", "cached-decode"])
    assert "put vertical-slash before cached-decode" in run(SPARSE, cached).reasons[0] or not cached.states


def test_layers(builder, run) -> None:
    """Only the attentions that are named are rewritten."""
    done = run(f"{SPARSE},layers=0+2", program_of(builder, *["q - k >= 0"] * 3))
    assert [d.where for d in done.plan.decisions] == ["attention_default", "attention_default_2"]
    assert done.reasons == ["attention 1 is not among the layers [0, 2]"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vertical": 29}, "vertical must be at least 30, got 29"),
        ({"slash": 10}, "slash must be at least 30, got 10"),
        ({"minimum_tokens": 1}, "minimum_tokens must be at least 2"),
        ({"density": 0.0}, "density must be in"),
        ({"density": 0.5, "slash": 60}, "give it alone"),
    ],
)
def test_options_out_of_range(options, message) -> None:
    """Options that make no sense are errors."""
    with pytest.raises(OptionError, match=message):
        VerticalSlash(**options)


def test_a_plan_edited_by_hand_is_obeyed(builder, run) -> None:
    """Each head gets the numbers that the plan has for it; numbers that do not fit are a PlanError."""

    def edited(**detail):
        return lambda plan: dataclasses.replace(
            plan, decisions=tuple(dataclasses.replace(d, detail={**d.detail, **detail}) for d in plan.decisions)
        )

    program = program_of(builder)
    done = run(SPARSE, program, edited(slash=[30, 40, 50, 0], fixed=[True, False, False, False]))
    (index,) = calls(done.after.graph, dialect.block_index)
    assert (index.kwargs["slash"], index.kwargs["fixed"]) == ([30, 40, 50, 0], [True, False, False, False])
    for change, message in (
        ({"slash": [3]}, "slash has 1 values, and there are 4 heads"),
        ({"vertical": [-1] * 4}, "vertical must be at least 0"),
        ({"minimum_tokens": 0}, "minimum_tokens must be at least 2"),
    ):
        with pytest.raises(PlanError, match=message):
            run(SPARSE, program, edited(**change))
    step = parse_pass(SPARSE)
    with pytest.raises(PlanError, match="and no attention"):
        step.apply(done.after, Plan(NAME, (Decision("block_index_default", "", "", dict(done.plan.decisions[0].detail)),)))


def test_break_even() -> None:
    """It is where the tiles of sparse attention become fewer than those of dense, and longer lists put it off."""
    for blocks, columns in ((2, 30), (20, 500), (200, 1000)):
        tokens = break_even(blocks, columns)
        assert sparse_tiles(tokens, blocks, columns) < dense_tiles(tokens)
        assert sparse_tiles(tokens - 64, blocks, columns) >= dense_tiles(tokens - 64)
    assert break_even(2, 30) < break_even(20, 500) < break_even(200, 1000)
    assert dense_tiles(65) == 3


def test_measured_patterns_are_the_lists(builder) -> None:
    """What a search takes for a pattern's cost and recall is what the operations' lists have and see."""
    q, k, _ = (t[:1] for t in drawn(333))
    for fixed, vertical, slash in ((False, 60, 40), (True, 33, 90), (False, 333, 30), (False, 0, 333)):
        attention = head_attention(q[0, 0], k[0, 0], 0.3)
        got = measure([attention], Pattern(fixed, vertical, slash))
        blocks, columns = dialect.block_index(
            q[:, :1], k[:, :1], None, vertical=[vertical], slash=[slash], fixed=[fixed], scale=0.3
        )
        tiles = blocks[..., 0] + (columns[..., 0] + 63) // 64
        assert got.tiles == int(tiles.sum())
        assert got.blocks == int(blocks[0, 0, -1, 0])
        values = torch.eye(333)[None, None]
        weights = dialect.attention(q[:, :1], k[:, :1], values, [], None, predicate="q - k >= 0", scale=0.3)
        counts, _, single = listed_tiles(attention, Pattern(fixed, vertical, slash))
        assert torch.equal(counts, blocks[0, 0, :, 0].long())
        assert torch.equal(single.sum(1), columns[0, 0, :, 0].long())
        from graphwright.ir.ops.sparse_attention import listed_keys

        assert got.recall == pytest.approx(float((weights * listed_keys(blocks, columns, 333)).sum()) / 333, rel=1e-4)


def planted(tokens: int, distance: int, marks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys of three heads: one looks back at a distance, one at a few keys, one at near keys."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 3, tokens, 40, generator=generator) * 0.3 for _ in range(2))
    codes = torch.nn.functional.normalize(torch.randn(tokens, 39, generator=generator), dim=-1) * 6.0
    k[0, 0, :, :39] += codes
    q[0, 0, distance:, :39] += codes[: tokens - distance]
    q[0, 1, :, 39] += 4.0
    k[0, 1, marks, 39] += 5.0
    steps = torch.arange(tokens)[:, None] / 40.0 * torch.ones(20)
    waves = torch.cat([torch.sin(steps * torch.linspace(1, 9, 20)), torch.cos(steps * torch.linspace(1, 9, 20))], -1)
    q[0, 2] += waves * 2
    k[0, 2] += waves * 2
    return q, k


def test_every_head_gets_the_pattern_that_keeps_most() -> None:
    """At the same number of tiles a head that looks far back, or at single keys, keeps more than with an A-shape."""
    tokens = 1000
    q, k = planted(tokens, 417, [100, 333, 512, 700])
    budget = 0.5 * dense_tiles(tokens)
    for head in range(3):
        attention = [head_attention(q[0, head], k[0, head], 0.5)]
        pattern, found, shape = search(attention, 0.5)
        assert found.tiles <= budget
        assert found.recall >= shape.recall
        assert found.recall == measure(attention, pattern).recall
        if head < 2:
            assert not pattern.fixed
            assert found.recall > shape.recall + 0.2


def test_searching_on_sample_calls(builder) -> None:
    """The plan holds what was found for each head as plain data, states what it keeps, and keeps more at a larger density."""
    program = program_of(builder)
    context = call_of(program, *drawn(400, batch=1))
    recalls = []
    for density in (0.7, 0.85, 1.0):
        step = VerticalSlash(density=density)
        (decision,) = step.plan(program, context).decisions
        assert decision.detail["density"] <= density
        assert len(decision.detail["recall"]) == len(decision.detail["vertical"]) == 4
        assert all(a >= b for a, b in zip(decision.detail["recall"], decision.detail["recall_of_a_shape"], strict=True))
        recalls.append(sum(decision.detail["recall"]))
        verify(step.apply(program, step.plan(program, context)))
    assert recalls == sorted(recalls)
    assert recalls[-1] == pytest.approx(4.0)
    with pytest.raises(PassError, match="patterns are searched on sample calls, and there are none"):
        VerticalSlash(density=0.5).plan(program, Context())


@pytest.fixture(scope="module")
def sparse_llama(built, families):
    """A small decoder with sparse prompts, compiled to generate."""
    sample = families["llama"].sample(2, 90, 1)
    return graphwright.compile(built("llama"), passes=[SPARSE], generate=True, **sample)


def test_generating(sparse_llama, built, families) -> None:
    """A long prompt is sparse, every token after it sees all keys; a short prompt is dense."""
    model = built("llama")
    dense = graphwright.compile(model, generate=True, **families["llama"].sample(2, 90, 1))
    short = families["llama"].sample(2, 65, 3)["input_ids"]
    assert torch.equal(sparse_llama.generate(short, max_new_tokens=5), dense.generate(short, max_new_tokens=5))
    program = run_passes(graphwright.capture(model, **families["llama"].sample(2, 90, 1)), [*DEFAULT_PASSES, SPARSE])
    derived = CachedDecode(check=False).apply(program, CachedDecode().plan(program, Context()))
    verify(derived)
    ids = families["llama"].sample(2, 200, 4)["input_ids"]
    whole = program.reference(input_ids=ids)["logits"]
    assert (whole - model(ids).logits).abs().max() > 1e-4
    caches = [
        torch.full([2, *(n if isinstance(n, int) else 210 for n in spec.shape[1:])], torch.nan)
        for spec in derived.signature.tensors
        if spec.name in derived.states
    ]
    got, *caches = derived.module()(ids, torch.zeros(2, dtype=torch.int64), *caches)
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)
    # Token by token after the prompt: the keys and values of a sparse prompt, and all of them seen.
    expected, past = got[:, -1:].argmax(-1), torch.full((2,), 200)
    tokens = [expected]
    for _ in range(4):
        scores, *caches = derived.module()(tokens[-1], past, *caches)
        tokens.append(scores[:, -1:].argmax(-1))
        past = past + 1
    assert torch.equal(sparse_llama.generate(ids, max_new_tokens=5)[:, 200:], torch.cat(tokens, 1))


def test_prompts_of_different_lengths(sparse_llama, families) -> None:
    """The lists of a padded prompt are estimated from its own last tokens: it continues as it does alone."""
    ids = families["llama"].sample(2, 190, 6)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :60] = 0
    got = sparse_llama.generate(ids, max_new_tokens=6, attention_mask=mask)
    for row, start in ((0, 60), (1, 0)):
        alone = sparse_llama.generate(ids[row : row + 1, start:], max_new_tokens=6)
        assert torch.equal(got[row, -6:], alone[0, -6:])


def test_a_token_has_no_lists(sparse_llama) -> None:
    """The program for one token is the dense one: no lists are made while decoding."""
    programs = sparse_llama.generator.programs()
    prefill, step = (programs[name][0] for name in ("prefill", "step"))
    assert any("block_index" in name for name in prefill.kernels)
    assert not any("block_index" in name or "sparse" in name for name in step.kernels)


def test_left_out_layers_and_sparse_prompts(captured, families) -> None:
    """Layers may be left out before, and what is left is made sparse."""
    context = Context(tuple(families["llama"].sample(2, 100, seed) for seed in (1, 2)))
    program = run_passes(captured("llama"), [*DEFAULT_PASSES, "drop-layers:drop=1", SPARSE], context)
    assert len(list(calls(program.graph, dialect.sparse_attention))) == 1
    assert not list(calls(program.graph, dialect.attention))
    ids = families["llama"].sample(2, 100, 3)["input_ids"]
    assert not program.reference(input_ids=ids)["logits"].isnan().any()
