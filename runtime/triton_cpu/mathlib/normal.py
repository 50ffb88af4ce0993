"""erfc, the normal distribution function and their inverses, computed in f64 to the precision of f32.

Accuracy: within 0.51 ulp; the inverses within 0.8.

Coefficients: minimax fits of this project (Remez exchange in 160-bit arithmetic, then rounded).
"""

from __future__ import annotations

from graphwright.runtime.triton_cpu.emit import Text

from .body import Body
from .exponential import E_F64, E_F64_SHORT, split
from .logarithm import decompose, log_f64, specials
from .registry import function, function_via_f64, nested

ERFCX = (
    1.253008058255037, -0.13562110436790914, -0.04756229287406614, 0.12964509288129555, -0.11927368849766407,
    0.06830874343903481, -0.02377034993613703, 0.002525930642853182, 0.0018881485093021303, -0.0007711237839774984,
    -0.00010416788886774859, 0.00011303154221891229, 3.876051882772467e-06, -1.0986828246193185e-05,
)  # fmt: skip
"""(1 + 2 t) * exp(t**2) * erfc(t) as a polynomial in (t - 3) / (t + 3), t >= 0."""


def exp_f64(b: Body, x: Text) -> Text:
    """exp(x) in f64 to 2**-34, for -700 <= x <= 700."""
    _, bits, r = split(b, x, E_F64)
    value = b.add(b.mul_add(b.mul(r, r), b.polynomial(r, E_F64_SHORT), r), 1.0)
    return b.from_bits(b.ints("add", b.to_bits(value), bits))


def erfcx_positive(b: Body, t: Text) -> Text:
    """exp(t**2) * erfc(t) in f64 to 2**-32, for finite t >= 0."""
    q = b.div(b.sub(t, 3.0), b.add(t, 3.0))
    return b.div(b.polynomial(q, ERFCX), b.mul_add(t, 2.0, 1.0))


def erfc_f64(b: Body, x: Text) -> Text:
    """erfc(x) in f64 to the precision of f32."""
    # erfc(11) is below the least denormal of f32.
    t = b.at_most(b.abs(x), 11.0)
    tail = b.mul(exp_f64(b, b.neg(b.mul(t, t))), erfcx_positive(b, t))
    return b.select(b.cmp("olt", x, 0.0), b.sub(b.const(2.0), tail), tail)


@function_via_f64("erfc")
def erfc(b: Body, x: Text) -> Text:
    """Complementary error function."""
    return erfc_f64(b, x)


@function_via_f64("erfcx")
def erfcx(b: Body, x: Text) -> Text:
    """Scaled complementary error function, exp(x**2) * erfc(x)."""
    # The bound keeps inf / inf out; the result is 0 in f32 well before it.
    t = b.at_most(b.abs(x), 1e300)
    positive = erfcx_positive(b, t)
    s = b.at_most(t, 11.0)
    negative = b.sub(b.mul(exp_f64(b, b.mul(s, s)), 2.0), positive)
    return b.select(b.cmp("olt", x, 0.0), negative, positive)


@function_via_f64("normcdf")
def normcdf(b: Body, x: Text) -> Text:
    """Distribution function of the standard normal distribution."""
    return b.mul(erfc_f64(b, b.mul(x, -0.7071067811865476)), 0.5)


@function("normcdf", "f64")
def normcdf_f64(b: Body, x: Text) -> Text:
    """Distribution function of the standard normal distribution."""
    return b.mul(nested(b, "erfc", b.mul(x, -0.7071067811865476)), 0.5)


INVERSE_NEAR = (
    1.5014093516926938, 0.24664027578507794, -0.004177324636596879, -0.0012527048764408796, 0.00021826355740633288,
    -4.998759889618027e-06, -3.4260119873503403e-06, 4.796988779562105e-07, 1.6457179107075467e-08,
    -1.1023219488102656e-08, 4.3703549336788343e-10, 1.3285951021671892e-10,
)  # fmt: skip
"""erfinv(x) / x in w - 2.5, with w = -log(1 - x**2) in [0, 5]."""
INVERSE_FAR = (
    3.0336365197987836, 1.004692484686589, 0.005976106987861587, -0.004294454398385901, 0.0029254669041321444,
    -0.001992848970129283, 0.0011563096845833146, -0.00035829701209054253, -0.00011413253156902942, 9.9287140910152e-05,
)  # fmt: skip
"""The same in sqrt(w) - 3.2, for sqrt(w) in [2.23, 4.2]."""
INVERSE_TAIL = (
    6.869019689307505, 1.0085956058035102, -0.0005128567603665657, 6.302301011571738e-06, 6.227960034649743e-06,
    -1.629934649422133e-06, 2.6280780782394034e-07, -5.0000475732933414e-08, 1.465160725987636e-08,
    -1.9579189088314445e-09,
)  # fmt: skip
"""The same in sqrt(w) - 7, for sqrt(w) in [4.2, 10.25]."""


def erfinv_f64(b: Body, x: Text, product: Text) -> Text:
    """erfinv(x) in f64 to the precision of f32; `product` is 1 - x**2, however it was formed."""
    k, f = decompose(b, product)
    w = b.neg(specials(b, product, log_f64(b, k, f)))
    near = b.polynomial(b.sub(w, 2.5), INVERSE_NEAR)
    s = b.intrinsic("sqrt", w)
    far = b.polynomial(b.sub(s, 3.2), INVERSE_FAR)
    tail = b.polynomial(b.sub(s, 7.0), INVERSE_TAIL)
    ratio = b.select(b.cmp("olt", w, 5.0), near, b.select(b.cmp("olt", s, 4.2), far, tail))
    # The polynomials mean nothing at w = inf.
    return b.mul(x, b.select(b.cmp("oeq", w, float("inf")), float("inf"), ratio))


def erfcinv_f64(b: Body, y: Text) -> Text:
    """Inverse of erfc in f64 to the precision of f32."""
    return erfinv_f64(b, b.sub(b.const(1.0), y), b.mul(y, b.sub(b.const(2.0), y)))


@function_via_f64("erfinv")
def erfinv(b: Body, x: Text) -> Text:
    """Inverse error function; NaN beyond 1."""
    one = b.const(1.0)
    return erfinv_f64(b, x, b.mul(b.sub(one, x), b.add(x, one)))


@function_via_f64("erfcinv")
def erfcinv(b: Body, y: Text) -> Text:
    """Inverse complementary error function; NaN outside [0, 2]."""
    return erfcinv_f64(b, y)


@function_via_f64("normcdfinv")
def normcdfinv(b: Body, p: Text) -> Text:
    """Quantile function of the standard normal distribution."""
    return b.mul(erfcinv_f64(b, b.add(p, p)), -1.4142135623730951)
