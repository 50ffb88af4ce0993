"""The text of the kernel that puts new tokens into a cache in two tiers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from graphwright.ir.ops.kv_tiered import STATES
from graphwright.ir.ops.tier_codes import LARGEST, PACKED, planes

from .kv_tiered_text import (
    STRIDES,
    TieredSpec,
    block_of,
    columns,
    function,
    indented,
    masked,
    new_entries,
    packed_row,
    packed_shift,
    places,
    range_place,
    stored_where,
)

HELPERS = f"""\
@triton.jit
def encoded(x, columns, most):
    # Zero and step of rows of values, and the values in steps from zero.
    lowest = tl.min(tl.where(columns, x, float("inf")), 1)
    highest = tl.max(tl.where(columns, x, float("-inf")), 1)
    zero = lowest.to(tl.float16)
    step = tl.minimum(tl.maximum((highest - zero.to(tl.float32)) / most, 0.0), {LARGEST}).to(tl.float16)
    wide = step.to(tl.float32)
    inverse = tl.where(wide > 0.0, 1.0 / wide, 0.0)
    place = (x - zero.to(tl.float32)[:, None]) * inverse[:, None]
    code = tl.minimum(tl.maximum(tl.floor(place + 0.5), 0.0), most)
    return zero, step, place, code


@triton.jit
def leaving_bits(p_recent_score, p_own_mass, token, filled, inside, ring):
    # Scores are not negative: as integers, their bits are in the same order. NaN, of either sign, is above all.
    old = tl.load(p_recent_score + token % ring, mask=inside & (token < filled), other=0.0)
    new = tl.load(p_own_mass + (token - filled), mask=inside & (token >= filled), other=0.0)
    return tl.where(token < filled, old, new).to(tl.int32, bitcast=True) & 0x7FFFFFFF
"""

COUNTED = """\
@triton.jit
def count_from(
    p_pool_score, p_recent_score, p_own_mass, pooled, stored, stored_after, filled, least, ring, BLOCK_N: tl.constexpr
):
    # How many scores are at least `least`, in the pool and of the tokens that leave the ring.
    in_pool = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, pooled, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        bits = tl.load(p_pool_score + o_n, mask=o_n < pooled, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        in_pool += ((bits >= least) & (o_n < pooled)).to(tl.int32)
    leaving = tl.zeros([BLOCK_N], tl.int32)
    for first in range(stored, stored_after, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        bits = leaving_bits(p_recent_score, p_own_mass, o_n, filled, o_n < stored_after, ring)
        leaving += ((bits >= least) & (o_n < stored_after)).to(tl.int32)
    return tl.sum(in_pool, 0), tl.sum(leaving, 0)
"""


def append_parameters(spec: TieredSpec) -> tuple[str, ...]:
    """Return the kernel's parameters."""
    tensors = ("q", "k", "v", "past", *["count"] * spec.counted, "recent_mass", "pool_mass", "own_mass", *STATES)
    strides = [stride for tensor in ("q", "k", "v") for stride in STRIDES[tensor]]
    return (*(f"p_{t}" for t in tensors), "tokens", "capacity", "slots", *strides)


def append_text(spec: TieredSpec) -> str:
    """Return the kernel of `graphwright::kv_tiered_append`.

    The grid is (Hk, B).

    Numerics: values are encoded in float32; an entry next to the middle of two codes may get the other one.
    Limits: heads of up to 256 features.
    Reference: graphwright/ir/ops/kv_tiered.py, kv_tiered_append_reference.
    """
    helpers = HELPERS + (f"\n\n{COUNTED}" if spec.tiers.promoted else "")
    return function("{name}", helpers, append_parameters(spec), ("BLOCK_N",), _append(spec))


def _append(spec: TieredSpec) -> Iterator[str]:
    d, dv, tiers = spec.head_dim, spec.value_dim, spec.tiers
    in_d, in_v = columns(d), columns(dv, "o_v")
    yield '"""Put the new tokens of one sequence and key head into its cache."""'
    yield "i_h, i_b, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0)"
    yield from places(spec, STATES)
    yield f"p_recent_mass += head * {tiers.ring}"
    yield "p_pool_mass += head * slots"
    yield "p_own_mass += head * tokens"
    yield from new_entries("k")
    yield from new_entries("v")
    yield f"o_d = tl.arange(0, {block_of(d)})[None, :]"
    yield f"o_v = tl.arange(0, {block_of(dv)})[None, :]"
    count = "tl.load(p_count + i_b).to(tl.int32)" if spec.counted else "tokens"
    yield f"count = tl.minimum({count}, room - filled)"
    yield "after = filled + count"
    yield f"stored_after = tl.maximum(after - {tiers.residual}, 0) // {tiers.group_size} * {tiers.group_size}"
    yield "if count > 0:"
    yield from indented(_scores(spec))
    yield from indented(_balance(spec, in_d))
    yield "    tl.debug_barrier()"
    yield "    if stored_after > stored:"
    yield from indented(_leave(spec, in_d, in_v), 2)
    yield "        tl.debug_barrier()"
    yield "    for token in range(tl.maximum(stored_after, filled), after):"
    for tensor, dim, name, inside in (("k", d, "o_d", in_d), ("v", dv, "o_v", in_v)):
        yield f"        new = tl.load(p_{tensor} + (token - filled).to(tl.int64) * {tensor}_token + {name}{masked(inside)})"
        yield f"        tl.store(p_recent_{tensor} + token % {tiers.ring} * {dim} + {name}, new{stored_where(inside)})"
    yield f"        tl.store(p_recent_score + token % {tiers.ring}, tl.load(p_own_mass + token - filled))"


def _scores(spec: TieredSpec) -> Iterator[str]:
    """The attention that tokens got is added to their scores."""
    ring = spec.tiers.ring
    yield f"kept = tl.exp2(count.to(tl.float32) * {math.log2(spec.decay)!r})"
    if spec.tiers.promoted:
        yield "for first in range(0, pooled, BLOCK_N):"
        yield "    o_n = first + tl.arange(0, BLOCK_N)"
        yield "    inside = o_n < pooled"
        yield "    score = tl.load(p_pool_score + o_n, mask=inside) * kept + tl.load(p_pool_mass + o_n, mask=inside)"
        yield "    tl.store(p_pool_score + o_n, score, mask=inside)"
    yield "for first in range(stored, filled, BLOCK_N):"
    yield "    o_n = first + tl.arange(0, BLOCK_N)"
    yield f"    slot, inside = o_n % {ring}, o_n < filled"
    yield "    score = tl.load(p_recent_score + slot, mask=inside) * kept + tl.load(p_recent_mass + slot, mask=inside)"
    yield "    tl.store(p_recent_score + slot, score, mask=inside)"


def _balance(spec: TieredSpec, in_d: str) -> Iterator[str]:
    """The balance of a new sequence."""
    block, inside = block_of(spec.head_dim), stored_where(columns(spec.head_dim, f"tl.arange(0, {block_of(spec.head_dim)})"))
    yield "if filled == 0:"
    yield f"    balance = tl.full([{block}], 1.0, tl.float32)"
    if spec.balanced:
        yield f"    most_k = tl.zeros([{block}], tl.float32)"
        yield f"    most_q = tl.zeros([{block}], tl.float32)"
        yield "    for first in range(0, count, BLOCK_N):"
        yield "        o_n = first + tl.arange(0, BLOCK_N)[:, None]"
        yield f"        k = tl.load(p_k + o_n.to(tl.int64) * k_token + o_d{masked('o_n < count', in_d)}).to(tl.float32)"
        yield "        most_k = tl.maximum(most_k, tl.max(tl.abs(k), 0))"
        yield f"        for i_q in range(i_h * {spec.group}, i_h * {spec.group} + {spec.group}):"
        yield "            rows = i_b.to(tl.int64) * q_batch + i_q * q_head + o_n.to(tl.int64) * q_token"
        yield f"            q = tl.load(p_q + rows + o_d{masked('o_n < count', in_d)}).to(tl.float32)"
        yield "            most_q = tl.maximum(most_q, tl.max(tl.abs(q), 0))"
        yield "    known = (most_q > 0.0) & (most_k > 0.0)"
        yield "    balance = tl.where(known, tl.sqrt_rn(most_q / tl.where(known, most_k, 1.0)), 1.0)"
    yield f"    tl.store(p_balance + tl.arange(0, {block}), balance{inside})"


def _entries(spec: TieredSpec, tensor: str, dim: int, name: str, inside: str, token: str, x: str) -> Iterator[str]:
    """Tokens' keys or values, from the ring or from the new ones, as they are encoded; `token` is [N, 1]."""
    old = f"tl.load(p_recent_{tensor} + {token} % {spec.tiers.ring} * {dim} + {name}{masked(f'{token} < filled', inside)})"
    place = f"p_{tensor} + ({token} - filled).to(tl.int64) * {tensor}_token + {name}"
    yield f"{x} = tl.where({token} < filled, {old}, tl.load({place}{masked(f'{token} >= filled', inside)}))"
    yield f"{x}_wide = {x}.to(tl.float32){' * balance' if tensor == 'k' else ''}"
    yield f"{x}_wide = tl.minimum(tl.maximum({x}_wide, -{LARGEST}), {LARGEST})"


def _plane(code: str, bits: int, first: int, width: int) -> str:
    """The bits of codes that lie in a plane."""
    return code if width == bits else f"({code} >> {first} & {(1 << width) - 1})"


def _leave(spec: TieredSpec, in_d: str, in_v: str) -> Iterator[str]:
    """Tokens leave the ring: they are encoded, and compete for the pool."""
    tiers = spec.tiers
    d, dv = spec.head_dim, spec.value_dim
    most = (1 << tiers.low_bits) - 1
    rows = tiers.group_size // PACKED
    yield f"balance = tl.load(p_balance + o_d{f', mask={in_d}, other=1' if in_d else ''})"
    yield f"for first in range(stored, stored_after, {tiers.group_size}):"
    yield f"    o_g = tl.arange(0, {rows})"
    yield f"    tl.store(p_refined + first // {PACKED} + o_g, tl.zeros([{rows}], tl.uint8))"
    for tensor, dim, name, inside, at in (("k", d, "o_d", in_d, 0), ("v", dv, "o_v", in_v, 2)):
        row = 0
        for first, width in planes(tiers.low_bits):
            yield f"    for row in range({width}):"
            yield f"        packed = tl.zeros([{rows}, {block_of(dim)}], tl.int32)"
            yield f"        for piece in range({PACKED // width}):"
            yield f"            token = first + o_g * {PACKED} + piece{f' * {width} + row' if width > 1 else ''}"
            yield "            token_2d = token[:, None]"
            yield from indented(_entries(spec, tensor, dim, name, inside, "token_2d", "x"), 3)
            yield f"            zero, step, place, code = encoded(x_wide, {name} < {dim}, {most}.0)"
            yield f"            packed |= {_plane('code.to(tl.int32)', tiers.low_bits, first, width)} << (piece * {width})"
            if not first:
                # Zero and step are the same for all planes.
                yield f"            place = {range_place('token')}"
                yield f"            tl.store(p_ranges + {at * PACKED} * groups + place, zero)"
                yield f"            tl.store(p_ranges + {(at + 1) * PACKED} * groups + place, step)"
            yield f"        places = ((first // {PACKED} + o_g[:, None]) * {tiers.low_bits} + {row} + row) * {dim}"
            yield f"        tl.store(p_low_{tensor} + places + {name}, packed.to(tl.uint8){stored_where(inside)})"
            row += width
    if tiers.promoted:
        yield "tl.debug_barrier()"
        yield from _compete(spec, in_d, in_v)


def _compete(spec: TieredSpec, in_d: str, in_v: str) -> Iterator[str]:
    """The tokens of the highest scores take the pool's slots."""
    tiers = spec.tiers
    given = "p_pool_score, p_recent_score, p_own_mass, pooled, stored, stored_after, filled"
    yield f"pooled_after = stored_after // {tiers.group_size} * {tiers.promoted}"
    yield "# The lowest score in the pool from now on, bit by bit."
    yield "lowest = 0"
    yield "for bit in range(31):"
    yield "    trial = lowest | (1 << (30 - bit))"
    yield f"    in_pool, leaving = count_from({given}, trial, {tiers.ring}, BLOCK_N)"
    yield "    lowest = tl.where(in_pool + leaving >= pooled_after, trial, lowest)"
    yield f"pool_above, above = count_from({given}, lowest + 1, {tiers.ring}, BLOCK_N)"
    yield f"pool_from, leaving = count_from({given}, lowest, {tiers.ring}, BLOCK_N)"
    yield "ties = pooled_after - pool_above - above"
    yield "pool_ties = tl.minimum(ties, pool_from - pool_above)"
    yield "ties -= pool_ties"
    yield "slot = 0"
    yield "for token in range(stored, stored_after):"
    yield f"    bits = leaving_bits(p_recent_score, p_own_mass, token, filled, True, {tiers.ring})"
    yield "    wins = (bits > lowest) | ((bits == lowest) & (ties > 0))"
    yield "    ties -= (bits == lowest).to(tl.int32)"
    yield "    if wins:"
    yield "        looking = slot < pooled"
    yield "        while looking:"
    yield "            other = tl.load(p_pool_score + slot).to(tl.int32, bitcast=True) & 0x7FFFFFFF"
    yield "            stays = (other > lowest) | ((other == lowest) & (pool_ties > 0))"
    yield "            pool_ties -= (other == lowest).to(tl.int32)"
    yield "            slot += stays.to(tl.int32)"
    yield "            looking = stays & (slot < pooled)"
    yield "        old = tl.load(p_pool_token + slot, mask=slot < pooled, other=0)"
    yield "        tl.debug_barrier()"
    yield f"        marks = tl.load(p_refined + old // {PACKED}).to(tl.int32) & ~(1 << old % {PACKED})"
    yield f"        tl.store(p_refined + old // {PACKED}, marks.to(tl.uint8), mask=slot < pooled)"
    yield "        tl.debug_barrier()"
    yield f"        marks = tl.load(p_refined + token // {PACKED}).to(tl.int32) | 1 << token % {PACKED}"
    yield f"        tl.store(p_refined + token // {PACKED}, marks.to(tl.uint8))"
    yield "        tl.store(p_pool_token + slot, token)"
    yield "        tl.store(p_pool_score + slot, bits.to(tl.float32, bitcast=True))"
    yield from indented(_refine(spec, in_d, in_v), 2)
    yield "        slot += 1"


def _refine(spec: TieredSpec, in_d: str, in_v: str) -> Iterator[str]:
    """What the pool holds of a token."""
    tiers = spec.tiers
    bits = tiers.fine_bits
    yield "token_2d = token + tl.zeros([1, 1], tl.int32)"
    for tensor, dim, name, inside in (("k", spec.head_dim, "o_d", in_d), ("v", spec.value_dim, "o_v", in_v)):
        yield from _entries(spec, tensor, dim, name, inside, "token_2d", "x")
        if not bits:
            yield f"tl.store(p_fine_{tensor} + slot * {dim} + {name}, x{stored_where(inside)})"
            continue
        yield f"zero, step, place, code = encoded(x_wide, {name} < {dim}, {(1 << tiers.low_bits) - 1}.0)"
        yield f"fine = tl.floor((place - code + 0.5) * {1 << bits}.0)"
        yield f"fine = tl.minimum(tl.maximum(fine, 0.0), {(1 << bits) - 1}.0).to(tl.int32)"
        row = 0
        for first, width in planes(bits):
            yield f"shift = {packed_shift('slot', width)}"
            yield f"places = p_fine_{tensor} + ({packed_row('slot', bits, row, width)}) * {dim} + {name}"
            yield f"packed = tl.load(places{masked(inside)}).to(tl.int32) & ~({(1 << width) - 1} << shift)"
            part = _plane("fine", bits, first, width)
            yield f"tl.store(places, (packed | {part} << shift).to(tl.uint8){stored_where(inside)})"
            row += width
