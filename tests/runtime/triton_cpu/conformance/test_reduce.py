"""Reductions: every combiner, dtype, axis and shape, indices, NaN, ties, general and tuple combiners, chains."""

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import (
    INTEGERS,
    INTERPRETED,
    NUMBERS,
    assert_error_ratio,
    assert_same,
    is_float,
    random_values,
)

SIMPLE = ("sum", "max", "min")
INDEXED = ("argmax", "argmin")


def reduce_kernel(expression, rank_in, shape, out_shape):
    """Return a kernel that loads a tensor of a shape, evaluates an expression of `x` and stores the result."""
    place = "0"
    for axis, n in enumerate(shape):
        slots = ", ".join(":" if k == axis else "None" for k in range(rank_in))
        place = f"({place}) * {n} + tl.arange(0, {n})[{slots}]"
    out_place = "0"
    for axis, n in enumerate(out_shape):
        slots = ", ".join(":" if k == axis else "None" for k in range(len(out_shape)))
        out_place = f"({out_place}) * {n} + tl.arange(0, {n})[{slots}]"
    return module_from(
        f"""@triton.jit
def combine_first(a, b):
    return a


@triton.jit
def combine_product(a, b):
    return a * b


@triton.jit
def kernel(out, x_ptr):
    x = tl.load(x_ptr + {place})
    tl.store(out + {out_place}, {expression})
"""
    ).kernel


def run_reduce(buffers, expression, x, dtype, out_shape, out_dtype):
    """Reduce an array by an expression of `x`."""
    out = buffers.empty(out_shape, out_dtype)
    reduce_kernel(expression, x.ndim, x.shape, out_shape)[(1,)](out, buffers.put(x, dtype))
    return out


def reduced(op, x, axis, dtype):
    """Return the reference of a simple reduction: integers in at least 32 bits, floats in float64."""
    if op in ("max", "min"):
        return getattr(np, op)(x, axis=axis)
    if op in INDEXED:
        return getattr(np, op)(x, axis=axis).astype(np.int32)
    if is_float(dtype):
        return x.astype(np.float64).sum(axis=axis)
    wide = np.dtype(dtype if x.itemsize >= 4 else ("uint32" if dtype.startswith("u") else "int32"))
    return x.astype(wide).sum(axis=axis, dtype=wide)


def sum_dtype(dtype):
    """Return the dtype that `sum` of a dtype gives."""
    if is_float(dtype):
        return dtype
    return dtype if dtype[-2:] in ("32", "64") else ("uint32" if dtype.startswith("u") else "int32")


def compare(found, x, op, axis, dtype, sums):
    """Compare a reduction with its reference."""
    expected = reduced(op, x, axis, dtype)
    if op == "sum" and is_float(dtype):
        eps = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "float64": 2**-52}[dtype]
        bound = np.abs(x).astype(np.float64).sum(axis=axis).max() / max(np.abs(expected).max(), 1e-9)
        assert_error_ratio(found, np.asarray(expected), max(2 * np.log2(sums + 1), 2) * eps * max(bound, 1))
    else:
        assert_same(found, np.asarray(expected))


CASES_1D = [
    (op, dtype, ((1, 128), (2, 512), (32, 1024), (4, 64))[(row + column) % 4][large])
    for row, op in enumerate((*SIMPLE, *INDEXED))
    for column, dtype in enumerate(NUMBERS)
    for large in (0, 1)
]


@pytest.mark.parametrize(("op", "dtype", "size"), CASES_1D)
def test_reduce_1d(op, dtype, size, rng, buffers, covers):
    """A vector reduces to a scalar; small integers are summed in 32 bits."""
    covers(op, dtype)
    x = random_values(rng, size, dtype, *((-1000, 1000) if INTERPRETED else ()))
    out_dtype = "int32" if op in INDEXED else sum_dtype(dtype) if op == "sum" else dtype
    found = run_reduce(buffers, f"tl.{op}(x, axis=0)", x, dtype, (), out_dtype)
    compare(found, x, op, 0, dtype, size)


def with_axes(operations, shapes):
    """Return (operation, shape, axis) for all, without those that want an index and have no axis."""
    return [(op, shape, axis) for op in operations for shape, axis in shapes if axis is not None or op not in INDEXED]


SHAPES_2D = [((8, 64), 0), ((8, 64), 1), ((64, 4), 0), ((64, 4), 1), ((1, 128), 0), ((128, 1), 1), ((32, 32), None)]


@pytest.mark.parametrize(("op", "shape", "axis"), with_axes((*SIMPLE, *INDEXED), SHAPES_2D))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "uint32", "int64", "float64"])
def test_reduce_2d(op, dtype, shape, axis, rng, buffers, covers):
    """A matrix reduces along either axis, or to a scalar along none."""
    covers(op, dtype)
    x = random_values(rng, shape, dtype)
    out_shape = () if axis is None else tuple(n for k, n in enumerate(shape) if k != axis)
    out_dtype = "int32" if op in INDEXED else sum_dtype(dtype) if op == "sum" else dtype
    found = run_reduce(buffers, f"tl.{op}(x, axis={axis})", x, dtype, out_shape, out_dtype)
    compare(found, x, op, axis, dtype, x.size if axis is None else shape[axis])


SHAPES_3D = [((4, 8, 16), 0), ((4, 8, 16), 1), ((4, 8, 16), 2), ((2, 4, 8), None), ((2, 2, 32), -1)]


@pytest.mark.parametrize(("op", "shape", "axis"), with_axes(("sum", "max", "argmin"), SHAPES_3D))
def test_reduce_3d(op, shape, axis, rng, buffers, covers):
    """A tensor of rank three reduces along each axis."""
    covers(op, "float32")
    x = random_values(rng, shape, "float32")
    out_shape = () if axis is None else tuple(n for k, n in enumerate(shape) if k != axis % 3)
    out_dtype = "int32" if op in INDEXED else "float32"
    found = run_reduce(buffers, f"tl.{op}(x, axis={axis})", x, "float32", out_shape, out_dtype)
    compare(found, x, op, axis, "float32", x.size)


SHAPES_KEPT = [((8, 32), 0), ((8, 32), 1), ((32,), 0), ((4, 4, 8), 1), ((8, 32), None)]


@pytest.mark.parametrize(("op", "shape", "axis"), with_axes(("sum", "max", "argmax"), SHAPES_KEPT))
def test_keep_dims(op, shape, axis, rng, buffers, covers):
    """`keep_dims` leaves a dimension of one in place of the axis."""
    covers(f"{op} keep_dims", "int32")
    x = random_values(rng, shape, "int32", -1000, 1000)
    out_shape = tuple(1 if axis in (None, k) else n for k, n in enumerate(shape))
    found = run_reduce(buffers, f"tl.{op}(x, axis={axis}, keep_dims=True)", x, "int32", out_shape, "int32")
    assert_same(found.reshape(-1), np.asarray(reduced(op, x, axis, "int32")).reshape(-1))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_bit_reductions(dtype, rng, buffers, covers):
    """`xor_sum` and `reduce_or` combine the bits of integers."""
    covers("xor_sum reduce_or", dtype)
    x = random_values(rng, (8, 32), dtype)
    found = run_reduce(buffers, "tl.xor_sum(x, axis=1)", x, dtype, (8,), dtype)
    assert_same(found, np.bitwise_xor.reduce(x, axis=1))
    found = run_reduce(buffers, "tl.reduce_or(x, axis=0)", x, dtype, (32,), dtype)
    assert_same(found, np.bitwise_or.reduce(x, axis=0))


@pytest.mark.parametrize("dtype", ["float32", "int32", "float64", "uint8"])
@pytest.mark.parametrize("axis", [0, 1])
def test_products(dtype, axis, rng, buffers, covers):
    """`reduce` takes a combiner of the user's."""
    covers("reduce", dtype)
    x = random_values(rng, (8, 16), dtype, *((0.5, 1.5) if is_float(dtype) else (1, 3)))
    out_shape = (16,) if axis == 0 else (8,)
    found = run_reduce(buffers, f"tl.reduce(x, {axis}, combine_product)", x, dtype, out_shape, dtype)
    if is_float(dtype):
        assert_error_ratio(found, np.prod(x.astype(np.float64), axis=axis), 1e-5 if dtype == "float32" else 1e-14)
    else:
        assert_same(found, np.prod(x, axis=axis, dtype=dtype))


@pytest.mark.parametrize("op", INDEXED)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["int8", "float32", "float16", "int64"])
def test_ties_break_left(op, axis, dtype, rng, buffers, covers):
    """Of equal extremes the first index wins, and without the rule any of them."""
    covers(f"{op} ties", dtype)
    x = random_values(rng, (16, 64), "int32", -2, 2).astype(dtype)
    out_shape = (64,) if axis == 0 else (16,)
    found = run_reduce(buffers, f"tl.{op}(x, axis={axis}, tie_break_left=True)", x, dtype, out_shape, "int32")
    assert_same(found, getattr(np, op)(x, axis=axis).astype(np.int32))
    found = run_reduce(buffers, f"tl.{op}(x, axis={axis}, tie_break_left=False)", x, dtype, out_shape, "int32").numpy()
    extreme = np.take_along_axis(x, np.expand_dims(found, axis), axis).squeeze(axis)
    assert_same(extreme, getattr(np, op[3:])(x, axis=axis))


@triton.jit
def max_with_indices_kernel(values, indices, x, M: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    value, index = tl.max(tl.load(x + place), axis=1, return_indices=True, keep_dims=KEEP)
    low, low_index = tl.min(tl.load(x + place), axis=1, return_indices=True, keep_dims=KEEP)
    if KEEP:
        tl.static_assert(value.shape == [M, 1])
    rows = tl.arange(0, M)
    tl.store(values + rows, value.reshape(M))
    tl.store(indices + rows, index.reshape(M))
    tl.store(values + M + rows, low.reshape(M))
    tl.store(indices + M + rows, low_index.reshape(M))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "int16", "bfloat16", "float64"])
def test_extremes_with_indices(keep, dtype, rng, buffers, covers):
    """`max` and `min` return the value and its index together."""
    covers("max return_indices", dtype)
    x = random_values(rng, (8, 64), dtype)
    values, indices = buffers.empty((2, 8), dtype), buffers.empty((2, 8), "int32")
    max_with_indices_kernel[(1,)](values, indices, buffers.put(x, dtype), M=8, N=64, KEEP=keep)
    assert_same(values, np.stack([x.max(1), x.min(1)]))
    assert_same(indices, np.stack([x.argmax(1), x.argmin(1)]).astype(np.int32))


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("place", [0, 5, 63])
def test_extremes_ignore_nan(dtype, place, rng, buffers, covers):
    """`max` and `min` pass over NaN wherever it stands, and over infinities by order."""
    covers("max min with NaN", dtype)
    x = random_values(rng, 64, dtype)
    x[place] = np.nan
    x[10] = -np.inf
    assert_same(run_reduce(buffers, "tl.max(x, axis=0)", x, dtype, (), dtype), np.asarray(np.nanmax(x)))
    assert_same(run_reduce(buffers, "tl.min(x, axis=0)", x, dtype, (), dtype), np.asarray(np.nanmin(x)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sum_propagates_nan_and_infinity(dtype, rng, buffers, covers):
    """A sum with NaN is NaN, and one with an infinity infinite."""
    covers("sum with NaN", dtype)
    x = random_values(rng, (3 + 1, 64), dtype)
    x[0, 7], x[1, 63], x[2, 0], x[2, 9] = np.nan, np.inf, np.inf, -np.inf
    found = run_reduce(buffers, "tl.sum(x, axis=1)", x, dtype, (4,), dtype).numpy()
    assert np.isnan(found[0])
    assert found[1] == np.inf
    assert np.isnan(found[2])
    assert np.isfinite(found[3])


@pytest.mark.compiled
def test_all_equal_to_minus_infinity(buffers, covers):
    """The maximum of a row of minus infinities is minus infinity, and of NaN only is NaN."""
    covers("max min with NaN", "float32")
    x = np.full((2, 32), -np.inf, np.float32)
    x[1] = np.nan
    found = run_reduce(buffers, "tl.max(x, axis=1)", x, "float32", (2,), "float32")
    assert found[0].item() == -np.inf
    assert np.isnan(found[1].item())


@triton.jit
def welford_combine(mean_a, m2_a, weight_a, mean_b, m2_b, weight_b):
    delta = mean_b - mean_a
    weight = weight_a + weight_b
    share = weight_b / weight
    return mean_a + delta * share, m2_a + m2_b + delta * delta * weight_a * share, weight


@triton.jit
def welford_kernel(out, x, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, K: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    value = tl.load(x + place)
    mean, m2, weight = tl.reduce((value, tl.zeros_like(value), value * 0 + 1), AXIS, welford_combine)
    rows = tl.arange(0, K)
    tl.store(out + rows, mean)
    tl.store(out + K + rows, m2)
    tl.store(out + 2 * K + rows, weight)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("m", "n"), [(8, 64), (128, 2), (1, 256), (32, 32)])
def test_welford(axis, m, n, rng, buffers, covers):
    """A combiner of three values gives mean and variance in one reduction."""
    covers("reduce of tuples", "float32")
    x = random_values(rng, (m, n), "float32")
    kept = n if axis == 0 else m
    out = buffers.empty((3, kept), "float32")
    welford_kernel[(1,)](out, buffers.put(x, "float32"), M=m, N=n, AXIS=axis, K=kept)
    wide = x.astype(np.float64)
    assert_error_ratio(out[0], wide.mean(axis), 1e-5)
    assert (
        np.abs(out[1].numpy() - wide.var(axis) * x.shape[axis]).max() <= 1e-4 * max(1, np.abs(wide).max() ** 2) * x.shape[axis]
    )
    assert_same(out[2], np.full(kept, x.shape[axis], np.float32))


@triton.jit
def pair_combine(value_a, index_a, value_b, index_b):
    keep = (value_a > value_b) | ((value_a == value_b) & (index_a < index_b))
    return tl.where(keep, value_a, value_b), tl.where(keep, index_a, index_b)


@triton.jit
def pair_kernel(values, indices, x, N: tl.constexpr):
    offsets = tl.arange(0, N)
    value, index = tl.reduce((tl.load(x + offsets), offsets.to(tl.int64)), 0, pair_combine)
    tl.store(values, value)
    tl.store(indices, index)


@pytest.mark.parametrize("n", [1, 8, 256])
@pytest.mark.parametrize("dtype", ["int16", "float64", "float32"])
def test_tuples_of_different_dtypes(n, dtype, rng, buffers, covers):
    """The values of a tuple reduction may have different dtypes."""
    covers("reduce of tuples", dtype)
    x = random_values(rng, n, dtype)
    value, index = buffers.empty(1, dtype), buffers.empty(1, "int64")
    pair_kernel[(1,)](value, index, buffers.put(x, dtype), N=n)
    assert_same(value, x.max(keepdims=True))
    assert index.item() == x.argmax()


@triton.jit
def branching_combine(a, b):
    if 1 > 0:  # noqa: SIM108 - a branch of the language
        result = tl.where(a > b, a - b, b - a)
    else:
        result = a
    return tl.maximum(result, tl.maximum(a, b))


@triton.jit
def custom_kernel(out, x, N: tl.constexpr):
    tl.store(out, tl.reduce(tl.load(x + tl.arange(0, N)), 0, branching_combine))


def test_combiner_of_several_operations(rng, buffers, covers):
    """A combiner may have several operations and a compile-time branch."""
    covers("reduce", "int32")
    x = random_values(rng, 64, "int32", 0, 1000)
    out = buffers.empty(1, "int32")
    custom_kernel[(1,)](out, buffers.put(x, "int32"), N=64)
    assert out.item() == x.max()


@triton.jit
def chained_kernel(out, x, M: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    value = tl.load(x + place)
    rows = tl.sum(value, axis=1)
    columns = tl.max(value, axis=0)
    tl.store(out, tl.sum(rows, axis=0))
    tl.store(out + 1, tl.min(columns, axis=0))
    tl.store(out + 2, tl.sum(tl.sum(value, axis=0), axis=0))
    again = tl.sum(value * rows[:, None] + columns[None, :], axis=1)
    tl.store(out + 3 + tl.arange(0, M), again)


@pytest.mark.parametrize(("m", "n"), [(8, 32), (32, 8), (1, 64), (64, 1)])
def test_chained_reductions(m, n, rng, buffers, covers):
    """Results of reductions are reduced again and broadcast back."""
    covers("chained reductions", "int32")
    x = random_values(rng, (m, n), "int32", -100, 100)
    out = buffers.empty(3 + m, "int32")
    chained_kernel[(1,)](out, buffers.put(x, "int32"), M=m, N=n)
    rows, columns = x.sum(1, dtype=np.int32), x.max(0)
    again = (x * rows[:, None] + columns).sum(1, dtype=np.int32)
    assert_same(out, np.concatenate([[x.sum(), columns.min(), x.sum()], again]).astype(np.int32))


@triton.jit
def softmax_kernel(out, x, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < columns
    value = tl.load(x + row * stride + offsets, mask=mask, other=-float("inf"))
    value = value.to(tl.float32)
    shifted = tl.exp(value - tl.max(value, axis=0))
    tl.store(out + row * stride + offsets, shifted / tl.sum(shifted, axis=0), mask=mask)


@pytest.mark.parametrize("columns", [1, 63, 1000, 1024])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_softmax(columns, dtype, rng, buffers, covers):
    """A masked row softmax sums to one and matches the reference."""
    covers("softmax kernel", dtype)
    x = random_values(rng, (5, columns), dtype)
    out = buffers.empty((5, columns), dtype)
    softmax_kernel[(5,)](out, buffers.put(x, dtype), columns, columns, BLOCK=triton.next_power_of_2(columns))
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    assert_error_ratio(out, e / e.sum(1, keepdims=True), {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}[dtype])


def test_softmax_function(rng, buffers, covers):
    """`tl.softmax` works along a dimension."""
    covers("softmax", "float32")
    x = random_values(rng, (8, 32), "float32")
    for axis, text in ((1, "dim=1"), (0, "dim=0"), (1, "dim=1, ieee_rounding=True")):
        keep = ", keep_dims=True"
        found = run_reduce(buffers, f"tl.softmax(x, {text}{keep})", x, "float32", (8, 32), "float32")
        e = np.exp(x.astype(np.float64))
        assert_error_ratio(found, e / e.sum(axis, keepdims=True), 1e-6)


@pytest.mark.parametrize(
    ("dtype", "total"),
    [("int8", "int64"), ("float16", "float32"), ("int32", "int64"), ("bfloat16", "float32"), ("int1", "int32")],
)
def test_sum_dtypes(dtype, total, rng, buffers, covers):
    """`sum` accumulates in the dtype asked for."""
    covers("sum dtype", dtype)
    x = random_values(rng, 512, dtype)
    found = run_reduce(buffers, f"tl.sum(x, axis=0, dtype=tl.{total})", x, dtype, (), total)
    if is_float(total):
        assert_error_ratio(found, x.astype(np.float64).sum(), 1e-4)
    else:
        assert_same(found, np.asarray(x.sum(dtype=total)))


@triton.jit
def count_kernel(out, x, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets, mask=offsets < n, other=0)
    positive = value > 0
    tl.store(out, tl.sum(positive.to(tl.int32), axis=0))
    tl.store(out + 1, tl.sum(tl.where(positive, 1, 0), axis=0))
    tl.store(out + 2, tl.max(offsets * positive, axis=0))


def test_reductions_of_comparisons(rng, buffers, covers):
    """Comparisons are counted as ones."""
    covers("sum", "int1")
    x = random_values(rng, 100, "float32")
    out = buffers.empty(3, "int32")
    count_kernel[(1,)](out, buffers.put(x, "float32"), 100, BLOCK=128)
    count = (x > 0).sum()
    assert out.tolist() == [count, count, np.nonzero(x > 0)[0].max()]


@triton.jit
def loop_reduce_kernel(out, x, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    running = 0.0
    for start in range(0, n, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        value = tl.load(x + offsets, mask=offsets < n, other=0.0)
        total += value
        best = tl.maximum(best, tl.where(offsets < n, value, -float("inf")))
        running += tl.sum(value, axis=0)
    tl.store(out, tl.sum(total, axis=0))
    tl.store(out + 1, tl.max(best, axis=0))
    tl.store(out + 2, running)


@pytest.mark.parametrize("n", [1, 63, 1000])
def test_reductions_over_loops(n, rng, buffers, covers):
    """A loop accumulates blocks that a reduction finishes."""
    covers("reduction loops", "float32")
    x, out = random_values(rng, n, "float32"), buffers.empty(3, "float32")
    loop_reduce_kernel[(1,)](out, buffers.put(x, "float32"), n, BLOCK=64)
    total = x.astype(np.float64).sum()
    bound = 1e-6 * np.abs(x).sum() + 1e-7
    assert abs(out[0].item() - total) <= bound
    assert out[1].item() == x.max()
    assert abs(out[2].item() - total) <= bound


@triton.jit
def moments_kernel(out, x, weight, rows, columns, eps, M: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * M + tl.arange(0, M)
    j = tl.arange(0, N)
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    value = tl.load(x + i[:, None] * columns + j[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=1) / columns
    centred = tl.where(mask, value - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / columns + eps)
    w = tl.load(weight + j, mask=j < columns, other=0.0).to(tl.float32)
    tl.store(out + i[:, None] * columns + j[None, :], centred * scale[:, None] * w[None, :], mask=mask)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "columns"), [(7, 63), (33, 100), (1, 1)])
def test_layer_norm(dtype, rows, columns, rng, buffers, covers):
    """Two reductions in a row over masked tiles give a layer norm."""
    covers("layer norm kernel", dtype)
    x, w = random_values(rng, (rows, columns), dtype), random_values(rng, columns, dtype)
    out = buffers.empty((rows, columns), dtype)
    moments_kernel[(triton.cdiv(rows, 4),)](out, buffers.put(x, dtype), buffers.put(w, dtype), rows, columns, 1e-5, M=4, N=128)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(1, keepdims=True)
    expected = centred / np.sqrt(wide.var(1, keepdims=True) + 1e-5) * w
    assert np.abs(out.double().numpy() - expected).max() <= {"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}[dtype]
