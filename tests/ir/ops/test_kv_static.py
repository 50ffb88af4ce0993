"""Attention over codes with scales that never change: what codes hold, and what attention makes of them."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir import dialect
from graphwright.ir.ops.kv_static import decode, encode


def scales(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the scales that reach the largest value of each channel, [H * D]."""
    return x.abs().amax((0, 2)).flatten() / (2 ** (bits - 1) - 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_code_is_half_a_step_away_at_most(bits: int) -> None:
    """Every value comes back to within half its channel's scale; channels of heads are not mixed up."""
    x = torch.randn(2, 3, 17, 8) * torch.rand(3, 1, 8) * 10
    scale = scales(x, bits)
    codes = encode(x, scale, bits)
    assert codes.shape == (2, 3, 17, 8 * bits // 8)
    gap = (decode(codes, scale, bits) - x).abs()
    assert bool((gap <= scale.reshape(3, 1, 8) * 0.5001).all())
    assert float(gap.max()) > 0


def test_two_codes_share_a_byte_the_first_in_the_lower_half() -> None:
    """Codes from -8 to 7 are kept with 8 added; what is beyond them becomes the nearest."""
    x = torch.tensor([-8.0, 7.0, 0.0, -1.0, 100.0, -100.0]).reshape(1, 1, 1, 6)
    codes = encode(x, torch.ones(6), 4)
    assert codes.flatten().tolist() == [0xF0, 0x78, 0x0F]
    assert decode(codes, torch.ones(6), 4).flatten().tolist() == [-8, 7, 0, -1, 7, -8]
    assert encode(x, torch.ones(6), 8).flatten().tolist() == [-8, 7, 0, -1, 100, -100]
    assert encode(x * 10, torch.ones(6), 8).flatten().tolist()[4:] == [127, -128]


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_attention_over_what_the_codes_stand_for(bits: int) -> None:
    """The result is that of attention over decoded keys and values, the call's own in codes too; later keys are not seen."""
    q, (k, v) = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 2, 12, 8)
    k_scale, v_scale = scales(k, bits), scales(v, bits)
    codes = encode(k, k_scale, bits), encode(v, v_scale, bits)
    hidden = torch.zeros(2, 12, dtype=torch.long)
    hidden[1, :4] = 1
    options = {"predicate": "in0[b, k] == 0", "bias": "float(k) * 0.25", "scale": 0.4, "softcap": 1.5}
    found, *present = dialect.kv_static_attention(
        q, k[:, :, 7:], v[:, :, 7:], codes[0][:, :, :7], codes[1][:, :, :7], k_scale, v_scale, [hidden], bits=bits, **options
    )
    for new, whole in zip(present, codes, strict=True):
        assert torch.equal(new, whole)
    options["predicate"] += " & q + 7 - k >= 0"
    keys, values = decode(codes[0], k_scale, bits), decode(codes[1], v_scale, bits)
    torch.testing.assert_close(found, dialect.attention(q, keys, values, [hidden], None, **options))


def test_a_query_that_sees_nothing_sees_all_alike() -> None:
    """Where the predicate leaves no key, the keys up to the query's own weigh the same."""
    q, k = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8)
    empty, scale = torch.zeros(1, 1, 0, 8, dtype=torch.int8), scales(k, 8)
    found = dialect.kv_static_attention(q, k, k, empty, empty, scale, scale, [], bits=8, predicate="q < 0", scale=1.0)[0]
    values = decode(encode(k, scale, 8), scale, 8)
    torch.testing.assert_close(found, values.cumsum(2) / torch.arange(1, 4).reshape(1, 1, 3, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 2}, "bits must be 8 or 4"),
        ({"bits": 4}, "must be torch.uint8 for 4 bits"),
        ({"width": 4}, "4 bytes for 8 codes"),
        ({"scale": 9}, "k_scale is"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, int], message: str) -> None:
    """Other bits, codes of another dtype or width, and scales of another size are refused."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = {"bits": 8, "width": 8, "scale": 8, **change}
    with FakeTensorMode():
        q, past, scale = (
            torch.zeros(1, 1, 2, 8),
            torch.zeros(1, 1, 3, given["width"], dtype=torch.int8),
            torch.ones(given["scale"]),
        )
        with pytest.raises(RuntimeError, match=message):
            dialect.kv_static_attention(q, q, q, past, past, scale, scale, [], bits=given["bits"], scale=1.0)
