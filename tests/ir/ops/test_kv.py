"""Entries put into caches, and attention over what is filled of them."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir import dialect


def attended(q, k, v, **options):
    """Attention over whole sequences."""
    return dialect.attention(q, k, v, [], None, predicate="q - k >= 0", scale=0.5, **options)


def test_append_puts_each_sequence_behind_what_it_has() -> None:
    """Entries go to the slots after the filled ones, which differ by sequence; all others keep what they hold."""
    cache, new = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 2, 4)
    got = dialect.kv_append(cache, new, torch.tensor([0, 4]))
    expected = cache.clone()
    expected[0, :, 0:2], expected[1, :, 4:6] = new[0], new[1]
    assert torch.equal(got, expected)
    assert got.data_ptr() != cache.data_ptr()


def test_append_leaves_out_what_does_not_fit() -> None:
    """Entries beyond the capacity are dropped."""
    cache, new = torch.zeros(1, 1, 3, 2), torch.ones(1, 1, 2, 2)
    assert dialect.kv_append(cache, new, torch.tensor([2])).sum() == 2


@pytest.mark.parametrize("past", [(0, 0), (3, 5)])
def test_attention_over_a_cache_is_attention_over_its_filled_part(past) -> None:
    """Queries at their positions get what they get in the whole sequence; NaN in unfilled slots does not matter."""
    size, count = 12, 3
    q, k, v = torch.randn(2, 4, count, 8), torch.randn(2, 2, size, 8), torch.randn(2, 2, size, 5)
    for row, first in enumerate(past):
        k[row, :, first + count :] = v[row, :, first + count :] = torch.nan
    got = dialect.kv_attention(q, k, v, torch.tensor(past), [], None, predicate="q - k >= 0", scale=0.5)
    for row, first in enumerate(past):
        whole = torch.zeros(1, 4, first + count, 8)
        whole[:, :, first:] = q[row]
        kept = slice(0, first + count)
        expected = attended(whole, k[row : row + 1, :, kept], v[row : row + 1, :, kept])[:, :, first:]
        torch.testing.assert_close(got[row : row + 1], expected)


def test_attention_sees_no_later_key_whatever_the_predicate_says() -> None:
    """Without a predicate all keys up to the query's own are seen, and no others."""
    q, k, v = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9, 4)
    got = dialect.kv_attention(q, k, v, torch.tensor([2]), [], None, scale=0.5)
    again = dialect.kv_attention(q, k, v, torch.tensor([2]), [], None, predicate="q - k >= 0", scale=0.5)
    torch.testing.assert_close(got, again)


def test_shapes_that_do_not_fit_are_refused() -> None:
    """A cache of other heads, or numbers of filled slots for other sequences, do not fit."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        cache, new = torch.empty(2, 3, 7, 4), torch.empty(2, 2, 1, 4)
        with pytest.raises(RuntimeError, match="what is new is"):
            dialect.kv_append(cache, new, torch.empty(2, dtype=torch.int64))
        with pytest.raises(RuntimeError, match="past has 3 sequences"):
            dialect.kv_append(cache, torch.empty(2, 3, 1, 4), torch.empty(3, dtype=torch.int64))
