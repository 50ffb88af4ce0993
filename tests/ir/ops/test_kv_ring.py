"""Rings compared with caches that keep every token: chunk after chunk, ragged, whatever the sizes."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.ops.kv import kv_attention_reference
from graphwright.ir.ops.kv_ring import kv_ring_append_reference, kv_ring_attention_reference, kv_ring_read_reference

TOTAL = 40


@pytest.mark.parametrize("slots", [1, 5, 8, 64])
@pytest.mark.parametrize("chunk", [1, 3, 5, 20])
def test_a_ring_gives_what_a_cache_of_all_tokens_gives(slots, chunk) -> None:
    """The window is that of the ring or smaller; the ring starts full of NaN; sequences have tokens of their own number."""
    past, counts = torch.tensor([0, 0]), torch.tensor([chunk, max(1, chunk - 2)])
    every = [torch.zeros(2, 2, TOTAL * 2, 4) for _ in "kv"]
    rings = [torch.full((2, 2, slots, 4), torch.nan) for _ in "kv"]
    for window in (slots, max(1, slots - 2)):
        predicate = f"q - k >= 0 & k - q + {window - 1} >= 0"
        for _ in range(TOTAL // chunk // 2):
            q, *new = torch.randn(2, 4, chunk, 4), torch.randn(2, 2, chunk, 4), torch.randn(2, 2, chunk, 4)
            for b in range(2):
                for cache, x in zip(every, new, strict=True):
                    cache[b, :, int(past[b]) : int(past[b]) + chunk] = x[b]
            options = {"predicate": predicate, "scale": 0.4, "bias": "float(k - q)*0.1 + float(k)*0.01"}
            expected = kv_attention_reference(q, *every, past, [], None, **options)
            old = [kv_ring_read_reference(ring, x, past) for ring, x in zip(rings, new, strict=True)]
            got = kv_ring_attention_reference(q, *old, past, [], None, **options)
            for b, count in enumerate(counts.tolist()):
                torch.testing.assert_close(got[b, :, :count], expected[b, :, :count])
            rings = [kv_ring_append_reference(ring, x, past, counts) for ring, x in zip(rings, new, strict=True)]
            past = past + counts


def test_all_tokens_count_unless_it_is_said() -> None:
    """Without a count the last of the new tokens stay; with one, those before it, and none at all leave the ring as it is."""
    ring, new, past = torch.full((1, 1, 3, 1), -1.0), torch.arange(5.0).view(1, 1, 5, 1), torch.tensor([4])
    # Tokens 4 to 8 go to slots 1, 2, 0, 1, 2.
    assert kv_ring_append_reference(ring, new, past).flatten().tolist() == [2.0, 3.0, 4.0]
    assert kv_ring_append_reference(ring, new, past, torch.tensor([2])).flatten().tolist() == [-1.0, 0.0, 1.0]
    assert torch.equal(kv_ring_append_reference(ring, new, past, torch.tensor([0])), ring)
    assert torch.equal(kv_ring_append_reference(ring, new[:, :, :0], past), ring)


def test_entries_are_read_in_order() -> None:
    """The oldest first, zeros where there was none, then the new ones."""
    ring = torch.tensor([9.0, 7.0, 8.0]).view(1, 1, 3, 1)
    new = torch.tensor([10.0, 11.0]).view(1, 1, 2, 1)
    assert kv_ring_read_reference(ring, new, torch.tensor([10])).flatten().tolist() == [7, 8, 9, 10, 11]
    ring[0, 0, 2] = torch.nan
    assert kv_ring_read_reference(ring, new, torch.tensor([2])).flatten().tolist() == [0, 9, 7, 10, 11]
