"""Powers, roots and norms. In f32 they are computed in f64, in f64 by the C library.

Accuracy: f32 within 0.51 ulp.
"""

from __future__ import annotations

from graphwright.runtime.triton_cpu.emit import Text

from .body import Body
from .exponential import E_F64_SHORT, TWO_F64, split
from .logarithm import ATANH_F64, NAN, decompose, log_f64, specials
from .registry import FUNCTIONS, Function, function, function_via_f64, nested

LOG2_E = 1.4426950408889634
LN2 = 0.6931471805599453


def log2_f64(b: Body, x: Text) -> Text:
    """log2(x) in f64, for operands that come from f32."""
    k, f = decompose(b, x, denormals=False)
    return specials(b, x, b.mul(log_f64(b, k, f, ATANH_F64), LOG2_E))


def exp2_f64(b: Body, x: Text) -> Text:
    """2**x in f64 to 2**-34, clamped to what f32 rounds to 0 and inf."""
    bounded = b.at_most(x, 300.0)
    bounded = b.select(b.cmp("olt", bounded, -300.0), -300.0, bounded)
    _, bits, r = split(b, bounded, TWO_F64)
    r = b.mul(r, LN2)
    value = b.add(b.mul_add(b.mul(r, r), b.polynomial(r, E_F64_SHORT), r), 1.0)
    return b.from_bits(b.ints("add", b.to_bits(value), bits))


def pow_f64(b: Body, x: Text, y: Text) -> Text:
    """x**y in f64 to the precision of f32, with the special cases of C."""
    exponent = b.mul(y, log2_f64(b, b.abs(x)))
    one = b.cmp("oeq", b.abs(x), 1.0)
    trivial = b.ints("or", one, b.cmp("oeq", y, 0.0), of="i1")
    value = exp2_f64(b, b.select(trivial, 0.0, exponent))
    half = b.mul(y, 0.5)
    whole = b.cmp("oeq", b.intrinsic("rint", y), y)
    odd = b.ints("and", whole, b.cmp("une", b.intrinsic("rint", half), half), of="i1")
    value = b.select(odd, b.with_sign(value, x), value)
    negative = b.ints("and", b.cmp("olt", x, 0.0), b.cmp("ogt", x, float("-inf")), of="i1")
    undefined = b.ints("and", negative, b.cmp("une", b.intrinsic("rint", y), y), of="i1")
    return b.select(undefined, NAN, value)


@function_via_f64("pow", arity=2)
def pow(b: Body, x: Text, y: Text) -> Text:
    """x**y."""
    return pow_f64(b, x, y)


def _powi_f32(b: Body, x: Text, n: Text) -> Text:
    wide = b.widened()
    y = b.cast("sitofp", n, "i32", "f64")
    return b.cast("fptrunc", pow_f64(wide, b.cast("fpext", x, "f32", "f64"), y), "f64", "f32")


def _powi_f64(b: Body, x: Text, n: Text) -> Text:
    return nested(b, "pow", x, b.cast("sitofp", n, "i32", "f64"))


FUNCTIONS["powi", "f32"] = Function(_powi_f32, ("f32", "i32"), "f32")
FUNCTIONS["powi", "f64"] = Function(_powi_f64, ("f64", "i32"), "f64")


@function_via_f64("cbrt")
def cbrt(b: Body, x: Text) -> Text:
    """Cube root."""
    return b.with_sign(exp2_f64(b, b.mul(log2_f64(b, b.abs(x)), 1 / 3)), x)


@function_via_f64("rcbrt")
def rcbrt(b: Body, x: Text) -> Text:
    """Reciprocal of the cube root."""
    return b.with_sign(exp2_f64(b, b.mul(log2_f64(b, b.abs(x)), -1 / 3)), x)


@function("rcbrt", "f64")
def rcbrt_f64(b: Body, x: Text) -> Text:
    """Reciprocal of the cube root."""
    return b.div(1.0, nested(b, "cbrt", x))


def _norm(b: Body, args: tuple[Text, ...]) -> Text:
    """Square root of the sum of squares; inf if any operand is infinite, even beside a NaN."""
    total = b.mul(args[0], args[0])
    infinite = b.cmp("oeq", b.abs(args[0]), float("inf"))
    for a in args[1:]:
        total = b.mul_add(a, a, total)
        infinite = b.ints("or", infinite, b.cmp("oeq", b.abs(a), float("inf")), of="i1")
    return b.select(infinite, float("inf"), b.intrinsic("sqrt", total))


def _register_norms() -> None:
    def norm(b: Body, *args: Text) -> Text:
        return _norm(b, args)

    def reciprocal(b: Body, *args: Text) -> Text:
        return b.div(1.0, _norm(b, args))

    def double(b: Body, *args: Text) -> Text:
        # The C library's hypot keeps the squares from overflowing.
        total = nested(b, "hypot", args[0], args[1])
        for a in args[2:]:
            total = nested(b, "hypot", total, a)
        return total

    def double_reciprocal(b: Body, *args: Text) -> Text:
        return b.div(1.0, double(b, *args))

    for arity, suffix in ((2, "hypot"), (3, "norm3d"), (4, "norm4d")):
        function_via_f64(suffix, arity=arity)(norm)
        function_via_f64("r" + suffix, arity=arity)(reciprocal)
        if arity > 2:
            function(suffix, "f64", arity=arity)(double)
        function("r" + suffix, "f64", arity=arity)(double_reciprocal)


_register_norms()
