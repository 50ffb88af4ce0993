"""Functions of `triton.language.extra.libdevice`."""

import numpy as np
import pytest
import scipy.special
from conformance_kernels import run_elementwise
from conformance_numbers import assert_same, assert_ulps, random_values

pytestmark = pytest.mark.compiled


def wide(function):
    """Return a function evaluated in extended precision."""
    return lambda *args: function(*(a.astype(np.longdouble) for a in args))


def double(function):
    """Return a function evaluated in float64."""
    return lambda *args: function(*(a.astype(np.float64) for a in args))


# name: (reference, low, high, limit in ulps for float32, for float64)
UNARY = {
    "abs": (wide(np.abs), -9, 9, 0, 0),
    "floor": (wide(np.floor), -99, 99, 0, 0),
    "ceil": (wide(np.ceil), -99, 99, 0, 0),
    "trunc": (wide(np.trunc), -99, 99, 0, 0),
    "rint": (wide(np.rint), -99, 99, 0, 0),
    "nearbyint": (wide(np.rint), -99, 99, 0, 0),
    "sqrt": (wide(np.sqrt), 0, 99, 1, 1),
    "rsqrt": (lambda x: 1 / np.sqrt(x.astype(np.longdouble)), 0.01, 99, 2, 2),
    "cbrt": (wide(np.cbrt), -99, 99, 2, 4),
    "exp": (wide(np.exp), -80, 80, 2, 2),
    "exp2": (wide(np.exp2), -80, 80, 2, 2),
    "exp10": (lambda x: np.longdouble(10) ** x.astype(np.longdouble), -30, 30, 4, 4),
    "expm1": (wide(np.expm1), -5, 5, 4, 4),
    "log": (wide(np.log), 0.001, 1e4, 2, 2),
    "log2": (wide(np.log2), 0.001, 1e4, 2, 2),
    "log10": (wide(np.log10), 0.001, 1e4, 3, 3),
    "log1p": (wide(np.log1p), -0.9, 9, 4, 4),
    "sin": (wide(np.sin), -100, 100, 2, 2),
    "cos": (wide(np.cos), -100, 100, 2, 2),
    "tan": (wide(np.tan), -100, 100, 4, 4),
    "asin": (wide(np.arcsin), -1, 1, 4, 4),
    "acos": (wide(np.arccos), -1, 1, 4, 4),
    "atan": (wide(np.arctan), -99, 99, 4, 4),
    "sinh": (wide(np.sinh), -9, 9, 4, 4),
    "cosh": (wide(np.cosh), -9, 9, 4, 4),
    "tanh": (wide(np.tanh), -5, 5, 4, 4),
    "asinh": (wide(np.arcsinh), -99, 99, 5, 5),
    "acosh": (wide(np.arccosh), 1, 99, 5, 5),
    "atanh": (wide(np.arctanh), -0.99, 0.99, 5, 5),
    "erf": (double(scipy.special.erf), -4, 4, 4, 6),
    "erfc": (double(scipy.special.erfc), -4, 4, 6, 12),
    "cyl_bessel_i0": (double(scipy.special.i0), -30, 30, 1, 12),
    "cyl_bessel_i1": (double(scipy.special.i1), -30, 30, 1, 12),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", UNARY)
def test_unary_functions(name, dtype, rng, buffers, covers):
    """Each function is within its number of units of the last place."""
    covers(f"libdevice.{name}", dtype)
    reference, low, high, *limits = UNARY[name]
    x = random_values(rng, 1000, dtype, low, high)
    found = run_elementwise(buffers, {f"libdevice.{name}(x)": dtype}, {"x": (x, dtype)})[0]
    assert_ulps(found, reference(x), dtype, limits[dtype == "float64"])


BINARY = {
    "pow": (wide(np.power), (0.01, 9), (-9, 9), 4, 4),
    "atan2": (wide(np.arctan2), (-9, 9), (-9, 9), 4, 4),
    "hypot": (wide(np.hypot), (-9, 9), (-9, 9), 3, 3),
    "fmod": (wide(np.fmod), (-99, 99), (-9, 9), 0, 0),
    "copysign": (wide(np.copysign), (-9, 9), (-9, 9), 0, 0),
    "fdim": (lambda x, y: np.maximum(x.astype(np.longdouble) - y, 0), (-9, 9), (-9, 9), 0.5, 0.5),
    "remainder": (None, (-99, 99), (1, 9), 0, 0),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", BINARY)
def test_binary_functions(name, dtype, rng, buffers, covers):
    """Functions of two arguments are within their number of units of the last place."""
    covers(f"libdevice.{name}", dtype)
    reference, x_range, y_range, *limits = BINARY[name]
    x, y = random_values(rng, 1000, dtype, *x_range), random_values(rng, 1000, dtype, *y_range)
    found = run_elementwise(buffers, {f"libdevice.{name}(x, y)": dtype}, {"x": (x, dtype), "y": (y, dtype)})[0]
    if name == "remainder":
        import math

        expected = np.array([math.remainder(float(a), float(b)) for a, b in zip(x, y, strict=True)])
    else:
        expected = reference(x, y)
    assert_ulps(found, expected, dtype, limits[dtype == "float64"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_classification(dtype, buffers, covers):
    """`isnan`, `isinf`, `signbit` and finiteness look at the bits."""
    covers("libdevice.isnan isinf signbit", dtype)
    x = np.array([0.0, -0.0, 1.5, -2.5, np.inf, -np.inf, np.nan], dtype=dtype)
    finite = "finitef" if dtype == "float32" else "isfinited"
    results = {f"libdevice.{name}(x)": "int32" for name in ("isnan", "isinf", "signbit", finite)}
    found = run_elementwise(buffers, results, {"x": (x, dtype)})
    for actual, function in zip(found, (np.isnan, np.isinf, np.signbit, np.isfinite), strict=True):
        assert_same(actual.numpy() != 0, function(x))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ldexp_and_exponents(dtype, rng, buffers, covers):
    """`ldexp` and `scalbn` scale by powers of two, `ilogb` and `logb` return exponents."""
    covers("libdevice.ldexp scalbn ilogb logb", dtype)
    x, n = random_values(rng, 63, dtype), random_values(rng, 63, "int32", -20, 20)
    x[x == 0] = 1
    results = {
        "libdevice.ldexp(x, n)": dtype,
        "libdevice.scalbn(x, n)": dtype,
        "libdevice.ilogb(x)": "int32",
        "libdevice.logb(x)": dtype,
    }
    found = run_elementwise(buffers, results, {"x": (x, dtype), "n": (n, "int32")})
    exponents = np.frexp(x)[1] - 1
    for actual, expected in zip(found, (np.ldexp(x, n), np.ldexp(x, n), exponents, exponents.astype(dtype)), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_half_away(dtype, buffers, covers):
    """`round` rounds halves away from zero, `rint` to even."""
    covers("libdevice.round rint", dtype)
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.4999, 1e6 + 0.5, 0.49999997], dtype=dtype)
    found = run_elementwise(buffers, {"libdevice.round(x)": dtype, "libdevice.rint(x)": dtype}, {"x": (x, dtype)})
    magnitude = np.floor(np.abs(x.astype(np.longdouble)) + np.longdouble(0.5))
    assert_same(found[0], (np.sign(x) * magnitude).astype(dtype))
    assert_same(found[1], np.rint(x))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_next_after(dtype, rng, buffers, covers):
    """`nextafter` returns the neighbour."""
    covers("libdevice.nextafter", dtype)
    x, y = random_values(rng, 63, dtype), random_values(rng, 63, dtype)
    x[0], y[1], x[2] = 0, x[1], np.inf
    found = run_elementwise(buffers, {"libdevice.nextafter(x, y)": dtype}, {"x": (x, dtype), "y": (y, dtype)})[0]
    assert_same(found, np.nextafter(x, y))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_bit_functions(dtype, rng, buffers, covers):
    """`clz`, `popc`, `ffs` and `brev` count and reverse bits."""
    covers("libdevice.clz popc ffs brev", dtype)
    width = 32 if dtype == "int32" else 64
    x = random_values(rng, 63, dtype)
    x[:4] = [0, 1, -1, 2]
    names = ("clz", "popc", "ffs", "brev")
    outs = {f"libdevice.{name}(x)": dtype if name == "brev" else "int32" for name in names}
    found = run_elementwise(buffers, outs, {"x": (x, dtype)})
    texts = [format(int(v) & (2**width - 1), f"0{width}b") for v in x]
    unsigned = np.array([int(t[::-1], 2) for t in texts], dtype=f"uint{width}")
    wanted = ([width - len(t.lstrip("0")) for t in texts], [t.count("1") for t in texts],
              [0 if "1" not in t else len(t) - t.rindex("1") for t in texts], unsigned.view(dtype))  # fmt: skip
    for actual, expected in zip(found, wanted, strict=True):
        assert_same(actual, np.array(expected))


def test_integer_functions(rng, buffers, covers):
    """`mulhi`, `abs`, `byte_perm` and bit reinterpretations work on int32."""
    covers("libdevice.mulhi abs", "int32")
    x, y = random_values(rng, 63, "int32"), random_values(rng, 63, "int32")
    x[0] = 5
    results = {"libdevice.mulhi(x, y)": "int32", "libdevice.abs(x)": "int32", "libdevice.int_as_float(x)": "float32"}
    found = run_elementwise(buffers, results, {"x": (x, "int32"), "y": (y, "int32")})
    assert_same(found[0], ((x.astype(np.int64) * y) >> 32).astype(np.int32))
    assert_same(found[1], np.abs(x))
    assert_same(found[2].numpy().view(np.int32)[~np.isnan(x.view(np.float32))], x[~np.isnan(x.view(np.float32))])


CONVERSIONS = [("float2int_rn", "float32", "int32", np.rint), ("float2int_rz", "float32", "int32", np.trunc),
               ("float2int_rd", "float32", "int32", np.floor), ("float2int_ru", "float32", "int32", np.ceil),
               ("double2int_rn", "float64", "int32", np.rint), ("double2ll_rz", "float64", "int64", np.trunc),
               ("int2float_rn", "int32", "float32", lambda x: x), ("llrint", "float32", "int64", np.rint)]  # fmt: skip


@pytest.mark.parametrize(("name", "source", "target", "function"), CONVERSIONS)
def test_conversions(name, source, target, function, rng, buffers, covers):
    """Conversions round as their suffix says."""
    covers(f"libdevice.{name}", source)
    x = random_values(rng, 63, source, -1000, 1000)
    found = run_elementwise(buffers, {f"libdevice.{name}(x)": target}, {"x": (x, source)})[0]
    assert_same(found, function(x).astype(target))


@pytest.mark.parametrize("name", ["fast_expf", "fast_logf", "fast_sinf", "fast_cosf"])
def test_fast_functions(name, rng, buffers, covers):
    """Fast variants have a small relative error."""
    covers(f"libdevice.{name}", "float32")
    x = random_values(rng, 63, "float32", 0.1, 3)
    found = run_elementwise(buffers, {f"libdevice.{name}(x)": "float32"}, {"x": (x, "float32")})[0]
    reference = {"fast_expf": np.exp, "fast_logf": np.log, "fast_sinf": np.sin, "fast_cosf": np.cos}[name]
    assert np.abs(found.numpy() - reference(x.astype(np.float64))).max() < 1e-5 * 21


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["tanh", "atan", "expm1", "log1p", "asinh", "sinh", "cosh"])
def test_corners(name, dtype, buffers, covers):
    """Infinities, NaN and zeros give what C gives."""
    covers(f"libdevice.{name}", dtype)
    x = np.array([0.0, np.inf, -np.inf, np.nan, 1e-10, 50.0], dtype=dtype)
    found = run_elementwise(buffers, {f"libdevice.{name}(x)": dtype}, {"x": (x, dtype)})[0]
    functions = {"atan": np.arctan, "asinh": np.arcsinh}
    with np.errstate(all="ignore"):
        expected = functions.get(name, getattr(np, name, None))(x.astype(np.longdouble))
    assert_ulps(found, expected, dtype, 5)


def test_scalar_arguments(rng, buffers, covers):
    """A number is broadcast against a tensor."""
    covers("libdevice.pow", "float32")
    x = random_values(rng, 63, "float32", 0.1, 9)
    found = run_elementwise(buffers, {"libdevice.pow(x, 2.5)": "float32"}, {"x": (x, "float32")})[0]
    assert_ulps(found, x.astype(np.float64) ** 2.5, "float32", 4)
