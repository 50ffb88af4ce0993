"""The text of the kernel that puts new tokens into a quantised cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .attention_parts import cut
from .kv_quantized_text import Piece, key_pieces, value_pieces

PARAMETERS = (
    *("p_codes", "p_scale", "p_minimum", "p_ring", "p_new", "p_past", "p_count"),
    *("tokens", "capacity", "new_batch", "new_head", "new_token"),
)
"""Names of the kernel's parameters in order. `p_count` is not read where all tokens count."""

ROWS = 32
"""Tokens that are copied to the ring at a time."""


@dataclass(frozen=True, kw_only=True)
class AppendSpec:
    """What the kernel puts where.

    Args:
        size: D, columns of a token.
        bits: of a code.
        group: tokens of a group.
        slots: of the ring.
        groups: groups of the channels of a token; 0 for groups of tokens of one channel.
        limit: the largest number that scales and minima can be.
        counted: whether p_count says how many tokens there are.
    """

    size: int
    bits: int
    group: int
    slots: int
    groups: int
    limit: float
    counted: bool

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """How the columns are cut."""
        return value_pieces(self.size, self.bits, self.groups) if self.groups else key_pieces(self.size, self.bits)

    @property
    def width(self) -> int:
        """Bytes of a token."""
        return self.size * self.bits // 8


def append_body(spec: AppendSpec) -> str:
    """Return the kernel's function with "{name}" for its name.

    A program does it for one head of one sequence: first the groups that are full now, then the ring, of which they read.
    """
    lines = ['@triton.jit(do_not_specialize=["tokens", "capacity"])', "def {name}(", f"    {', '.join(PARAMETERS)},", "):"]
    lines += [f"    {line}".rstrip() for line in _body(spec)]
    return "\n".join(lines) + "\n"


def _body(spec: AppendSpec) -> Iterator[str]:
    yield '"""Quantise the groups of one head of one sequence that its new tokens fill, and put the newest into the ring."""'
    yield "i_h = tl.program_id(0)"
    yield "i_b = tl.program_id(1)"
    yield "row = i_b.to(tl.int64) * tl.num_programs(0) + i_h"
    yield "past = tl.load(p_past + i_b).to(tl.int32)"
    if spec.counted:
        yield "tokens = tl.minimum(tl.maximum(tl.load(p_count + i_b).to(tl.int32), 0), tokens)"
    yield "end = tl.minimum(past + tokens, capacity)"
    yield f"first = tl.maximum(past - {spec.slots - spec.group}, 0) // {spec.group}"
    yield f"last = tl.maximum(end - {spec.slots - spec.group}, 0) // {spec.group}"
    yield f"p_codes += row * capacity * {spec.width}"
    parameters = f"{spec.groups} * capacity" if spec.groups else f"(capacity // {spec.group}) * {spec.size}"
    yield f"p_scale += row * ({parameters})"
    yield f"p_minimum += row * ({parameters})"
    yield f"p_ring += row * {spec.slots * spec.size}"
    yield "p_new += i_b.to(tl.int64) * new_batch + i_h.to(tl.int64) * new_head"
    yield f"o_g = tl.arange(0, {spec.group})[:, None]"
    yield "for at in range(first, last):"
    yield from (f"    {line}" for line in _group(spec))
    yield "tl.debug_barrier()"
    yield f"for first_row in range(tl.maximum(past, end - {spec.slots}), end, {ROWS}):"
    yield f"    token = first_row + tl.arange(0, {ROWS})[:, None]"
    for part in cut(spec.size):
        mask = part.mask("token < end")
        yield f"    x = tl.load(p_new + (token - past).to(tl.int64) * new_token + {part.columns}{mask})"
        yield f"    tl.store(p_ring + (token % {spec.slots}) * {spec.size} + {part.columns}, x{mask})"


def _group(spec: AppendSpec) -> Iterator[str]:
    """Quantise one group of tokens."""
    levels = float(2**spec.bits - 1)
    yield f"token = at * {spec.group} + o_g"
    yield "old = token < past"
    for piece in spec.pieces:
        columns = piece.columns.columns
        ring, new = (piece.columns.mask(rows) for rows in ("old", "token >= past"))
        yield f"x = tl.load(p_ring + (token % {spec.slots}) * {spec.size} + {columns}{ring}, other=0.0)"
        yield f"y = tl.load(p_new + (token - past).to(tl.int64) * new_token + {columns}{new}, other=0.0)"
        yield f"x{piece.number} = tl.where(old, x, y).to(tl.float32)"
    if spec.groups:
        for number in range(spec.groups):
            yield from _span([piece for piece in spec.pieces if piece.group == number], str(number))
            yield from _parameters(str(number), levels, spec.limit)
            yield f"p_at = {number} * capacity + at * {spec.group} + tl.arange(0, {spec.group})"
            yield f"tl.store(p_scale + p_at, scale{number})"
            yield f"tl.store(p_minimum + p_at, minimum{number})"
    else:
        for piece in spec.pieces:
            n, part = piece.number, piece.columns
            yield f"low = tl.min(x{n}, 0)"
            yield f"high = tl.max(x{n}, 0)"
            yield from _parameters(str(n), levels, spec.limit)
            columns = f"at * {spec.size} + {part.start} + tl.arange(0, {part.size})"
            mask = f", mask=tl.arange(0, {part.size}) < {part.used}" if part.used < part.size else ""
            yield f"tl.store(p_scale + {columns}, scale{n}{mask})"
            yield f"tl.store(p_minimum + {columns}, minimum{n}{mask})"
    spread = "[:, None]" if spec.groups else "[None, :]"
    planes = 8 // spec.bits
    for piece in spec.pieces:
        n, of = piece.number, piece.group if spec.groups else piece.number
        yield f"scale = scale{of}.to(tl.float32){spread}"
        yield f"steps = (x{n} - minimum{of}.to(tl.float32){spread}) / tl.where(scale > 0.0, scale, 1.0)"
        yield f"code = tl.where(scale > 0.0, tl.minimum(tl.maximum(tl.floor(steps + 0.5), 0.0), {levels}), 0.0).to(tl.uint8)"
        yield f"bytes = bytes | (code << {piece.shift})" if piece.shift else "bytes = code"
        if n % planes == planes - 1:
            yield f"tl.store(p_codes + token.to(tl.int64) * {spec.width} + {piece.bytes.columns}, bytes{piece.bytes.mask()})"


def _span(pieces: list[Piece], name: str) -> Iterator[str]:
    """The least and the largest of the pieces of a group, for each token."""
    for at, piece in enumerate(pieces):
        low, high = f"x{piece.number}", f"x{piece.number}"
        part = piece.columns
        if part.used < part.size:
            inside = f"{part.columns} < {part.start + part.used}"
            low = f'tl.where({inside}, {low}, float("inf"))'
            high = f'tl.where({inside}, {high}, float("-inf"))'
        yield f"low = tl.minimum(low, tl.min({low}, 1))" if at else f"low = tl.min({low}, 1)"
        yield f"high = tl.maximum(high, tl.max({high}, 1))" if at else f"high = tl.max({high}, 1)"


def _parameters(name: str, levels: float, limit: float) -> Iterator[str]:
    """The minimum and the scale, in the dtype that they are kept in."""
    dtype = "p_scale.dtype.element_ty"
    yield f"minimum{name} = tl.minimum(tl.maximum(low, {-limit!r}), {limit!r}).to({dtype})"
    yield f"span = high - minimum{name}.to(tl.float32)"
    yield f"scale{name} = tl.minimum(tl.maximum(span / {levels}, 0.0), {limit!r}).to({dtype})"
