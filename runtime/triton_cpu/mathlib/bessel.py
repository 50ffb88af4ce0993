"""The modified Bessel functions I0 and I1 of f64, and of f32, computed in f64.

Up to 8 a polynomial in x**2, whose coefficients are all positive; beyond, exp(x) / sqrt(x) times a polynomial in
16 / x - 1. Both are evaluated and one is selected.

Accuracy: f32 within 0.51 ulp, f64 within 5 ulp.

Coefficients: Chebyshev fits of this project (60-digit arithmetic, then rounded).
"""

from __future__ import annotations

from collections.abc import Sequence

from graphwright.runtime.triton_cpu.emit import Text

from .body import Body
from .normal import exp_f64
from .registry import function, function_via_f64, nested

EDGE = 8.0

I0_NEAR = (
    1.0, 0.25, 0.015625000000000007, 0.00043402777777777445, 6.781684027778812e-06, 6.781684027758202e-08,
    4.709502797312111e-10, 2.4028075474081917e-12, 9.385967122158306e-15, 2.896902788810415e-17,
    7.242279005317181e-20, 1.4962822964042478e-22, 2.5987841051325663e-25, 3.829411247002327e-28,
    5.0327117729737235e-31, 4.601357767863732e-34, 8.487698345602824e-37,
)  # fmt: skip
"""I0(x) as a polynomial in x**2, for |x| <= 8."""
I1_NEAR = (
    0.5, 0.06250000000000001, 0.0026041666666666574, 5.42534722222271e-05, 6.781684027764357e-07,
    5.651403356704746e-09, 3.3639305668982475e-11, 1.5017547367976848e-13, 5.214425120919993e-16,
    1.448455537254395e-18, 3.2918259018287706e-21, 6.2370206832638684e-24, 9.956969230500738e-27,
    1.408926251589232e-29, 1.3808181584914298e-32, 2.716505589516919e-35,
)  # fmt: skip
"""I1(x) / x, likewise."""
I0_FAR = (
    0.4021765094450081, 0.0033605519836678913, 0.00013621607438951463, 1.114303378845176e-05,
    1.4838476780922646e-06, 2.9735992084667734e-07, 8.872014585661555e-08, 3.932512321137824e-08,
    2.156780676115673e-08, 7.559364098665437e-09, -6.856484545962442e-09, -1.3427511481900905e-08,
    -5.0175940345046716e-09, 7.600254486433509e-09, 6.522264862032271e-09, -3.5862834111582305e-09,
    -4.5305710768621196e-09, 1.6084886155781772e-09, 2.163681278413876e-09, -6.327909921997027e-10,
    -6.494591114401118e-10, 1.7698085539456536e-10, 9.114760157514253e-11, -2.4421972688131832e-11,
)  # fmt: skip
"""exp(-x) * sqrt(x) * I0(x) as a polynomial in 16 / x - 1, for x >= 8."""
I1_FAR = (
    0.38939845902587233, -0.009749577193235765, -0.00021923576383137776, -1.5038547198221758e-05,
    -1.8349102493990178e-06, -3.4838563464253135e-07, -1.0001075046243961e-07, -4.3128498031006734e-08,
    -2.3394122958362557e-08, -8.432168972932417e-09, 6.84757829926934e-09, 1.4051746928735543e-08,
    5.5720183980930355e-09, -7.687251308765992e-09, -6.9444186339873875e-09, 3.501765193290176e-09,
    4.763780078020254e-09, -1.5218214060680734e-09, -2.2624401109204446e-09, 5.870664618471487e-10,
    6.7727478454462e-10, -1.6283264322621244e-10, -9.491890392992048e-11, 2.2421768596847442e-11,
)  # fmt: skip
"""The same of I1."""
I0_NEAR_SHORT = (
    1.000000000005861, 0.24999999996905267, 0.015625000027048107, 0.00043402776849957883, 6.7816856792870155e-06,
    6.78166656004351e-08, 4.709621152758906e-10, 2.4022716027732928e-12, 9.402516061059225e-15, 2.8620200600088e-17,
    7.73396022541711e-20, 1.0574942023526907e-22, 4.773217165893802e-25,
)  # fmt: skip
"""I0(x), and the others below, to 2**-33: enough for results rounded to f32."""
I1_NEAR_SHORT = (
    0.4999999999905008, 0.06250000004273418, 0.0026041666348843476, 5.425348146727897e-05, 6.781670155494767e-07,
    5.651525939110622e-09, 3.3632455960175416e-11, 1.504265455397372e-13, 5.153365891203708e-16,
    1.5456262162831017e-18, 2.3291947609270933e-21, 1.1460832451640963e-23,
)  # fmt: skip
I0_FAR_SHORT = (
    0.4021765094304104, 0.0033605519772923567, 0.0001362168064095406, 1.114335783616667e-05, 1.4779039317130925e-06,
    2.9454355258644655e-07, 1.0581912143444269e-07, 4.87052699324228e-08, 1.4299052612198226e-09,
    -7.604476628119482e-09,
)  # fmt: skip
I1_FAR_SHORT = (
    0.3893984590413705, -0.00974957718622692, -0.00021923654075302202, -1.5038903140823282e-05,
    -1.8286126404951484e-06, -3.4530445206404697e-07, -1.180581934125939e-07, -5.331069808950009e-08,
    -2.3366532025618313e-09, 7.805544285716195e-09,
)  # fmt: skip


def near(b: Body, x: Text, coefficients: Sequence[float]) -> Text:
    """A polynomial in x**2; what lies beyond the edge gives the value at it."""
    t = b.at_most(b.abs(x), EDGE)
    return b.polynomial(b.mul(t, t), coefficients)


def far(b: Body, t: Text, coefficients: Sequence[float]) -> Text:
    """A polynomial in 16 / t - 1, over sqrt(t)."""
    q = b.sub(b.div(2 * EDGE, t), 1.0)
    return b.div(b.polynomial(q, coefficients), b.intrinsic("sqrt", t))


def far_f64(b: Body, x: Text, coefficients: Sequence[float]) -> Text:
    """The function beyond the edge, of |x|."""
    # The results are infinite from 714 on, where exp still is finite if taken of half the argument.
    t = b.at_most(b.abs(x), 720.0)
    root = nested(b, "exp", b.mul(t, 0.5))
    return b.mul(b.mul(far(b, t, coefficients), root), root)


def far_short(b: Body, x: Text, coefficients: Sequence[float]) -> Text:
    """The same to the precision of f32."""
    # The results are infinite in f32 from 92 on.
    t = b.at_most(b.abs(x), 100.0)
    return b.mul(far(b, t, coefficients), exp_f64(b, t))


def either(b: Body, x: Text, small: Text, large: Text) -> Text:
    """Select by the edge; a NaN takes the second way."""
    return b.select(b.cmp("ole", b.abs(x), EDGE), small, large)


@function("i0", "f64")
def i0(b: Body, x: Text) -> Text:
    """Modified Bessel function of the first kind, order 0."""
    return either(b, x, near(b, x, I0_NEAR), far_f64(b, x, I0_FAR))


@function("i1", "f64")
def i1(b: Body, x: Text) -> Text:
    """Modified Bessel function of the first kind, order 1."""
    return either(b, x, b.mul(x, near(b, x, I1_NEAR)), b.with_sign(far_f64(b, x, I1_FAR), x))


@function_via_f64("i0")
def i0_f32(b: Body, x: Text) -> Text:
    """Modified Bessel function of the first kind, order 0."""
    return either(b, x, near(b, x, I0_NEAR_SHORT), far_short(b, x, I0_FAR_SHORT))


@function_via_f64("i1")
def i1_f32(b: Body, x: Text) -> Text:
    """Modified Bessel function of the first kind, order 1."""
    return either(b, x, b.mul(x, near(b, x, I1_NEAR_SHORT)), b.with_sign(far_short(b, x, I1_FAR_SHORT), x))
