"""The loop nest of one tile product: C[m, n] += sum over k of A[m, k] * B[k, n].

Lanes run along n: rows of B are read as vectors and elements of A are broadcast. A block of `rows` x `vectors`
accumulators stays in registers while k runs. The loops over blocks are run-time loops, so that a product is one block
body, or a few where the extents do not divide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .emit import LLVM_TYPES, Emitter, Text, vector_type
from .errors import UnsupportedError
from .isa import Isa

Coordinate = int | Text
"""A row or column: a constant, or an SSA i64."""

Initial = Callable[[Coordinate, Coordinate, int], Text]
"""(row, column, lanes) -> the accumulators of `lanes` columns of a row before the product."""

Store = Callable[[Coordinate, Coordinate, int, Text], None]
"""(row, column, lanes, vector): takes the accumulators of `lanes` columns of a row after the product."""

Piece = tuple[int, int]
"""(offset in the panel, lanes) of one vector of a row."""

ELEMENT_BYTES = {"i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "f64": 8}

ACCUMULATOR_TYPES = {"f32": "float", "f64": "double", "i32": "i32"}


@dataclass(frozen=True, slots=True)
class Operand:
    """A matrix in memory: rows and columns of A are m and k, those of B are k and n.

    Args:
        pointer: address of element [0, 0].
        element: element type as stored: "f32", "f64", "f16", "bf16", "i8", "i16" or "i32".
        strides: distance of neighbouring rows and of neighbouring columns, in elements. B's column stride is 1.
    """

    pointer: Text
    element: str
    strides: tuple[int | Text, int | Text]


@dataclass(frozen=True, slots=True)
class Blocking:
    """How many accumulators stay in registers.

    Args:
        rows: rows of a block.
        vectors: vectors of a row of a block.
        unroll: steps of k per iteration of the loop over k.
    """

    rows: int
    vectors: int
    unroll: int


@dataclass(frozen=True, slots=True)
class Span:
    """`count` pieces of `extent` rows or columns each, from `start` on."""

    start: int
    extent: int
    count: int


def choose_blocking(isa: Isa, m: int, vectors: int) -> Blocking:
    """Return the register block for `m` rows of `vectors` vectors.

    Args:
        isa: the instruction set.
        m: rows of the product.
        vectors: vectors that a row of the product fills.
    """
    if isa.name == "avx512":
        widest, limit, unroll = 4, 24, 4
    elif isa.name == "avx2":
        widest, limit, unroll = 2, 12, 4
    else:
        widest, limit, unroll = 2, 8, 4
    vectors = min(vectors, widest)
    return Blocking(min(m, limit // vectors), vectors, unroll)


def row_spans(m: int, rows: int) -> list[Span]:
    """Cut `m` rows into equal blocks of at most `rows`, or into blocks of `rows` and a rest."""
    blocks = -(-m // rows)
    if m % blocks == 0:
        return [Span(0, m // blocks, blocks)]
    full = m // rows
    return [Span(0, rows, full), Span(full * rows, m - full * rows, 1)]


def column_spans(n: int, lanes: int, vectors: int) -> list[Span]:
    """Cut `n` columns into panels of `vectors` full vectors, and a rest."""
    width = vectors * lanes
    full = n // width
    spans = [Span(0, width, full)] if full else []
    if n % width:
        spans.append(Span(full * width, n % width, 1))
    return spans


def vectors_of(width: int, lanes: int) -> list[Piece]:
    """Cut a panel into (offset, lanes) of vectors; a rest becomes vectors of smaller powers of two."""
    pieces = [(at, lanes) for at in range(0, width - lanes + 1, lanes)]
    at = width // lanes * lanes
    while at < width:
        size = 1 << ((width - at).bit_length() - 1)
        pieces.append((at, size))
        at += size
    return pieces


def half_to_float(e: Emitter, value: Text, lanes: int) -> Text:
    """Emit f16 -> f32 by integer arithmetic: without F16C, fpext is a call of a library that need not be there."""
    integer, kind = vector_type("i32", lanes), vector_type("float", lanes)
    short, half = vector_type("i16", lanes), vector_type("half", lanes)

    def bits(constant: int) -> Text:
        return e.splat(str(constant), "i32", lanes)

    wide = e.op(f"zext {short} {e.op(f'bitcast {half} {value} to {short}')} to {integer}")
    magnitude = e.op(f"shl {integer} {e.op(f'and {integer} {wide}, {bits(0x7FFF)}')}, {bits(13)}")
    rebias = e.splat("0x46F0000000000000", "float", lanes)  # 2**112
    scaled = e.op(f"bitcast {integer} {magnitude} to {kind}")
    finite = e.op(f"bitcast {kind} {e.op(f'fmul {kind} {scaled}, {rebias}')} to {integer}")
    special = e.op(f"icmp uge {integer} {magnitude}, {bits(0x7C00 << 13)}")
    condition = vector_type("i1", lanes)
    infinite = e.op(f"or {integer} {magnitude}, {bits(0x7F800000)}")
    chosen = e.op(f"select {condition} {special}, {integer} {infinite}, {integer} {finite}")
    sign = e.op(f"shl {integer} {e.op(f'and {integer} {wide}, {bits(0x8000)}')}, {bits(16)}")
    return e.op(f"bitcast {integer} {e.op(f'or {integer} {chosen}, {sign}')} to {kind}")


def emit_product(
    e: Emitter,
    isa: Isa,
    m: int,
    n: int,
    k: int,
    a: Operand,
    b: Operand,
    accumulator: str,
    initial: Initial,
    store: Store,
    *,
    blocking: Blocking | None = None,
) -> None:
    """Emit C[m, n] += sum over k of A[m, k] * B[k, n].

    Every accumulator is read by `initial` before any step of its sum, and stored once: C may be updated in place.

    Args:
        e: the function being emitted.
        isa: the instruction set.
        m: rows of A and C, at least 1.
        n: columns of B and C, at least 1.
        k: columns of A and rows of B, at least 1.
        a: the operand whose elements are broadcast; any strides.
        b: the operand read as vectors.
        accumulator: "f32", "f64" or "i32". Elements of another type are converted as they are read.
        initial: yields the initial accumulators; `lanes` is a power of two, and one lane is a scalar.
        store: takes the results.
        blocking: replaces the choice made for the instruction set.

    Raises:
        UnsupportedError: the element types cannot be multiplied into the accumulator.
    """
    product = _Product(e, isa, k, a, b, accumulator, initial, store)
    lanes = isa.vector_bits // (8 * ELEMENT_BYTES[accumulator])
    chosen = blocking or choose_blocking(isa, m, max(1, n // lanes))
    for panels in column_spans(n, lanes, chosen.vectors):
        pieces = vectors_of(panels.extent, lanes)
        rows = max(1, chosen.rows * chosen.vectors // max(len(pieces), chosen.vectors))
        with _blocks(e, panels) as column:
            for blocks in row_spans(m, rows):
                with _blocks(e, blocks) as row:
                    product.block(row, blocks.extent, column, pieces, chosen.unroll)


@contextmanager
def _blocks(e: Emitter, span: Span) -> Iterator[Coordinate]:
    """Open a loop over the pieces of a span; yield where a piece starts."""
    if span.count == 1:
        with e.scope():
            yield span.start
    else:
        with e.loop(span.start, span.start + span.count * span.extent, span.extent) as loop:
            yield loop.index


@dataclass(slots=True)
class _Product:
    """What the blocks of a product have in common."""

    e: Emitter
    isa: Isa
    k: int
    a: Operand
    b: Operand
    accumulator: str
    initial: Initial
    store: Store

    def block(self, row: Coordinate, rows: int, column: Coordinate, pieces: list[Piece], unroll: int) -> None:
        """Emit one block of accumulators: read, sum over k, store."""
        e = self.e
        places = [(self.shift(row, r), self.shift(column, at), lanes) for r in range(rows) for at, lanes in pieces]
        sums = [self.initial(*place) for place in places]
        step = max(u for u in range(1, unroll + 1) if self.k % u == 0)
        a_rows = [self.at(self.a, e.combine((row, self.a.strides[0]), (r, self.a.strides[0]))) for r in range(rows)]
        b_first = self.at(self.b, column)
        if step == self.k:
            sums, _ = self.steps(sums, a_rows, 0, b_first, pieces, step)
        else:
            kinds = [vector_type(ACCUMULATOR_TYPES[self.accumulator], lanes) for _, _, lanes in places]
            carried = [*zip(kinds, sums, strict=True), ("ptr", b_first)]
            with e.loop(0, self.k, step, carried=carried) as loop:
                following, b_next = self.steps(loop.phis[:-1], a_rows, loop.index, loop.phis[-1], pieces, step)
                loop.next = [*following, b_next]
            sums = loop.results[:-1]
        for place, value in zip(places, sums, strict=True):
            self.store(*place, value)

    def steps(
        self, sums: list[Text], a_rows: list[Text], k: Coordinate, b_row: Text, pieces: list[Piece], count: int
    ) -> tuple[list[Text], Text]:
        """Emit `count` steps of k; return the sums and the address of the row of B that follows."""
        e = self.e
        sums = list(sums)
        for u in range(count):
            a_offset = e.combine((k, self.a.strides[1]), (u, self.a.strides[1]))
            vectors = [self.load(self.b, self.at(self.b, at, b_row), lanes) for at, lanes in pieces]
            for r, a_row in enumerate(a_rows):
                scalar = self.load(self.a, self.at(self.a, a_offset, a_row), 1)
                splats: dict[int, Text] = {}
                for v, (_, lanes) in enumerate(pieces):
                    if lanes not in splats:
                        splats[lanes] = e.splat(scalar, ACCUMULATOR_TYPES[self.accumulator], lanes)
                    at = r * len(pieces) + v
                    sums[at] = self.multiply_add(splats[lanes], vectors[v], sums[at], lanes)
            b_row = self.at(self.b, self.b.strides[0], b_row)
        return sums, b_row

    def multiply_add(self, x: Text, y: Text, total: Text, lanes: int) -> Text:
        """Emit x * y + total."""
        kind = vector_type(ACCUMULATOR_TYPES[self.accumulator], lanes)
        if self.accumulator == "i32":
            return self.e.op(f"add {kind} {total}, {self.e.op(f'mul {kind} {x}, {y}')}")
        # fmuladd, not fma: without an FMA instruction, fma is a call of the C library.
        suffix = f"{'' if lanes == 1 else f'v{lanes}'}{self.accumulator}"
        return self.e.call(kind, f"llvm.fmuladd.{suffix}", [(kind, x), (kind, y), (kind, total)])

    def load(self, operand: Operand, address: Text, lanes: int) -> Text:
        """Emit a load of `lanes` neighbouring elements, converted to the accumulator's type."""
        e = self.e
        stored, wanted = operand.element, self.accumulator
        scalar = LLVM_TYPES[stored]
        kind, target = vector_type(scalar, lanes), vector_type(ACCUMULATOR_TYPES[wanted], lanes)
        value = e.op(f"load {kind}, ptr {address}, align {ELEMENT_BYTES[stored]}")
        if stored == wanted:
            return value
        if stored == "bf16" and wanted == "f32":
            integer = vector_type("i32", lanes)
            high = e.op(f"shl {integer} {e.op(f'zext {kind} {value} to {integer}')}, {e.splat('16', 'i32', lanes)}")
            return e.op(f"bitcast {integer} {high} to {target}")
        if stored == "f16" and wanted == "f32" and self.isa.name == "portable":
            return half_to_float(e, value, lanes)
        if (stored, wanted) in (("f16", "f32"), ("f32", "f64")):
            return e.op(f"fpext {kind} {value} to {target}")
        if (stored, wanted) in (("i8", "i32"), ("i16", "i32")):
            return e.op(f"sext {kind} {value} to {target}")
        raise UnsupportedError(f"a product of {stored} into {wanted}")

    def at(self, operand: Operand, offset: int | Text, base: Text | None = None) -> Text:
        """Emit the address of an element of an operand."""
        return self.e.address(LLVM_TYPES[operand.element], operand.pointer if base is None else base, offset)

    def shift(self, start: Coordinate, distance: int) -> Coordinate:
        """Emit start + distance."""
        return self.e.combine((start, 1), (distance, 1))
