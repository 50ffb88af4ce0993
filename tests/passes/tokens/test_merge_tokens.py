"""Merging the tokens of encoders."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphwright
from graphwright.ir import dialect
from graphwright.ir.errors import OptionError, PlanError
from graphwright.ir.printer import print_program
from graphwright.ir.program import calls, dimension_symbol
from graphwright.ir.verifier import verify
from graphwright.passes.base import Context
from graphwright.passes.registry import parse_pass
from graphwright.passes.tokens.merge_tokens import MergeTokens
from graphwright.pipeline import run_passes

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """Attention that a mask limits, and a feed-forward."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, mask):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Two blocks over x [B, S, E] with a mask [B, S].

    Args:
        head: what is returned for x and the mask.
        between: what is done to x between the blocks.
    """

    def __init__(self, head=None, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = head or (lambda x, mask: x)
        self.between = between or (lambda x: x)

    def forward(self, x, mask):
        seen = mask[:, None, None, :] != 0
        x = self.between(self.blocks[0](x, seen))
        return self.head(self.blocks[1](x, seen), mask)


def batch(lengths, size):
    """Return random tokens and a mask of sequences of these lengths, padded on the right."""
    return torch.randn(len(lengths), size, WIDTH), (torch.arange(size) < torch.tensor(lengths)[:, None]).long()


def masked_mean(x, mask):
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@pytest.fixture(scope="module")
def encoder():
    """Return the program of an encoder by its head."""
    made = {}

    def get(head=None, between=None):
        if (head, between) not in made:
            sample = batch([5, 7, 2], 7)
            made[head, between] = run_passes(graphwright.capture(Encoder(head, between).eval(), *sample, check=False))
        return made[head, between]

    return get


def merged(program, options):
    """Return the plan and the program after merging."""
    step = parse_pass(f"merge-tokens:{options}")
    plan = step.plan(program, Context())
    assert plan.decisions, plan.refusals
    result = step.apply(program, plan)
    verify(result)
    return plan, result


def reason(program, options="r=1"):
    """Return the one reason for which tokens are not merged."""
    plan = parse_pass(f"merge-tokens:{options}").plan(program, Context())
    assert plan.decisions == ()
    (refusal,) = plan.refusals
    return refusal.reason


def tensors(results):
    """Return the tensors of a model's results."""
    return [results] if isinstance(results, torch.Tensor) else list(dict(results).values())


def lengths_after(program, tokens):
    """Return the number of tokens after each merge of a sequence."""
    found = [program.size(node.args[2]) for node in calls(program.graph, dialect.merge_plan)]
    return [n if isinstance(n, int) else int(n.subs(dimension_symbol("tokens"), tokens)) for n in found]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": -1}, "r must be at least 0"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\]"),
        ({"ratio": 1.5}, r"ratio must be in \(0, 1\]"),
        ({"r": 2, "ratio": 0.5}, "give one of them"),
        ({"r": 2, "first": 3, "last": 2}, "last must be at least first"),
        ({"r": 2, "protect": -1}, "protect must be at least 0"),
        ({"r": 2, "schedule": "rising"}, "no schedule 'rising'"),
        ({"r": 2, "metric": "values"}, "no metric 'values'"),
    ],
)
def test_options_out_of_range(options, message) -> None:
    """What an option may be is said when the pass is made."""
    with pytest.raises(OptionError, match=message):
        MergeTokens(**options)


def test_nothing_asked_nothing_done(encoder) -> None:
    """Without an amount the plan is a refusal, and with none it is empty and the program stays."""
    assert "give r or ratio" in MergeTokens().plan(encoder(), Context()).refusals[0].reason
    for options in ({"r": 0}, {"ratio": 1.0}):
        step = MergeTokens(**options)
        plan = step.plan(encoder(), Context())
        assert plan.decisions == plan.refusals == ()
        assert print_program(step.apply(encoder(), plan)) == print_program(encoder())


@pytest.mark.parametrize(
    "name",
    ["bert", "vit", "encoder-post-norm"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("dinov2", "clip-vision", "encoder-pre-norm")],
)
def test_encoders_merge(name, captured, families) -> None:
    """Encoders of all kinds merge in every block, and return as many tokens as before, near those."""
    program = run_passes(captured(name))
    plan, result = merged(program, "r=2")
    assert len(plan.decisions) == 2
    assert {decision.detail["protect"] for decision in plan.decisions} == {int("tokens" not in program.dimensions)}
    tokens = 19 if "tokens" in program.dimensions else 37
    assert lengths_after(result, tokens) == [tokens - 2, tokens - 4]
    inputs = families[name].sample(3, 19, 5)
    for old, new in zip(tensors(program.reference(**inputs)), tensors(result.reference(**inputs)), strict=True):
        assert old.shape == new.shape
        assert 0 < (old - new).norm() < old.norm()


def test_short_sequences_keep_what_cannot_go(encoder) -> None:
    """Sequences down to one token are computed, with as many tokens as the plan's formula says."""
    plan, result = merged(encoder(), "r=3")
    assert [decision.why for decision in plan.decisions] == [
        "block 0: max(tokens - 3, min(tokens, 3)) tokens are left",
        "block 1: max(tokens - 6, min(tokens, 3)) tokens are left",
    ]
    for tokens in (1, 2, 3, 4, 5, 9):
        x, mask = batch([tokens, 1], tokens)
        found = result.reference(x, mask)
        assert found.shape == x.shape
        assert found[0].isfinite().all()
        assert lengths_after(result, tokens) == [max(tokens - 3, min(tokens, 3)), max(tokens - 6, min(tokens, 3))]


def test_duplicates_are_merged_without_loss(encoder) -> None:
    """Where every token is there twice, half of them can go in the first block, and nothing is lost in the second."""
    x = torch.randn(2, 8, WIDTH).repeat_interleave(2, 1)
    mask = torch.ones(2, 16, dtype=torch.long)
    for metric in ("keys", "tokens"):
        _, result = merged(encoder(), f"r=8,last=0,metric={metric}")
        assert lengths_after(result, 16) == [8]
        torch.testing.assert_close(result.reference(x, mask), encoder().reference(x, mask))


def test_without_sizes_duplicates_would_be_lost(encoder) -> None:
    """That keys count as often as they stand for is what keeps duplicates: without it the result is another."""
    _, result = merged(encoder(), "r=8,last=0")
    for node in calls(result.graph, dialect.attention):
        node.kwargs = {**node.kwargs, "bias": ""}
    x = torch.cat([torch.randn(1, 1, WIDTH).expand(1, 10, WIDTH), torch.randn(1, 6, WIDTH)], 1)
    mask = torch.ones(1, 16, dtype=torch.long)
    assert (result.reference(x, mask) - encoder().reference(x, mask)).abs().max() > 1e-3


def test_padding_suffices(encoder) -> None:
    """As long as padding can go, results at tokens are those of the whole program, and padding changes none of them."""
    _, result = merged(encoder(), "r=2")
    x, mask = batch([12, 9], 20)
    there = mask.bool()
    found, expected = result.reference(x, mask), encoder().reference(x, mask)
    torch.testing.assert_close(found[there], expected[there])
    other = torch.where(there[..., None], x, 100 * torch.randn(WIDTH))
    assert torch.equal(result.reference(other, mask)[there], found[there])


def test_padding_changes_no_content(encoder) -> None:
    """Where content has to be merged too, what padding holds still makes no difference, and sizes add up to the content."""
    _, result = merged(encoder(), "r=6")
    x, mask = batch([15, 11], 17)
    there = mask.bool()
    other = torch.where(there[..., None], x, 100 * torch.randn(WIDTH))
    assert torch.equal(result.reference(other, mask)[there], result.reference(x, mask)[there])
    (last,) = [node for node in calls(result.graph, dialect.merge)][1:]
    result.graph.output_node().args = ((result.output.args[0][0], last.args[1]),)
    _, sizes = result.module()(x, mask)
    assert sizes.sum(1).tolist() == [15, 11]


def test_rows_are_independent(encoder) -> None:
    """A full sequence gives the same beside padded ones as alone."""
    _, result = merged(encoder(), "r=4")
    x, mask = batch([18, 3, 10], 18)
    torch.testing.assert_close(result.reference(x, mask)[:1], result.reference(x[:1], mask[:1]))


def test_pooled_results(encoder) -> None:
    """A mean over tokens is the mean of what each was merged into, and a token at a fixed place is protected."""
    x, mask = batch([13, 8], 13)
    _, tokens = merged(encoder(), "r=3")
    _, pooled = merged(encoder(masked_mean), "r=3")
    torch.testing.assert_close(pooled.reference(x, mask), masked_mean(tokens.reference(x, mask), mask))
    first = encoder(_first)
    plan, result = merged(first, "r=3")
    assert {decision.detail["protect"] for decision in plan.decisions} == {1}
    assert not list(calls(result.graph, dialect.unmerge))[1:]
    assert 0 < (result.reference(x, mask) - first.reference(x, mask)).norm() < 0.5 * first.reference(x, mask).norm()


def _first(x, mask):
    return x[:, 0]


def _shifted(x):
    return x + torch.arange(x.shape[1])[None, :, None] / 10


def test_positions_between_merges(encoder) -> None:
    """What depends on positions between the blocks is a reason to refuse; from behind it on, tokens can be merged."""
    program = encoder(between=_shifted)
    assert "depends on it" in reason(program)
    plan, _ = merged(program, "r=1,first=1")
    assert len(plan.decisions) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama", "depends on positions"),
        ("gpt2", "depends on positions"),
        ("convnet", "no residual block"),
        ("attention", "no residual block"),
        *(
            pytest.param(name, text, marks=pytest.mark.slow)
            for name, text in (("deberta-v2", "positions"), ("swin", "not the same tokens"), ("t5", "not the same tokens"))
        ),
    ],
)
def test_refusals(name, text, captured) -> None:
    """Models whose attention depends on more than which tokens there are, are left alone, with the reason."""
    assert text in reason(run_passes(captured(name)))


def test_fixed_numbers_of_tokens(captured) -> None:
    """A number of tokens that is known is checked when the plan is made; a least number is kept to."""
    program = run_passes(captured("vit"))
    assert "18 can" in reason(program, "r=19")
    _, result = merged(program, "r=15,minimum_tokens=20")
    assert lengths_after(result, 37) == [22, 20]
    assert "11 can" in reason(program, "ratio=0.2")


def test_limited_numbers_of_tokens(captured) -> None:
    """Where no number of tokens is large enough for what is asked, the reason says so."""
    assert "there are 64 tokens at most, and nothing is merged below 80" in reason(run_passes(captured("bert")), "r=80")


def test_ratio_and_blocks(encoder) -> None:
    """A ratio is what is left in the end, and a range of blocks leaves the others alone."""
    _, result = merged(encoder(), "ratio=0.6,schedule=increasing")
    assert lengths_after(result, 100) == [60]
    _, result = merged(encoder(), "ratio=0.75")
    assert lengths_after(result, 100) == [88, 75]
    plan, _ = merged(encoder(), "r=2,first=1")
    assert [decision.why.partition(":")[0] for decision in plan.decisions] == ["block 1"]
    assert "more than half" in reason(encoder(), "ratio=0.4,last=0")
    assert "none of the blocks" in reason(encoder(), "r=2,first=2")


def test_edited_plans(encoder) -> None:
    """A plan that was edited is obeyed; one that cannot be is an error that says why."""
    step = MergeTokens(r=2)
    plan = step.plan(encoder(), Context())

    def edited(*changes):
        decisions = [dataclasses.replace(d, detail={**d.detail, **c}) for d, c in zip(plan.decisions, changes, strict=True)]
        return step.apply(encoder(), dataclasses.replace(plan, decisions=tuple(decisions)))

    assert lengths_after(edited({"less": 1}, {"less": 3, "metric": "tokens"}), 30) == [29, 27]
    for changes, message in (
        (({}, {"less": 9}), "needs `least` to be 7"),
        (({}, {"less": 1}), "numbers must fall"),
        (({}, {"metric": "values"}), "no metric 'values'"),
        (({"protect": -1}, {}), "`protect`, at least 0"),
        (({"parts": 2000}, {}), "`parts`, 1 to 1024"),
    ):
        with pytest.raises(PlanError, match=message):
            edited(*changes)
    with pytest.raises(PlanError, match="in order"):
        step.apply(encoder(), dataclasses.replace(plan, decisions=plan.decisions[::-1]))


def test_other_passes(encoder) -> None:
    """Packed programs are refused, and packing refuses merged ones; layers go before, and behind merges their feed-forwards."""
    packed = run_passes(encoder(), ["pack-tokens"])
    assert packed.signature.packing is not None
    assert "packed" in reason(packed)
    _, result = merged(encoder(), "r=2")
    (refusal,) = parse_pass("pack-tokens").plan(result, Context()).refusals
    assert refusal.reason
    assert "merged already" in reason(result)
    context = Context(tuple(((x, mask), {}) for x, mask in [batch([20] * 8, 20)]))
    fewer = run_passes(encoder(), ["drop-layers:drop=1", "merge-tokens:r=2"], context)
    assert len(list(calls(fewer.graph, dialect.merge))) == 1
    step = parse_pass("drop-layers:drop=1,unit=feed-forward")
    verify(step.apply(result, step.plan(result, context)))
    refusals = parse_pass("drop-layers:keep_ratio=1,unit=attention").plan(result, context).refusals
    assert [refusal.reason.rpartition(" or ")[2] for refusal in refusals] == ["is read outside of it"] * 2


def test_kernels(encoder) -> None:
    """The compiled program computes what the graph does, at all lengths, padded or not."""
    program = run_passes(encoder(), ["merge-tokens:r=5,metric=tokens"])
    compiled = graphwright.compile(program)
    for lengths, size in (([1], 1), ([2, 1], 2), ([7, 0], 7), ([63, 20, 1], 63), ([140], 140)):
        x, mask = batch(lengths, size)
        found, expected = compiled(x, mask), program.reference(x, mask)
        there = mask.bool()
        assert found.isfinite().all()
        assert (found - expected)[there].norm() <= 1e-4 * expected[there].norm()
