"""Products of operands in microscaling formats, rewritten to ordinary products of what they stand for.

An operand with scales, or of packed 4-bit floats, becomes a lazy fp32 tensor: its product evaluates it, chunk by chunk, into
the scratch that it reads. Everything else about the product (layout, accumulators, loops) is that of tt.dot.
"""

from __future__ import annotations

from typing import Any

from .errors import UnsupportedError
from .structure import relink
from .ttir import Block, Function, Op, Type, Value

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
    changed = False
    for op in list(function.walk()):
        if op.name == "tt.dot_scaled" and op.block is not None:
            _Expansion(op).replace(op.block)
            changed = True
    if changed:
        relink(function)


class _Expansion:
    """The operations that take the place of one product."""

    def __init__(self, op: Op) -> None:
        self._op = op
        self._ops: list[Op] = []

    def replace(self, block: Block) -> None:
        """Put the expansion where the product stands."""
        op, operands = self._op, iter(self._op.operands)
        a = next(operands)
        a_scale = next(operands) if op.attrs["has_lhs_scale"] else None
        b = next(operands)
        b_scale = next(operands) if op.attrs["has_rhs_scale"] else None
        rank = len(a.shape)
        x = self._operand(a, a_scale, op.attrs["lhs"], rank - 1, bool(op.attrs.get("lhs_k_pack", True)))
        y = self._operand(b, b_scale, op.attrs["rhs"], rank - 2, bool(op.attrs.get("rhs_k_pack", True)))
        attrs = {"precision": "ieee", "max_num_imprecise_acc": 0}
        self._ops.append(Op("tt.dot", [x, y, next(operands)], attrs, op.results, line=op.line))
        at = block.ops.index(op)
        block.ops[at : at + 1] = self._ops

    def _operand(self, x: Value, scale: Value | None, form: str, k_dim: int, packed_along_k: bool) -> Value:
        """The numbers that an operand stands for; one without scales and packing as it is."""
        if form not in _FORMATS:
            raise UnsupportedError(f"tl.dot_scaled of {form}", self._op.line)
        if form == "e2m1":
            other_dim = 2 * len(x.shape) - 3 - k_dim
            x = self._unpacked(x, k_dim if packed_along_k else other_dim)
        if scale is None:
            return x
        factors = self._factors(scale)
        if k_dim != len(x.shape) - 1:
            factors = self._permuted(factors, [*range(k_dim), k_dim + 1, k_dim])
        single = x if x.element == "f32" else self._new("arith.extf", "f32", x)
        return self._new("arith.mulf", "f32", single, self._repeated(factors, k_dim, x.shape))

    def _factors(self, scale: Value) -> Value:
        """The numbers that scales stand for: powers of two for exponents (e8m0), where 0xFF is NaN."""
        if scale.element != "i8":
            return self._new("arith.extf", "f32", scale)
        exponent = self._new("arith.extui", "i32", scale)
        bits = self._new("arith.shli", "i32", exponent, self._constant(scale, "i32", 23))
        is_least = self._compare(exponent, 0)
        # 2^-127 is a denormal of fp32.
        bits = self._new("arith.select", "i32", is_least, self._constant(scale, "i32", 1 << 22), bits)
        bits = self._new("arith.select", "i32", self._compare(exponent, 0xFF), self._constant(scale, "i32", 0x7FC00000), bits)
        return self._new("arith.bitcast", "f32", bits)

    def _repeated(self, factors: Value, k_dim: int, shape: tuple[int, ...]) -> Value:
        """Every factor for its whole group of k."""
        groups = factors.shape
        if not groups[k_dim] or shape[k_dim] % groups[k_dim]:
            raise UnsupportedError(f"tl.dot_scaled with {groups[k_dim]} scales for {shape[k_dim]} elements", self._op.line)
        head, tail = groups[: k_dim + 1], groups[k_dim + 1 :]
        column = self._shaped("tt.expand_dims", (*head, 1, *tail), factors, axis=k_dim + 1)
        spread = self._shaped("tt.broadcast", (*head, shape[k_dim] // groups[k_dim], *tail), column)
        return self._shaped("tt.reshape", shape, spread)

    def _unpacked(self, x: Value, dim: int) -> Value:
        """4-bit floats (sign, two bits of exponent, one of mantissa), the lower half of a byte first."""
        # The bits of a number at their places in an e5m2, whose exponents are lower by 14.
        sign, magnitude = self._constant(x, "i8", -0x80), self._constant(x, "i8", 0xE)
        sides = []
        for shift, magnitude_shift, by in ((4, 1, "arith.shli"), (0, 3, "arith.shrui")):
            moved = self._new("arith.shli", "i8", x, self._constant(x, "i8", shift)) if shift else x
            low = self._new("arith.andi", "i8", self._new(by, "i8", x, self._constant(x, "i8", magnitude_shift)), magnitude)
            sides.append(self._new("arith.ori", "i8", self._new("arith.andi", "i8", moved, sign), low))
        rank = len(x.shape)
        pairs = self._shaped("tt.join", (*x.shape, 2), *sides)
        if dim != rank - 1:
            pairs = self._permuted(pairs, [*range(dim + 1), rank, *range(dim + 1, rank)])
        codes = self._shaped("tt.reshape", tuple(2 * n if d == dim else n for d, n in enumerate(x.shape)), pairs)
        small = self._new("arith.extf", "f32", self._new("tt.bitcast", "f8E5M2", codes))
        return self._new("arith.mulf", "f32", small, self._constant(small, "f32", 2.0**14))

    def _permuted(self, x: Value, order: list[int]) -> Value:
        return self._shaped("tt.trans", tuple(x.shape[d] for d in order), x, order=order)

    def _compare(self, x: Value, value: int) -> Value:
        return self._add("arith.cmpi", Type(x.shape, "i1"), [x, self._constant(x, x.element, value)], predicate="eq")

    def _constant(self, like: Value, element: str, value: int | float) -> Value:
        return self._add("arith.constant", Type(like.shape, element), [], value=value)

    def _new(self, name: str, element: str, *operands: Value) -> Value:
        """An operation whose result has the shape of its operands."""
        return self._add(name, Type(operands[-1].shape, element), list(operands))

    def _shaped(self, name: str, shape: tuple[int, ...], *operands: Value, **attrs: Any) -> Value:
        """An operation that only moves elements."""
        return self._add(name, Type(shape, operands[0].element), list(operands), **attrs)

    def _add(self, name: str, type_: Type, operands: list[Value], **attrs: Any) -> Value:
        result = Value(f"{self._op.result.name}.{len(self._ops)}", type_)
        self._ops.append(Op(name, operands, attrs, [result], line=self._op.line))
        return result
