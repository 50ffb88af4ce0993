"""The text of the kernel that says how much attention the tokens of a cache in two tiers get."""

from __future__ import annotations

from collections.abc import Iterator

from graphwright.ir.ops.tier_codes import PACKED

from .kv_tiered_text import (
    LOG2E,
    STRIDES,
    TieredSpec,
    block_of,
    columns,
    function,
    indented,
    masked,
    new_entries,
    places,
    range_place,
    refined_codes,
    refined_range,
)

_HELD = """\
@triton.jit
def held(slot, stored, filled, ring):
    # A slot of the ring holds a token if the first token at or behind the stored ones that comes into it is there.
    return (slot < ring) & (stored + (slot - stored % ring + ring) % ring < filled)
"""

_STATES = ("recent_k", "balance", "low_k", "ranges", "fine_k", "pool_token")


def mass_parameters(spec: TieredSpec) -> tuple[str, ...]:
    """Return the parameters of the kernel of the attention that tokens get."""
    tensors = ("q", "k", "lse", "past", *["count"] * spec.counted, *_STATES, "recent_mass", "pool_mass", "own_mass")
    strides = [stride for tensor in ("q", "k") for stride in STRIDES[tensor]]
    return (*(f"p_{t}" for t in tensors), "tokens", "capacity", "slots", "scale", *strides)


def mass_text(spec: TieredSpec) -> str:
    """Return the kernel of `graphwright::kv_tiered_mass`.

    The grid is (cdiv(P, BLOCK_N) + cdiv(N, BLOCK_N) + cdiv(T, BLOCK_N), Hk, B).

    Numerics: products and sums are in float32.
    Limits: heads of up to 256 features.
    Reference: graphwright/ir/ops/kv_tiered.py, kv_tiered_mass_reference.
    """
    return function("{name}", _HELD, mass_parameters(spec), ("BLOCK_M", "BLOCK_N"), _mass(spec))


def _mass(spec: TieredSpec) -> Iterator[str]:
    d, tiers = spec.head_dim, spec.tiers
    in_d = columns(d)
    yield '"""The attention that BLOCK_N slots of the pool or the ring, or new tokens, get from rows of queries."""'
    yield "i_h, i_b, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)"
    yield from places(spec, _STATES)
    yield f"o_d = tl.arange(0, {block_of(d)})[None, :]"
    yield f"p_q += i_b.to(tl.int64) * q_batch + i_h.to(tl.int64) * {spec.group} * q_head"
    yield f"p_lse += head * {spec.group} * tokens"
    yield from new_entries("k")
    yield f"stop = {'tl.load(p_count + i_b).to(tl.int32)' if spec.counted else 'tokens'} * {spec.group}"
    yield f"start = {f'tl.maximum(stop - {spec.window * spec.group}, 0)' if spec.window else '0'}"
    yield "pool_blocks = tl.cdiv(slots, BLOCK_N)"
    yield f"recent_blocks = tl.cdiv({tiers.ring}, BLOCK_N)"
    yield "i_n = tl.program_id(0)"
    yield "if i_n < pool_blocks:"
    yield from indented(_pool(spec, in_d))
    yield "elif i_n < pool_blocks + recent_blocks:"
    yield "    first = (i_n - pool_blocks) * BLOCK_N"
    yield "    o_n = first + tl.arange(0, BLOCK_N)[:, None]"
    inside = masked(f"held(o_n, stored, filled, {tiers.ring})", in_d)
    yield f"    k = tl.load(p_recent_k + o_n * {d} + o_d{inside}).to(tl.float32)"
    yield from indented(_received(spec, in_d, "tl.where(filled > 0, start, stop)"))
    yield "    o_n = first + tl.arange(0, BLOCK_N)"
    yield f"    in_use = held(o_n, stored, filled, {tiers.ring})"
    yield f"    tl.store(p_recent_mass + head * {tiers.ring} + o_n, tl.where(in_use, mass, 0.0), mask=o_n < {tiers.ring})"
    yield "else:"
    if spec.one:
        yield "    o_r = tl.arange(0, BLOCK_M)"
        yield f"    q = tl.load(p_q + o_r[:, None] * q_head + o_d{masked('o_r[:, None] < stop', in_d)}).to(tl.float32)"
        yield f"    s = tl.sum(q * tl.load(p_k + o_d{masked(in_d)}).to(tl.float32), 1) * scale"
        yield '    lse = tl.load(p_lse + o_r, mask=o_r < stop, other=float("inf"))'
        yield "    tl.store(p_own_mass + head, tl.sum(tl.exp(s - lse), 0))"
        return
    yield "    first = (i_n - pool_blocks - recent_blocks) * BLOCK_N"
    yield "    o_n = first + tl.arange(0, BLOCK_N)[:, None]"
    yield f"    k = tl.load(p_k + o_n.to(tl.int64) * k_token + o_d{masked('o_n < tokens', in_d)}).to(tl.float32)"
    yield from indented(_received(spec, in_d, f"tl.maximum(start, first * {spec.group})", causal=True))
    yield "    o_n = first + tl.arange(0, BLOCK_N)"
    yield "    tl.store(p_own_mass + head * tokens + o_n, mass, mask=o_n < tokens)"


def _pool(spec: TieredSpec, in_d: str) -> Iterator[str]:
    """A block of the pool's slots."""
    d, tiers = spec.head_dim, spec.tiers
    yield "first = i_n * BLOCK_N"
    yield "o_n = first + tl.arange(0, BLOCK_N)"
    if not tiers.promoted:
        yield "tl.store(p_pool_mass + head * slots + o_n, tl.zeros([BLOCK_N], tl.float32), mask=o_n < slots)"
        return
    yield "slots_2d = first + tl.arange(0, BLOCK_N)[:, None]"
    if tiers.fine_bits:
        yield from refined_codes(spec, "k", d, "o_d", in_d)
        yield "tokens_of = tl.load(p_pool_token + o_n, mask=o_n < pooled, other=0)"
        yield f"place = {range_place('tokens_of')}"
        yield "zero = tl.load(p_ranges + place, mask=o_n < pooled, other=0).to(tl.float32)"
        yield f"step = tl.load(p_ranges + {PACKED} * groups + place, mask=o_n < pooled, other=0).to(tl.float32)"
        yield from refined_range("zero", "step", tiers.fine_bits)
        yield f"balance = tl.load(p_balance + o_d{f', mask={in_d}, other=1' if in_d else ''})"
    else:
        yield f"k = tl.load(p_fine_k + slots_2d * {d} + o_d{masked('slots_2d < pooled', in_d)}).to(tl.float32)"
    yield from _received(spec, in_d, "tl.where(first < pooled, start, stop)", encoded=bool(tiers.fine_bits))
    yield "tl.store(p_pool_mass + head * slots + o_n, tl.where(o_n < pooled, mass, 0.0), mask=o_n < slots)"


def _received(spec: TieredSpec, in_d: str, start: str, *, causal: bool = False, encoded: bool = False) -> Iterator[str]:
    """The sums of the probabilities of keys k, or of codes k, over rows of queries."""
    group = spec.group
    yield "mass = tl.zeros([BLOCK_N], tl.float32)"
    yield f"for first_row in range({start}, stop, BLOCK_M):"
    yield "    o_r = first_row + tl.arange(0, BLOCK_M)[:, None]"
    yield f"    p_rows = p_q + o_r % {group} * q_head + (o_r // {group}).to(tl.int64) * q_token"
    yield f"    q = tl.load(p_rows + o_d{masked('o_r < stop', in_d)}).to(tl.float32) * (scale * {LOG2E!r})"
    yield f'    lse = tl.load(p_lse + o_r % {group} * tokens + o_r // {group}, mask=o_r < stop, other=float("inf"))'
    if encoded:
        yield "    q /= balance"
        yield '    s = tl.dot(q, tl.trans(k), input_precision="ieee") * step[None, :] + tl.sum(q, 1)[:, None] * zero[None, :]'
    else:
        yield '    s = tl.dot(q, tl.trans(k), input_precision="ieee")'
    yield f"    s -= lse * {LOG2E!r}"
    if causal:
        yield f'    s = tl.where(first + tl.arange(0, BLOCK_N)[None, :] <= o_r // {group}, s, float("-inf"))'
    yield "    mass += tl.sum(tl.exp2(s), 0)"
