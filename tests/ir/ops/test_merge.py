"""What merging tokens keeps, whatever the tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from graphwright.ir import dialect


def plan(metric, size, kept, protect=0):
    score, partner = dialect.merge_match(metric, size, protect)
    return dialect.merge_plan(dialect.merge_rank(score), partner, kept)


def some(batch, tokens, features=8):
    """Return a metric, sizes 0 to 3, and tokens."""
    metric = functional.normalize(torch.randn(batch, tokens, features), dim=-1)
    return metric, torch.randint(0, 4, (batch, tokens)).float(), torch.randn(batch, tokens, features)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 40), st.integers(0, 3), st.data())
def test_every_row_is_filled(tokens, protect, data) -> None:
    """Any number that may go leaves so many rows, each with one token that stays, in order; sums of sizes stay."""
    torch.manual_seed(tokens)
    metric, size, x = some(2, tokens)
    gone = data.draw(st.integers(0, max(tokens - protect, 0) // 2))
    destination = plan(metric, size, tokens - gone, protect)
    merged, sizes = dialect.merge(x, size, destination, tokens - gone)
    assert merged.shape == (2, tokens - gone, 8)
    torch.testing.assert_close(sizes.sum(1), size.sum(1))
    for row in destination:
        assert sorted(set(row.tolist())) == list(range(tokens - gone))
        first = [row.tolist().index(at) for at in range(min(protect, tokens))]
        assert first == list(range(min(protect, tokens)))
    if gone == 0:
        assert torch.equal(merged, x)
        assert torch.equal(sizes, size)


def test_protected_tokens_are_alone() -> None:
    """The first tokens keep their places and their values, and nothing is merged into them."""
    metric, _, x = some(3, 21)
    metric[:, 1:] = metric[:, :1]
    merged, sizes = dialect.merge(x, torch.ones(3, 21), plan(metric, torch.ones(3, 21), 12, 3), 12)
    assert torch.equal(merged[:, :3], x[:, :3])
    assert torch.equal(sizes[:, :3], torch.ones(3, 3))


def test_most_alike_go_first() -> None:
    """One pair that is more alike than all others is the one that is merged, into the mean by size."""
    metric, size, x = torch.eye(6)[None].clone(), torch.tensor([[1.0, 1, 3, 1, 1, 1]]), torch.randn(1, 6, 4)
    metric[0, 2] = metric[0, 5]
    destination = plan(metric, size, 5)
    assert destination.tolist() == [[0, 1, 4, 2, 3, 4]]
    merged, sizes = dialect.merge(x, size, destination, 5)
    torch.testing.assert_close(merged[0, 4], (3 * x[0, 2] + x[0, 5]) / 4)
    assert sizes.tolist() == [[1, 1, 1, 1, 4]]


def test_padding_goes_before_content_and_changes_nothing() -> None:
    """As long as padding can go no content is merged, whatever padding holds."""
    metric, size, x = some(1, 16)
    size = (torch.arange(16) < 8).float()[None]
    for number in (1e3, -7.0):
        x[0, 8:] = number
        merged, sizes = dialect.merge(x, size, plan(metric, size, 12), 12)
        assert torch.equal(merged[0, :8], x[0, :8])
        assert torch.equal(sizes[0, :8], torch.ones(8))
    # Of eight that have to go, four are padding; the others are merged with content.
    merged, sizes = dialect.merge(x, size, plan(metric, size, 8), 8)
    assert sizes.sum() == 8
    assert (sizes > 0).sum() == 4
    assert (merged[sizes > 0] != -7.0).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(0, 9))
def test_duplicates_are_merged_without_loss(pairs, seed) -> None:
    """Attention to merged duplicates with log(size) added is attention to all, and unmerging gives all of it back."""
    torch.manual_seed(seed)
    keys, values = torch.randn(2, 2, pairs, 4).double(), torch.randn(2, 2, pairs, 3).double()
    k, v = keys.repeat_interleave(2, 2), values.repeat_interleave(2, 2)
    size = torch.randint(1, 4, (2, 2 * pairs)).float()
    destination = plan(dialect.merge_metric(k), size, pairs)
    flat = [t.permute(0, 2, 1, 3).flatten(2) for t in (k, v)]
    (merged_k, sizes), (merged_v, _) = (dialect.merge(t, size, destination, pairs) for t in flat)
    for whole, merged in zip(flat, (merged_k, merged_v), strict=True):
        torch.testing.assert_close(dialect.unmerge(merged, destination), whole)
    q = torch.randn(2, 2, 5, 4).double()
    options = {"bias": "log(in0[b, k])", "scale": 0.5}
    expected = dialect.attention(q, k, v, [size], None, **options)
    heads = (t.unflatten(2, (2, -1)).permute(0, 2, 1, 3) for t in (merged_k, merged_v))
    torch.testing.assert_close(dialect.attention(q, *heads, [sizes], None, **options), expected)


def test_unmerge_of_indices_composes() -> None:
    """Unmerging one plan's rows by another's gives the rows of both."""
    metric, size, x = some(2, 20)
    first = plan(metric, size, 14)
    once, sizes = dialect.merge(x, size, first, 14)
    second = plan(dialect.merge_metric(once[:, None]), sizes, 9)
    twice, _ = dialect.merge(once, sizes, second, 9)
    both = dialect.unmerge(second, first)
    assert torch.equal(dialect.unmerge(twice, both), dialect.unmerge(dialect.unmerge(twice, second), first))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dialect.merge_match(torch.ones(2, 3, 4), torch.ones(2, 4), 0), "size is"),
        (lambda: dialect.merge_match(torch.ones(2, 3, 4), torch.ones(2, 3), -1), "protect"),
        (lambda: dialect.merge_metric(torch.ones(2, 3, 4)), "heads"),
        (lambda: dialect.merge(torch.ones(2, 3, 4), torch.ones(2, 3), torch.ones(2, 3), 2), "destination must be"),
    ],
)
def test_misfits_are_refused(call, message) -> None:
    """Shapes and dtypes that do not fit are refused when shapes are worked out."""
    with torch.device("meta"), pytest.raises(RuntimeError, match=message):
        call()
