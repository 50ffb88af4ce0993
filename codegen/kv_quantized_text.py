"""The texts of the kernels over quantised caches.

Neither keys nor values are ever written out dequantised. A group's scale and minimum of each channel go into the queries,
q . (c * s + m) = (q * s) . c + q . m, and those of each token into the weights, sum of w (c * s + m) = sum of (w s) c + sum of
w m: what is done for each code is its conversion to a number and the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from .attention_parts import SMALLEST_PART, Part, cut
from .attention_text import HELPERS

_LOG2E = math.log2(math.e)
_FLOOR = "-3.4028234663852886e38"
_STATES = ("codes", "scale", "minimum", "ring")


@dataclass(frozen=True)
class Piece:
    """Columns of a head whose codes are the same bits of neighbouring bytes.

    Args:
        number: of the piece.
        bytes: columns of the bytes.
        columns: columns of the head.
        shift: the lowest bit of the codes.
        group: of values: which group of channels they are in.
    """

    number: int
    bytes: Part
    columns: Part
    shift: int
    group: int = 0


@dataclass(frozen=True, kw_only=True)
class QuantizedSpec:
    """What the kernels of one attention compute.

    Args:
        head_dim: D, elements of a query and of a key.
        value_dim: Dv, elements of a value and of an output.
        bits: of a code.
        group: tokens of a group of keys.
        slots: of the rings.
        value_groups: groups of channels of a value.
        heads: query heads that share a key head.
        one: there is one query for each sequence, and the heads that share a key head are a program's rows.
        predicate: Triton text of what else than its position shows a key to a query; None for nothing.
        bias: Triton text of a float32 that is added to scores; None for none.
        operands: names of parameters that these two read.
        softcap: None for none.
        sink: whether there are sinks.
        continued: leave the outputs of sequences without tokens before alone; not if `one`.
    """

    head_dim: int
    value_dim: int
    bits: int
    group: int
    slots: int
    value_groups: int
    heads: int = 1
    one: bool = False
    predicate: str | None = None
    bias: str | None = None
    operands: tuple[str, ...] = ()
    softcap: float | None = None
    sink: bool = False
    continued: bool = False

    @cached_property
    def key_pieces(self) -> tuple[Piece, ...]:
        """How the columns of keys are cut."""
        return key_pieces(self.head_dim, self.bits)

    @cached_property
    def value_pieces(self) -> tuple[Piece, ...]:
        """How the columns of values are cut: each piece is in one group."""
        return value_pieces(self.value_dim, self.bits, self.value_groups)


def key_pieces(size: int, bits: int) -> tuple[Piece, ...]:
    """Return pieces of the columns of a head."""
    width = size * bits // 8
    return _pieces(cut(width), width, bits, size)


def value_pieces(size: int, bits: int, groups: int) -> tuple[Piece, ...]:
    """Return pieces of the columns of a head, each in one of equal groups of channels."""
    width = size * bits // 8
    step = math.gcd(width, size // groups)
    parts = [Part(at, max(step, SMALLEST_PART), step) for at in range(0, width, step)]
    return _pieces(parts, width, bits, size // groups)


def _pieces(parts: Sequence[Part], width: int, bits: int, group: int) -> tuple[Piece, ...]:
    places = [(part, plane) for part in parts for plane in range(8 // bits)]
    return tuple(
        Piece(number, part, Part(start, part.size, part.used), plane * bits, start // group)
        for number, (part, plane) in enumerate(places)
        for start in [plane * width + part.start]
    )


def attention_parameters(spec: QuantizedSpec) -> tuple[str, ...]:
    """Return the names of the attention kernel's parameters in order, without the constants BLOCK_M and BLOCK_N."""
    names = ["p_q", "p_k", "p_v", "p_out", "p_past", *(f"p_{tensor}_{state}" for tensor in "kv" for state in _STATES)]
    names += ["p_sink"] * spec.sink + [*spec.operands]
    names += [*attention_lengths(spec), "scale"]
    names += [f"{tensor}_{dim}" for tensor in ("q", "k", "v", "out") for dim in ("batch", "head", "token")]
    return tuple(names)


def attention_lengths(spec: QuantizedSpec) -> tuple[str, ...]:
    """Return the parameters that change from call to call, which the kernel is not specialised for."""
    return ("capacity",) if spec.one else ("query_length", "capacity")


def attention_body(spec: QuantizedSpec) -> str:
    """Return the attention kernel's function, with "{name}" for its name, and what it calls."""
    lengths = ", ".join(f'"{length}"' for length in attention_lengths(spec))
    lines = [HELPERS, "", f"@triton.jit(do_not_specialize=[{lengths}])", "def {name}("]
    lines += [f"    {parameter}," for parameter in attention_parameters(spec)]
    lines += ["    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,", "):"]
    lines += [f"    {line}".rstrip() for line in _attention(spec)]
    return "\n".join(lines) + "\n"


def _attention(spec: QuantizedSpec) -> Iterator[str]:
    rows = "the query's heads that share a key head" if spec.one else "BLOCK_M queries of one head"
    yield f'"""Attention of {rows}, over keys in groups of codes, then over the ring, then over the queries\' own."""'
    yield from _places(spec)
    yield from _start(spec)
    yield ""
    yield f"for first_k in range(0, quantised, {spec.group}):"
    yield from (f"    {line}" for line in _quantised_block(spec))
    yield f"for first_k in range(quantised, past, {spec.group}):"
    yield from (f"    {line}" for line in _ring_block(spec))
    if spec.one:
        yield from _own_token(spec)
    else:
        yield "for first_own in range(0, tl.minimum(query_length, first_q + BLOCK_M), BLOCK_N):"
        yield from (f"    {line}" for line in _own_block(spec))
    yield ""
    yield from _end(spec)


def _places(spec: QuantizedSpec) -> Iterator[str]:
    if spec.one:
        yield "i_m = tl.program_id(0)"
    else:
        yield "# The last queries see the most keys; started first, they do not leave one thread working alone at the end."
        yield "i_m = tl.num_programs(0) - 1 - tl.program_id(0)"
    yield "i_h = tl.program_id(1)"
    yield "i_b = tl.program_id(2)"
    yield "first_q = i_m * BLOCK_M"
    yield "o_m = tl.arange(0, BLOCK_M)[:, None]"
    yield "o_q = first_q + o_m"
    if spec.one:
        yield f"query_length = {spec.heads}"
        yield "key_head = i_h"
        yield "row = i_b.to(tl.int64) * tl.num_programs(1) + i_h"
    else:
        yield f"key_head = i_h // {spec.heads}"
        yield f"row = i_b.to(tl.int64) * (tl.num_programs(1) // {spec.heads}) + key_head"
    yield "past = tl.load(p_past + i_b).to(tl.int32)"
    if spec.continued:
        yield "query_length = tl.where(past > 0, query_length, 0)"
    yield f"key_length = past + {'1' if spec.one else 'query_length'}"
    yield f"quantised = tl.maximum(past - {spec.slots - spec.group}, 0) // {spec.group} * {spec.group}"
    head = f"(i_h * {spec.heads})" if spec.one else "i_h"
    for tensor in ("q", "out"):
        yield f"p_{tensor} += i_b.to(tl.int64) * {tensor}_batch + {head}.to(tl.int64) * {tensor}_head"
    for tensor in ("k", "v"):
        yield f"p_{tensor} += i_b.to(tl.int64) * {tensor}_batch + key_head.to(tl.int64) * {tensor}_head"
    for tensor, size in (("k", spec.head_dim), ("v", spec.value_dim)):
        yield f"p_{tensor}_codes += row * capacity * {size * spec.bits // 8}"
        groups = f"(capacity // {spec.group}) * {size}" if tensor == "k" else f"{spec.value_groups} * capacity"
        yield f"p_{tensor}_scale += row * ({groups})"
        yield f"p_{tensor}_minimum += row * ({groups})"
        yield f"p_{tensor}_ring += row * {spec.slots * size}"
    yield f"o_g = tl.arange(0, {spec.group})[:, None]"


def _row(spec: QuantizedSpec, tensor: str) -> str:
    """The stride between the rows of the queries or of the outputs."""
    return f"{tensor}_head" if spec.one else f"{tensor}_token"


def _start(spec: QuantizedSpec) -> Iterator[str]:
    """The queries, scaled, and the running sums."""
    factor = "scale" if _natural(spec) else f"(scale * {_LOG2E!r})"
    for piece in spec.key_pieces:
        mask = piece.columns.mask("o_q < query_length")
        yield (
            f"q{piece.number} = tl.load(p_q + o_q.to(tl.int64) * {_row(spec, 'q')} + {piece.columns.columns}{mask}, other=0.0)"
            f".to(tl.float32) * {factor}"
        )
    yield f"row_max = tl.full([BLOCK_M], {_FLOOR}, tl.float32)"
    if spec.sink:
        rows = f"i_h * {spec.heads} + tl.arange(0, BLOCK_M), mask=tl.arange(0, BLOCK_M) < {spec.heads}, other=0.0"
        yield f"sink = tl.load(p_sink + {rows if spec.one else 'i_h'}){'' if _natural(spec) else f' * {_LOG2E!r}'}"
        yield "row_max = tl.maximum(row_max, sink)"
        yield f"row_sum = {_exponential(spec)}(sink - row_max)"
    else:
        yield "row_sum = tl.zeros([BLOCK_M], tl.float32)"
    for piece in spec.value_pieces:
        yield f"acc{piece.number} = tl.zeros([BLOCK_M, {piece.columns.size}], tl.float32)"


def _quantised_block(spec: QuantizedSpec) -> Iterator[str]:
    """One group of tokens as codes."""
    yield f"o_k = first_k + tl.arange(0, {spec.group})[None, :]"
    width = spec.head_dim * spec.bits // 8
    yield f"p_block = p_k_codes + (first_k + o_g).to(tl.int64) * {width}"
    yield f"at = first_k // {spec.group} * {spec.head_dim}"
    yield from _codes(spec, spec.key_pieces, "k")
    for piece in spec.key_pieces:
        columns, mask = piece.columns.columns, _masked(piece.columns)
        n = piece.number
        yield f"scale{n} = tl.load(p_k_scale + at + {columns}{mask}).to(tl.float32)"
        yield f"minimum{n} = tl.load(p_k_minimum + at + {columns}{mask}).to(tl.float32)"
        yield f's = tl.dot(q{n} * scale{n}, tl.trans(k{n}){", s" if n else ""}, input_precision="ieee")'
        yield f"shift = {'shift + ' if n else ''}tl.sum(q{n} * minimum{n}, 1)"
    yield "s += shift[:, None]"
    yield from _bend(spec)
    yield from _weigh(spec)
    width = spec.value_dim * spec.bits // 8
    yield f"p_block = p_v_codes + (first_k + o_g).to(tl.int64) * {width}"
    yield from _codes(spec, spec.value_pieces, "v")
    yield "p_token = first_k + tl.arange(0, " + str(spec.group) + ")[None, :]"
    for group in range(spec.value_groups):
        at = f"{group} * capacity + p_token" if group else "p_token"
        yield f"weights{group} = weights * tl.load(p_v_scale + {at}).to(tl.float32)"
        yield f"base{group} = tl.sum(weights * tl.load(p_v_minimum + {at}).to(tl.float32), 1)[:, None]"
    for piece in spec.value_pieces:
        n = piece.number
        before = f"acc{n} * decay[:, None] + base{piece.group}"
        yield f'acc{n} = tl.dot(weights{piece.group}, v{n}, {before}, input_precision="ieee")'


def _codes(spec: QuantizedSpec, pieces: Sequence[Piece], tensor: str) -> Iterator[str]:
    """Load bytes and take codes out of them."""
    for piece in pieces:
        if piece.shift == 0:
            yield f"bytes = tl.load(p_block + {piece.bytes.columns}{_masked(piece.bytes, '0')})"
        code = f"bytes >> {piece.shift}" if piece.shift else "bytes"
        if piece.shift + spec.bits < 8:
            code = f"({code}) & {2**spec.bits - 1}"
        yield f"{tensor}{piece.number} = ({code}).to(tl.float32)"


def _masked(part: Part, other: str = "0.0") -> str:
    mask = part.mask()
    return f"{mask}, other={other}" if mask else ""


def _ring_block(spec: QuantizedSpec) -> Iterator[str]:
    """Tokens as they came, in neighbouring slots, since groups never go over the ring's end."""
    yield f"o_k = first_k + tl.arange(0, {spec.group})[None, :]"
    yield f"slot = first_k % {spec.slots} + o_g"
    yield "there = first_k + o_g < past"
    yield from _exact_keys(spec, f"p_k_ring + slot * {spec.head_dim}", "there")
    yield from _bend(spec)
    yield 's = tl.where(o_k < past, s, float("-inf"))'
    yield from _weigh(spec)
    yield from _exact_values(spec, f"p_v_ring + slot * {spec.value_dim}", "there")


def _own_block(spec: QuantizedSpec) -> Iterator[str]:
    """Keys and values of the queries' own tokens."""
    yield "o_n = first_own + tl.arange(0, BLOCK_N)[:, None]"
    yield "o_k = past + first_own + tl.arange(0, BLOCK_N)[None, :]"
    yield "there = o_n < query_length"
    yield from _exact_keys(spec, "p_k + o_n.to(tl.int64) * k_token", "there")
    yield from _bend(spec)
    yield 's = tl.where((o_k <= o_q + past) & (o_k < key_length), s, float("-inf"))'
    yield from _weigh(spec)
    yield from _exact_values(spec, "p_v + o_n.to(tl.int64) * v_token", "there")


def _own_token(spec: QuantizedSpec) -> Iterator[str]:
    """The key and the value of the one query's own token: no product, since there is a single row."""
    yield "o_k = past + tl.zeros([1, 1], tl.int32)"
    for piece in spec.key_pieces:
        n = piece.number
        key = f"tl.load(p_k + {piece.columns.columns}{_masked(piece.columns)}).to(tl.float32)"
        yield f"own = {'own + ' if n else ''}tl.sum(q{n} * {key}, 1)"
    yield "s = own[:, None]"
    yield from _bend(spec)
    exponential = _exponential(spec)
    yield "score = tl.sum(s, 1)"
    yield "new_max = larger(row_max, score)"
    yield f"weight = {exponential}(score - new_max)"
    yield f"decay = {exponential}(row_max - new_max)"
    yield "row_sum = row_sum * decay + weight"
    for piece in spec.value_pieces:
        n = piece.number
        value = f"tl.load(p_v + {piece.columns.columns}{_masked(piece.columns)}).to(tl.float32)"
        yield f"acc{n} = acc{n} * decay[:, None] + weight[:, None] * {value}"


def _exact_keys(spec: QuantizedSpec, rows: str, there: str) -> Iterator[str]:
    for piece in spec.key_pieces:
        n = piece.number
        yield f"k{n} = tl.load({rows} + {piece.columns.columns}{piece.columns.mask(there)}, other=0.0).to(tl.float32)"
        yield f's = tl.dot(q{n}, tl.trans(k{n}){", s" if n else ""}, input_precision="ieee")'


def _exact_values(spec: QuantizedSpec, rows: str, there: str) -> Iterator[str]:
    for piece in spec.value_pieces:
        n = piece.number
        yield f"v{n} = tl.load({rows} + {piece.columns.columns}{piece.columns.mask(there)}, other=0.0).to(tl.float32)"
        yield f'acc{n} = tl.dot(weights, v{n}, acc{n} * decay[:, None], input_precision="ieee")'


def _bend(spec: QuantizedSpec) -> Iterator[str]:
    """What is done to scores before the softmax."""
    if spec.softcap is not None:
        yield f"s = libdevice.tanh(s / {spec.softcap!r}) * {spec.softcap!r}"
    if spec.bias is not None:
        yield f"s += {spec.bias}"
    if spec.predicate is not None:
        yield f's = tl.where({spec.predicate}, s, float("-inf"))'


def _weigh(spec: QuantizedSpec) -> Iterator[str]:
    """From scores to weights, and what they do to the running maximum and the running sum."""
    exponential = _exponential(spec)
    yield "new_max = larger(row_max, tl.reduce(s, 1, larger))"
    yield f"weights = {exponential}(s - new_max[:, None])"
    yield f"decay = {exponential}(row_max - new_max)"
    yield "row_max = new_max"
    yield "row_sum = row_sum * decay + tl.sum(weights, 1)"


def _end(spec: QuantizedSpec) -> Iterator[str]:
    yield "# A query that saw no key has a sum of zero, and gets zeros."
    yield "norm = (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]"
    for piece in spec.value_pieces:
        value = f"(acc{piece.number} * norm).to(p_out.dtype.element_ty)"
        mask = piece.columns.mask("o_q < query_length")
        yield f"tl.store(p_out + o_q.to(tl.int64) * {_row(spec, 'out')} + {piece.columns.columns}, {value}{mask})"


def _natural(spec: QuantizedSpec) -> bool:
    """Whether scores are exponents of e, which a bias and a cap are made for, and not of 2."""
    return spec.bias is not None or spec.softcap is not None


def _exponential(spec: QuantizedSpec) -> str:
    return "tl.exp" if _natural(spec) else "tl.exp2"
