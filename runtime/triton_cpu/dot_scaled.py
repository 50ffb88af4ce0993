"""Products of operands in microscaling formats, rewritten to ordinary products of what they stand for.

An operand with scales, or of packed 4-bit floats, becomes a lazy fp32 tensor: its product evaluates it, chunk by chunk, into
the scratch that it reads. Everything else about the product (layout, accumulators, loops) is that of tt.dot.
"""

from __future__ import annotations

from .errors import UnsupportedError
from .rewrite import Replacement, replace_all
from .ttir import Function, Type, Value

_FORMATS = ("e2m1", "e4m3", "e5m2", "bf16", "fp16")


def expand_scaled_dots(function: Function) -> None:
    """Rewrite every tt.dot_scaled to tt.dot.

    Before:
        %d = tt.dot_scaled %a scale %s, %b, %c lhs = e4m3 rhs = bf16 : tensor<MxKxf8E4M3FN>, tensor<MxGxi8> * tensor<KxNxbf16>
    After:
        %f = ... %s ...                                      tensor<MxGxf32>, a power of two for each group of K
        %g = tt.reshape(tt.broadcast(tt.expand_dims %f))     tensor<MxKxf32>
        %e = arith.extf %a
        %x = arith.mulf %e, %g
        %d = tt.dot %x, %b, %c

    Elements and scales are multiplied in fp32, exactly unless the product is beyond its range: nothing is rounded to bf16 or
    fp16 first. fast_math, which allows NaN scales to be ignored, changes nothing.

    Raises:
        UnsupportedError: an operand or scale is of a format that is not known.
    """
    replace_all(function, "tt.dot_scaled", _expand)


def _expand(new: Replacement) -> bool:
    op, operands = new.op, iter(new.op.operands)
    a = next(operands)
    a_scale = next(operands) if op.attrs["has_lhs_scale"] else None
    b = next(operands)
    b_scale = next(operands) if op.attrs["has_rhs_scale"] else None
    rank = len(a.shape)
    x = _operand(new, a, a_scale, op.attrs["lhs"], rank - 1, bool(op.attrs.get("lhs_k_pack", True)))
    y = _operand(new, b, b_scale, op.attrs["rhs"], rank - 2, bool(op.attrs.get("rhs_k_pack", True)))
    new.append("tt.dot", [x, y, next(operands)], op.results, {"precision": "ieee", "max_num_imprecise_acc": 0})
    return True


def _operand(new: Replacement, x: Value, scale: Value | None, form: str, k_dim: int, packed_along_k: bool) -> Value:
    """The numbers that an operand stands for; one without scales and packing as it is."""
    if form not in _FORMATS:
        raise UnsupportedError(f"tl.dot_scaled of {form}", new.op.line)
    if form == "e2m1":
        other_dim = 2 * len(x.shape) - 3 - k_dim
        x = _unpacked(new, x, k_dim if packed_along_k else other_dim)
    if scale is None:
        return x
    factors = _factors(new, scale)
    if k_dim != len(x.shape) - 1:
        factors = _permuted(new, factors, [*range(k_dim), k_dim + 1, k_dim])
    single = x if x.element == "f32" else new.lanewise("arith.extf", "f32", x)
    return new.lanewise("arith.mulf", "f32", single, _repeated(new, factors, k_dim, x.shape))


def _factors(new: Replacement, scale: Value) -> Value:
    """The numbers that scales stand for: powers of two for exponents (e8m0), where 0xFF is NaN."""
    if scale.element != "i8":
        return new.lanewise("arith.extf", "f32", scale)
    exponent = new.lanewise("arith.extui", "i32", scale)
    bits = new.lanewise("arith.shli", "i32", exponent, new.constant(scale, "i32", 23))
    is_least = _equal(new, exponent, 0)
    # 2^-127 is a denormal of fp32.
    bits = new.lanewise("arith.select", "i32", is_least, new.constant(scale, "i32", 1 << 22), bits)
    bits = new.lanewise("arith.select", "i32", _equal(new, exponent, 0xFF), new.constant(scale, "i32", 0x7FC00000), bits)
    return new.lanewise("arith.bitcast", "f32", bits)


def _repeated(new: Replacement, factors: Value, k_dim: int, shape: tuple[int, ...]) -> Value:
    """Every factor for its whole group of k."""
    groups = factors.shape
    if not groups[k_dim] or shape[k_dim] % groups[k_dim]:
        raise UnsupportedError(f"tl.dot_scaled with {groups[k_dim]} scales for {shape[k_dim]} elements", new.op.line)
    head, tail = groups[: k_dim + 1], groups[k_dim + 1 :]
    column = new.moved("tt.expand_dims", (*head, 1, *tail), factors, axis=k_dim + 1)
    spread = new.moved("tt.broadcast", (*head, shape[k_dim] // groups[k_dim], *tail), column)
    return new.moved("tt.reshape", shape, spread)


def _unpacked(new: Replacement, x: Value, dim: int) -> Value:
    """4-bit floats (sign, two bits of exponent, one of mantissa), the lower half of a byte first."""
    # The bits of a number at their places in an e5m2, whose exponents are lower by 14.
    sign, magnitude = new.constant(x, "i8", -0x80), new.constant(x, "i8", 0xE)
    sides = []
    for shift, magnitude_shift, by in ((4, 1, "arith.shli"), (0, 3, "arith.shrui")):
        moved = new.lanewise("arith.shli", "i8", x, new.constant(x, "i8", shift)) if shift else x
        low = new.lanewise("arith.andi", "i8", new.lanewise(by, "i8", x, new.constant(x, "i8", magnitude_shift)), magnitude)
        sides.append(new.lanewise("arith.ori", "i8", new.lanewise("arith.andi", "i8", moved, sign), low))
    rank = len(x.shape)
    pairs = new.moved("tt.join", (*x.shape, 2), *sides)
    if dim != rank - 1:
        pairs = _permuted(new, pairs, [*range(dim + 1), rank, *range(dim + 1, rank)])
    codes = new.moved("tt.reshape", tuple(2 * n if d == dim else n for d, n in enumerate(x.shape)), pairs)
    small = new.lanewise("arith.extf", "f32", new.lanewise("tt.bitcast", "f8E5M2", codes))
    return new.lanewise("arith.mulf", "f32", small, new.constant(small, "f32", 2.0**14))


def _permuted(new: Replacement, x: Value, order: list[int]) -> Value:
    return new.moved("tt.trans", tuple(x.shape[d] for d in order), x, order=order)


def _equal(new: Replacement, x: Value, value: int) -> Value:
    return new.add("arith.cmpi", Type(x.shape, "i1"), [x, new.constant(x, x.element, value)], predicate="eq")
