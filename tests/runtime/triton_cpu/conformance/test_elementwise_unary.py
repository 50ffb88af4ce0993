"""Unary operators and the functions of `tl.math`, in units of the last place."""

import numpy as np
import pytest
import scipy.special
import triton
import triton.language as tl
from conformance_kernels import run_elementwise
from conformance_numbers import (
    FLOATS,
    NUMBERS,
    SIGNED,
    as_numpy,
    assert_same,
    assert_ulps,
    random_values,
    round_to,
    special_values,
    with_specials,
)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_negation_and_absolute_value(dtype, rng, buffers, covers):
    """`-x` and `abs` change only signs, wrap at the least integer and keep NaN and infinities."""
    covers("unary - abs", dtype)
    x = (
        with_specials(rng, 1000, dtype)
        if dtype not in ("uint8", "uint16", "uint32", "uint64")
        else random_values(rng, 1000, dtype)
    )
    results = {"tl.abs(x)": dtype}
    if dtype in SIGNED + FLOATS:
        results["-x"] = dtype
    found = run_elementwise(buffers, results, {"x": (x, dtype)})
    with np.errstate(all="ignore"):
        assert_same(found[0], np.abs(x))
        if len(found) > 1:
            assert_same(found[1], -x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.compiled
def test_sign_of_zero(dtype, buffers, covers):
    """Negation subtracts from zero, so that both zeros become plus zero; multiplication keeps signs."""
    covers("signed zero", dtype)
    x = np.array([0.0, -0.0, 0.0], dtype=np.float32)
    found = run_elementwise(buffers, {"-x": dtype, "0.0 - x": dtype, "x * -1.0": dtype}, {"x": (x, dtype)})
    assert np.signbit(found[0].float().numpy()).tolist() == [False, False, False]
    assert np.signbit(found[1].float().numpy()).tolist() == [False, False, False]
    assert np.signbit(found[2].float().numpy()).tolist() == [True, False, True]


def domain(rng, size, dtype, kind):
    """Return arguments of a function: anything, positive, moderate or angles."""
    if kind == "positive":
        return np.exp(rng.uniform(-20, 20, size)).astype(dtype)
    if kind == "exponents":
        return rng.uniform(-80, 80, size).astype(dtype)
    if kind == "angles":
        return np.concatenate([rng.uniform(-4, 4, size // 2), rng.uniform(-3000, 3000, size - size // 2)]).astype(dtype)
    return rng.uniform(-5, 5, size).astype(dtype)


def precise(function):
    """Return the function evaluated in extended precision."""
    return lambda x: function(x.astype(np.longdouble))


# name: (expression, reference, domain, limit in ulps for float32, for float64)
FUNCTIONS = {
    "exp": ("tl.exp(x)", precise(np.exp), "exponents", 2, 2),
    "exp2": ("tl.exp2(x)", precise(np.exp2), "exponents", 2, 2),
    "log": ("tl.log(x)", precise(np.log), "positive", 2, 2),
    "log2": ("tl.log2(x)", precise(np.log2), "positive", 2, 2),
    "sin": ("tl.sin(x)", precise(np.sin), "angles", 2, 2),
    "cos": ("tl.cos(x)", precise(np.cos), "angles", 2, 2),
    "sqrt": ("tl.sqrt(x)", precise(np.sqrt), "positive", 1, 1),
    "rsqrt": ("tl.rsqrt(x)", lambda x: 1 / np.sqrt(x.astype(np.longdouble)), "positive", 2, 2),
    "erf": ("tl.erf(x)", lambda x: scipy.special.erf(x.astype(np.float64)), "moderate", 3, 4),
    "sigmoid": ("tl.sigmoid(x)", lambda x: 1 / (1 + np.exp(-x.astype(np.longdouble))), "moderate", 4, 4),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, dtype, rng, buffers, covers):
    """Each function is within its number of units of the last place over its domain."""
    covers(name, dtype)
    expression, reference, kind, *limits = FUNCTIONS[name]
    x = domain(rng, 4000, dtype, kind)
    found = run_elementwise(buffers, {expression: dtype}, {"x": (x, dtype)})[0]
    assert_ulps(found, reference(x), dtype, limits[dtype == "float64"])


SPECIAL = {
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "erf": scipy.special.erf,
    "floor": np.floor,
    "ceil": np.ceil,
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SPECIAL)
def test_functions_at_corners(name, dtype, buffers, covers):
    """Zeros, infinities, NaN and extreme arguments give what IEEE 754 and C give."""
    covers(f"{name} at corners", dtype)
    corners = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0], dtype=dtype)
    if name in ("exp", "exp2"):
        corners = np.concatenate([corners, np.array([1e4, -1e4, -3e4], dtype=dtype)])
    if name in ("log", "log2", "sqrt", "rsqrt"):
        corners = np.concatenate([corners, special_values(dtype)[7:8], special_values(dtype)[9:10]])
    found = run_elementwise(buffers, {f"tl.{name}(x)": dtype}, {"x": (corners, dtype)})[0]
    with np.errstate(all="ignore"):
        expected = SPECIAL[name](corners.astype(np.longdouble if name != "erf" else np.float64))
    assert_ulps(found, expected, dtype, 2, flush=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exponential_over_its_whole_range(dtype, rng, buffers, covers):
    """`exp` is finite and accurate up to the overflow limit and zero or tiny below the underflow limit."""
    covers("exp", dtype)
    limit = 88.7 if dtype == "float32" else 709.7
    x = np.concatenate([np.linspace(-limit * 1.3, limit * 1.02, 3000), rng.uniform(-1e-6, 1e-6, 500)]).astype(dtype)
    found = run_elementwise(buffers, {"tl.exp(x)": dtype}, {"x": (x, dtype)})[0]
    with np.errstate(all="ignore"):
        assert_ulps(found, np.exp(x.astype(np.longdouble)), dtype, 2, flush=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floor_and_ceil(dtype, rng, buffers, covers):
    """`floor` and `ceil` are exact for every magnitude."""
    covers("floor ceil", dtype)
    x = (rng.standard_normal(1000) * np.exp(rng.uniform(-5, 30, 1000))).astype(dtype)
    x[:100] = np.arange(-50, 50) / 2
    found = run_elementwise(buffers, {"tl.floor(x)": dtype, "tl.ceil(x)": dtype}, {"x": (x, dtype)})
    assert_same(found[0], np.floor(x))
    assert_same(found[1], np.ceil(x))


def test_rounded_square_root(rng, buffers, covers):
    """`sqrt_rn` rounds correctly."""
    covers("sqrt_rn", "float32")
    x = domain(rng, 1000, "float32", "positive")
    assert_same(run_elementwise(buffers, {"tl.sqrt_rn(x)": "float32"}, {"x": (x, "float32")})[0], np.sqrt(x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32"])
@pytest.mark.compiled
def test_functions_refuse_other_dtypes(dtype, buffers):
    """`exp` of anything but float32 and float64 is a compile-time error that names the dtypes."""
    with pytest.raises(triton.TritonError, match="Expected dtype"):
        run_elementwise(buffers, {"tl.exp(x)": dtype}, {"x": (np.ones(4, np.float32), dtype)})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_functions_of_widened_values(dtype, rng, buffers, covers):
    """A half-precision argument widened to float32 and stored back rounds once."""
    covers("exp of widened", dtype)
    x = random_values(rng, 1000, dtype)
    found = run_elementwise(buffers, {"tl.exp(x.to(tl.float32))": dtype}, {"x": (x, dtype)})[0]
    assert_ulps(found, np.exp(x.astype(np.float64)), dtype, 0.51)


def test_shared_subexpressions(rng, buffers, covers):
    """An expensive value used several times has one value everywhere."""
    covers("shared values", "float32")
    x = random_values(rng, 1000, "float32")
    results = {"tl.exp(x) - tl.exp(x)": "float32", "tl.sqrt(tl.abs(x)) == tl.sqrt(tl.abs(x))": "int1"}
    found = run_elementwise(buffers, results, {"x": (x, "float32")})
    assert_same(found[0], np.zeros(1000, np.float32))
    assert_same(found[1], np.ones(1000, np.bool_))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 128, 1024, 4096])
def test_every_block_size(size, rng, buffers, covers):
    """Blocks from one element to thousands compute the same."""
    covers("block sizes", "float32")
    x = random_values(rng, size + 3, "float32")
    found = run_elementwise(buffers, {"x * 2.0 + 1.0": "float32"}, {"x": (x, "float32")}, block=size)[0]
    assert_same(found, (x.astype(np.float64) * 2 + 1).astype(np.float32))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("dtype", ["float64", "int64", "int8", "float16", "int1"])
def test_small_blocks_of_every_width(size, dtype, rng, buffers, covers):
    """Blocks narrower and wider than a vector register work for every element width."""
    covers("block sizes", dtype)
    x = random_values(rng, 65, dtype)
    found = run_elementwise(buffers, {"x": dtype}, {"x": (x, dtype)}, block=size)[0]
    assert_same(found, x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_arithmetic_rounds_at_every_operation(dtype, rng, buffers, covers):
    """A chain of half-precision operations rounds after each one, or once where product and sum fuse."""
    covers("chains", dtype)
    x, y = random_values(rng, 1000, dtype), random_values(rng, 1000, dtype)
    found = run_elementwise(buffers, {"x * y + x": dtype}, {"x": (x, dtype), "y": (y, dtype)})[0]
    wide = x.astype(np.float64)
    separate, fused = round_to(round_to(wide * y, dtype) + wide, dtype), round_to(wide * y + wide, dtype)
    actual = as_numpy(found).astype(np.float64)
    assert_same(actual, np.where(actual == fused, fused, separate))


@triton.jit
def long_chain_kernel(out, x, STEPS: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, N)
    value = tl.load(x + place)
    for _ in tl.static_range(STEPS):
        value = value * 0.5 + 1.0
    tl.store(out + place, value)


@pytest.mark.parametrize("steps", [50, 200, 1000])
def test_long_chains(steps, rng, buffers, covers):
    """A thousand operations in a row compile."""
    covers("chains", "float32")
    x, out = random_values(rng, 64, "float32"), buffers.empty(64, "float32")
    long_chain_kernel[(1,)](out, buffers.put(x, "float32"), STEPS=steps, N=64)
    assert_ulps(out, x.astype(np.float64) * 0.5**steps + 2 - 2 * 0.5**steps, "float32", 2)


@triton.jit
def shared_chain_kernel(out, x, STEPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    value = tl.load(x + place)
    for _ in tl.static_range(STEPS):
        value = value * value + value
    tl.store(out + place, value)


@pytest.mark.parametrize("steps", [4, 12, 30])
def test_chains_that_use_values_twice(steps, rng, buffers, covers):
    """The time to compile does not grow with the number of paths through a chain of matrices."""
    covers("chains", "int32")
    x, out = random_values(rng, (8, 8), "int32", -9, 9), buffers.empty((8, 8), "int32")
    shared_chain_kernel[(1,)](out, buffers.put(x, "int32"), STEPS=steps, M=8, N=8)
    with np.errstate(all="ignore"):
        for _ in range(steps):
            x = x * x + x
    assert_same(out, x)
