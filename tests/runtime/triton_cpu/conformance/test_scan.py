"""Scans: cumulative sums, products and general combiners along every axis and in both directions."""

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import NUMBERS, assert_error_ratio, assert_same, is_float, random_values

SOURCE = """@triton.jit
def combine_max(a, b):
    return tl.maximum(a, b)


@triton.jit
def combine_get_first(a, b):
    return a


@triton.jit
def combine_last_nonzero(a, b):
    return tl.where(b != 0, b, a)


@triton.jit
def kernel(out, x_ptr):
    place = {place}
    x = tl.load(x_ptr + place)
    tl.store(out + place, {expression})
"""


def run_scan(buffers, expression, x, dtype, out_dtype):
    """Scan an array by an expression of `x`."""
    place = "0"
    for axis, n in enumerate(x.shape):
        slots = ", ".join(":" if k == axis else "None" for k in range(x.ndim))
        place = f"({place}) * {n} + tl.arange(0, {n})[{slots}]"
    out = buffers.empty(x.shape, out_dtype)
    module_from(SOURCE.format(place=place, expression=expression)).kernel[(1,)](out, buffers.put(x, dtype))
    return out


def scanned(x, axis, reverse, combine):
    """Return the inclusive scan of a two-argument function along an axis."""
    moved = np.moveaxis(x, axis, 0)
    moved = moved[::-1] if reverse else moved
    rows = [moved[0]]
    for row in moved[1:]:
        rows.append(combine(rows[-1], row))
    result = np.stack(rows)
    return np.moveaxis(result[::-1] if reverse else result, 0, axis)


def sum_dtype(dtype):
    """Return the dtype that `cumsum` of a dtype gives."""
    if is_float(dtype) or dtype[-2:] in ("32", "64"):
        return dtype
    return "uint32" if dtype.startswith("u") else "int32"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_cumulative_sum_1d(dtype, reverse, rng, buffers, covers):
    """`cumsum` of a vector runs in both directions; small integers sum in 32 bits."""
    covers("cumsum", dtype)
    size = (1, 32, 512)[len(dtype) % 3]
    total = sum_dtype(dtype)
    x = random_values(rng, size, dtype)
    found = run_scan(buffers, f"tl.cumsum(x, 0, reverse={reverse})", x, dtype, total)
    if is_float(dtype):
        expected = scanned(x.astype(np.float64), 0, reverse, np.add)
        assert_error_ratio(found, expected, {"float16": 2e-2, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-13}[dtype])
    else:
        assert_same(found, scanned(x.astype(total), 0, reverse, np.add))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((8, 64), 0), ((8, 64), 1), ((64, 2), 0), ((1, 128), 0), ((128, 1), 1), ((4, 4, 8), 1), ((2, 8, 4), 2), ((4, 2, 2), 0)],
)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_cumulative_sum_along_axes(shape, axis, reverse, dtype, rng, buffers, covers):
    """`cumsum` runs along any axis of matrices and rank-three tensors."""
    covers("cumsum", dtype)
    x = random_values(rng, shape, dtype)
    found = run_scan(buffers, f"tl.cumsum(x, {axis}, reverse={reverse})", x, dtype, dtype)
    expected = scanned(x.astype(np.float64) if is_float(dtype) else x, axis, reverse, np.add)
    assert_error_ratio(found, expected, 1e-5) if is_float(dtype) else assert_same(found, expected)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "float32", "float64", "float16"])
@pytest.mark.parametrize(("axis", "reverse"), [(0, False), (1, True)])
def test_cumulative_product(dtype, axis, reverse, rng, buffers, covers):
    """`cumprod` wraps for integers."""
    covers("cumprod", dtype)
    x = random_values(rng, (8, 16), dtype, *((0.75, 1.25) if is_float(dtype) else (1, 5)))
    found = run_scan(buffers, f"tl.cumprod(x, {axis}, reverse={reverse})", x, dtype, dtype)
    if is_float(dtype):
        expected = scanned(x.astype(np.float64), axis, reverse, np.multiply)
        assert_error_ratio(found, expected, {"float16": 2e-2, "float32": 1e-5, "float64": 1e-13}[dtype])
    else:
        assert_same(found, scanned(x, axis, reverse, np.multiply))


@pytest.mark.parametrize("num_warps", [1, 4, 8])
def test_number_of_warps(num_warps, rng, buffers, covers):
    """The number of warps changes no scan."""
    covers("cumsum", "int32")
    x = random_values(rng, 256, "int32")
    out = buffers.empty(256, "int32")
    warps_kernel[(1,)](out, buffers.put(x, "int32"), N=256, num_warps=num_warps)
    assert_same(out, np.cumsum(x, dtype=np.int32))


@triton.jit
def warps_kernel(out, x, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(out + offsets, tl.cumsum(tl.load(x + offsets), 0))


GENERAL = {
    "combine_max": np.maximum,
    "combine_get_first": lambda a, b: a,
    "combine_last_nonzero": lambda a, b: np.where(b != 0, b, a),
}


@pytest.mark.parametrize("combine", GENERAL)
@pytest.mark.parametrize(("shape", "axis"), [((64,), 0), ((8, 32), 1), ((32, 8), 0)])
@pytest.mark.parametrize("reverse", [False, True])
def test_general_combiners(combine, shape, axis, reverse, rng, buffers, covers):
    """`associative_scan` takes combiners that need not commute."""
    covers("associative_scan", "int32")
    x = random_values(rng, shape, "int32", 0, 5)
    found = run_scan(buffers, f"tl.associative_scan(x, {axis}, {combine}, reverse={reverse})", x, "int32", "int32")
    assert_same(found, scanned(x, axis, reverse, GENERAL[combine]))


@triton.jit
def linear_combine(decay_a, value_a, decay_b, value_b):
    return decay_a * decay_b, value_a * decay_b + value_b


@triton.jit
def linear_kernel(out, decay, x, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    _, value = tl.associative_scan((tl.load(decay + place), tl.load(x + place)), AXIS, linear_combine, reverse=REVERSE)
    tl.store(out + place, value)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("m", "n"), [(16, 32), (1, 128), (128, 1), (64, 4)])
def test_linear_recurrence(axis, reverse, m, n, rng, buffers, covers):
    """A scan of pairs solves a linear recurrence."""
    covers("associative_scan of tuples", "float32")
    decay, x = random_values(rng, (m, n), "float32", 0.5, 1), random_values(rng, (m, n), "float32")
    out = buffers.empty((m, n), "float32")
    linear_kernel[(1,)](out, buffers.put(decay, "float32"), buffers.put(x, "float32"), M=m, N=n, AXIS=axis, REVERSE=reverse)
    d, v = np.moveaxis(decay, axis, 0).astype(np.float64), np.moveaxis(x, axis, 0).astype(np.float64)
    d, v = (d[::-1], v[::-1]) if reverse else (d, v)
    state, rows = np.zeros(v.shape[1:]), []
    for step in range(len(v)):
        state = state * d[step] + v[step]
        rows.append(state)
    expected = np.stack(rows)
    assert_error_ratio(out, np.moveaxis(expected[::-1] if reverse else expected, 0, axis), 1e-5)


@triton.jit
def roll_combine(value_a, last_a, current_a, value_b, last_b, current_b):
    return value_a + value_b, tl.where(last_b == 1, current_a, 0) + last_b, current_b


@triton.jit
def roll_kernel(out, x, N: tl.constexpr):
    offsets = tl.arange(0, N)
    value = tl.load(x + offsets)
    total, previous, current = tl.associative_scan((value, 0 * value, value), 0, roll_combine)
    tl.store(out + offsets, total + previous * 0 + current)


def test_tuples_of_three(rng, buffers, covers):
    """A scan carries three values."""
    covers("associative_scan of tuples", "int32")
    x, out = random_values(rng, 64, "int32", 0, 100), buffers.empty(64, "int32")
    roll_kernel[(1,)](out, buffers.put(x, "int32"), N=64)
    assert_same(out, np.cumsum(x, dtype=np.int32) + x)


@triton.jit
def segment_combine(value_a, flag_a, value_b, flag_b):
    return tl.where(flag_b, value_b, value_a + value_b), flag_a | flag_b


@triton.jit
def segment_kernel(out, x, starts, N: tl.constexpr):
    offsets = tl.arange(0, N)
    value, _ = tl.associative_scan((tl.load(x + offsets), tl.load(starts + offsets)), 0, segment_combine)
    tl.store(out + offsets, value)


def test_segmented_sum(rng, buffers, covers):
    """A flag of dtype int1 in the tuple restarts the sum."""
    covers("associative_scan of tuples", "int1")
    x, starts = random_values(rng, 128, "int32", 0, 100), rng.random(128) < 0.1
    out = buffers.empty(128, "int32")
    segment_kernel[(1,)](out, buffers.put(x, "int32"), buffers.put(starts, "int1"), N=128)
    total, expected = 0, []
    for value, start in zip(x, starts, strict=True):
        total = value if start else total + value
        expected.append(total)
    assert_same(out, np.array(expected, np.int32))


@triton.jit
def mixed_kernel(out, x, N: tl.constexpr):
    offsets = tl.arange(0, N)
    total = tl.cumsum(tl.load(x + offsets), 0)
    scaled = total * 2 - tl.max(total, axis=0)
    tl.store(out + offsets, tl.cumsum(scaled, 0))
    tl.store(out + N, tl.sum(scaled, axis=0))


def test_scans_of_scans(rng, buffers, covers):
    """Scans, reductions and arithmetic follow one another."""
    covers("chained scans", "int32")
    x, out = random_values(rng, 64, "int32", -10, 10), buffers.empty(65, "int32")
    mixed_kernel[(1,)](out, buffers.put(x, "int32"), N=64)
    total = np.cumsum(x, dtype=np.int32)
    scaled = total * 2 - total.max()
    assert_same(out, np.concatenate([np.cumsum(scaled), [scaled.sum()]]).astype(np.int32))


@triton.jit
def compact_kernel(out, count, x, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets, mask=offsets < n, other=-1)
    keep = value >= 0
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(out + place, value, mask=keep)
    tl.store(count, tl.max(place, axis=0) + 1)


def test_compaction(rng, buffers, covers):
    """A scan of a mask gives the places for a masked scatter."""
    covers("cumsum", "int1")
    x = random_values(rng, 100, "int32", -50, 50)
    out, count = buffers.put(np.full(100, -7), "int32", writable=True), buffers.empty(1, "int32")
    compact_kernel[(1,)](out, count, buffers.put(x, "int32"), 100, BLOCK=128)
    kept = x[x >= 0]
    assert count.item() == len(kept)
    assert_same(out, np.concatenate([kept, np.full(100 - len(kept), -7, np.int32)]))
