"""Products of several k at a time, by instructions that sum the products of neighbours in a 32-bit word.

Both operands hold groups: the elements of `group` consecutive k, side by side, fill 32 bits. A is row-major, so its
groups lie in memory as they are; `pack` writes those of B.

* i8 in fours (VNNI): the instruction multiplies unsigned by signed bytes. A is offset by 128 as it is broadcast, and
  what that adds to a column, 128 times the column's sum, is taken back through the operand's correction.
* i16 in twos: 8-bit operands, widened, where there is no VNNI.
* bf16 in twos (AVX512_BF16): denormals count as zero, and the sum is rounded to nearest whatever the rounding mode is.

Integer products are exact. Sums wrap as i32 sums do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .emit import Emitter, Text, vector_type
from .isa import Isa
from .microkernel_elements import ELEMENT_BYTES, Operand

Load = Callable[[int | Text, int | Text, int], Text]
"""(row, column, lanes) -> `lanes` elements of a row of B, from `column` on, as stored."""


@dataclass(frozen=True, slots=True)
class Packing:
    """The form in which a product wants its operands.

    Args:
        element: element type of both operands in memory; those of A lie row by row.
        group: consecutive k that lie side by side in B.
        corrected: whether a correction of each column follows the elements of B.
    """

    element: str
    group: int
    corrected: bool = False

    def bytes(self, k: int, n: int) -> int:
        """Bytes that `pack` writes for a B of k rows and n columns."""
        return k * n * ELEMENT_BYTES[self.element] + (4 * n if self.corrected else 0)


def packing_of(isa: Isa, element: str, k: int) -> Packing | None:
    """Return the grouped form for operands of type `element`, or None where the product takes them as they are."""
    if element == "i8":
        if "vnni" in isa.has and k % 4 == 0:
            return Packing("i8", 4, corrected=True)
        if has_pair_product(isa) and k % 2 == 0:
            return Packing("i16", 2)
    if element == "bf16" and "bf16" in isa.has and k % 2 == 0:
        return Packing("bf16", 2)
    return None


def has_pair_product(isa: Isa) -> bool:
    """Whether the instruction set multiplies pairs of i16: every x86 does."""
    return isa.name != "portable" or isa.cpu.startswith("x86-64")


def check_group(isa: Isa, k: int, a: Operand, b: Operand, accumulator: str) -> None:
    """Verify that operands can be multiplied in groups.

    Raises:
        ValueError: they cannot.
    """
    group, element = b.group, b.element
    known = {("i8", 4): "vnni" in isa.has, ("i16", 2): has_pair_product(isa), ("bf16", 2): "bf16" in isa.has}
    if not known.get((element, group), False):
        raise ValueError(f"{isa.name} has no product of {element} in groups of {group}")
    if a.element != element or a.strides[1] != 1 or k % group:
        raise ValueError(f"groups of {group} {element} need rows of {element} in A and k a multiple of {group}; k is {k}")
    if accumulator != ("f32" if element == "bf16" else "i32"):
        raise ValueError(f"groups of {element} are not summed in {accumulator}")


def pack(e: Emitter, isa: Isa, packing: Packing, k: int, n: int, element: str, load: Load, target: Text) -> Operand:
    """Emit the loops that write B in groups.

    Args:
        e: the function being emitted.
        isa: the instruction set.
        packing: the form, from `packing_of`.
        k: rows of B, a multiple of the group.
        n: columns of B.
        element: element type that `load` yields.
        load: yields elements of B; `lanes` is a power of two, and one lane is a scalar.
        target: address of `packing.bytes(k, n)` bytes, aligned to 4.

    Returns:
        The operand for `emit_product`.
    """
    group = packing.group
    correction = e.address("i8", target, k * n * ELEMENT_BYTES[packing.element]) if packing.corrected else None
    full = n // isa.lanes * isa.lanes

    def columns(column: int | Text, lanes: int) -> None:
        kind = vector_type("i32", lanes)
        zero = "zeroinitializer" if lanes > 1 else "0"
        carried = [(kind, zero)] if packing.corrected else []
        with e.loop(0, k // group, 1, carried=carried) as loop:
            word = ""
            for i in range(group):
                value = load(e.combine((loop.index, group), (i, 1)), column, lanes)
                word = placed(e, word, value, element, packing, i, lanes)
            address = e.address("i32", target, e.combine((loop.index, n), (column, 1)))
            e.raw(f"store {kind} {word}, ptr {address}, align 4")
            if packing.corrected:
                ones = e.splat(str(0x01010101), "i32", lanes)
                loop.next = [grouped_multiply_add(e, isa, "i8", ones, word, loop.phis[0], lanes)]
        if correction is not None:
            scale = e.splat("-128", "i32", lanes)
            value = e.op(f"mul {kind} {loop.results[0]}, {scale}")
            e.raw(f"store {kind} {value}, ptr {e.address('i32', correction, column)}, align 4")

    if full:
        with e.loop(0, full, isa.lanes) as chunks:
            columns(chunks.index, isa.lanes)
    at = full
    while at < n:
        lanes = 1 << ((n - at).bit_length() - 1)
        columns(at, lanes)
        at += lanes
    return Operand(target, packing.element, (n * group, group), group, correction)


def placed(e: Emitter, word: Text, value: Text, element: str, packing: Packing, index: int, lanes: int) -> Text:
    """Emit a word with element `index` of its group put in; the first one makes the word."""
    kind = vector_type("i32", lanes)
    bits = 32 // packing.group
    stored = vector_type("i16" if element == "bf16" else element, lanes)
    narrow = vector_type(f"i{bits}", lanes)
    if stored != narrow:
        value = e.op(f"sext {stored} {value} to {narrow}")
    wide = e.op(f"zext {narrow} {value} to {kind}")
    if index == 0:
        return wide
    shift = e.splat(str(bits * index), "i32", lanes)
    return e.op(f"or {kind} {word}, {e.op(f'shl {kind} {wide}, {shift}')}")


def unsigned_offset(e: Emitter, lanes: int) -> Text:
    """Emit the vector that makes unsigned bytes of signed ones; emit it before the loop over k.

    The empty assembly hides that all lanes are equal. LLVM would otherwise apply the offset before the broadcast, as
    two instructions that compete with the products, instead of one that reads memory (7 % of the whole product).
    """
    splat = e.splat(str(0x80808080 - (1 << 32)), "i32", lanes)
    if lanes < 4:
        return splat
    return e.op(f'call {vector_type("i32", lanes)} asm "", "=v,0"({vector_type("i32", lanes)} {splat})')


def grouped_splat(e: Emitter, word: Text, lanes: int, offset: Text | None) -> Text:
    """Emit the broadcast of a group of A, made unsigned by `offset`."""
    wide = e.splat(word, "i32", lanes)
    return wide if offset is None else e.op(f"xor {vector_type('i32', lanes)} {wide}, {offset}")


def grouped_multiply_add(e: Emitter, isa: Isa, element: str, x: Text, y: Text, total: Text, lanes: int) -> Text:
    """Emit total + the sums of the products of the groups of x (unsigned for i8) and y, both as i32 words."""
    size = max(lanes, 4)
    scalar = "float" if element == "bf16" else "i32"
    if lanes < size:
        order = [i if i < lanes else -1 for i in range(size)]
        x, y = e.shuffle(x, "i32", lanes, order), e.shuffle(y, "i32", lanes, order)
        total = e.shuffle(total, scalar, lanes, order)
    bits = 32 * size
    words, sums = f"<{size} x i32>", f"<{size} x {scalar}>"
    if element == "bf16":
        pairs = f"<{2 * size} x bfloat>"
        left, right = e.op(f"bitcast {words} {x} to {pairs}"), e.op(f"bitcast {words} {y} to {pairs}")
        symbol = f"llvm.x86.avx512bf16.dpbf16ps.{bits}"
        result = e.call(sums, symbol, [(sums, total), (pairs, left), (pairs, right)])
    elif element == "i8" or "vnni" in isa.has:
        symbol = f"llvm.x86.avx512.{'vpdpbusd' if element == 'i8' else 'vpdpwssd'}.{bits}"
        result = e.call(sums, symbol, [(sums, total), (words, x), (words, y)])
    else:
        pairs = f"<{2 * size} x i16>"
        left, right = e.op(f"bitcast {words} {x} to {pairs}"), e.op(f"bitcast {words} {y} to {pairs}")
        symbol = {128: "llvm.x86.sse2.pmadd.wd", 256: "llvm.x86.avx2.pmadd.wd", 512: "llvm.x86.avx512.pmaddw.d.512"}[bits]
        result = e.op(f"add {sums} {total}, {e.call(sums, symbol, [(pairs, left), (pairs, right)])}")
    return result if lanes == size else e.shuffle(result, scalar, size, range(lanes))
