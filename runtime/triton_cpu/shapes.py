"""Operations that make, move or regroup elements without computing on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import scalars as s
from .arithmetic import choose
from .chunks import index_as
from .emit import LLVM_TYPES
from .errors import UnsupportedError
from .registry import evaluator, materialiser
from .values import Affine, Coord, Coords, Number, Pointer, Uniform, Val, Vector, lanes_of, widths_of

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Op, Value


def map_number(x: Val, change: Callable[[Number], Number]) -> Val:
    """Apply a change of lanes to a number, or to the offset of a pointer."""
    return Pointer(x.base, change(x.offset), x.pointee) if isinstance(x, Pointer) else change(x)


@evaluator("arith.constant")
def constant(lowering: Lowering, op: Op, value: Value, coords: Coords) -> Val:
    """A number, the same everywhere."""
    number = op.attrs["value"]
    if isinstance(number, list):
        raise UnsupportedError("a constant tensor whose elements differ", op.line)
    return s.constant(number, value.element)


@evaluator("tt.splat", "tt.unsplat")
def splat(lowering: Lowering, op: Op, value: Value, coords: Coords) -> Val:
    """A scalar in all elements (or the only element as a scalar)."""
    source = op.operands[0]
    return lowering.eval(source, tuple(Coord(0) for _ in source.shape))


@evaluator("tt.make_range")
def make_range(lowering: Lowering, op: Op, value: Value, coords: Coords) -> Val:
    """start, start + 1, ..."""
    (at,) = coords
    start = int(op.attrs["start"])
    base = index_as(lowering.e, at, "i32", start)
    return s.affine(base, (s.constant(1, "i32"),), (at.width,)) if at.width > 1 else base


@evaluator("tt.expand_dims")
def expand_dims(lowering: Lowering, op: Op, value: Value, coords: Coords) -> Val:
    """Insert a dimension of size one."""
    axis = op.attrs["axis"]
    return lowering.eval(op.operands[0], coords[:axis] + coords[axis + 1 :])


@evaluator("tt.broadcast")
def broadcast(lowering: Lowering, op: Op, value: Value, coords: Coords) -> Val:
    """Repeat along dimensions of size one."""
    source = op.operands[0]
    repeated = [source.shape[d] == 1 and value.shape[d] != 1 for d in range(len(coords))]
    inner = tuple(Coord(0) if r else c for r, c in zip(repeated, coords, strict=True))
    lanes = [(c.width, r) for c, r in zip(coords, repeated, strict=True) if c.width > 1]
    result = lowering.eval(source, inner)
    if not any(r for _, r in lanes):
        return result
    return map_number(result, lambda x: _repeat(lowering, x, lanes))


def _repeat(lowering: Lowering, x: Number, lanes: list[tuple[int, bool]]) -> Number:
    widths = tuple(w for w, _ in lanes)
    if isinstance(x, Uniform):
        return x
    if isinstance(x, Affine):
        strides = iter(x.strides)
        spread = tuple(s.constant(0, x.element) if r else next(strides) for _, r in lanes)
        return s.affine(x.base, spread, widths)
    order = [0]
    for width, is_repeated in lanes:
        order = [o * (1 if is_repeated else width) + (0 if is_repeated else i) for o in order for i in range(width)]
    text = lowering.e.shuffle(x.text, LLVM_TYPES[x.element], x.lanes, order)
    return Vector(text, x.element, widths)


@evaluator("tt.trans")
def transpose(lowering: Lowering, op: Op, value: Value, coords: Coords) -> Val:
    """Permute dimensions: dimension i of the result is dimension order[i] of the operand."""
    order: list[int] = op.attrs["order"]
    inner: list[Coord] = [Coord(0)] * len(order)
    for i, d in enumerate(order):
        inner[d] = coords[i]
    result = lowering.eval(op.operands[0], tuple(inner))
    outer_dims = [d for d in order if inner[d].width > 1]
    if len(outer_dims) < 2 or outer_dims == sorted(outer_dims):
        return result
    inner_dims = sorted(outer_dims)
    return map_number(result, lambda x: _permute(lowering, x, inner_dims, outer_dims))


def _permute(lowering: Lowering, x: Number, inner_dims: list[int], outer_dims: list[int]) -> Number:
    if isinstance(x, Uniform):
        return x
    at = [inner_dims.index(d) for d in outer_dims]
    widths = tuple(x.widths[i] for i in at)
    if isinstance(x, Affine):
        return s.affine(x.base, tuple(x.strides[i] for i in at), widths)
    steps = [math.prod(x.widths[i + 1 :]) for i in range(len(x.widths))]
    order = [0]
    for i in at:
        order = [o + k * steps[i] for o in order for k in range(x.widths[i])]
    return Vector(lowering.e.shuffle(x.text, LLVM_TYPES[x.element], x.lanes, order), x.element, widths)


def _bits(shape: tuple[int, ...]) -> list[int]:
    """Per dimension, the number of the lowest bit of the linear index that it holds."""
    low, at = [0] * len(shape), 0
    for d in reversed(range(len(shape))):
        low[d] = at
        at += shape[d].bit_length() - 1
    return low


@evaluator("tt.reshape")
def reshape(lowering: Lowering, op: Op, value: Value, coords: Coords) -> Val:
    """Same elements in row-major order under another shape.

    Sizes are powers of two, so an index is a row of bits and the lanes of a chunk are some of them. Where they are not the low
    bits of the operand's dimensions, the operand is evaluated in several pieces and the lanes are woven together.
    """
    e, source = lowering.e, op.operands[0]
    outer_low, inner_low = _bits(value.shape), _bits(source.shape)
    lane_bits = sorted(low + i for low, c in zip(outer_low, coords, strict=True) for i in range(c.width.bit_length() - 1))
    widths_inner, usable = [1] * len(source.shape), set()
    for d, low in enumerate(inner_low):
        while low in lane_bits and 1 << (low - inner_low[d]) < source.shape[d]:
            usable.add(low)
            widths_inner[d] *= 2
            low += 1
    linear = e.combine(*((1 << low, c.base) for low, c in zip(outer_low, coords, strict=True)))
    woven = [b for b in lane_bits if b not in usable]

    def piece(offset: int) -> Val:
        chunk = []
        for d, low in enumerate(inner_low):
            size, width = source.shape[d], widths_inner[d]
            chunk.append(Coord(_field(lowering, linear, offset, low, size, inner_low, d), width, width))
        return lowering.eval(source, tuple(chunk))

    widths = widths_of(coords)
    if not woven:
        return map_number(piece(0), lambda x: _regroup(lowering, x, widths))
    offsets = [0]
    for bit in reversed(woven):
        offsets = [o | (k << bit) for o in offsets for k in (0, 1)]
    pieces = [piece(o) for o in offsets]
    if isinstance(pieces[0], Pointer):
        addresses = [s.absolute(e, p) if isinstance(p, Pointer) else p for p in pieces]
        return Pointer(None, _weave(lowering, addresses, lane_bits, woven, widths), str(value.type.pointee))
    return _weave(lowering, [p for p in pieces if not isinstance(p, Pointer)], lane_bits, woven, widths)


def _field(lowering: Lowering, linear: int | str, offset: int, low: int, size: int, lows: list[int], d: int) -> int | str:
    """The index along one dimension of element `linear + offset`."""
    if isinstance(linear, int):
        return ((linear + offset) >> low) & (size - 1)
    if size == 1:
        return 0
    e = lowering.e
    shifted = linear if low == 0 else s.memo(e, ("lshr", linear, low), lambda: e.op(f"lshr i64 {linear}, {low}"))
    field = s.memo(e, ("and", shifted, size), lambda: e.op(f"and i64 {shifted}, {size - 1}"))
    own = (offset >> low) & (size - 1)
    return field if own == 0 else e.op(f"or i64 {field}, {own}")


def _regroup(lowering: Lowering, x: Number, widths: tuple[int, ...]) -> Number:
    """The same lanes in order, grouped under other widths."""
    if isinstance(x, Uniform) or x.widths == widths:
        return x
    if isinstance(x, Affine):
        flat = _flatten(lowering, x)
        if flat is not None and len(widths) == 1:
            return s.affine(x.base, (flat,), widths)
        if flat is not None:
            strides = tuple(
                s.uniform_binary(lowering.e, "mul", flat, s.constant(math.prod(widths[i + 1 :]), x.element))
                for i in range(len(widths))
            )
            return s.affine(x.base, strides, widths)
    return Vector(s.vector_text(lowering.e, x, math.prod(x.widths)), x.element, widths)


def _flatten(lowering: Lowering, x: Affine) -> Uniform | None:
    """The single stride of an affine number over all its lanes, if there is one."""
    last, step = x.strides[-1], x.widths[-1]
    for stride, width in zip(x.strides[-2::-1], x.widths[-2::-1], strict=True):
        if not (isinstance(stride.value, int) and isinstance(last.value, int) and stride.value == last.value * step):
            return None
        step *= width
    return last


def _weave(lowering: Lowering, pieces: list[Number], lane_bits: list[int], woven: list[int], widths: tuple[int, ...]) -> Number:
    element = pieces[0].element
    total = math.prod(widths)
    each = total // len(pieces)
    texts = [s.vector_text(lowering.e, p, each) for p in pieces]
    kept = [b for b in lane_bits if b not in woven]
    order = []
    for lane in range(total):
        bits = {b: (lane >> i) & 1 for i, b in enumerate(lane_bits)}
        which = sum(bits[b] << i for i, b in enumerate(woven))
        order.append(which * each + sum(bits[b] << i for i, b in enumerate(kept)))
    joined = concatenate(lowering, texts, LLVM_TYPES[element], each)
    return Vector(lowering.e.shuffle(joined, LLVM_TYPES[element], total, order), element, widths)


def concatenate(lowering: Lowering, texts: list[str], kind: str, lanes: int) -> str:
    """Join vectors of `lanes` lanes end to end."""
    e = lowering.e
    if lanes == 1:
        result = "poison"
        for i, text in enumerate(texts):
            result = e.op(f"insertelement <{len(texts)} x {kind}> {result}, {kind} {text}, i32 {i}")
        return result
    while len(texts) > 1:
        texts = [e.shuffle(a, kind, lanes, list(range(2 * lanes)), b) for a, b in zip(texts[::2], texts[1::2], strict=True)]
        lanes *= 2
    return texts[0]


@evaluator("tt.join")
def join(lowering: Lowering, op: Op, value: Value, coords: Coords) -> Val:
    """Two tensors side by side along a new last dimension."""
    last, inner = coords[-1], coords[:-1]
    a, b = op.operands
    if last.width == 1:
        if isinstance(last.base, int):
            return lowering.eval(b if last.base else a, inner)
        is_second = Uniform(lowering.e.op(f"icmp ne i64 {last.base}, 0"), "i1")
        return choose(lowering, is_second, lowering.eval(b, inner), lowering.eval(a, inner), value.type.pointee)
    lanes = lanes_of(inner)
    sides = [lowering.eval(v, inner) for v in (a, b)]
    element = "i64" if value.type.is_pointer else value.element
    kind = LLVM_TYPES[element]
    texts = [lowering.lanes_text(x, lanes) for x in sides]
    order = [lane // 2 + (lane % 2) * lanes for lane in range(2 * lanes)]
    woven = Vector(lowering.e.shuffle(texts[0], kind, lanes, order, texts[1]), element, widths_of(coords))
    return Pointer(None, woven, str(value.type.pointee)) if value.type.is_pointer else woven


@evaluator("tt.split")
def split(lowering: Lowering, op: Op, value: Value, coords: Coords) -> Val:
    """The two halves of the last dimension, of size two."""
    both = lowering.eval(op.operands[0], (*coords, Coord(0, 2)))
    widths, lanes = widths_of(coords), lanes_of(coords)

    def half(x: Number) -> Number:
        if isinstance(x, Uniform):
            return x
        if isinstance(x, Affine):
            base = s.uniform_binary(lowering.e, "add", x.base, x.strides[-1]) if value.index else x.base
            return s.affine(base, x.strides[:-1], widths)
        picks = [2 * lane + value.index for lane in range(lanes)]
        text = lowering.e.shuffle(x.text, LLVM_TYPES[x.element], 2 * lanes, picks)
        return Vector(text, x.element, widths) if widths else Uniform(text, x.element)

    return map_number(both, half)


@materialiser("tt.cat")
def concatenate_tensors(lowering: Lowering, op: Op) -> None:
    """One tensor after the other along the first dimension."""
    result = op.result
    buffer = lowering.new_buffer(result.shape, result.element, len(result.shape) - 1)
    rows = 0
    for operand in op.operands:
        lowering.prepare(operand)

        def write(coords: Coords, operand: Value = operand, start: int = rows) -> None:
            first = coords[0]
            shifted = lowering.e.combine((1, first.base), (1, start))
            at = (Coord(shifted, first.width, math.gcd(first.width, start or first.width)), *coords[1:])
            lowering.store_chunk(buffer, at, lowering.eval(operand, coords))

        lowering.for_each_chunk(operand.shape, len(operand.shape) - 1, write)
        rows += operand.shape[0]
    lowering.buffers[result] = buffer
