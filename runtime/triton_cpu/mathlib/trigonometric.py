"""Trigonometric functions of f32, computed in f64.

The argument is reduced by pi/2 in two steps that are exact to 2**-50 up to `REDUCIBLE`; beyond it the C library is
called.

Accuracy: within 0.57 ulp; tan of large arguments 1.4, the C library's. In f64 sinpi and cospi call the C library.

Coefficients: minimax fits of this project (Remez exchange in 200-bit arithmetic, then rounded).
"""

from __future__ import annotations

import math

from graphwright.runtime.triton_cpu.emit import Text, mangle

from .body import Body
from .registry import Writer, call, function, function_via_f64, nested

REDUCIBLE = 2.0**20
TWO_OVER_PI = 0.6366197723675814
HALF_PI_HIGH, HALF_PI_LOW = 1.5707963109016418, 1.5893254773528196e-08
"""pi/2 in two parts; the first has 25 bits, so that its product with a reduced quotient is exact."""
SHIFTER = 6755399441055744.0
"""1.5 * 2**52: adding it leaves the rounded value in the low bits."""

SIN = (-0.16666666641527067, 0.008333329374142379, -0.00019839331002640342, 2.71827452015221e-06)
COS = (-0.4999999972401173, 0.041666623194828493, -0.0013886759567758315, 2.4390043037966523e-05)
ATAN = (
    -0.33333332235289653, 0.1999993219645306, -0.14284250852268793, 0.11095202355336799, -0.08988791666437053,
    0.07269383213331178, -0.0547044704044148, 0.03470464193704767, -0.016471448112423816, 0.004999314390306188,
    -0.0007113045806844997,
)  # fmt: skip
ASIN = (
    0.16666667191556497, 0.07499948008037317, 0.044660205610431734, 0.030109707370502514, 0.024621914471092327,
    0.007457810834422673, 0.034706995362598234,
)  # fmt: skip


def sine_and_cosine(b: Body, r: Text) -> tuple[Text, Text]:
    """sin(r) and cos(r) in f64 to 2**-34, for |r| <= pi/4."""
    z = b.mul(r, r)
    return b.mul(r, b.polynomial(z, (1.0, *SIN))), b.polynomial(z, (1.0, *COS))


def quarter(b: Body, sine: Text, cosine: Text, quadrant: Text) -> Text:
    """sin(r + quadrant * pi/2) from sin(r) and cos(r)."""
    odd = b.icmp("ne", b.ints("and", quadrant, 1), 0)
    value = b.select(odd, cosine, sine)
    sign = b.ints("shl", b.ints("and", quadrant, 2), 62)
    return b.from_bits(b.ints("xor", b.to_bits(value), sign))


def reduce(b: Body, x: Text) -> tuple[Text, Text]:
    """Return (quadrant as an integer, remainder) of x by pi/2."""
    shifted = b.mul_add(x, TWO_OVER_PI, SHIFTER)
    n = b.sub(shifted, SHIFTER)
    return b.to_bits(shifted), b.mul_add(n, -HALF_PI_LOW, b.mul_add(n, -HALF_PI_HIGH, x))


def with_large(name: str, write: Writer) -> None:
    """Register `write` (in f64) as the f32 function `name`, with the C library for large arguments."""

    def guarded(b: Body, x: Text) -> Text:
        e = b.emitter
        wide = write(b.widened(), b.cast("fpext", x, "f32", "f64"))
        value = b.cast("fptrunc", wide, "f64", "f32")
        large = b.cmp("oge", b.abs(x), REDUCIBLE)
        some = large
        if b.lanes > 1:
            some = e.call("i1", f"llvm.vector.reduce.or.{mangle('i1', b.lanes)}", [(b.of("i1"), large)])
        slow, done, before = "slow", "done", e.current
        e.branch(some, slow, done)
        e.label(slow)
        corrected = b.select(large, call(e, b.isa, f"libm.{name}", "f32", b.lanes, [x]), value)
        e.jump(done)
        e.label(done)
        return e.op(f"phi {b.type} [{value}, %{before}], [{corrected}, %{slow}]")

    function(name, "f32")(guarded)


def _sin(b: Body, x: Text) -> Text:
    quadrant, r = reduce(b, x)
    return quarter(b, *sine_and_cosine(b, r), quadrant)


def _cos(b: Body, x: Text) -> Text:
    quadrant, r = reduce(b, x)
    return quarter(b, *sine_and_cosine(b, r), b.ints("add", quadrant, 1))


def _tan(b: Body, x: Text) -> Text:
    quadrant, r = reduce(b, x)
    sine, cosine = sine_and_cosine(b, r)
    odd = b.icmp("ne", b.ints("and", quadrant, 1), 0)
    return b.div(b.select(odd, cosine, sine), b.select(odd, b.neg(sine), cosine))


with_large("sin", _sin)
with_large("cos", _cos)
with_large("tan", _tan)


def _half_turns(b: Body, x: Text, offset: int) -> tuple[Text, Text]:
    """Return (quadrant as an integer, remainder) of pi * x + offset * pi/2 by pi/2; exact but for the product by pi."""
    turns = b.mul_add(b.intrinsic("rint", b.mul(x, 0.5)), -2.0, x)
    # The reduction would turn -0 into +0.
    x = b.select(b.cmp("oeq", x, 0.0), x, turns)
    shifted = b.add(b.add(x, x), SHIFTER)
    r = b.mul_add(b.sub(shifted, SHIFTER), -0.5, x)
    return b.ints("add", b.to_bits(shifted), offset), b.mul(r, math.pi)


def _register_half_turns(name: str, offset: int) -> None:
    def single(b: Body, x: Text) -> Text:
        quadrant, r = _half_turns(b, x, offset)
        return quarter(b, *sine_and_cosine(b, r), quadrant)

    def double(b: Body, x: Text) -> Text:
        quadrant, r = _half_turns(b, x, offset)
        return quarter(b, nested(b, "sin", r), nested(b, "cos", r), quadrant)

    function_via_f64(name)(single)
    function(name, "f64")(double)


_register_half_turns("sinpi", 0)
_register_half_turns("cospi", 1)


def _atan_unit(b: Body, q: Text) -> Text:
    """atan(q) in f64 to 2**-34, for 0 <= q <= 1."""
    z = b.mul(q, q)
    return b.mul_add(b.mul(q, z), b.polynomial(z, ATAN), q)


@function_via_f64("atan")
def atan(b: Body, x: Text) -> Text:
    """Inverse tangent."""
    t = b.abs(x)
    big = b.cmp("ogt", t, 1.0)
    p = _atan_unit(b, b.select(big, b.div(1.0, t), t))
    return b.with_sign(b.select(big, b.sub(b.const(math.pi / 2), p), p), x)


@function_via_f64("atan2", arity=2)
def atan2(b: Body, y: Text, x: Text) -> Text:
    """Angle of the point (x, y)."""
    a, c = b.abs(y), b.abs(x)
    steep = b.cmp("ogt", a, c)
    large, small = b.select(steep, a, c), b.select(steep, c, a)
    # 0/0 and inf/inf stand for the angles that C defines: 0 and pi/4.
    diagonal = b.select(b.cmp("oeq", large, 0.0), 0.0, 1.0)
    q = b.select(b.cmp("oeq", large, small), diagonal, b.div(small, large))
    p = _atan_unit(b, q)
    p = b.select(steep, b.sub(b.const(math.pi / 2), p), p)
    p = b.select(b.icmp("slt", b.to_bits(x), 0), b.sub(b.const(math.pi), p), p)
    return b.with_sign(p, y)


def _asin_parts(b: Body, x: Text) -> tuple[Text, Text]:
    """Return (whether |x| > 1/2, p) where asin(|x|) is p, or pi/2 - 2 p when |x| > 1/2."""
    t = b.abs(x)
    big = b.cmp("ogt", t, 0.5)
    z = b.select(big, b.mul_add(t, -0.5, 0.5), b.mul(t, t))
    s = b.select(big, b.intrinsic("sqrt", z), t)
    return big, b.mul_add(b.mul(s, z), b.polynomial(z, ASIN), s)


@function_via_f64("asin")
def asin(b: Body, x: Text) -> Text:
    """Inverse sine; NaN beyond 1."""
    big, p = _asin_parts(b, x)
    return b.with_sign(b.select(big, b.mul_add(p, -2.0, math.pi / 2), p), x)


@function_via_f64("acos")
def acos(b: Body, x: Text) -> Text:
    """Inverse cosine; NaN beyond 1."""
    big, p = _asin_parts(b, x)
    negative = b.cmp("olt", x, 0.0)
    twice = b.add(p, p)
    far = b.select(negative, b.sub(b.const(math.pi), twice), twice)
    near = b.sub(b.const(math.pi / 2), b.with_sign(p, x))
    return b.select(big, far, near)
