"""Kernels that merge tokens, against the reference, in memory that holds NaN before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphwright
from graphwright.ir import dialect

DYNAMIC = {0: "batch", 1: "tokens"}


class Matched(nn.Module):
    def __init__(self, protect):
        super().__init__()
        self.protect = protect

    def forward(self, keys, size):
        score, partner = dialect.merge_match(dialect.merge_metric(keys.transpose(1, 2)), size, self.protect)
        return score, partner, dialect.merge_rank(score)


class Planned(nn.Module):
    """What becomes of the tokens after `merged` of them go, or all that can where these are fewer."""

    def __init__(self, merged, protect=0):
        super().__init__()
        self.merged, self.protect = merged, protect

    def forward(self, metric, size, x):
        tokens = metric.shape[1]
        kept = torch.sym_max(tokens - self.merged, torch.sym_min(tokens, self.merged + self.protect))
        score, partner = dialect.merge_match(metric, size, self.protect)
        destination = dialect.merge_plan(dialect.merge_rank(score), partner, kept)
        merged, sizes = dialect.merge(x, size, destination, kept)
        return destination, merged, sizes, dialect.unmerge(merged, destination), dialect.unmerge(destination, destination)


def sizes_of(batch, tokens):
    """Return sizes 0 to 3, whole numbers."""
    return torch.randint(0, 4, (batch, tokens)).float()


@pytest.fixture(scope="module")
def matched():
    made = {}

    def get(protect, heads=3, features=24, dtype=torch.float32):
        key = (protect, heads, features, dtype)
        if key not in made:
            given = torch.randn(2, 9, heads, features).to(dtype), sizes_of(2, 9)
            made[key] = graphwright.compile(Matched(protect), *given, dynamic={"keys": DYNAMIC, "size": DYNAMIC}, check=False)
        return made[key]

    return get


@pytest.mark.parametrize(
    ("heads", "features", "dtype"), [(3, 24, torch.float32), (1, 80, torch.float32), (4, 32, torch.bfloat16)]
)
@pytest.mark.parametrize("protect", [0, 2])
def test_match(matched, heads, features, dtype, protect):
    """Scores are those of the reference at all lengths, partners are as like as its, and ranks are a stable order."""
    compiled = matched(protect, heads, features, dtype)
    for tokens in (1, 2, 3, 63, 1000):
        keys, size = torch.randn(3, tokens, heads, features).to(dtype), sizes_of(3, tokens)
        score, partner, rank = compiled(keys, size)
        metric = dialect.merge_metric(keys.transpose(1, 2))
        expected, _ = dialect.merge_match(metric, size, protect)
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-5)
        mine = (metric * metric.gather(1, partner[..., None].expand_as(metric))).sum(-1)
        plain = (score > -2) & (score < 2)
        torch.testing.assert_close(score[plain], mine[plain], rtol=0, atol=1e-5)
        stays = score == -torch.inf
        assert torch.equal(partner[stays], torch.arange(tokens).expand(3, tokens)[stays])
        assert torch.equal(rank, dialect.merge_rank(score))


def test_match_ties(matched):
    """Of equally like partners the first is chosen, and of equal scores the first token goes."""
    keys, size = torch.ones(1, 150, 3, 24), torch.ones(1, 150)
    score, partner, rank = matched(0)(keys, size)
    assert torch.equal(partner[0, ::2], torch.ones(75, dtype=torch.int64))
    assert torch.equal(rank, dialect.merge_rank(score))
    torch.testing.assert_close(score[0, ::2], torch.ones(75))
    assert torch.equal(rank[0, ::2], torch.arange(75))


def test_match_without_numbers(matched):
    """NaN and zero keys give no NaN: NaN counts as unlike, and ranks stay a permutation."""
    keys, size = torch.randn(1, 40, 3, 24), torch.ones(1, 40)
    keys[0, 5:20] = torch.nan
    keys[0, 20:25] = 0
    score, _, rank = matched(0)(keys, size)
    assert not score.isnan().any()
    assert torch.equal(score[0, 6:20:2], torch.full((7,), -1.0))
    assert torch.equal(rank.sort(-1).values[0], torch.arange(40))


@pytest.mark.parametrize(
    ("features", "dtype", "tolerance"), [(24, torch.float32, 1e-6), (1, torch.float16, 2e-3), (1100, torch.bfloat16, 8e-3)]
)
def test_merge(features, dtype, tolerance):
    """Rows, means and sizes are the reference's, what is alone keeps its bits, and every token gets its row's mean again."""
    model = Planned(6, protect=1)
    names = ("metric", "size", "x")

    def inputs(batch, tokens):
        metric = nn.functional.normalize(torch.randn(batch, tokens, 8), dim=-1)
        return metric, sizes_of(batch, tokens), torch.randn(batch, tokens, features).to(dtype)

    compiled = graphwright.compile(model, *inputs(2, 30), dynamic=dict.fromkeys(names, DYNAMIC), check=False)
    for batch, tokens in ((1, 1), (2, 7), (1, 8), (2, 63), (1, 1000)):
        given = inputs(batch, tokens)
        destination, merged, sizes, back, index = compiled(*given)
        expected = model(*given)
        assert torch.equal(destination, expected[0])
        assert torch.equal(sizes, expected[2])
        assert torch.equal(index, expected[4])
        assert not merged.isnan().any()
        error = (merged.double() - expected[1].double()).norm() / expected[1].double().norm()
        assert error <= tolerance
        assert torch.equal(back, dialect.unmerge(merged, destination))
        alone = torch.nn.functional.one_hot(destination, merged.shape[1]).sum(1) == 1
        rows = alone.gather(1, destination)
        assert torch.equal(back[rows], given[2][rows])


def test_fixed_sizes():
    """A program of fixed sizes is made too, and one that does not use the sizes."""

    class Fixed(nn.Module):
        def forward(self, metric, size, x):
            score, partner = dialect.merge_match(metric, size, 0)
            return dialect.merge(x, size, dialect.merge_plan(dialect.merge_rank(score), partner, 9), 9)[0]

    metric = nn.functional.normalize(torch.randn(1, 13, 8), dim=-1)
    given = metric, torch.ones(1, 13), torch.randn(1, 13, 5)
    compiled = graphwright.compile(Fixed(), *given, dynamic={}, check=False)
    torch.testing.assert_close(compiled(*given), Fixed()(*given))
