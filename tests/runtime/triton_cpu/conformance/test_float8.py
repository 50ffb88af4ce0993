"""float8: copies, conversions, arithmetic and products, where the backend declares the dtypes."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conformance_kernels import float8_supported, module_from
from conformance_numbers import FLOAT8, as_numpy, assert_error_ratio, assert_same, random_values, round_to, torch_dtype, ulps

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(not float8_supported(), reason="the backend declares no float8 dtypes: see test_unsupported.py"),
]


def copy(source, out, expression):
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


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("size", [1, 63, 1000])
def test_float8_copy(dtype, size, rng, buffers, covers):
    """A masked copy moves every bit of float8."""
    covers("load store", dtype)
    raw = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
    x, out = buffers.put(raw.view(torch_dtype(dtype)), dtype), buffers.empty(size, dtype)
    copy(x, out, "x")
    assert torch.equal(out.view(torch.uint8), raw)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_bitcasts(dtype, rng, buffers, covers):
    """float8 bitcasts to and from bytes."""
    covers("bitcast", dtype)
    raw = torch.from_numpy(rng.integers(0, 256, 256, dtype=np.uint8))
    out = buffers.empty(256, dtype)
    copy(buffers.put(raw, "uint8"), out, f"x.to(tl.{dtype}, bitcast=True)")
    assert torch.equal(out.view(torch.uint8), raw)
    back = buffers.empty(256, "uint8")
    copy(buffers.put(raw.view(torch_dtype(dtype)), dtype), back, "x.to(tl.uint8, bitcast=True)")
    assert torch.equal(back, raw)


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("wide", ["float16", "bfloat16", "float32", "float64"])
def test_float8_widens_exactly(dtype, wide, buffers, covers):
    """Every finite float8 value converts exactly to a wider float, and NaN to NaN."""
    covers("cast to float", dtype)
    x = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch_dtype(dtype))
    source = buffers.put(x, dtype)
    out = buffers.empty(256, wide)
    copy(source, out, f"x.to(tl.{wide})")
    assert_same(as_numpy(out).astype(np.float64), as_numpy(x))


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("wide", ["float16", "bfloat16", "float32"])
def test_float8_narrows_to_nearest_even(dtype, wide, rng, buffers, covers):
    """Wider floats in range round to the nearest float8, ties to even, and NaN stays NaN."""
    covers("cast to float8", wide)
    x = np.concatenate([rng.standard_normal(2000) * 4, rng.uniform(-400, 400, 2000), rng.standard_normal(1000) * 0.01])
    x = round_to(x, wide)
    x[0] = np.nan
    out = buffers.empty(len(x), dtype)
    copy(buffers.put(x, wide), out, f"x.to(tl.{dtype})")
    assert_same(as_numpy(out), round_to(x, dtype))


def test_float8_rounds_towards_zero(rng, buffers, covers):
    """`fp_downcast_rounding="rtz"` truncates to float8e5."""
    covers("cast rtz", "float8e5")
    x = (rng.standard_normal(1000) * 10).astype(np.float32)
    out = buffers.empty(1000, "float8e5")
    copy(buffers.put(x, "float32"), out, 'x.to(tl.float8e5, fp_downcast_rounding="rtz")')
    found = as_numpy(out)
    assert (np.abs(found) <= np.abs(x)).all()
    assert (ulps(found, x, "float8e5") < 1).all()


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_arithmetic(dtype, rng, buffers, covers):
    """float8 values widen, compute and narrow."""
    covers("+ - *", dtype)
    x = random_values(rng, 256, dtype)
    out = buffers.empty(256, dtype)
    copy(buffers.put(x, dtype), out, f"(x.to(tl.float32) * 2 + 1).to(tl.{dtype})")
    assert_same(as_numpy(out), round_to(x.astype(np.float64) * 2 + 1, dtype))


@triton.jit
def dot_kernel(out, x, y, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(x + m[:, None] * K + k[None, :]), tl.load(y + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(a, b))


@pytest.mark.parametrize(
    ("x_type", "y_type"), [("float8e4nv", "float8e4nv"), ("float8e5", "float8e5"), ("float8e4nv", "float8e5")]
)
def test_float8_dot(x_type, y_type, rng, buffers, covers):
    """A product of float8 accumulates in float32."""
    covers("dot", x_type, y_type)
    x, y = random_values(rng, (32, 64), x_type), random_values(rng, (64, 32), y_type)
    out = buffers.empty((32, 32), "float32")
    dot_kernel[(1,)](out, buffers.put(x, x_type), buffers.put(y, y_type), M=32, N=32, K=64)
    assert_error_ratio(out, x.astype(np.float64) @ y.astype(np.float64), 1e-4)
