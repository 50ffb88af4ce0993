"""tanh in f32; expm1, log1p and the other hyperbolic functions of f32, computed in f64.

Accuracy: tanh within 1.1 ulp (1.3 without fused multiply-add), the others within 0.51.

Coefficients: minimax fits of this project (Remez exchange in 200-bit arithmetic, then rounded).
"""

from __future__ import annotations

from graphwright.runtime.triton_cpu.emit import Text

from .body import Body
from .errorfunction import exp_inside
from .exponential import E_F64, E_F64_SHORT, split
from .logarithm import ATANH_F64_SHORT, NAN, decompose, log_f64, specials
from .registry import function, function_via_f64

TANH_NEAR = (
    -4.222513894092117e-09, -0.33333277702331543, 0.1333215981721878, -0.05387091264128685, 0.021464819088578224,
    -0.007917444221675396, 0.002282229484990239, -0.0003533455019351095,
)  # fmt: skip


@function("tanh", "f32")
def tanh(b: Body, x: Text) -> Text:
    """Hyperbolic tangent: x + x * P(x**2) up to 1, then 1 - 2 / (exp(2 |x|) + 1)."""
    t = b.abs(x)
    near = b.mul_add(x, b.polynomial(b.mul(x, x), TANH_NEAR), x)
    # tanh rounds to 1 from 9.011 on.
    bounded = b.at_most(t, 9.5)
    growth = exp_inside(b, b.add(bounded, bounded))
    far = b.sub(b.const(1.0), b.div(2.0, b.add(growth, 1.0)))
    return b.with_sign(b.select(b.cmp("olt", t, 1.0), near, far), x)


def expm1_f64(b: Body, x: Text) -> Text:
    """exp(x) - 1 in f64, to a relative error of about 2**-30, for operands that come from f32."""
    # exp(100) is inf in f32, and exp(-100) is nothing beside 1.
    bounded = b.at_most(x, 100.0)
    bounded = b.select(b.cmp("olt", bounded, -100.0), -100.0, bounded)
    _, bits, r = split(b, bounded, E_F64)
    q = b.mul_add(b.mul(r, r), b.polynomial(r, E_F64_SHORT), r)
    power = b.from_bits(b.ints("add", bits, 0x3FF << 52))
    return b.mul_add(power, q, b.sub(power, 1.0))


def log1p_f64(b: Body, u: Text) -> Text:
    """log(1 + u) in f64 to a relative error of about 2**-34; +0 for both zeros."""
    y = b.add(u, 1.0)
    k, f = decompose(b, y, denormals=False)
    # Where nothing is scaled, u itself has the bits that 1 + u has lost.
    f = b.select(b.cmp("oeq", k, 0.0), u, f)
    return specials(b, y, log_f64(b, k, f, ATANH_F64_SHORT))


@function_via_f64("expm1")
def expm1(b: Body, x: Text) -> Text:
    """exp(x) - 1 without cancellation."""
    return b.with_sign(expm1_f64(b, x), x)


@function_via_f64("log1p")
def log1p(b: Body, x: Text) -> Text:
    """log(1 + x) without cancellation."""
    return b.with_sign(log1p_f64(b, x), x)


@function_via_f64("sinh")
def sinh(b: Body, x: Text) -> Text:
    """Hyperbolic sine."""
    u = expm1_f64(b, b.abs(x))
    return b.with_sign(b.mul(b.add(u, b.div(u, b.add(u, 1.0))), 0.5), x)


@function_via_f64("cosh")
def cosh(b: Body, x: Text) -> Text:
    """Hyperbolic cosine."""
    e = b.add(expm1_f64(b, b.abs(x)), 1.0)
    return b.mul(b.add(e, b.div(1.0, e)), 0.5)


@function_via_f64("asinh")
def asinh(b: Body, x: Text) -> Text:
    """Inverse hyperbolic sine."""
    t = b.abs(x)
    root = b.intrinsic("sqrt", b.mul_add(t, t, 1.0))
    return b.with_sign(log1p_f64(b, b.add(t, b.sub(root, 1.0))), x)


@function_via_f64("acosh")
def acosh(b: Body, x: Text) -> Text:
    """Inverse hyperbolic cosine; NaN below 1."""
    v = b.sub(x, 1.0)
    root = b.intrinsic("sqrt", b.mul(v, b.add(x, 1.0)))
    return b.select(b.cmp("olt", x, 1.0), NAN, log1p_f64(b, b.add(v, root)))


@function_via_f64("atanh")
def atanh(b: Body, x: Text) -> Text:
    """Inverse hyperbolic tangent; NaN beyond 1."""
    t = b.abs(x)
    ratio = b.div(b.add(t, t), b.sub(b.const(1.0), t))
    return b.with_sign(b.mul(log1p_f64(b, ratio), 0.5), x)
