"""Keys and values that are kept in few bits: `graphwright::kv_quantized_append` and `graphwright::kv_quantized_attention`.

What is kept of a sequence with n tokens is a function of n and of the tokens alone, however they came: one by one, as a block
or in any parts. With groups of G tokens and a ring of R + G slots,

- the first Q(n) = G * floor(max(n - R, 0) / G) tokens are quantised, once and for all: a token is when its group leaves the
  residual window of R tokens, together with its group;
- the ring holds the newest R + G tokens as they came, token p in slot p mod (R + G). The n - Q(n) < R + G tokens that are not
  quantised are among them.

A group of numbers with minimum m and maximum M has a scale s = (M - m) / (2^bits - 1) and codes c = round((x - m) / s), and
stands for c * s + m. Both m and s are rounded to the dtype that they are kept in before the codes are made, which takes up what
the rounding changed; a scale of 0 has codes of 0, so that equal numbers that this dtype has come back as they were. Groups
never cross heads or sequences:

- keys, "channel": the G consecutive tokens from a multiple of G on, of one channel;
- values, "token": up to G consecutive channels of one token.

States of one of both, with D features:

- codes [B, Hk, C, D * bits / 8], uint8. With W = D * bits / 8, byte j of a token holds the codes of the channels j, j + W,
  j + 2 W, ..., the first in the lowest bits;
- scale and minimum, float16 or float32: [B, Hk, C // G, D] of keys, [B, Hk, D / g, C] of values with groups of g channels;
- ring [B, Hk, R + G, D], of the model's dtype.

Slots of tokens that are not there may hold anything, NaN included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch

from .definition import computed_in, define, expect
from .kv import kv_append_reference, kv_attention_reference

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

APPEND_SCHEMA = (
    "kv_quantized_append(Tensor codes, Tensor scale, Tensor minimum, Tensor ring, Tensor new, Tensor past, *, "
    "Tensor? count=None, int bits, int group, str along) -> (Tensor, Tensor, Tensor, Tensor)"
)
ATTENTION_SCHEMA = (
    "kv_quantized_attention(Tensor q, Tensor k, Tensor v, Tensor past, Tensor k_codes, Tensor k_scale, Tensor k_minimum, "
    "Tensor k_ring, Tensor v_codes, Tensor v_scale, Tensor v_minimum, Tensor v_ring, Tensor[] operands, Tensor? sink, *, "
    "int bits, int group, str predicate='', str bias='', float scale, float softcap=0.0) -> Tensor"
)

BITS = (2, 4, 8)
CHANNEL, TOKEN = "channel", "token"


def quantised_tokens(tokens: int, residual: int, group: int) -> int:
    """Return how many of the first tokens of a sequence are quantised.

    Args:
        tokens: of the sequence.
        residual: the newest tokens that never are, R.
        group: tokens of a group, G.
    """
    return group * (max(tokens - residual, 0) // group)


def quantise(
    x: torch.Tensor, bits: int, group: int, along: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the codes, the scales and the minima of whole groups.

    Args:
        x: [..., T, D], floating point; for "channel" T is a multiple of the group, for "token" D is.
        bits: of a code: 2, 4 or 8.
        group: numbers of a group.
        along: "channel" or "token".
        dtype: of scales and minima.

    Returns:
        Codes, uint8 [..., T, D * bits / 8]; scales and minima, [..., T / group, D] for "channel", [..., D / group, T] for
        "token".
    """
    dim = -2 if along == CHANNEL else -1
    wide = x.to(computed_in(x.dtype)).unflatten(dim, (-1, group))  # type: ignore[no-untyped-call]
    limit, levels = torch.finfo(dtype).max, 2**bits - 1
    minimum = wide.amin(dim, keepdim=True).clamp(-limit, limit).to(dtype)
    span = wide.amax(dim, keepdim=True) - minimum.to(wide.dtype)
    scale = (span / levels).clamp(0, limit).to(dtype)
    steps = (wide - minimum.to(wide.dtype)) / scale.to(wide.dtype)
    codes = torch.where(scale > 0, torch.floor(steps + 0.5), 0.0).clamp(0, levels).flatten(dim - 1, dim).to(torch.uint8)
    scale, minimum = (t.squeeze(dim) if along == CHANNEL else t.squeeze(dim).transpose(-1, -2) for t in (scale, minimum))
    return _pack(codes, bits), scale, minimum


def dequantise(
    codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, bits: int, along: str, dtype: torch.dtype
) -> torch.Tensor:
    """Return what codes stand for, [..., T, D] in `dtype`; the arguments are those that `quantise` returned."""
    numbers = _unpack(codes, bits).to(dtype)
    scale, minimum = (t.to(dtype) if along == CHANNEL else t.to(dtype).transpose(-1, -2) for t in (scale, minimum))
    dim = -2 if along == CHANNEL else -1
    times = numbers.shape[dim] // scale.shape[dim]
    return numbers * scale.repeat_interleave(times, dim) + minimum.repeat_interleave(times, dim)


def kv_quantized_append_reference(
    codes: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    ring: torch.Tensor,
    new: torch.Tensor,
    past: torch.Tensor,
    *,
    count: torch.Tensor | None = None,
    bits: int,
    group: int,
    along: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the states with new tokens at positions past[b], past[b] + 1, ...; what goes beyond the capacity is left out.

    Args:
        codes: [B, Hk, C, D * bits / 8], uint8.
        scale: [B, Hk, C // G, D] along channels, [B, Hk, D / g, C] along tokens.
        minimum: likewise.
        ring: [B, Hk, R + G, D].
        new: [B, Hk, T, D], of the ring's dtype.
        past: [B], int64: tokens that there are.
        count: [B], int64: how many of the new tokens count, from the first on; None for all.
        bits: of a code: 2, 4 or 8.
        group: G, a power of two.
        along: "channel" for keys, "token" for values.

    Returns:
        The four states.
    """
    codes, scale, minimum, ring = codes.clone(), scale.clone(), minimum.clone(), ring.clone()
    capacity, slots = codes.shape[2], ring.shape[2]
    counts = [new.shape[2]] * len(new) if count is None else count.clamp(0, new.shape[2]).tolist()
    for row, (start, added) in enumerate(zip(past.tolist(), counts, strict=True)):
        end = min(start + added, capacity)
        first, last = (quantised_tokens(n, slots - group, group) for n in (start, end))
        if last > first:
            positions = torch.arange(first, last, device=new.device)
            old = ring[row][:, positions % slots]
            fresh = new[row][:, (positions - start).clamp(min=0)]
            x = torch.where((positions < start)[:, None], old, fresh)
            parts = quantise(x, bits, group if along == CHANNEL else new.shape[3] // scale.shape[2], along, scale.dtype)
            codes[row, :, first:last] = parts[0]
            for state, part in ((scale, parts[1]), (minimum, parts[2])):
                if along == CHANNEL:
                    state[row, :, first // group : last // group] = part
                else:
                    state[row, :, :, first:last] = part
        kept = torch.arange(max(start, end - slots), end, device=new.device)
        ring[row][:, kept % slots] = new[row][:, kept - start]
    return codes, scale, minimum, ring


def kv_quantized_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: torch.Tensor,
    k_codes: torch.Tensor,
    k_scale: torch.Tensor,
    k_minimum: torch.Tensor,
    k_ring: torch.Tensor,
    v_codes: torch.Tensor,
    v_scale: torch.Tensor,
    v_minimum: torch.Tensor,
    v_ring: torch.Tensor,
    operands: list[torch.Tensor],
    sink: torch.Tensor | None,
    *,
    bits: int,
    group: int,
    predicate: str = "",
    bias: str = "",
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Return what `graphwright::kv_attention` gives over the tokens kept and the queries' own, which are exact.

    The states are those before the call: they hold `past` tokens of each sequence, and none of the queries'. A prompt that
    starts a sequence is therefore computed as without quantisation.

    Args:
        q: [B, H, T, D], floating point.
        k: [B, Hk, T, D], keys of the queries' own tokens.
        v: [B, Hk, T, Dv].
        past: [B], int64: the position of the first query of each sequence.
        k_codes: with k_scale, k_minimum and k_ring the states of keys.
        k_scale: see there.
        k_minimum: see there.
        k_ring: see there.
        v_codes: with v_scale, v_minimum and v_ring the states of values.
        v_scale: see there.
        v_minimum: see there.
        v_ring: see there.
        operands: as of `kv_attention`, like all that follow the states' bits and group.
        sink: [H] or None.
        bits: of a code.
        group: G.
        predicate: over b, h and the positions q and k.
        bias: likewise.
        scale: factor of the scores.
        softcap: 0 for none.

    Returns:
        [B, H, T, Dv] in q's dtype. A query that sees no key gives 0.
    """
    wide = computed_in(q.dtype)
    keys = _kept(k_codes, k_scale, k_minimum, k_ring, past, bits, group, CHANNEL, wide)
    values = _kept(v_codes, v_scale, v_minimum, v_ring, past, bits, group, TOKEN, wide)
    keys, values = kv_append_reference(keys, k.to(wide), past), kv_append_reference(values, v.to(wide), past)
    options = {"predicate": predicate, "bias": bias, "scale": scale, "softcap": softcap}
    return kv_attention_reference(q.to(wide), keys, values, past, operands, sink, **options).to(q.dtype)  # type: ignore[arg-type]


def _kept(
    codes: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    ring: torch.Tensor,
    past: torch.Tensor,
    bits: int,
    group: int,
    along: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the tokens kept, [B, Hk, C, D]; slots of others hold anything."""
    batch, heads, capacity, _ = codes.shape
    slots = ring.shape[2]
    made = torch.zeros(batch, heads, capacity, ring.shape[3], dtype=dtype, device=ring.device)
    for row, tokens in enumerate(past.tolist()):
        prefix = quantised_tokens(tokens, slots - group, group)
        if along == CHANNEL:
            scales, minima = (t[row, :, : prefix // group] for t in (scale, minimum))
        else:
            scales, minima = (t[row, :, :, :prefix] for t in (scale, minimum))
        if prefix:
            made[row, :, :prefix] = dequantise(codes[row, :, :prefix], scales, minima, bits, along, dtype)
        exact = torch.arange(prefix, tokens, device=ring.device)
        made[row, :, prefix:tokens] = ring[row][:, exact % slots].to(dtype)
    return made


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    planes = codes.chunk(8 // bits, -1)
    packed = planes[0].clone()
    for number, plane in enumerate(planes[1:], 1):
        packed |= plane << (bits * number)
    return packed


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.cat([packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)], -1)


def _append_fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    ring: torch.Tensor,
    new: torch.Tensor,
    past: torch.Tensor,
    *,
    count: torch.Tensor | None = None,
    bits: int,
    group: int,
    along: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _expect_states(codes, scale, minimum, ring, new, bits, group, along)
    for name, tensor in (("past", past), ("count", count)):
        if tensor is not None:
            expect(tensor.dim() == 1 and tensor.dtype == torch.int64, f"{name} must be int64 [batch], got {tensor.dtype}")
            expect(tensor.shape[0] == new.shape[0], f"{name} has {tensor.shape[0]} sequences, expected {new.shape[0]}")
    made = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (codes, scale, minimum, ring)]
    return made[0], made[1], made[2], made[3]


def _expect_states(
    codes: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    ring: torch.Tensor,
    new: torch.Tensor,
    bits: int,
    group: int,
    along: str,
) -> None:
    """Raise unless the states are of one format and fit what is new."""
    expect(bits in BITS, f"bits must be one of {BITS}, got {bits}")
    expect(group >= 1 and group & (group - 1) == 0, f"the group must be a power of two, got {group}")
    expect(along in (CHANNEL, TOKEN), f"along must be {CHANNEL!r} or {TOKEN!r}, got {along!r}")
    expect(all(t.dim() == 4 for t in (codes, scale, minimum, ring, new)), "states and what is new must have 4 dimensions")
    expect(codes.dtype == torch.uint8, f"codes must be uint8, got {codes.dtype}")
    expect(scale.dtype == minimum.dtype, f"scales are {scale.dtype}, minima {minimum.dtype}")
    expect(scale.dtype in (torch.float16, torch.float32), f"scales must be float16 or float32, got {scale.dtype}")
    expect(ring.dtype == new.dtype, f"the ring is {ring.dtype}, what is new is {new.dtype}")
    size = new.shape[3]
    for state in (codes, scale, minimum, ring):
        for dim in (0, 1):
            expect(state.shape[dim] == new.shape[dim], f"a state is {tuple(state.shape)}, what is new {tuple(new.shape)}")
    expect(codes.shape[3] * 8 == size * bits, f"{codes.shape[3]} bytes hold no {size} codes of {bits} bits")
    expect(ring.shape[3] == size, f"the ring has {ring.shape[3]} features, what is new {size}")
    expect(ring.shape[2] % group == 0 and ring.shape[2] >= group, f"a ring of {ring.shape[2]} holds no groups of {group}")
    for dim in (2, 3):
        expect(scale.shape[dim] == minimum.shape[dim], f"scales are {tuple(scale.shape)}, minima {tuple(minimum.shape)}")
    if along == CHANNEL:
        expect(scale.shape[3] == size, f"there are scales of {scale.shape[3]} channels, expected {size}")
        expect(scale.shape[2] == codes.shape[2] // group, f"there are {scale.shape[2]} groups for {codes.shape[2]} tokens")
    else:
        expect(scale.shape[3] == codes.shape[2], f"there are scales of {scale.shape[3]} tokens, expected {codes.shape[2]}")
        expect(size % scale.shape[2] == 0, f"{size} channels are no {scale.shape[2]} equal groups")


def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: torch.Tensor,
    k_codes: torch.Tensor,
    k_scale: torch.Tensor,
    k_minimum: torch.Tensor,
    k_ring: torch.Tensor,
    v_codes: torch.Tensor,
    v_scale: torch.Tensor,
    v_minimum: torch.Tensor,
    v_ring: torch.Tensor,
    operands: list[torch.Tensor],
    sink: torch.Tensor | None,
    *,
    bits: int,
    group: int,
    predicate: str = "",
    bias: str = "",
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    _expect_states(k_codes, k_scale, k_minimum, k_ring, k, bits, group, CHANNEL)
    _expect_states(v_codes, v_scale, v_minimum, v_ring, v, bits, group, TOKEN)
    expect(q.dim() == 4, f"q must be [batch, heads, tokens, features], got {q.dim()} sizes")
    expect(q.dtype == k.dtype == v.dtype, f"q is {q.dtype}, k {k.dtype}, v {v.dtype}")
    expect(q.shape[3] == k.shape[3], f"k has {k.shape[3]} features, q has {q.shape[3]}")
    expect(q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads")
    for dim in (0, 1, 2):
        expect(k.shape[dim] == v.shape[dim], f"k is {tuple(k.shape)} and v {tuple(v.shape)}")
    expect(q.shape[2] == k.shape[2], f"there are {q.shape[2]} queries and {k.shape[2]} keys of their own")
    expect(k_ring.shape[2] == v_ring.shape[2], f"the rings have {k_ring.shape[2]} and {v_ring.shape[2]} slots")
    expect(past.dim() == 1 and past.dtype == torch.int64, f"past must be int64 [batch], got {past.dtype} {tuple(past.shape)}")
    if sink is not None:
        expect(tuple(sink.shape) == (q.shape[1],), f"the sink must be [{q.shape[1]}], got {tuple(sink.shape)}")
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _attention_flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    batch, heads, queries, features = program.shape(node.args[0])  # type: ignore[arg-type]
    capacity, values = program.shape(node.args[4])[2], program.shape(node.args[2])[3]  # type: ignore[arg-type]
    return batch * heads * queries * capacity * (2 * features + 2 * values + 8)


kv_quantized_append = define(APPEND_SCHEMA, kv_quantized_append_reference, _append_fake, lambda program, node: 0)
kv_quantized_attention = define(ATTENTION_SCHEMA, kv_quantized_attention_reference, _attention_fake, _attention_flops)
