"""Attention within sequences that lie one after the other."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir import dialect


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_sequences_do_not_see_each_other(heads, softcap):
    """Each sequence gets what attention on it alone gives; one without tokens is passed over."""
    lengths = [3, 0, 1, 5]
    starts = torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32)
    q, k, v = (torch.randn(1, n, 9, 8) for n in (heads[0], heads[1], heads[1]))
    found = dialect.ragged_attention(q, k, v, starts, 5, scale=0.4, softcap=softcap)
    for first, length in zip(starts.tolist(), lengths, strict=False):
        own = slice(first, first + length)
        if length:
            expected = dialect.attention(q[:, :, own], k[:, :, own], v[:, :, own], [], None, scale=0.4, softcap=softcap)
            assert torch.allclose(found[:, :, own], expected)


@pytest.mark.parametrize(
    "change",
    [
        {"k": torch.ones(1, 3, 9, 8), "v": torch.ones(1, 3, 9, 8)},
        {"v": torch.ones(1, 4, 8, 8)},
        {"q": torch.ones(2, 4, 9, 8)},
        {"k": torch.ones(1, 4, 9, 6)},
        {"starts": torch.tensor([0, 9])},
    ],
)
def test_what_does_not_fit_is_refused(change):
    """Shapes and dtypes that do not fit raise when shapes are inferred."""
    given = {name: torch.ones(1, 4, 9, 8) for name in "qkv"} | {"starts": torch.tensor([0, 9], dtype=torch.int32)} | change
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(RuntimeError):
        dialect.ragged_attention(*(mode.from_tensor(given[n]) for n in ("q", "k", "v", "starts")), 9, scale=1.0)
