"""Histograms and gathers from tensors."""

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_numbers import assert_same, random_values

pytestmark = pytest.mark.compiled


@triton.jit
def histogram_kernel(out, x, n, M: tl.constexpr, BINS: tl.constexpr, MASKED: tl.constexpr):
    offsets = tl.arange(0, M)
    value = tl.load(x + offsets)
    if MASKED:  # noqa: SIM108 - a branch of the language
        counts = tl.histogram(value, BINS, mask=offsets < n)
    else:
        counts = tl.histogram(value, BINS)
    tl.store(out + tl.arange(0, BINS), counts)


@pytest.mark.parametrize(("m", "bins"), [(1024, 2), (1024, 16), (64, 128), (32, 32), (1, 4)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_histogram(m, bins, masked, dtype, rng, buffers, covers):
    """`histogram` counts values, those that a mask lets in."""
    covers("histogram", dtype)
    x = random_values(rng, m, dtype, 0, bins - 1)
    out = buffers.empty(bins, "int32")
    n = m * 2 // 3
    histogram_kernel[(1,)](out, buffers.put(x, dtype), n, M=m, BINS=bins, MASKED=masked)
    assert_same(out, np.bincount(x[:n] if masked else x, minlength=bins).astype(np.int32))


@triton.jit
def gather_kernel(out, x, index, M: tl.constexpr, N: tl.constexpr, I: tl.constexpr, J: tl.constexpr, AXIS: tl.constexpr):
    value = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    place = tl.arange(0, I)[:, None] * J + tl.arange(0, J)[None, :]
    tl.store(out + place, tl.gather(value, tl.load(index + place), AXIS))


@pytest.mark.parametrize(
    ("shape", "index_shape", "axis"),
    [((8, 16), (4, 16), 0), ((8, 16), (8, 64), 1), ((32, 4), (32, 4), 1), ((64, 2), (128, 2), 0)],
)
@pytest.mark.parametrize("dtype", ["float32", "int8", "float16"])
def test_gather(shape, index_shape, axis, dtype, rng, buffers, covers):
    """`gather` picks elements along an axis of a tensor in registers."""
    covers("gather", dtype)
    x = random_values(rng, shape, dtype)
    index = random_values(rng, index_shape, "int32", 0, shape[axis] - 1)
    out = buffers.empty(index_shape, dtype)
    gather_kernel[(1,)](out, buffers.put(x, dtype), buffers.put(index, "int32"), M=shape[0], N=shape[1],
                        I=index_shape[0], J=index_shape[1], AXIS=axis)  # fmt: skip
    assert_same(out, np.take_along_axis(x, index, axis))


@triton.jit
def gather_vector_kernel(out, x, index, N: tl.constexpr, M: tl.constexpr):
    value = tl.load(x + tl.arange(0, N)) * 2
    place = tl.load(index + tl.arange(0, M))
    tl.store(out + tl.arange(0, M), value.gather(place, 0))


@pytest.mark.parametrize("index_type", ["int32", "int64", "uint8"])
def test_gather_from_a_vector(index_type, rng, buffers, covers):
    """`gather` works on vectors, with indices of any integer dtype."""
    covers("gather", "int32")
    x, index = random_values(rng, 32, "int32", -99, 99), random_values(rng, 64, index_type, 0, 31)
    out = buffers.empty(64, "int32")
    gather_vector_kernel[(1,)](out, buffers.put(x, "int32"), buffers.put(index, index_type), N=32, M=64)
    assert_same(out, x[index] * 2)
