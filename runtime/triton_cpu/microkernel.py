"""The loop nest of one tile product: C[m, n] += sum over k of A[m, k] * B[k, n].

Lanes run along n: rows of B are read as vectors and elements of A are broadcast. A block of `rows` x `vectors`
accumulators stays in registers while k runs. The loops over blocks are run-time loops, so that a product is one block
body, or a few where the extents do not divide.

Small integers and bf16 can be multiplied several k at a time, by instructions that sum the products of neighbours in a
32-bit word. Their operands hold a *group* of consecutive k side by side: see `microkernel_groups`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .emit import LLVM_TYPES, Emitter, Text, vector_type
from .isa import Isa
from .microkernel_elements import ACCUMULATOR_TYPES, ELEMENT_BYTES, Operand, converted
from .microkernel_groups import check_group, grouped_multiply_add, grouped_splat, unsigned_offset

__all__ = ["Blocking", "Operand", "choose_blocking", "emit_product"]

Coordinate = int | Text
"""A row or column: a constant, or an SSA i64."""

Initial = Callable[[Coordinate, Coordinate, int], Text]
"""(row, column, lanes) -> the accumulators of `lanes` columns of a row before the product."""

Store = Callable[[Coordinate, Coordinate, int, Text], None]
"""(row, column, lanes, vector): takes the accumulators of `lanes` columns of a row after the product."""

Piece = tuple[int, int]
"""(offset in the panel, lanes) of one vector of a row."""


CACHED_BYTES = 32768
"""A B of up to this size is read again for every block of rows, so that A is read only once.

Rows of A often lie a multiple of 4 KiB apart, where few of them fit in the cache at a time. A larger B would be read from
the second-level cache; then panels of B are the outer loop. (Product of 128x32 by 32x128 within a matrix product of size
2048: 220 against 101 Gflop/s.)
"""


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


def choose_blocking(isa: Isa, vectors: int) -> Blocking:
    """Return the register block for rows of `vectors` vectors.

    With AVX-512, 16 accumulators keep both FMA units as busy as 24 do (240 to 260 Gflop/s of 262 on Zen 5, within 3 %
    on Cascade Lake), and 4x4 and 8x2 divide powers of two: one body instead of two, which halves the time to compile.
    With 16 registers 6x2 is worth its second body: 4x2 leaves the adders waiting (125 against 108 Gflop/s). Without
    FMA the broadcasts cost a shuffle each, and few rows are best. Unrolling further only lengthens compilation.

    Args:
        isa: the instruction set.
        vectors: vectors that a row of the product fills.
    """
    if isa.name == "avx512":
        return Blocking(4, 4, 4) if vectors > 3 else Blocking(5, 3, 2) if vectors == 3 else Blocking(8, max(vectors, 1), 2)
    if isa.name == "avx2":
        return Blocking(6, 2, 2) if vectors > 1 else Blocking(8, 1, 2)
    if isa.registers >= 32:
        return Blocking(8, 2, 2) if vectors > 1 else Blocking(8, 1, 2)
    return Blocking(2, 4, 2) if vectors > 3 else Blocking(4, 2, 2) if vectors > 1 else Blocking(4, 1, 2)


def block_rows(blocking: Blocking, pieces: list[Piece]) -> int:
    """Rows that fit in the register block when a row is made of these vectors."""
    return max(1, blocking.rows * blocking.vectors // max(len(pieces), blocking.vectors))


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
        ValueError: the operands' groups do not fit each other, k or the instruction set.
    """
    if b.group > 1:
        check_group(isa, k, a, b, accumulator)
    product = _Product(e, isa, k, a, b, accumulator, initial, store)
    lanes = isa.vector_bits // (8 * ELEMENT_BYTES[accumulator])
    chosen = blocking or choose_blocking(isa, n // lanes)
    spans = column_spans(n, lanes, chosen.vectors)
    if len(spans) == 1 and k * n * ELEMENT_BYTES[b.element] <= CACHED_BYTES:
        pieces = vectors_of(spans[0].extent, lanes)
        for blocks in row_spans(m, block_rows(chosen, pieces)):
            with _blocks(e, blocks) as row, _blocks(e, spans[0]) as column:
                product.block(row, blocks.extent, column, pieces, chosen.unroll)
        return
    for panels in spans:
        pieces = vectors_of(panels.extent, lanes)
        with _blocks(e, panels) as column:
            for blocks in row_spans(m, block_rows(chosen, pieces)):
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
    offsets: dict[int, Text] = field(default_factory=dict)
    """Number of lanes -> the vector that makes groups of A unsigned, in the block being emitted."""

    def block(self, row: Coordinate, rows: int, column: Coordinate, pieces: list[Piece], unroll: int) -> None:
        """Emit one block of accumulators: read, sum over k, store."""
        e = self.e
        places = [(self.shift(row, r), self.shift(column, at), lanes) for r in range(rows) for at, lanes in pieces]
        sums = [self.initial(*place) for place in places]
        if self.b.group > 1 and self.b.element == "i8":
            self.offsets = {lanes: unsigned_offset(e, lanes) for lanes in sorted({lanes for _, lanes in pieces})}
        if self.b.correction is not None:
            sums = self.corrected(self.b.correction, sums, column, pieces)
        total = self.k // self.b.group
        step = max(u for u in range(1, unroll + 1) if total % u == 0)
        a_rows = [self.at(self.a, e.combine((row, self.a.strides[0]), (r, self.a.strides[0]))) for r in range(rows)]
        b_first = self.at(self.b, e.combine((column, self.b.group)))
        if step == total:
            sums, _ = self.steps(sums, a_rows, 0, b_first, pieces, step)
        else:
            kinds = [vector_type(ACCUMULATOR_TYPES[self.accumulator], lanes) for _, _, lanes in places]
            carried = [*zip(kinds, sums, strict=True), ("ptr", b_first)]
            with e.loop(0, total, step, carried=carried) as loop:
                following, b_next = self.steps(loop.phis[:-1], a_rows, loop.index, loop.phis[-1], pieces, step)
                loop.next = [*following, b_next]
            sums = loop.results[:-1]
        for place, value in zip(places, sums, strict=True):
            self.store(*place, value)

    def corrected(self, correction: Text, sums: list[Text], column: Coordinate, pieces: list[Piece]) -> list[Text]:
        """Emit the addition of the columns' corrections to the initial accumulators."""
        e = self.e
        kinds = [vector_type("i32", lanes) for _, lanes in pieces]
        vectors = [
            e.op(f"load {kind}, ptr {e.address('i32', correction, self.shift(column, at))}, align 4")
            for kind, (at, _) in zip(kinds, pieces, strict=True)
        ]
        width = len(pieces)
        return [e.op(f"add {kinds[i % width]} {value}, {vectors[i % width]}") for i, value in enumerate(sums)]

    def steps(
        self, sums: list[Text], a_rows: list[Text], k: Coordinate, b_row: Text, pieces: list[Piece], count: int
    ) -> tuple[list[Text], Text]:
        """Emit `count` steps of k; return the sums and the address of the row of B that follows."""
        e = self.e
        sums = list(sums)
        a_step = self.a.strides[1] if self.b.group == 1 else self.b.group
        for u in range(count):
            a_offset = e.combine((k, a_step), (u, a_step))
            vectors = [self.load(self.b, self.at(self.b, at * self.b.group, b_row), lanes) for at, lanes in pieces]
            for r, a_row in enumerate(a_rows):
                scalar = self.load(self.a, self.at(self.a, a_offset, a_row), 1)
                splats: dict[int, Text] = {}
                for v, (_, lanes) in enumerate(pieces):
                    if lanes not in splats:
                        splats[lanes] = self.splat(scalar, lanes)
                    at = r * len(pieces) + v
                    sums[at] = self.multiply_add(splats[lanes], vectors[v], sums[at], lanes)
            b_row = self.at(self.b, self.b.strides[0], b_row)
        return sums, b_row

    def splat(self, scalar: Text, lanes: int) -> Text:
        """Emit the broadcast of an element, or group of elements, of A."""
        if self.b.group == 1:
            return self.e.splat(scalar, ACCUMULATOR_TYPES[self.accumulator], lanes)
        return grouped_splat(self.e, scalar, lanes, self.offsets.get(lanes))

    def multiply_add(self, x: Text, y: Text, total: Text, lanes: int) -> Text:
        """Emit x * y + total."""
        if self.b.group > 1:
            return grouped_multiply_add(self.e, self.isa, self.b.element, x, y, total, lanes)
        kind = vector_type(ACCUMULATOR_TYPES[self.accumulator], lanes)
        if self.accumulator == "i32":
            return self.e.op(f"add {kind} {total}, {self.e.op(f'mul {kind} {x}, {y}')}")
        # fmuladd, not fma: without an FMA instruction, fma is a call of the C library.
        suffix = f"{'' if lanes == 1 else f'v{lanes}'}{self.accumulator}"
        return self.e.call(kind, f"llvm.fmuladd.{suffix}", [(kind, x), (kind, y), (kind, total)])

    def load(self, operand: Operand, address: Text, lanes: int) -> Text:
        """Emit a load of `lanes` neighbouring elements, converted to the accumulator's type, or of groups as i32."""
        e = self.e
        stored = operand.element
        if self.b.group > 1:
            return e.op(f"load {vector_type('i32', lanes)}, ptr {address}, align {ELEMENT_BYTES[stored]}")
        value = e.op(f"load {vector_type(LLVM_TYPES[stored], lanes)}, ptr {address}, align {ELEMENT_BYTES[stored]}")
        return converted(e, self.isa, value, stored, self.accumulator, lanes)

    def at(self, operand: Operand, offset: int | Text, base: Text | None = None) -> Text:
        """Emit the address of an element of an operand."""
        return self.e.address(LLVM_TYPES[operand.element], operand.pointer if base is None else base, offset)

    def shift(self, start: Coordinate, distance: int) -> Coordinate:
        """Emit start + distance."""
        return self.e.combine((start, 1), (distance, 1))
