"""`tl.dot_scaled`: formats, scales, packing, layouts, accumulators, batches and loops."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conformance_numbers import assert_error_ratio, random_values

pytestmark = pytest.mark.compiled

DTYPES = {"e2m1": "uint8", "e4m3": "float8e4nv", "e5m2": "float8e5", "bf16": "bfloat16", "fp16": "float16"}
FORMATS = tuple(DTYPES)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LIMIT = 1e-5


@triton.jit
def kernel(
    out, x_ptr, x_scale, y_ptr, y_scale, z_ptr, stride_xm, stride_xk, stride_yk, stride_yn,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, X_ROWS: tl.constexpr, X_COLUMNS: tl.constexpr,
    Y_ROWS: tl.constexpr, Y_COLUMNS: tl.constexpr, X_FORMAT: tl.constexpr, Y_FORMAT: tl.constexpr,
    X_ALONG_K: tl.constexpr = True, Y_ALONG_K: tl.constexpr = True, GROUP: tl.constexpr = 32, FAST: tl.constexpr = False,
):  # fmt: skip
    groups = tl.arange(0, K // GROUP)[None, :]
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[:, None]
    x = tl.load(x_ptr + tl.arange(0, X_ROWS)[:, None] * stride_xm + tl.arange(0, X_COLUMNS)[None, :] * stride_xk)
    y = tl.load(y_ptr + tl.arange(0, Y_ROWS)[:, None] * stride_yk + tl.arange(0, Y_COLUMNS)[None, :] * stride_yn)
    if x_scale is not None:
        x_scale = tl.load(x_scale + m * (K // GROUP) + groups)
    if y_scale is not None:
        y_scale = tl.load(y_scale + n * (K // GROUP) + groups)
    place = m * N + tl.arange(0, N)[None, :]
    if z_ptr is not None:
        z_ptr = tl.load(z_ptr + place)
    result = tl.dot_scaled(x, x_scale, X_FORMAT, y, y_scale, Y_FORMAT, acc=z_ptr, fast_math=FAST,
                           lhs_k_pack=X_ALONG_K, rhs_k_pack=Y_ALONG_K)  # fmt: skip
    tl.store(out + place, result)


def pack(codes, axis):
    """Return 4-bit codes two to a byte along an axis, the first one in the lower half."""
    low, high = (np.take(codes, range(start, codes.shape[axis], 2), axis) for start in (0, 1))
    return (low | high << 4).astype(np.uint8)


def operand(rng, shape, form, axis):
    """Return random numbers of a format as they are stored, packed along `axis` where they are, and in float64."""
    if form != "e2m1":
        values = random_values(rng, shape, DTYPES[form])
        return values, values.astype(np.float64)
    codes = rng.integers(0, 16, shape)
    return pack(codes, axis), np.where(codes & 8, -1, 1) * E2M1[codes & 7]


def random_scales(rng, rows, groups):
    """Return exponents, and the powers of two that they stand for, for each element of K."""
    scales = rng.integers(120, 134, (rows, groups))
    return scales.astype(np.uint8), np.repeat(2.0 ** (scales - 127), 32, axis=1)


def run(buffers, rng, x_form, y_form, m=32, n=32, k=64, x_scaled=True, y_scaled=True, z=None, x_transposed=False,
        y_transposed=False, **options):  # fmt: skip
    """Return the result of the kernel on random operands, and what it should be."""
    x, x_values = operand(rng, (m, k), x_form, int(options.get("X_ALONG_K", True)))
    y, y_values = operand(rng, (k, n), y_form, int(not options.get("Y_ALONG_K", True)))
    scales: list[torch.Tensor | None] = [None, None]
    if x_scaled:
        stored, factors = random_scales(rng, m, k // 32)
        scales[0], x_values = buffers.put(stored, "uint8"), x_values * factors
    if y_scaled:
        stored, factors = random_scales(rng, n, k // 32)
        scales[1], y_values = buffers.put(stored, "uint8"), y_values * factors.T
    a, b = (
        buffers.put(np.ascontiguousarray(t.T), DTYPES[form]).T if transposed else buffers.put(t, DTYPES[form])
        for t, form, transposed in ((x, x_form, x_transposed), (y, y_form, y_transposed))
    )
    out = buffers.empty((m, n), "float32")
    c = None if z is None else buffers.put(z, "float32")
    kernel[(1,)](out, a, scales[0], b, scales[1], c, *a.stride(), *b.stride(), m, n, k, *a.shape, *b.shape,
                 x_form, y_form, **options)  # fmt: skip
    return out, x_values @ y_values + (0 if z is None else z)


@pytest.mark.parametrize("y_form", FORMATS)
@pytest.mark.parametrize("x_form", FORMATS)
def test_formats(x_form, y_form, rng, buffers, covers):
    """Every format is multiplied with every other."""
    covers("dot_scaled", DTYPES[x_form], DTYPES[y_form])
    found, expected = run(buffers, rng, x_form, y_form)
    assert_error_ratio(found, expected, LIMIT)


@pytest.mark.parametrize(("x_scaled", "y_scaled"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("x_form", "y_form"), [("e2m1", "bf16"), ("e4m3", "e2m1"), ("fp16", "e5m2")])
def test_optional_scales(x_form, y_form, x_scaled, y_scaled, rng, buffers, covers):
    """Scales may be left out on either side."""
    covers("dot_scaled without scales", DTYPES[x_form])
    found, expected = run(buffers, rng, x_form, y_form, x_scaled=x_scaled, y_scaled=y_scaled)
    assert_error_ratio(found, expected, LIMIT)


@pytest.mark.parametrize("x_transposed", [False, True])
@pytest.mark.parametrize("y_transposed", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(16, 64, 32), (64, 16, 128), (128, 128, 64), (1, 16, 32), (4, 2, 64)])
@pytest.mark.parametrize(("x_form", "y_form"), [("e2m1", "e4m3"), ("e5m2", "e2m1"), ("e2m1", "e2m1")])
def test_shapes_and_layouts(x_form, y_form, m, n, k, x_transposed, y_transposed, rng, buffers, covers):
    """Operands of any shape may lie transposed in memory."""
    covers("dot_scaled transposed", DTYPES[x_form], DTYPES[y_form])
    found, expected = run(buffers, rng, x_form, y_form, m, n, k, x_transposed=x_transposed, y_transposed=y_transposed)
    assert_error_ratio(found, expected, LIMIT)


@pytest.mark.parametrize("y_transposed", [False, True])
@pytest.mark.parametrize(("x_along_k", "y_along_k"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize(("m", "n", "k"), [(32, 64, 64), (2, 16, 32)])
def test_packing_along_the_other_dimension(m, n, k, x_along_k, y_along_k, y_transposed, rng, buffers, covers):
    """4-bit floats may be packed along M or N."""
    covers("dot_scaled packed along M, N", "uint8")
    found, expected = run(
        buffers, rng, "e2m1", "e2m1", m, n, k, y_transposed=y_transposed, X_ALONG_K=x_along_k, Y_ALONG_K=y_along_k
    )
    assert_error_ratio(found, expected, LIMIT)


def test_accumulator(rng, buffers, covers):
    """The product is added to an accumulator."""
    covers("dot_scaled acc", "float32")
    z = random_values(rng, (32, 32), "float32")
    found, expected = run(buffers, rng, "e4m3", "e2m1", z=z, FAST=True)
    assert_error_ratio(found, expected, LIMIT)


def test_extreme_scales(buffers, covers):
    """A scale of 0xFF makes its group NaN, one of 0 is 2^-127, and products of large and small scales are exact."""
    covers("dot_scaled extreme scales", "uint8")
    ones = buffers.put(np.full((32, 64), 0x22), "uint8")
    right = buffers.put(np.full((128, 16), 1.0), "bfloat16")
    scales = np.full((32, 4), 127)
    scales[3, 2], scales[5], scales[6], scales[7, 0] = 0xFF, 0, 254, 128
    factors = buffers.put(np.full((16, 4), 127), "uint8")
    out = buffers.empty((32, 16), "float32")
    for form, x in (("e2m1", ones), ("e4m3", buffers.put(np.ones((32, 128)), "float8e4nv"))):
        kernel[(1,)](out, x, buffers.put(scales, "uint8"), right, factors, None, *x.stride(), *right.stride(), 32, 16, 128,
                     *x.shape, *right.shape, form, "bf16")  # fmt: skip
        found = out.numpy()
        assert np.isnan(found[3]).all()
        assert np.isfinite(np.delete(found, [3, 6], axis=0)).all()
        assert (found[5] == 2.0**-120).all()
        assert (found[6] == np.inf).all()
        assert (found[7] == 160).all()
        assert (found[8:] == 128).all()


def test_every_code(buffers, covers):
    """Each code of each 8-bit or 4-bit format has its value, infinities and NaN included."""
    covers("dot_scaled codes", "uint8")
    identity = buffers.put(np.eye(32), "bfloat16")
    scales = buffers.put(np.full((16, 1), 130), "uint8")
    for form, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2), ("e2m1", None)):
        codes = (np.arange(512) % (256 if dtype else 16)).reshape(16, 32).astype(np.uint8)
        x = buffers.put(codes if dtype else pack(codes, 1), "uint8")
        exact = torch.from_numpy(codes).view(dtype).double().numpy() if dtype else np.where(codes & 8, -1, 1) * E2M1[codes & 7]
        out = buffers.empty((16, 32), "float32")
        kernel[(1,)](out, x, scales, identity, None, None, *x.stride(), 32, 1, 16, 32, 32, *x.shape, 32, 32,
                     form, "bf16")  # fmt: skip
        # Infinities and NaN spoil the rest of their rows, as they are multiplied by zeros.
        finite = np.isfinite(exact).all(1)
        np.testing.assert_array_equal(out.numpy()[finite], exact[finite] * 8)
        assert not np.isfinite(out.numpy()[~finite]).any()


@triton.jit
def batched_kernel(out, x, x_scale, y, y_scale, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    b = tl.arange(0, B)[:, None, None]
    m, n = tl.arange(0, M)[None, :, None], tl.arange(0, N)[None, None, :]
    left = tl.load(x + b * M * K // 2 + m * (K // 2) + tl.arange(0, K // 2)[None, None, :])
    right = tl.load(y + b * K * N + tl.arange(0, K)[None, :, None] * N + n)
    groups = tl.arange(0, K // 32)[None, None, :]
    left_scale = tl.load(x_scale + b * M * (K // 32) + m * (K // 32) + groups)
    right_scale = tl.load(y_scale + b * N * (K // 32) + tl.arange(0, N)[None, :, None] * (K // 32) + groups)
    tl.store(out + b * M * N + m * N + n, tl.dot_scaled(left, left_scale, "e2m1", right, right_scale, "e4m3"))


@pytest.mark.since("3.7")
@pytest.mark.parametrize(("b", "m", "n", "k"), [(1, 16, 16, 32), (2, 32, 16, 64), (4, 16, 32, 32)])
def test_batches(b, m, n, k, rng, buffers, covers):
    """Tensors of rank three are multiplied matrix by matrix."""
    covers("dot_scaled 3d", "uint8", "float8e4nv")
    x, x_values = operand(rng, (b, m, k), "e2m1", 2)
    y, y_values = operand(rng, (b, k, n), "e4m3", 1)
    x_scales, x_factors = random_scales(rng, b * m, k // 32)
    y_scales, y_factors = random_scales(rng, b * n, k // 32)
    out = buffers.empty((b, m, n), "float32")
    batched_kernel[(1,)](out, buffers.put(x, "uint8"), buffers.put(x_scales, "uint8"), buffers.put(y, "float8e4nv"),
                         buffers.put(y_scales, "uint8"), b, m, n, k)  # fmt: skip
    y_factors = y_factors.reshape(b, n, k).swapaxes(1, 2)
    assert_error_ratio(out, (x_values * x_factors.reshape(b, m, k)) @ (y_values * y_factors), LIMIT)


@triton.jit
def matmul_kernel(out, x, x_scale, y, y_scale, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, half, group = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // 32)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(x + m[:, None] * K + (start + k)[None, :], mask=(m < M)[:, None], other=0.0)
        right = tl.load(y + n[None, :] * (K // 2) + (start // 2 + half)[:, None], mask=(n < N)[None, :], other=0)
        left_scale = tl.load(x_scale + m[:, None] * (K // 32) + (start // 32 + group)[None, :], mask=(m < M)[:, None], other=0)
        right_scale = tl.load(y_scale + n[:, None] * (K // 32) + (start // 32 + group)[None, :], mask=(n < N)[:, None], other=0)
        total = tl.dot_scaled(left, left_scale, "e5m2", right, right_scale, "e2m1", acc=total)
    tl.store(out + m[:, None] * N + n[None, :], total, mask=(m < M)[:, None] & (n < N)[None, :])


@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 128), (33, 100, 256), (1, 63, 64)])
def test_matmul_kernel(m, n, k, rng, buffers, covers):
    """A tiled product of microscaled matrices with ragged edges accumulates over a loop."""
    covers("dot_scaled matmul kernel", "float8e5", "uint8")
    x, x_values = operand(rng, (m, k), "e5m2", 1)
    y, y_values = operand(rng, (n, k), "e2m1", 1)
    x_scales, x_factors = random_scales(rng, m, k // 32)
    y_scales, y_factors = random_scales(rng, n, k // 32)
    out = buffers.empty((m, n), "float32")
    matmul_kernel[(triton.cdiv(m, 32), triton.cdiv(n, 32))](
        out, buffers.put(x, "float8e5"), buffers.put(x_scales, "uint8"), buffers.put(y, "uint8"),
        buffers.put(y_scales, "uint8"), m, n, k, BLOCK_M=32, BLOCK_N=32, BLOCK_K=64,
    )  # fmt: skip
    assert_error_ratio(out, (x_values * x_factors) @ (y_values * y_factors).T, LIMIT)


def test_eight_bit_float_scales(rng, buffers, covers):
    """Scales in e4m3 are numbers, one for 16 elements."""
    covers("dot_scaled with e4m3 scales", "uint8")
    x, x_values = operand(rng, (32, 64), "e2m1", 1)
    y, y_values = operand(rng, (64, 16), "e2m1", 0)
    scales = [random_values(rng, (rows, 4), "float8e4nv", 0.25, 4) for rows in (32, 16)]
    x_factors, y_factors = (np.repeat(s.astype(np.float64), 16, axis=1) for s in scales)
    a, b = buffers.put(x, "uint8"), buffers.put(y, "uint8")
    out = buffers.empty((32, 16), "float32")
    stored = [buffers.put(s, "float8e4nv") for s in scales]
    kernel[(1,)](out, a, stored[0], b, stored[1], None, *a.stride(), *b.stride(), 32, 16, 64, *a.shape, *b.shape,
                 "e2m1", "e2m1", GROUP=16)  # fmt: skip
    assert_error_ratio(out, (x_values * x_factors) @ (y_values * y_factors.T), LIMIT)
