"""The texts of the kernels over a cache in two tiers that read it: attention, and the attention that its tokens get.

Rows of queries are those of all heads that share a key head, token by token: row r is token r // group, head r % group. Codes
are never turned into keys and values in memory. A score is a product with codes, times the token's step, plus the sum of the
query times the token's zero; so is a value's share of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from graphwright.ir.ops.kv_tiered import PACKED, Tiers, planes

from .attention_parts import both

LOG2E = math.log2(math.e)
_A_LINE = 8
_FLOOR = "-3.4028234663852886e38"

STRIDES = {
    **{"q": ("q_batch", "q_head", "q_token"), "k": ("k_batch", "k_head", "k_token"), "v": ("v_batch", "v_head", "v_token")},
    **{"out": ("out_batch", "out_head", "out_token")},
}

LARGER = """\
@triton.jit
def larger(a, b):
    # Unlike tl.maximum this says nothing about NaN, and is one instruction. A NaN spoils its row through the exponentials.
    return tl.where(a > b, a, b)
"""


@dataclass(frozen=True, kw_only=True)
class TieredSpec:
    """What the kernels over a cache in two tiers are made for.

    Args:
        head_dim: D.
        value_dim: Dv.
        group: query heads that share a key head.
        tiers: the format.
        one: there is one new token.
        counted: calls say how many of a sequence's new tokens there are.
        window: queries whose attention counts for scores; 0 for all.
        balanced: keys are balanced.
    """

    head_dim: int
    value_dim: int
    group: int
    tiers: Tiers
    one: bool = False
    counted: bool = False
    window: int = 0
    balanced: bool = True


def block_of(dim: int) -> int:
    """Return the columns of tiles that hold `dim`, which must be a power of two, and enough for a product."""
    return max(16, 1 << (dim - 1).bit_length())


def columns(dim: int, name: str = "o_d") -> str:
    """Return the condition that columns exist, "" if all do."""
    return f"{name} < {dim}" if block_of(dim) != dim else ""


def masked(*conditions: str) -> str:
    """Return the arguments of a load that takes zeros where a condition is false."""
    terms = [condition for condition in conditions if condition]
    return f", mask={both(terms)}, other=0" if terms else ""


def packed_row(rows: str, bits: int, first: int, width: int) -> str:
    """Return the text of the number of the row of bytes that holds a plane's bits of a token, or slot.

    Args:
        rows: text of the token's number; a name.
        bits: of a code.
        first: the plane's first row of the eight tokens' rows.
        width: bits of the plane.
    """
    return f"{rows} // {PACKED} * {bits}" + (f" + {first}" if first else "") + (f" + {rows} % {width}" if width > 1 else "")


def packed_shift(rows: str, width: int) -> str:
    """Return the text of the number of the first of a plane's bits of a token, or slot, in its byte."""
    return f"{rows} % {PACKED} // {width} * {width}" if width > 1 else f"{rows} % {PACKED}"


def range_place(tokens: str) -> str:
    """Return the text of where tokens' ranges and marks are, given their numbers."""
    return f"{tokens} % {PACKED} * groups + {tokens} // {PACKED}"


def codes(pointer: str, rows: str, bits: int, dim: int, mask: str, name: str = "o_d") -> str:
    """Return the text of a tile of codes, int32: of rows [N, 1] by their numbers."""
    terms, row = [], 0
    for first, width in planes(bits):
        load = f"tl.load({pointer} + ({packed_row(rows, bits, row, width)}) * {dim} + {name}{mask}).to(tl.int32)"
        term = f"({load} >> ({packed_shift(rows, width)}) & {(1 << width) - 1})"
        terms.append(f"({term} << {first})" if first else term)
        row += width
    return " | ".join(terms)


def indented(lines: Iterable[str], depth: int = 1) -> Iterator[str]:
    """Yield lines further to the right."""
    for line in lines:
        yield "    " * depth + line if line else line


def function(name: str, helpers: str, parameters: Iterable[str], constants: Iterable[str], body: Iterable[str]) -> str:
    """Return the text of a kernel; `name` may be "{name}"."""
    names = list(parameters)
    varying = ", ".join(f'"{n}"' for n in ("tokens", "capacity", "slots") if n in names)
    lines = [f"@triton.jit(do_not_specialize=[{varying}])", f"def {name}("]
    lines += [f"    {', '.join(names[at : at + _A_LINE])}," for at in range(0, len(names), _A_LINE)]
    lines += [f"    {', '.join(f'{n}: tl.constexpr' for n in constants)},", "):"]
    return "\n".join([helpers, "", *lines, *indented(body)]) + "\n"


HELD = """\
@triton.jit
def held(slot, stored, filled, ring):
    # A slot of the ring holds a token if the first token at or behind the stored ones that comes into it is there.
    return (slot < ring) & (stored + (slot - stored % ring + ring) % ring < filled)
"""

ATTENTION_STATES = (
    *("recent_k", "recent_v", "balance", "low_k", "low_v", "ranges", "refined"),
    *("fine_k", "fine_v", "pool_token"),
)
MASS_STATES = ("recent_k", "balance", "low_k", "ranges", "fine_k", "pool_token")


def attention_parameters() -> tuple[str, ...]:
    """Return the attention kernel's parameters."""
    tensors = ("q", "k", "v", "past", *ATTENTION_STATES, "out", "lse")
    strides = [stride for tensor in ("q", "k", "v", "out") for stride in STRIDES[tensor]]
    return (*(f"p_{t}" for t in tensors), "tokens", "capacity", "slots", "scale", *strides)


def mass_parameters(spec: TieredSpec) -> tuple[str, ...]:
    """Return the parameters of the kernel of the attention that tokens get."""
    tensors = ("q", "k", "lse", "past", *["count"] * spec.counted, *MASS_STATES, "recent_mass", "pool_mass", "own_mass")
    strides = [stride for tensor in ("q", "k") for stride in STRIDES[tensor]]
    return (*(f"p_{t}" for t in tensors), "tokens", "capacity", "slots", "scale", *strides)


def places(spec: TieredSpec, states: Iterable[str]) -> Iterator[str]:
    """Yield what moves pointers to the program's sequence and key head, and tells how much there is."""
    tiers, d, dv = spec.tiers, spec.head_dim, spec.value_dim
    yield "head = (i_b * heads + i_h).to(tl.int64)"
    yield f"groups = capacity // {PACKED}"
    yield f"room = groups * {PACKED} // {tiers.group_size} * {tiers.group_size} + {tiers.ring - 1}"
    yield "filled = tl.minimum(tl.load(p_past + i_b).to(tl.int32), room)"
    yield f"stored = tl.maximum(filled - {tiers.residual}, 0) // {tiers.group_size} * {tiers.group_size}"
    yield f"pooled = stored // {tiers.group_size} * {tiers.promoted}"
    fine = f"slots // {PACKED} * {tiers.fine_bits}" if tiers.fine_bits else "slots"
    sizes = {
        **{"recent_k": f"{tiers.ring * d}", "recent_v": f"{tiers.ring * dv}", "recent_score": f"{tiers.ring}"},
        **{
            "balance": f"{d}",
            "low_k": f"(capacity * {d * tiers.low_bits // 8})",
            "low_v": f"(capacity * {dv * tiers.low_bits // 8})",
            "ranges": f"(groups * {4 * PACKED})",
        },
        **{"refined": "groups", "fine_k": f"({fine} * {d})", "fine_v": f"({fine} * {dv})"},
        **{"pool_token": "slots", "pool_score": "slots"},
    }
    for state in states:
        yield f"p_{state} += head * {sizes[state]}"


def attention_text(spec: TieredSpec) -> str:
    """Return the kernel of `graphwright::kv_tiered_attention`.

    The grid is (cdiv(T * group, BLOCK_M), Hk, B).

    Numerics: products, sums and softmax are in float32.
    Limits: heads of up to 256 features.
    Reference: graphwright/ir/ops/kv_tiered.py, kv_tiered_attention_reference.
    """
    return function("{name}", LARGER, attention_parameters(), ("BLOCK_M", "BLOCK_N", "BLOCK_G"), _attention(spec))


def _attention(spec: TieredSpec) -> Iterator[str]:
    d, dv, group, tiers = spec.head_dim, spec.value_dim, spec.group, spec.tiers
    in_d, in_v = columns(d), columns(dv, "o_v")
    yield '"""Attention of BLOCK_M rows of queries over both tiers, the ring, and the new tokens."""'
    yield "i_h, i_b, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)"
    yield from places(spec, ATTENTION_STATES)
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


def new_entries(name: str) -> Iterator[str]:
    """Yield what moves the pointer of the new tokens' keys or values to the program's head."""
    yield f"p_{name} += i_b.to(tl.int64) * {name}_batch + i_h.to(tl.int64) * {name}_head"


def stored_where(*conditions: str) -> str:
    """Return the argument of a store that stores nothing where a condition is false."""
    terms = [condition for condition in conditions if condition]
    return f", mask={both(terms)}" if terms else ""


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


def refined_codes(spec: TieredSpec, tensor: str, dim: int, name: str, inside: str) -> Iterator[str]:
    """Yield a tile of codes with their refinement, of the tokens in the slots `slots_2d` [N, 1]."""
    tiers = spec.tiers
    mask = masked("slots_2d < pooled", inside)
    yield "rows = tl.load(p_pool_token + slots_2d, mask=slots_2d < pooled, other=0)"
    yield f"low = {codes(f'p_low_{tensor}', 'rows', tiers.low_bits, dim, mask, name)}"
    yield f"fine = {codes(f'p_fine_{tensor}', 'slots_2d', tiers.fine_bits, dim, mask, name)}"
    yield f"{tensor} = ((low << {tiers.fine_bits}) | fine).to(tl.float32)"


def _ranges(tokens: str, inside: str, fine_bits: int = 0) -> Iterator[str]:
    """Zero and step of tokens' keys and values; with refinement, of codes that have its bits as their lowest."""
    for at, tensor in ((0, "k"), (2, "v")):
        for j, part in ((at, "zero"), (at + 1, "step")):
            place = f"p_ranges + {f'{j * PACKED} * groups + ' if j else ''}{tokens}"
            yield f"{tensor}_{part} = tl.load({place}, mask={inside}, other=0).to(tl.float32)"
        if fine_bits:
            yield from refined_range(f"{tensor}_zero", f"{tensor}_step", fine_bits)


def refined_range(zero: str, step: str, fine_bits: int) -> Iterator[str]:
    """Yield what turns zero and step of codes into those of codes with refinement."""
    yield f"{zero} += {step} * {0.5 / (1 << fine_bits) - 0.5!r}"
    yield f"{step} *= {1 / (1 << fine_bits)!r}"


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


def mass_text(spec: TieredSpec) -> str:
    """Return the kernel of `graphwright::kv_tiered_mass`.

    The grid is (cdiv(P, BLOCK_N) + cdiv(N, BLOCK_N) + cdiv(T, BLOCK_N), Hk, B).

    Numerics: products and sums are in float32.
    Limits: heads of up to 256 features.
    Reference: graphwright/ir/ops/kv_tiered.py, kv_tiered_mass_reference.
    """
    return function("{name}", HELD, mass_parameters(spec), ("BLOCK_M", "BLOCK_N"), _mass(spec))


def _mass(spec: TieredSpec) -> Iterator[str]:
    d, tiers = spec.head_dim, spec.tiers
    in_d = columns(d)
    yield '"""The attention that BLOCK_N slots of the pool or the ring, or new tokens, get from rows of queries."""'
    yield "i_h, i_b, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)"
    yield from places(spec, MASS_STATES)
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
    if tiers.promoted:
        yield "    first = i_n * BLOCK_N"
        yield "    slots_2d = first + tl.arange(0, BLOCK_N)[:, None]"
        yield "    used = first < pooled"
        if tiers.fine_bits:
            yield from indented(refined_codes(spec, "k", d, "o_d", in_d))
            for j, part in ((0, "zero"), (1, "step")):
                place = f"p_ranges + {f'{PACKED} * groups + ' if j else ''}{range_place('rows')}"
                yield f"    {part} = tl.load({place}, mask=slots_2d < pooled, other=0).to(tl.float32)"
            yield from indented(refined_range("zero", "step", tiers.fine_bits))
            balance = f"tl.load(p_balance + o_d{f', mask={in_d}, other=1' if in_d else ''})"
            yield f"    k = tl.where(slots_2d < pooled, (zero + step * k) / {balance}, 0.0)"
            if in_d:
                yield f"    k = tl.where({in_d}, k, 0.0)"
        else:
            yield f"    k = tl.load(p_fine_k + slots_2d * {d} + o_d{masked('slots_2d < pooled', in_d)}).to(tl.float32)"
        yield from indented(_received(spec, in_d, "tl.where(used, start, stop)"))
        yield "    o_n = first + tl.arange(0, BLOCK_N)"
        yield "    tl.store(p_pool_mass + head * slots + o_n, tl.where(o_n < pooled, mass, 0.0), mask=o_n < slots)"
    else:
        yield "    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)"
        yield "    tl.store(p_pool_mass + head * slots + o_n, tl.zeros([BLOCK_N], tl.float32), mask=o_n < slots)"
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


def _received(spec: TieredSpec, in_d: str, start: str, *, causal: bool = False) -> Iterator[str]:
    """The sums of the probabilities of keys k over rows of queries."""
    group = spec.group
    yield "mass = tl.zeros([BLOCK_N], tl.float32)"
    yield f"for first_row in range({start}, stop, BLOCK_M):"
    yield "    o_r = first_row + tl.arange(0, BLOCK_M)[:, None]"
    yield f"    p_rows = p_q + o_r % {group} * q_head + (o_r // {group}).to(tl.int64) * q_token"
    yield f"    q = tl.load(p_rows + o_d{masked('o_r < stop', in_d)}).to(tl.float32) * (scale * {LOG2E!r})"
    yield f'    lse = tl.load(p_lse + o_r % {group} * tokens + o_r // {group}, mask=o_r < stop, other=float("inf"))'
    yield f'    s = tl.dot(q, tl.trans(k), input_precision="ieee") - lse * {LOG2E!r}'
    if causal:
        yield f'    s = tl.where(first + tl.arange(0, BLOCK_N)[None, :] <= o_r // {group}, s, float("-inf"))'
    yield "    mass += tl.sum(tl.exp2(s), 0)"
