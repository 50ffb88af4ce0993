"""The text of attention over a cache in two tiers.

Rows of queries are those of all heads that share a key head, token by token: row r is token r // group, head r % group. Codes
are never turned into keys and values in memory. A score is a product with codes, times the token's step, plus the sum of the
query times the token's zero; so is a value's share of the result.
"""

from __future__ import annotations

from collections.abc import Iterator

from graphwright.ir.ops.tier_codes import PACKED, planes

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
    stored_where,
)

_FLOOR = "-3.4028234663852886e38"

_LARGER = """\
@triton.jit
def larger(a, b):
    # Unlike tl.maximum this says nothing about NaN, and is one instruction. A NaN spoils its row through the exponentials.
    return tl.where(a > b, a, b)
"""


_STATES = (
    *("recent_k", "recent_v", "balance", "low_k", "low_v", "ranges", "refined"),
    *("fine_k", "fine_v", "pool_token"),
)


def attention_parameters() -> tuple[str, ...]:
    """Return the attention kernel's parameters."""
    tensors = ("q", "k", "v", "past", *_STATES, "out", "lse")
    strides = [stride for tensor in ("q", "k", "v", "out") for stride in STRIDES[tensor]]
    return (*(f"p_{t}" for t in tensors), "tokens", "capacity", "slots", "scale", *strides)


def attention_text(spec: TieredSpec) -> str:
    """Return the kernel of `graphwright::kv_tiered_attention`.

    The grid is (cdiv(T * group, BLOCK_M), Hk, B).

    Numerics: products, sums and softmax are in float32.
    Limits: heads of up to 256 features.
    Reference: graphwright/ir/ops/kv_tiered.py, kv_tiered_attention_reference.
    """
    return function("{name}", _LARGER, attention_parameters(), ("BLOCK_M", "BLOCK_N", "BLOCK_G"), _attention(spec))


def _attention(spec: TieredSpec) -> Iterator[str]:
    d, dv, group, tiers = spec.head_dim, spec.value_dim, spec.group, spec.tiers
    in_d, in_v = columns(d), columns(dv, "o_v")
    yield '"""Attention of BLOCK_M rows of queries over both tiers, the ring, and the new tokens."""'
    yield "i_h, i_b, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)"
    yield from places(spec, _STATES)
    yield f"o_d = tl.arange(0, {block_of(d)})[None, :]"
    yield f"o_v = tl.arange(0, {block_of(dv)})[None, :]"
    yield "first_row = tl.program_id(0) * BLOCK_M"
    yield "o_r = first_row + tl.arange(0, BLOCK_M)[:, None]"
    yield f"token, row_head = o_r // {group}, i_h * {group} + o_r % {group}"
    yield "inside = token < tokens"
    yield "p_q += i_b.to(tl.int64) * q_batch + row_head * q_head + token.to(tl.int64) * q_token"
    yield f"q = tl.load(p_q + o_d{masked('inside', in_d)}).to(tl.float32) * (scale * {LOG2E!r})"
    yield from new_entries("k")
    yield from new_entries("v")
    yield f"row_max = tl.full([BLOCK_M], {_FLOOR}, tl.float32)"
    yield "row_sum = tl.zeros([BLOCK_M], tl.float32)"
    yield "shift = tl.zeros([BLOCK_M], tl.float32)"
    yield f"acc = tl.zeros([BLOCK_M, {block_of(dv)}], tl.float32)"
    yield "if stored > 0:"
    yield from indented(_stored(spec, in_d, in_v))
    yield "for first in range(stored, filled, BLOCK_N):"
    yield "    o_n = first + tl.arange(0, BLOCK_N)[:, None]"
    yield f"    slot = o_n % {tiers.ring}"
    yield f"    k = tl.load(p_recent_k + slot * {d} + o_d{masked('o_n < filled', in_d)}).to(tl.float32)"
    yield f"    v = tl.load(p_recent_v + slot * {dv} + o_v{masked('o_n < filled', in_v)}).to(tl.float32)"
    yield '    s = tl.dot(q, tl.trans(k), input_precision="ieee")'
    yield '    s = tl.where(first + tl.arange(0, BLOCK_N)[None, :] < filled, s, float("-inf"))'
    yield from indented(_update())
    yield from _own(spec, in_d, in_v)
    yield "result = (acc + shift[:, None]) / row_sum[:, None]"
    yield "p_out += i_b.to(tl.int64) * out_batch + row_head * out_head + token.to(tl.int64) * out_token"
    yield f"tl.store(p_out + o_v, result.to(p_out.dtype.element_ty){stored_where('inside', in_v)})"
    yield "o_r = first_row + tl.arange(0, BLOCK_M)"
    yield f"p_lse += (i_b.to(tl.int64) * heads * {group} + i_h * {group} + o_r % {group}) * tokens + o_r // {group}"
    yield f"tl.store(p_lse, (row_max + tl.log2(row_sum)) * {1 / LOG2E!r}, mask=o_r < tokens * {group})"


def _stored(spec: TieredSpec, in_d: str, in_v: str) -> Iterator[str]:
    """Both tiers of the stored tokens."""
    d, dv, tiers = spec.head_dim, spec.value_dim, spec.tiers
    yield f"balanced_q = q / tl.load(p_balance + o_d{f', mask={in_d}, other=1' if in_d else ''})"
    yield "sum_q = tl.sum(balanced_q, 1)"
    if tiers.promoted < tiers.group_size:
        yield "# A block is of every eighth token: its codes are at even distances, and at the same place in their bytes."
        yield f"for first in range(0, stored // {PACKED}, BLOCK_G):"
        yield f"    for lane in range({PACKED}):"
        yield "        rows = first + tl.arange(0, BLOCK_G)[:, None]"
        yield "        o_n = first + tl.arange(0, BLOCK_G)"
        yield f"        inside_2d, inside_n = rows < stored // {PACKED}, o_n < stored // {PACKED}"
        for tensor, dim, name, inside in (("k", d, "o_d", in_d), ("v", dv, "o_v", in_v)):
            text = _lane_codes(f"p_low_{tensor}", tiers.low_bits, dim, masked("inside_2d", inside), name)
            yield f"        {tensor} = ({text}).to(tl.float32)"
        yield "        place = lane * groups + o_n"
        yield from indented(_ranges("place", "inside_n"), 2)
        yield '        s = tl.dot(balanced_q, tl.trans(k), input_precision="ieee")'
        yield "        s = s * k_step[None, :] + sum_q[:, None] * k_zero[None, :]"
        marks = "tl.load(p_refined + o_n, mask=inside_n, other=255).to(tl.int32)"
        yield f"        low = {f'({marks} >> lane & 1) == 0' if tiers.promoted else 'inside_n'}"
        yield '        s = tl.where(low[None, :], s, float("-inf"))'
        yield from indented(_update(encoded=True), 2)
    if tiers.promoted:
        yield "for first in range(0, pooled, BLOCK_N):"
        yield "    slots_2d = first + tl.arange(0, BLOCK_N)[:, None]"
        yield "    o_n = first + tl.arange(0, BLOCK_N)"
        yield from indented(_pool(spec, in_d, in_v))


def _lane_codes(pointer: str, bits: int, dim: int, mask: str, name: str) -> str:
    """The codes of the tokens 8 * rows + lane."""
    terms, row = [], 0
    for first, width in planes(bits):
        base = f"rows * {bits * dim}"
        if width > 1:
            base += f" + ({f'{row} + ' if row else ''}lane % {width}) * {dim}"
        elif row:
            base += f" + {row * dim}"
        load = f"tl.load({pointer} + {base} + {name}{mask}).to(tl.int32)"
        term = f"({load} >> ({f'lane // {width} * {width}' if width > 1 else 'lane'}) & {(1 << width) - 1})"
        terms.append(f"({term} << {first})" if first else term)
        row += width
    return " | ".join(terms)


def _pool(spec: TieredSpec, in_d: str, in_v: str) -> Iterator[str]:
    """A block of the pool's slots."""
    d, dv, tiers = spec.head_dim, spec.value_dim, spec.tiers
    pairs = (("k", d, "o_d", in_d), ("v", dv, "o_v", in_v))
    if tiers.fine_bits:
        for tensor, dim, name, inside in pairs:
            yield from refined_codes(spec, tensor, dim, name, inside)
        yield "tokens_of = tl.load(p_pool_token + o_n, mask=o_n < pooled, other=0)"
        yield f"place = {range_place('tokens_of')}"
        yield from _ranges("place", "o_n < pooled", tiers.fine_bits)
        yield 's = tl.dot(balanced_q, tl.trans(k), input_precision="ieee")'
        yield "s = s * k_step[None, :] + sum_q[:, None] * k_zero[None, :]"
    else:
        for tensor, dim, name, inside in pairs:
            load = f"tl.load(p_fine_{tensor} + slots_2d * {dim} + {name}{masked('slots_2d < pooled', inside)})"
            yield f"{tensor} = {load}.to(tl.float32)"
        yield 's = tl.dot(q, tl.trans(k), input_precision="ieee")'
    yield 's = tl.where((o_n < pooled)[None, :], s, float("-inf"))'
    yield from _update(encoded=bool(tiers.fine_bits))


def _ranges(tokens: str, inside: str, fine_bits: int = 0) -> Iterator[str]:
    """Zero and step of tokens' keys and values; with refinement, of codes that have its bits as their lowest."""
    for at, tensor in ((0, "k"), (2, "v")):
        for j, part in ((at, "zero"), (at + 1, "step")):
            place = f"p_ranges + {f'{j * PACKED} * groups + ' if j else ''}{tokens}"
            yield f"{tensor}_{part} = tl.load({place}, mask={inside}, other=0).to(tl.float32)"
        if fine_bits:
            yield from refined_range(f"{tensor}_zero", f"{tensor}_step", fine_bits)


def _update(*, encoded: bool = False) -> Iterator[str]:
    """What scores s and values v of a block do to the running sums."""
    yield "new_max = larger(row_max, tl.reduce(s, 1, larger))"
    yield "weights = tl.exp2(s - new_max[:, None])"
    yield "decay = tl.exp2(row_max - new_max)"
    yield "row_max = new_max"
    yield "row_sum = row_sum * decay + tl.sum(weights, 1)"
    yield f"shift = shift * decay{' + tl.sum(weights * v_zero[None, :], 1)' if encoded else ''}"
    factor = " * v_step[None, :]" if encoded else ""
    yield f'acc = tl.dot(weights{factor}, v, acc * decay[:, None], input_precision="ieee")'


def _own(spec: TieredSpec, in_d: str, in_v: str) -> Iterator[str]:
    """The new tokens."""
    if spec.one:
        yield f"k = tl.load(p_k + o_d{masked(in_d)}).to(tl.float32)"
        yield f"v = tl.load(p_v + o_v{masked(in_v)}).to(tl.float32)"
        yield "s = tl.sum(q * k, 1)"
        yield "new_max = larger(row_max, s)"
        yield "weights = tl.exp2(s - new_max)"
        yield "decay = tl.exp2(row_max - new_max)"
        yield "row_max = new_max"
        yield "row_sum = row_sum * decay + weights"
        yield "shift = shift * decay"
        yield "acc = acc * decay[:, None] + weights[:, None] * v"
        return
    yield f"stop = tl.minimum((first_row + BLOCK_M - 1) // {spec.group} + 1, tokens)"
    yield "for first in range(0, stop, BLOCK_N):"
    yield "    o_n = first + tl.arange(0, BLOCK_N)[:, None]"
    yield f"    k = tl.load(p_k + o_n.to(tl.int64) * k_token + o_d{masked('o_n < tokens', in_d)}).to(tl.float32)"
    yield f"    v = tl.load(p_v + o_n.to(tl.int64) * v_token + o_v{masked('o_n < tokens', in_v)}).to(tl.float32)"
    yield '    s = tl.dot(q, tl.trans(k), input_precision="ieee")'
    yield '    s = tl.where(first + tl.arange(0, BLOCK_N)[None, :] <= token, s, float("-inf"))'
    yield from indented(_update())
