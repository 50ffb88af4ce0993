"""Sorts: `sort`, `topk`, `bitonic_merge`."""

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_numbers import assert_same, random_values

pytestmark = pytest.mark.compiled


@triton.jit
def sort_kernel(out, x, M: tl.constexpr, N: tl.constexpr, DESCENDING: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + place, tl.sort(tl.load(x + place), descending=DESCENDING))


@pytest.mark.parametrize(("m", "n"), [(1, 64), (8, 32), (64, 4), (4, 1)])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", ["int32", "float16", "float32", "bfloat16", "int8"])
def test_sort(m, n, descending, dtype, rng, buffers, covers):
    """`sort` orders the rows of a matrix."""
    covers("sort", dtype)
    x, out = random_values(rng, (m, n), dtype), buffers.empty((m, n), dtype)
    sort_kernel[(1,)](out, buffers.put(x, dtype), M=m, N=n, DESCENDING=descending)
    expected = np.sort(x, axis=1)
    assert_same(out, expected[:, ::-1] if descending else expected)


@triton.jit
def topk_kernel(out, x, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    best = tl.topk(tl.load(x + place), K)
    tl.store(out + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :], best)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 8), (8, 32, 1), (16, 16, 16)])
@pytest.mark.parametrize("dtype", ["int32", "float16", "float32"])
def test_topk(m, n, k, dtype, rng, buffers, covers):
    """`topk` returns the greatest elements in falling order."""
    covers("topk", dtype)
    x, out = random_values(rng, (m, n), dtype), buffers.empty((m, k), dtype)
    topk_kernel[(1,)](out, buffers.put(x, dtype), M=m, N=n, K=k)
    assert_same(out, np.sort(x, axis=1)[:, ::-1][:, :k])


@triton.jit
def merge_kernel(out, x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.bitonic_merge(tl.load(x + i)))


def test_bitonic_merge(rng, buffers, covers):
    """`bitonic_merge` sorts a bitonic sequence."""
    covers("bitonic_merge", "int32")
    x = random_values(rng, 32, "int32")
    x = np.concatenate([np.sort(x[:16]), np.sort(x[16:])[::-1]])
    out = buffers.empty(32, "int32")
    merge_kernel[(1,)](out, buffers.put(x, "int32"), N=32)
    assert_same(out, np.sort(x))
