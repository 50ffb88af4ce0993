"""Reductions with any combine function, over any axis, of any number of tensors at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import masks
from . import scalars as s
from .casts import as_number
from .chunks import CHEAP_TREE_OPS
from .combine import apply_region
from .emit import LLVM_TYPES, Text, vector_type
from .registry import materialiser
from .values import INTEGER_BITS, Coord, Coords, Uniform, Val, Vector

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Op

PARALLEL_CHAINS = 4
"""Partial results kept at once, so that one addition need not wait for the last."""

VERTICAL_CHAINS = 8
"""The same where the lanes are not along the axis; neighbouring chunks count."""

UNROLLED_CHUNKS = 16
"""Chunks along the axis, of all neighbours together, that are read without a loop."""

STACKED_ROWS = 4
"""Rows whose lanes are combined together."""

SHORT_ROW_CHUNKS = 8
"""Longest row for which that pays; longer ones are read faster one after the other."""

_INFINITY = float("inf")
_FLOAT_IDENTITIES = {
    "arith.addf": -0.0, "arith.mulf": 1.0, "arith.maxnumf": -_INFINITY, "arith.minnumf": _INFINITY,
    "arith.maximumf": -_INFINITY, "arith.minimumf": _INFINITY,
}  # fmt: skip
_INTEGER_IDENTITIES = {
    "arith.addi": 0,
    "arith.muli": 1,
    "arith.ori": 0,
    "arith.xori": 0,
    "arith.andi": -1,
    "arith.maxui": 0,
    "arith.minui": -1,
}


def identity(op: Op) -> int | float | None:
    """The neutral element of a combine function that is a single operation; None where there is none."""
    body = op.body
    if len(body.ops) != 2 or len(op.operands) != 1:
        return None
    first, element = body.ops[0], op.operands[0].element
    if set(first.operands) != set(body.args) or body.terminator.operands != [first.result]:
        return None
    if first.name in ("arith.maxnumf", "arith.minnumf"):
        # All elements may be NaN, and the result is NaN then: no number is neutral, but NaN itself is.
        return math.nan
    if first.name in ("arith.maxsi", "arith.minsi"):
        bits = INTEGER_BITS[element]
        low, high = (-1, 0) if bits == 1 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        return low if first.name == "arith.maxsi" else high
    return _FLOAT_IDENTITIES.get(first.name, _INTEGER_IDENTITIES.get(first.name))


@materialiser("tt.reduce")
def reduce(lowering: Lowering, op: Op) -> None:
    """Combine all elements along an axis."""
    e, axis, operands = lowering.e, op.attrs["axis"], op.operands
    shape = operands[0].shape
    fused = lowering.prepare(*operands, fuse=shape)
    lane = _lane(lowering, op)
    for value in fused:
        lowering.saving[value] = lowering.new_buffer(shape, value.element, lowering.plan.layout.lane(value))
    outer = [d for d in range(len(shape)) if d != axis]
    rest = tuple(shape[d] for d in outer)
    widths = lowering.chunk_widths(shape, lane)
    outputs = [lowering.new_buffer(rest, r.element, _result_lane(outer, lane)) if rest else None for r in op.results]
    groups, group_dim = 1, lane
    stacked = _stacks_rows(lowering, op, outer, widths)
    if stacked:
        groups, group_dim = STACKED_ROWS, outer[-1]
    elif widths[axis] == 1 and lane != axis:
        groups = min(PARALLEL_CHAINS, shape[lane] // widths[lane])

    def finish(at: list[Coord], results: list[Val]) -> None:
        chunk = tuple(at[d] for d in outer)
        for output, result, value in zip(outputs, results, op.results, strict=True):
            if output is None:
                lowering.environment[value] = result
            else:
                lowering.store_chunk(output, chunk, result)

    def descend(dims: list[int], at: list[Coord]) -> None:
        if not dims:
            chunks = [list(at) for _ in range(groups)]
            for g, chunk in enumerate(chunks):
                if g:
                    base = e.combine((1, at[group_dim].base), (1, g * widths[group_dim]))
                    chunk[group_dim] = Coord(base, widths[group_dim], widths[group_dim])
            sums = _accumulate(lowering, op, chunks, widths)
            if stacked:
                at[group_dim] = Coord(at[group_dim].base, groups, groups)
                finish(at, [_across_rows(lowering, op, [values[0] for values in sums], widths[axis])])
                return
            for chunk, values in zip(chunks, sums, strict=True):
                finish(chunk, _across_lanes(lowering, op, values, chunk, widths[axis]))
            return
        d, *others = dims
        step = widths[d] * (groups if d == group_dim else 1)
        if step == shape[d]:
            at[d] = Coord(0, widths[d])
            descend(others, at)
            return
        with e.loop(0, shape[d], step) as loop:
            at[d] = Coord(loop.index, widths[d], step)
            descend(others, at)

    def nest() -> None:
        with e.scope():
            descend(outer, [Coord(0)] * len(shape))

    masks.versioned(lowering, operands, nest, [] if rest else op.results)
    for value in fused:
        lowering.buffers[value] = lowering.saving.pop(value)
    for output, value in zip(outputs, op.results, strict=True):
        if output is not None:
            lowering.buffers[value] = output


def _stacks_rows(lowering: Lowering, op: Op, outer: list[int], widths: list[int]) -> bool:
    """Whether the lanes of several short rows are combined together, which saves half of the shuffles."""
    axis, shape = op.attrs["axis"], op.operands[0].shape
    if identity(op) is None or not outer or any(widths[d] > 1 for d in outer) or shape[outer[-1]] < STACKED_ROWS:
        return False
    chunks = shape[axis] // widths[axis]
    return widths[axis] >= STACKED_ROWS and chunks <= SHORT_ROW_CHUNKS and lowering.plan.cost(op.operands[0]) <= CHEAP_TREE_OPS


def _across_rows(lowering: Lowering, op: Op, rows: list[Val], width: int) -> Val:
    """Combine the lanes of each row; the results of the rows side by side."""
    element, e = op.operands[0].element, lowering.e
    kind, count = LLVM_TYPES[element], len(rows)
    texts = [s.vector_text(e, as_number(x), width) for x in rows]
    each = width

    def combined(sides: list[Text], lanes: int) -> Text:
        (result,) = apply_region(lowering, op.body, [Vector(t, element, (lanes,)) for t in sides])
        return s.vector_text(e, as_number(result), lanes)

    while len(texts) > 1:
        half, folded = each // 2, []
        for x, y in zip(texts[::2], texts[1::2], strict=True):
            starts = range(0, 2 * width, each)
            sides = [e.shuffle(x, kind, width, [at + side + i for at in starts for i in range(half)], y) for side in (0, half)]
            folded.append(combined(sides, width))
        texts, each = folded, half
    while each > 1:
        half, starts = each // 2, range(0, count * each, each)
        sides = [
            e.shuffle(texts[0], kind, count * each, [at + side + i for at in starts for i in range(half)]) for side in (0, half)
        ]
        texts, each = [combined(sides, count * half)], half
    return Vector(texts[0], element, (count,))


def _lane(lowering: Lowering, op: Op) -> int:
    return max((lowering.natural_lane(v) for v in op.operands[:1]), default=0)


def _result_lane(outer: list[int], lane: int) -> int:
    return outer.index(lane) if lane in outer else len(outer) - 1


def _accumulate(lowering: Lowering, op: Op, chunks: list[list[Coord]], widths: list[int]) -> list[list[Val]]:
    """Combine along the axis at the given places; return per place what is left in the lanes of one chunk."""
    axis, width = op.attrs["axis"], widths[op.attrs["axis"]]
    count = op.operands[0].shape[axis] // width
    neutral = identity(op)

    def at(chunk: list[Coord], base: int | Text) -> Coords:
        return (*chunk[:axis], Coord(base, width, width), *chunk[axis + 1 :])

    def read(chunk: list[Coord], base: int | Text) -> list[Val]:
        return [lowering.eval(v, at(chunk, base)) for v in op.operands]

    chains = min(PARALLEL_CHAINS if width > 1 and len(chunks) == 1 else max(1, VERTICAL_CHAINS // len(chunks)), count)
    if count * len(chunks) <= UNROLLED_CHUNKS:
        chains = count
    if count <= chains:
        partial = [[read(chunk, c * width) for c in range(count)] for chunk in chunks]
    else:
        first = 0
        if neutral is None:
            partial = [[read(chunk, c * width) for c in range(chains)] for chunk in chunks]
            first = chains
        else:
            partial = [[[Uniform(neutral, op.operands[0].element)] for _ in range(chains)] for _ in chunks]
        if first < count:
            partial = _loop(lowering, op, chunks, partial, range(first, count, chains), width, read)
    results = []
    for chain in partial:
        while len(chain) > 1:
            half = len(chain) // 2
            pairs = zip(chain[:half], chain[half : 2 * half], strict=True)
            chain = [apply_region(lowering, op.body, [*x, *y]) for x, y in pairs] + chain[2 * half :]
        results.append(chain[0])
    return results


def _loop(
    lowering: Lowering,
    op: Op,
    chunks: list[list[Coord]],
    partial: list[list[list[Val]]],
    counts: range,
    width: int,
    read: Callable[[list[Coord], int | Text], list[Val]],
) -> list[list[list[Val]]]:
    """Emit the loop along the axis; return the partial results after it."""
    e, commutes = lowering.e, identity(op) is not None
    lanes = math.prod(c.width for c in chunks[0]) * width
    kinds = [vector_type(LLVM_TYPES[v.element], lanes) for v in op.operands]
    carried = [
        (kind, lowering.lanes_text(x, lanes))
        for chain in partial for values in chain for kind, x in zip(kinds, values, strict=True)
    ]  # fmt: skip
    widths = tuple(w for w in _axis_widths(chunks[0], op.attrs["axis"], width) if w > 1)

    def wrapped(texts: list[Text]) -> list[list[list[Val]]]:
        remaining = iter(texts)
        return [
            [
                [
                    Vector(next(remaining), v.element, widths) if widths else Uniform(next(remaining), v.element)
                    for v in op.operands
                ]
                for _ in chain
            ]
            for chain in partial
        ]

    with e.loop(counts.start * width, counts.stop * width, counts.step * width, carried=carried) as loop:
        following: list[Text] = []
        for chunk, chain in zip(chunks, wrapped(loop.phis), strict=True):
            for c, values in enumerate(chain):
                base = loop.index if c == 0 else e.op(f"add i64 {loop.index}, {c * width}")
                fresh = read(chunk, base)
                # A function with a neutral element commutes. With the new element first, what maxnum does about a NaN
                # does not lengthen the chain from one partial result to the next.
                order = [*fresh, *values] if commutes else [*values, *fresh]
                new = apply_region(lowering, op.body, order)
                following.extend(lowering.lanes_text(x, lanes) for x in new)
        loop.next = following
    return wrapped(loop.results)


def _axis_widths(chunk: list[Coord], axis: int, width: int) -> list[int]:
    return [width if d == axis else c.width for d, c in enumerate(chunk)]


def _across_lanes(lowering: Lowering, op: Op, values: list[Val], chunk: list[Coord], width: int) -> list[Val]:
    """Combine the lanes that lie along the axis, half with half."""
    if width == 1:
        return values
    axis = op.attrs["axis"]
    sizes = _axis_widths(chunk, axis, width)
    before, after = math.prod(sizes[:axis]), math.prod(sizes[axis + 1 :])
    outer_widths = tuple(w for d, w in enumerate(sizes) if d != axis and w > 1)
    while width > 1:
        half = width // 2
        lanes = before * width * after
        left: list[Val] = []
        right: list[Val] = []
        for x, v in zip(values, op.operands, strict=True):
            text, kind = s.vector_text(lowering.e, as_number(x), lanes), LLVM_TYPES[v.element]
            for side, start in ((left, 0), (right, half)):
                order = [(b * width + start + i) * after + a for b in range(before) for i in range(half) for a in range(after)]
                part = lowering.e.shuffle(text, kind, lanes, order)
                now = tuple(w for w in (*sizes[:axis], half, *sizes[axis + 1 :]) if w > 1)
                side.append(Vector(part, v.element, now) if now else Uniform(part, v.element))
        values = apply_region(lowering, op.body, [*left, *right])
        width = half
    return [
        x
        if isinstance(x, Uniform)
        else Vector(s.vector_text(lowering.e, as_number(x), before * after), v.element, outer_widths)
        for x, v in zip(values, op.operands, strict=True)
    ]
