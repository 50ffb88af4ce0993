"""log, log2 and log10.

x = 2**k * m with m in [sqrt(1/2), sqrt(2)), f = m - 1, and log(m) = f + f**2 * R(f). In f64 the series is that of
2 * atanh(f / (2 + f)) instead. Zero gives -inf, a negative number NaN; denormal arguments are scaled up first.

Accuracy: f32 within 0.9 ulp (log), 1.1 (log2) and 1.6 (log10), 0.2 more without fused multiply-add; f64 within 0.8, 1.1
and 1.6.

Coefficients: minimax fits of this project (Remez exchange in 200-bit arithmetic, then rounded).
"""

from __future__ import annotations

from graphwright.runtime.triton_cpu.emit import Text

from .body import Body
from .registry import function

INF = float("inf")
NAN = float("nan")

LN2_F32 = 0.6931471824645996
LN2_HIGH, LN2_LOW = 0.6931471805592082, 7.371002565167799e-13
LOG_F32 = (
    -0.49999991059303284, 0.3333331048488617, -0.25001341104507446, 0.2000287026166916, -0.16614554822444916,
    0.14167173206806183, -0.13187755644321442, 0.1297839730978012, -0.07840077579021454,
)  # fmt: skip
ATANH_F64 = (
    0.6666666666666735, 0.39999999999411096, 0.2857142874326164, 0.2222219847607759, 0.18183569735716637,
    0.15313903337708681, 0.1479750690821733,
)  # fmt: skip
ATANH_F64_SHORT = (0.6666666564129581, 0.40000336218607, 0.2853723836146044, 0.23583568235813485)
"""The same to 2**-36: enough for results rounded to f32."""


def decompose(b: Body, x: Text, *, denormals: bool = True) -> tuple[Text, Text]:
    """Return (k, f) as floats, with x = 2**k * (1 + f) for positive finite x."""
    single = b.element == "f32"
    fraction, half_root = (23, 0x3F3504F3) if single else (52, 0x3FE6A09E667F3BCD)
    bits = b.to_bits(x)
    if denormals:
        tiny = b.cmp("olt", x, 2.0**-126 if single else 2.0**-1022)
        scaled = b.to_bits(b.mul(x, 2.0 ** (fraction + 1)))
        bits = b.select(tiny, scaled, bits, of=b.integer)
    offset = b.ints("sub", bits, half_root)
    k = b.ints("ashr", offset, fraction)
    mantissa = b.ints("sub", bits, b.ints("and", offset, -1 << fraction))
    f = b.sub(b.from_bits(mantissa), 1.0)
    if denormals:
        k = b.ints("sub", k, b.select(tiny, integer_const(b, fraction + 1), integer_const(b, 0), of=b.integer))
    if not single:
        # 64-bit integers convert to f64 only with AVX-512; the exponent fits in 32 bits.
        k = b.cast("trunc", k, "i64", "i32")
    return b.cast("sitofp", k, "i32", b.element), f


def integer_const(b: Body, value: int) -> Text:
    """An integer constant as wide as the element, in every lane."""
    return b.const(value, b.integer)


def specials(b: Body, x: Text, result: Text) -> Text:
    """Replace the result where x is not positive and finite."""
    other = b.select(b.cmp("olt", x, 0.0), NAN, x)
    other = b.select(b.cmp("oeq", x, 0.0), -INF, other)
    largest = 0x7F7FFFFF if b.element == "f32" else 0x7FEFFFFFFFFFFFFF
    ordinary = b.icmp("ult", b.ints("sub", b.to_bits(x), 1), largest)
    return b.select(ordinary, result, other)


def tail_f32(b: Body, f: Text) -> Text:
    """log(1 + f) - f in f32."""
    return b.mul(b.polynomial(f, LOG_F32), b.mul(f, f))


def tail_f64(b: Body, f: Text, coefficients: tuple[float, ...] = ATANH_F64) -> tuple[Text, Text]:
    """Return (f**2 / 2, t) with log(1 + f) = f - (f**2 / 2 - t) in f64."""
    s = b.div(f, b.add(f, 2.0))
    z = b.mul(s, s)
    series = b.mul(z, b.polynomial(z, coefficients))
    half = b.mul(b.mul(f, f), 0.5)
    return half, b.mul(s, b.add(half, series))


def log_f64(b: Body, k: Text, f: Text, coefficients: tuple[float, ...] = ATANH_F64) -> Text:
    """log(2**k * (1 + f)) in f64."""
    half, t = tail_f64(b, f, coefficients)
    inner = b.sub(half, b.mul_add(k, LN2_LOW, t))
    return b.mul_add(k, LN2_HIGH, b.sub(f, inner))


def scaled_log(b: Body, x: Text, high: float, low: float, k_high: float, k_low: float) -> Text:
    """Logarithm of x to a base c.

    Args:
        b: body to write to.
        x: operand.
        high: leading bits of 1 / ln(c): 12 in f32, 26 in f64.
        low: 1 / ln(c) - high.
        k_high: leading bits of log_c(2), few enough that k * k_high is exact.
        k_low: log_c(2) - k_high.
    """
    k, f = decompose(b, x)
    if b.element == "f32":
        t = tail_f32(b, f)
    else:
        half, u = tail_f64(b, f)
        t = b.sub(u, half)
    # f * high must not lose its low bits where k is 0, whatever the CPU: f is cut into halves that multiply exactly.
    mask = -1 << (12 if b.element == "f32" else 27)
    head = b.from_bits(b.ints("and", b.to_bits(f), mask))
    rest = b.add(b.sub(f, head), t)
    small = b.mul_add(rest, high, b.mul(b.add(head, rest), low))
    if k_low:
        small = b.mul_add(k, k_low, small)
        big = b.mul_add(k, k_high, b.mul(head, high))
    else:
        big = b.add(k, b.mul(head, high))
    return specials(b, x, b.add(big, small))


@function("log", "f32", "f64")
def log(b: Body, x: Text) -> Text:
    """Natural logarithm."""
    k, f = decompose(b, x)
    if b.element == "f64":
        return specials(b, x, log_f64(b, k, f))
    near = b.add(f, tail_f32(b, f))
    return specials(b, x, b.mul_add(k, LN2_F32, near))


@function("log2", "f32", "f64")
def log2(b: Body, x: Text) -> Text:
    """Logarithm to base 2."""
    if b.element == "f32":
        return scaled_log(b, x, 1.4423828125, 0.00031222839606925845, 1.0, 0.0)
    return scaled_log(b, x, 1.4426950216293335, 1.9259629911266175e-08, 1.0, 0.0)


@function("log10", "f32", "f64")
def log10(b: Body, x: Text) -> Text:
    """Logarithm to base 10."""
    if b.element == "f32":
        return scaled_log(b, x, 0.4342041015625, 9.038033749675378e-05, 0.301025390625, 4.605039066518657e-06)
    return scaled_log(b, x, 0.4342944771051407, 4.798111141615973e-09, 0.30102999566361177, 3.694239077158931e-13)
