"""What a quantised cache keeps, and attention over it."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir import dialect
from graphwright.ir.errors import VerifyError
from graphwright.ir.ops.kv_quantized import CHANNEL, TOKEN, dequantise, quantise, quantised_tokens

GROUP, RESIDUAL, CAPACITY, HEADS, SIZE = 16, 32, 160, 2, 32
STATES = ("codes", "scale", "minimum", "ring")


def empty(along: str, bits: int, batch: int = 1, size: int = SIZE, kept=torch.float16) -> list[torch.Tensor]:
    """Return states that hold nothing: NaN, and bytes of all ones."""
    groups = (CAPACITY // GROUP, size) if along == CHANNEL else (size // GROUP, CAPACITY)
    shapes = {"codes": (CAPACITY, size * bits // 8), "scale": groups, "minimum": groups, "ring": (RESIDUAL + GROUP, size)}
    dtypes = {"codes": torch.uint8, "ring": torch.float32}
    return [
        torch.full((batch, HEADS, *shape), 255 if name == "codes" else torch.nan, dtype=dtypes.get(name, kept))
        for name, shape in shapes.items()
    ]


def fill(new: torch.Tensor, parts: list[int], along: str, bits: int = 4, **options) -> list[torch.Tensor]:
    """Return the states after tokens [B, Hk, T, D] came in parts."""
    states, past = empty(along, bits, len(new), new.shape[3], **options), 0
    for part in new.split(parts, 2):
        at = torch.full((len(new),), past)
        states = list(dialect.kv_quantized_append(*states, part, at, bits=bits, group=GROUP, along=along))
        past += part.shape[2]
    return states


def attended(q, k, v, bits: int = 4, parts: list[int] | None = None, **options) -> torch.Tensor:
    """Return attention of the last queries over all tokens but their own from a quantised cache."""
    own = q.shape[2]
    earlier = k.shape[2] - own
    states = [fill(t[:, :, :earlier], parts or [earlier], along, bits) for t, along in ((k, CHANNEL), (v, TOKEN))]
    past = torch.full((len(q),), earlier)
    return dialect.kv_quantized_attention(
        q, k[:, :, earlier:], v[:, :, earlier:], past, *states[0], *states[1], [], None, bits=bits, group=GROUP,
        predicate="q - k >= 0", scale=0.2, **options,
    )  # fmt: skip


def exact(q, k, v) -> torch.Tensor:
    """Return the same without quantisation."""
    past = torch.full((len(q),), k.shape[2] - q.shape[2])
    return dialect.kv_attention(q, k, v, past, [], None, predicate="q - k >= 0", scale=0.2)


@pytest.mark.parametrize(("bits", "expected"), [(8, 0.0037), (4, 0.064), (2, 0.323)])
@pytest.mark.parametrize("along", [CHANNEL, TOKEN])
def test_errors_are_those_of_the_paper(bits, expected, along) -> None:
    """Normal numbers in groups of 32 come back with the mean error that uniform steps between extremes have."""
    x = torch.randn(4, 2048, 64, generator=torch.Generator().manual_seed(0))
    back = dequantise(*quantise(x, bits, 32, along, torch.float16), bits, along, torch.float32)
    assert float((back - x).abs().mean()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("along", [CHANNEL, TOKEN])
def test_no_number_is_off_by_more_than_half_a_step(bits, along) -> None:
    """The rounding of scales and minima is taken up by the codes, also where the minimum is large beside the span."""
    x = torch.randn(2, 64, 32) * 0.3 + 10
    back = dequantise(*quantise(x, bits, 32, along, torch.float32), bits, along, torch.float32)
    dim = -2 if along == CHANNEL else -1
    wide = x.unflatten(dim, (-1, 32))
    steps = (
        ((wide.amax(dim, keepdim=True) - wide.amin(dim, keepdim=True)) / (2**bits - 1)).expand_as(wide).flatten(dim - 1, dim)
    )
    assert ((back - x).abs() <= 0.5001 * steps + 1e-5).all()
    half = dequantise(*quantise(x, bits, 32, along, torch.float16), bits, along, torch.float32)
    assert ((half - x).abs() <= 0.6 * steps + 10 * 2**-11).all()


@pytest.mark.parametrize("along", [CHANNEL, TOKEN])
def test_equal_numbers_come_back_as_they_were(along) -> None:
    """A group without a span has no NaN, and is exact where the parameters' dtype has the number."""
    for dtype, value in ((torch.float32, 0.1), (torch.float16, 0.125), (torch.float16, 0.0), (torch.float16, -3.0)):
        x = torch.full((1, 32, 32), value)
        for bits in (2, 4, 8):
            assert torch.equal(dequantise(*quantise(x, bits, 32, along, dtype), bits, along, torch.float32), x)


def test_numbers_beyond_float16_stay_finite() -> None:
    """Scales and minima are its largest numbers then."""
    x = torch.tensor([-1e30, 1e30, 0.0, 5.0]).repeat(8).expand(1, 32, 32).contiguous()
    for along in (CHANNEL, TOKEN):
        codes, scale, minimum = quantise(x, 8, 32, along, torch.float16)
        assert torch.isfinite(scale).all()
        assert torch.isfinite(minimum).all()
        assert torch.isfinite(dequantise(codes, scale, minimum, 8, along, torch.float32)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_fill_their_bytes(bits) -> None:
    """Each channel's code is its own, in the place that the format gives it."""
    ramp = torch.arange(32.0).expand(1, 32, 32).contiguous()
    codes, *_ = quantise(ramp, bits, 32, TOKEN, torch.float32)
    assert codes.shape == (1, 32, 32 * bits // 8)
    wanted = torch.floor(torch.arange(32.0) / 31 * (2**bits - 1) + 0.5)
    width = 32 * bits // 8
    for channel in range(32):
        byte, plane = channel % width, channel // width
        assert ((codes[0, 0, byte].item() >> (plane * bits)) & (2**bits - 1)) == wanted[channel]


@pytest.mark.parametrize("along", [CHANNEL, TOKEN])
@pytest.mark.parametrize("parts", [[1] * 110, [63, 47], [100, 10], [3, 29, 1, 48, 29]], ids=["ones", "two", "long", "odd"])
def test_what_is_kept_does_not_depend_on_how_tokens_came(along, parts) -> None:
    """One by one, in parts or at once: the states are bitwise the same, slots without tokens included."""
    new = torch.randn(2, HEADS, 110, SIZE)
    for one, other in zip(fill(new, parts, along), fill(new, [110], along), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("along", [CHANNEL, TOKEN])
def test_nothing_is_quantised_twice(along) -> None:
    """Codes, scales and minima of earlier tokens stay as they are while others come."""
    new = torch.randn(1, HEADS, 150, SIZE)
    before = fill(new[:, :, :100], [100], along)
    after = fill(new, [100, 50], along)
    kept = quantised_tokens(100, RESIDUAL, GROUP)
    assert kept == 64
    assert torch.equal(before[0][:, :, :kept], after[0][:, :, :kept])
    for one, other in zip(before[1:3], after[1:3], strict=True):
        part = (slice(None), slice(None), slice(kept // GROUP)) if along == CHANNEL else (..., slice(kept))
        assert torch.equal(one[part], other[part])


@pytest.mark.parametrize("count", [0, 1, 31, 32, 47, 48, 49, 63, 64, 111])
def test_the_newest_tokens_are_as_they_came(count) -> None:
    """At least `residual` are exact, and fewer than `residual` and a group; the ring has no other slots."""
    exactly = count - quantised_tokens(count, RESIDUAL, GROUP)
    assert min(count, RESIDUAL) <= exactly < RESIDUAL + GROUP
    new = torch.randn(1, HEADS, max(count, 1), SIZE)[:, :, :count]
    ring = fill(new, [count], CHANNEL)[3]
    assert ring.shape[2] == RESIDUAL + GROUP
    for token in range(count - exactly, count):
        assert torch.equal(ring[:, :, token % (RESIDUAL + GROUP)], new[:, :, token])


def test_tokens_that_do_not_count_leave_no_trace() -> None:
    """A padded prompt leaves what it leaves without its padding."""
    new = torch.randn(2, HEADS, 100, SIZE)
    for along in (CHANNEL, TOKEN):
        past, options = torch.zeros(2, dtype=torch.int64), {"bits": 4, "group": GROUP, "along": along}
        got = dialect.kv_quantized_append(*empty(along, 4, 2), new, past, count=torch.tensor([61, 100]), **options)
        for row, count in enumerate((61, 100)):
            alone = fill(new[row : row + 1, :, :count], [count], along)
            for state, wanted in zip(got, alone, strict=True):
                torch.testing.assert_close(state[row : row + 1], wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("along", [CHANNEL, TOKEN])
def test_groups_do_not_cross_heads_or_sequences(along) -> None:
    """What a head of a sequence keeps is its own, whatever is in the others."""
    new = torch.randn(3, HEADS, 70, SIZE)
    wild = new * 1000
    wild[1, 0] = new[1, 0]
    for one, other in zip(fill(new, [70], along), fill(wild, [70], along), strict=True):
        torch.testing.assert_close(one[1, 0], other[1, 0], rtol=0, atol=0, equal_nan=True)


def test_what_does_not_fit_is_left_out() -> None:
    """Tokens beyond the capacity are dropped; the states are those of the tokens that fit."""
    new = torch.randn(1, HEADS, CAPACITY + 9, SIZE)
    for along in (CHANNEL, TOKEN):
        for one, other in zip(fill(new, [150, 19], along), fill(new[:, :, :CAPACITY], [CAPACITY], along), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_prompt_that_starts_a_sequence_is_exact() -> None:
    """Its keys and values are all its own."""
    q, k, v = torch.randn(2, 4, 90, SIZE), torch.randn(2, HEADS, 90, SIZE), torch.randn(2, HEADS, 90, SIZE)
    torch.testing.assert_close(attended(q, k, v, bits=2, parts=[0]), exact(q, k, v), rtol=1e-5, atol=1e-6)


def test_a_sequence_within_the_residual_window_is_exact() -> None:
    """Nothing of it is quantised yet."""
    q, k, v = torch.randn(1, 4, 1, SIZE), torch.randn(1, HEADS, 33, SIZE), torch.randn(1, HEADS, 33, SIZE)
    torch.testing.assert_close(attended(q, k, v, bits=2), exact(q, k, v), rtol=1e-5, atol=1e-6)


def test_errors_fall_with_bits() -> None:
    """8 bits are nearer than 4, and these than 2."""
    torch.manual_seed(3)
    q, k, v = torch.randn(2, 4, 3, SIZE), torch.randn(2, HEADS, 140, SIZE), torch.randn(2, HEADS, 140, SIZE)
    errors = [float((attended(q, k, v, bits=bits) - exact(q, k, v)).norm()) for bits in (2, 4, 8)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


def test_a_window_sees_what_it_would_see() -> None:
    """A predicate hides codes as it hides keys: a window within the ring is exact, whatever is quantised before it."""
    q, k, v = torch.randn(1, 4, 1, SIZE), torch.randn(1, HEADS, 120, SIZE), torch.randn(1, HEADS, 120, SIZE)
    predicate = "q - k >= 0 & k - q + 20 >= 0"
    past = torch.tensor([119])
    wanted = dialect.kv_attention(q, k, v, past, [], None, predicate=predicate, scale=0.2)
    states = [fill(t[:, :, :119], [119], along, 2) for t, along in ((k, CHANNEL), (v, TOKEN))]
    got = dialect.kv_quantized_attention(
        q, k[:, :, 119:], v[:, :, 119:], past, *states[0], *states[1], [], None, bits=2, group=GROUP,
        predicate=predicate, scale=0.2,
    )  # fmt: skip
    torch.testing.assert_close(got, wanted)


def test_what_does_not_fit_together_is_refused(builder) -> None:
    """Bits, groups and shapes are checked where a call is made."""
    made = builder()
    new, past = made.input("new", "batch", HEADS, "tokens", SIZE), made.input("past", "batch", dtype=torch.int64)
    dtypes = {"codes": torch.uint8, "scale": torch.float16, "minimum": torch.float16, "ring": torch.float32}
    states = [
        made.input(name, "batch", *tensor.shape[1:], dtype=dtypes[name])
        for name, tensor in zip(STATES, empty(CHANNEL, 4), strict=True)
    ]
    good = {"bits": 4, "group": GROUP, "along": CHANNEL}
    made.call(dialect.kv_quantized_append, *states, new, past, **good)
    for wrong, message in (
        ({"bits": 3}, "bits must be one of"),
        ({"bits": 8}, "hold no 32 codes of 8 bits"),
        ({"group": 24}, "power of two"),
        ({"group": 8}, "groups for 160 tokens"),
        ({"along": TOKEN}, "scales of 32 tokens"),
        ({"along": "row"}, "along must be"),
    ):
        with pytest.raises(VerifyError, match=message):
            made.call(dialect.kv_quantized_append, *states, new, past, **{**good, **wrong})
