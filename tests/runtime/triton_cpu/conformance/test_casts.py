"""Conversions between all dtypes, roundings and bitcasts."""

import numpy as np
import pytest
import torch
import triton
from conformance_kernels import module_from, run_elementwise
from conformance_numbers import (
    FLOATS,
    FORMATS,
    INTEGERS,
    NUMBERS,
    as_numpy,
    assert_same,
    assert_ulps,
    bits,
    convert,
    is_float,
    random_values,
    round_to,
    special_values,
    torch_dtype,
    ulps,
)


@pytest.mark.parametrize("source", ["int1", *INTEGERS])
def test_integers_to_integers(source, rng, buffers, covers):
    """Integer conversions wrap when they narrow and extend by the source's sign."""
    covers("cast to integer", source)
    x = random_values(rng, 1000, source)
    found = run_elementwise(buffers, {f"x.to(tl.{d})": d for d in INTEGERS}, {"x": (x, source)})
    for actual, dtype in zip(found, INTEGERS, strict=True):
        assert_same(actual, x.astype(dtype))


@pytest.mark.parametrize("source", ["int1", *INTEGERS])
def test_integers_to_floats(source, rng, buffers, covers):
    """Integers convert to the nearest float; to 16 bits within one unit of the last place."""
    covers("cast to float", source)
    x = random_values(rng, 1000, source)
    if source != "int1":
        x[:200] = random_values(rng, 200, source, -3000, 3000)
    found = run_elementwise(buffers, {f"x.to(tl.{d})": d for d in FLOATS}, {"x": (x, source)})
    for actual, dtype in zip(found, FLOATS, strict=True):
        if bits(dtype) > 16 or bits(source) <= 16:
            assert_same(actual, convert(x, dtype))
        else:
            assert_ulps(actual, round_to(x, dtype), dtype, 1)


@pytest.mark.parametrize("source", FLOATS)
def test_floats_to_integers(source, rng, buffers, covers):
    """Floats truncate towards zero."""
    covers("cast to integer", source)
    for unsigned in (False, True):
        targets = [d for d in INTEGERS if d.startswith("u") == unsigned]
        low = 0 if unsigned else -128
        x = rng.uniform(low, 127 if not unsigned else 255, 1000)
        x = np.clip(round_to(x, source), low, 127 if not unsigned else 255).astype(np.float64)
        found = run_elementwise(buffers, {f"x.to(tl.{d})": d for d in targets}, {"x": (x, source)})
        for actual, dtype in zip(found, targets, strict=True):
            assert_same(actual, np.trunc(x).astype(dtype))


@pytest.mark.parametrize(
    ("source", "target"),
    [("float32", "int32"), ("float64", "int64"), ("float32", "uint32"), ("float64", "uint64"), ("float32", "int64"),
     ("float64", "uint32"), ("float32", "uint64"), ("bfloat16", "int32"), ("float16", "int32")],
)  # fmt: skip
def test_large_floats_to_integers(source, target, rng, buffers, covers):
    """Conversions are right up to the ends of the integer's range."""
    covers("cast to integer", source)
    info = np.iinfo(target)
    top = min(float(info.max), FORMATS[source][2]) * 0.99
    bottom = max(float(info.min), -FORMATS[source][2]) * 0.99
    x = round_to(rng.uniform(bottom, top, 63), source)
    found = run_elementwise(buffers, {f"x.to(tl.{target})": target}, {"x": (x, source)})[0]
    assert_same(found, np.array([int(v) for v in x], dtype=target))


@pytest.mark.parametrize("source", FLOATS)
def test_floats_to_floats(source, rng, buffers, covers):
    """Widening is exact and narrowing rounds once to nearest even, with overflow to infinity."""
    covers("cast to float", source)
    x = random_values(rng, 4000, source)
    x[:2000] *= np.exp2(rng.integers(-12, 13, 2000)).astype(x.dtype)
    corners = special_values(source)
    x[: len(corners)] = corners
    found = run_elementwise(buffers, {f"x.to(tl.{d})": d for d in FLOATS}, {"x": (x, source)})
    for actual, dtype in zip(found, FLOATS, strict=True):
        assert_same(as_numpy(actual).astype(np.float64), round_to(x, dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ties_and_subnormals(dtype, rng, buffers, covers):
    """float32 narrows to even at ties, and to subnormal halves."""
    covers("cast to float", dtype)
    significand, least, _ = FORMATS[dtype]
    steps = rng.integers(2 ** (significand - 1), 2**significand, 500).astype(np.float64)
    ties = (steps + 0.5) * 2.0 ** rng.integers(-8, 8, 500)
    tiny = rng.integers(0, 2**significand, 500) * 2.0 ** (least - significand + 1) + 2.0 ** (least - significand) * (
        rng.integers(0, 2, 500)
    )
    x = np.concatenate([ties, -ties, tiny]).astype(np.float32)
    if dtype == "bfloat16":
        x = x[:1000]
    found = run_elementwise(buffers, {f"x.to(tl.{dtype})": dtype}, {"x": (x, "float32")})[0]
    assert_same(as_numpy(found).astype(np.float64), round_to(x, dtype))


@pytest.mark.parametrize("source", NUMBERS)
def test_to_boolean(source, buffers, covers):
    """Everything but zero converts to true, NaN included."""
    covers("cast to int1", source)
    corners = special_values(source)
    found = run_elementwise(buffers, {"x.to(tl.int1)": "int1", "x != 0": "int1"}, {"x": (corners, source)})
    assert_same(found[0], corners != 0)
    assert_same(found[1], corners != 0)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32", "int64"])
def test_booleans_in_arithmetic(dtype, rng, buffers, covers):
    """True counts as one, never as minus one."""
    covers("+ - *", "int1")
    x, c = random_values(rng, 63, dtype, 0, 50), random_values(rng, 63, "int1")
    found = run_elementwise(buffers, {"x + c": dtype, "x * c": dtype}, {"x": (x, dtype), "c": (c, "int1")})
    assert_same(found[0], x + c.astype(dtype))
    assert_same(found[1], x * c.astype(dtype))


@pytest.mark.parametrize("dtype", NUMBERS)
def test_store_converts(dtype, rng, buffers, covers):
    """A store converts the value to the pointer's element type."""
    covers("store converts", dtype)
    x = random_values(rng, 63, "float32", 0, 100)
    found = run_elementwise(buffers, {"x": dtype}, {"x": (x, "float32")})[0]
    assert_same(found, convert(x, dtype))


@pytest.mark.compiled
def test_boolean_arithmetic_alone(rng, buffers, covers):
    """Arithmetic on booleans after a conversion counts them."""
    covers("+ - *", "int1")
    c, d = random_values(rng, 63, "int1"), random_values(rng, 63, "int1")
    results = {"c.to(tl.int32) + d.to(tl.int32)": "int32", "c.to(tl.float32) - d.to(tl.float32)": "float32"}
    found = run_elementwise(buffers, results, {"c": (c, "int1"), "d": (d, "int1")})
    assert_same(found[0], c.astype(np.int32) + d)
    assert_same(found[1], c.astype(np.float32) - d.astype(np.float32))


BITCASTS = [("float32", "int32"), ("int32", "float32"), ("float16", "int16"), ("int16", "bfloat16"),
            ("bfloat16", "uint16"), ("float64", "int64"), ("uint64", "float64"), ("int8", "uint8"),
            ("float16", "bfloat16"), ("uint32", "int32")]  # fmt: skip


@pytest.mark.parametrize(("source", "target"), BITCASTS)
def test_bitcasts(source, target, rng, buffers, covers):
    """Bitcasts keep every bit."""
    covers("bitcast", source, target)
    raw = rng.integers(0, 256, 64 * bits(source) // 8).astype(np.uint8)
    if is_float(source) or is_float(target):
        raw[bits(source) // 8 - 1 :: bits(source) // 8] &= 0x3F  # keep away from NaN, whose payload may change
    x = buffers.put(torch.from_numpy(raw).view(torch_dtype(source)), source)
    kernel = module_from(
        f"""@triton.jit
def kernel(out, x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets).to(tl.{target}, bitcast=True))
"""
    ).kernel
    out = buffers.empty(64, target)
    kernel[(1,)](out, x, BLOCK=64)
    assert torch.equal(out.view(torch.uint8), x.view(torch.uint8))


def _copy(source, out, expression):
    """Run a kernel that stores an expression of `x` over whole tensors."""
    kernel = module_from(
        f"""@triton.jit
def kernel(out, x_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    tl.store(out + offsets, {expression}, mask=offsets < n)
"""
    ).kernel
    kernel[(-(-out.numel() // 128),)](out, source, out.numel(), BLOCK=128)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.compiled
def test_round_towards_zero(dtype, rng, buffers, covers):
    """`fp_downcast_rounding="rtz"` truncates."""
    covers("cast rtz", dtype)
    x = (rng.standard_normal(1000) * 10).astype(np.float32)
    out = buffers.empty(1000, dtype)
    _copy(buffers.put(x, "float32"), out, f'x.to(tl.{dtype}, fp_downcast_rounding="rtz")')
    found = as_numpy(out).astype(np.float64)
    assert (np.abs(found) <= np.abs(x)).all()
    assert (ulps(found, x, dtype) < 1).all()


def test_cast_function(rng, buffers, covers):
    """`tl.cast` is the same as the `to` method, with and without bitcast."""
    covers("cast to float", "int32")
    x = random_values(rng, 63, "int32", 0, 1000)
    results = {"tl.cast(x, tl.float32)": "float32", "tl.cast(x, tl.float32, bitcast=True)": "float32"}
    found = run_elementwise(buffers, results, {"x": (x, "int32")})
    assert_same(found[0], x.astype(np.float32))
    assert_same(found[1].view(torch.int32), x)


@pytest.mark.compiled
def test_bitcast_to_another_width_is_refused(buffers):
    """A bitcast between widths is a compile-time error."""
    with pytest.raises(triton.TritonError, match=r"[Bb]itcast|bitwidth|size"):
        run_elementwise(buffers, {"x.to(tl.int16, bitcast=True)": "int16"}, {"x": (np.ones(4, np.float32), "float32")})


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32"])
def test_pointers_to_integers(dtype, rng, buffers, covers):
    """A pointer converted to int64 holds the address, and converts back."""
    covers("pointer casts", dtype)
    kernel = module_from(
        """@triton.jit
def kernel(out, address, x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(address + offsets, (x + offsets).to(tl.int64))
    back = (x.to(tl.int64) + offsets * (x.dtype.element_ty.primitive_bitwidth // 8)).to(tl.pointer_type(x.dtype.element_ty))
    tl.store(out + offsets, tl.load(back))
"""
    ).kernel
    values = random_values(rng, 32, dtype)
    x, out, address = buffers.put(values, dtype), buffers.empty(32, dtype), buffers.empty(32, "int64")
    kernel[(1,)](out, address, x, BLOCK=32)
    assert_same(address, x.data_ptr() + np.arange(32) * values.itemsize)
    assert_same(out, values)
