"""Matrix products: dtypes, shapes, transposes, accumulators, epilogues, chains, batches and whole kernels."""

import math

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import assert_error_ratio, assert_same, random_values

EPSILON = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-22, "float64": 2**-50}

SOURCE = """@triton.jit
def kernel(out, x_ptr, y_ptr, z_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + {x_place})
    y = tl.load(y_ptr + {y_place})
    place = m[:, None] * N + n[None, :]
    {body}
    tl.store(out + place, result)
"""
PLACES = {
    "x": "m[:, None] * K + k[None, :]",
    "xt": "k[None, :] * M + m[:, None]",
    "y": "k[:, None] * N + n[None, :]",
    "yt": "n[None, :] * K + k[:, None]",
}


def run_dot(buffers, x, y, dtype, out_dtype, body="result = tl.dot(x, y)", z=None, x_place="x", y_place="y", **options):
    """Multiply matrices that are stored row-major, or transposed, by a kernel body that sets `result`."""
    kernel = module_from(
        SOURCE.format(x_place=PLACES[x_place], y_place=PLACES[y_place], body=body.replace("\n", "\n    "))
    ).kernel
    out = buffers.empty((x.shape[0], y.shape[1]), out_dtype)
    a = buffers.put(x if x_place == "x" else np.ascontiguousarray(x.T), dtype)
    b = buffers.put(y if y_place == "y" else np.ascontiguousarray(y.T), dtype)
    c = buffers.put(np.zeros(1) if z is None else z, "float32" if z is None or z.dtype.kind == "f" else "int32")
    kernel[(1,)](out, a, b, c, M=x.shape[0], N=y.shape[1], K=x.shape[1], **options)
    return out


def product(x, y):
    """Return the product in float64."""
    return x.astype(np.float64) @ y.astype(np.float64)


SHAPES = [(16, 16, 16), (32, 16, 64), (64, 64, 64), (16, 128, 32), (128, 32, 16), (64, 128, 16), (128, 128, 64)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dot(dtype, m, n, k, rng, buffers, covers):
    """A product accumulates in float32, or in float64 for float64."""
    covers("dot", dtype)
    x, y = random_values(rng, (m, k), dtype), random_values(rng, (k, n), dtype)
    total = "float64" if dtype == "float64" else "float32"
    form = "tl.dot(x, y, out_dtype=tl.float64)" if total == "float64" else "tl.dot(x, y, input_precision='ieee')"
    found = run_dot(buffers, x, y, dtype, total, f"result = {form}")
    assert_error_ratio(found, product(x, y), EPSILON[total] * math.sqrt(k))


@pytest.mark.parametrize(("m", "n", "k"), [(16, 16, 32), (32, 32, 32), (64, 16, 128), (16, 64, 64)])
def test_integer_dot(m, n, k, rng, buffers, covers):
    """A product of int8 accumulates exactly in int32, at the extremes too."""
    covers("dot", "int8")
    x, y = random_values(rng, (m, k), "int8"), random_values(rng, (k, n), "int8")
    x[0], y[:, 0] = -128, -128
    found = run_dot(buffers, x, y, "int8", "int32", "result = tl.dot(x, y, out_dtype=tl.int32)")
    assert_same(found, x.astype(np.int32) @ y.astype(np.int32))


def test_unsigned_integer_dot(rng, buffers, covers):
    """A product of int8 tiles takes an int32 accumulator."""
    covers("dot acc", "int8")
    x, y, z = (
        random_values(rng, (16, 32), "int8"),
        random_values(rng, (32, 16), "int8"),
        random_values(rng, (16, 16), "int32", -9999, 9999),
    )
    found = run_dot(
        buffers, x, y, "int8", "int32", "result = tl.dot(x, y, acc=tl.load(z_ptr + place), out_dtype=tl.int32)", z=z
    )
    assert_same(found, x.astype(np.int32) @ y.astype(np.int32) + z)


@pytest.mark.parametrize("x_place", ["x", "xt"])
@pytest.mark.parametrize("y_place", ["y", "yt"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("m", "n", "k"), [(32, 64, 32), (16, 16, 64)])
def test_stored_transposed(dtype, x_place, y_place, m, n, k, rng, buffers, covers):
    """Operands may lie transposed in memory."""
    covers("dot transposed", dtype)
    x, y = random_values(rng, (m, k), dtype), random_values(rng, (k, n), dtype)
    total = "int32" if dtype == "int8" else "float32"
    body = f"result = tl.dot(x, y, input_precision='ieee', out_dtype=tl.{total})"
    found = run_dot(buffers, x, y, dtype, total, body, x_place=x_place, y_place=y_place)
    if dtype == "int8":
        assert_same(found, x.astype(np.int32) @ y.astype(np.int32))
    else:
        assert_error_ratio(found, product(x, y), 1e-5)


def softmax(values):
    """Return the softmax of the rows."""
    e = np.exp(values - values.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


EPILOGUES = {
    "acc": ("result = tl.dot(x, y, acc=tl.load(z_ptr + place))", lambda p, z: p + z),
    "acc positional": ("result = tl.dot(x, y, tl.load(z_ptr + place))", lambda p, z: p + z),
    "add matrix": ("result = tl.dot(x, y) + tl.load(z_ptr + place)", lambda p, z: p + z),
    "add rows": ("result = tl.dot(x, y) + tl.load(z_ptr + m * N)[:, None]", lambda p, z: p + z[:, :1]),
    "add columns": ("result = tl.dot(x, y) + tl.load(z_ptr + n)[None, :]", lambda p, z: p + z[:1]),
    "add equals": ("result = tl.load(z_ptr + place)\nresult += tl.dot(x, y)", lambda p, z: p + z),
    "scale": ("result = tl.dot(x, y) * 0.125 - 1.0", lambda p, z: p * 0.125 - 1),
    "relu": (
        "result = tl.dot(x, y)\nresult = tl.where(result > 0, result, 0.01 * result)",
        lambda p, z: np.where(p > 0, p, 0.01 * p),
    ),
    "softmax": (
        "t = tl.dot(x, y)\nt = t - tl.max(t, axis=1)[:, None]\ne = tl.exp(t)\nresult = e / tl.sum(e, axis=1)[:, None]",
        lambda p, z: softmax(p),
    ),
    "row maxima": ("t = tl.dot(x, y)\nresult = t - tl.max(t, axis=0)[None, :]", lambda p, z: p - p.max(0)),
    "twice": ("t = tl.dot(x, y)\nresult = t * t + t", lambda p, z: p * p + p),
    "transposed": ("result = tl.reshape(tl.trans(tl.dot(x, y)), (M, N))", lambda p, z: p.T.reshape(p.shape)),
    "chain": (
        "t = tl.dot(x, y)\nw = tl.load(z_ptr + n[:, None] * N + n[None, :])\nresult = tl.dot(t, w, input_precision='ieee')",
        lambda p, z: p @ z,
    ),
    "prologue": ("result = tl.dot(x * 2 + 1, tl.where(y > 0, y, 0))", None),
    "cast in": ("result = tl.dot(x.to(tl.float16), y.to(tl.float16))", None),
    "out half": ("result = tl.dot(x.to(tl.float16), y.to(tl.float16), out_dtype=tl.float16)", None),
    "same operand": ("result = tl.dot(x, tl.trans(x))", None),
}


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize(("m", "n", "k"), [(32, 32, 32), (64, 64, 16)])
def test_prologues_and_epilogues(name, m, n, k, rng, buffers, covers):
    """A product takes computed operands, adds to accumulators and feeds any further work."""
    covers(f"dot: {name}", "float32")
    body, reference = EPILOGUES[name]
    x, y = random_values(rng, (m, k), "float32") / 8, random_values(rng, (k, n), "float32") / 8
    z = random_values(rng, (max(m, n), n), "float32")
    limit = 1e-5
    if name == "prologue":
        expected = product(x * 2 + 1, np.maximum(y, 0))
    elif name in ("cast in", "out half"):
        expected, limit = product(x.astype(np.float16), y.astype(np.float16)), 1e-2 if name == "out half" else 1e-5
    elif name == "same operand":
        y = np.zeros((k, m), np.float32)
        expected = product(x, x.T)
    elif name == "chain":
        z = z[:n]
        expected = reference(product(x, y), z.astype(np.float64))
    else:
        z = z[:m]
        expected = reference(product(x, y), z.astype(np.float64))
    body = body.replace("tl.dot(x, y)", "tl.dot(x, y, input_precision='ieee')")
    found = run_dot(buffers, x, y, "float32", "float16" if name == "out half" else "float32", body, z=z)
    assert_error_ratio(found, expected, limit)


@pytest.mark.compiled
@pytest.mark.parametrize(
    "options",
    [
        "input_precision='tf32'",
        "input_precision='tf32x3'",
        "input_precision='ieee'",
        "allow_tf32=False",
        "max_num_imprecise_acc=0",
    ],
)
def test_precision_options(options, rng, buffers, covers):
    """Every precision option is accepted and is at least as accurate as it says."""
    covers("dot precision", "float32")
    x, y = random_values(rng, (32, 32), "float32"), random_values(rng, (32, 32), "float32")
    found = run_dot(buffers, x, y, "float32", "float32", f"result = tl.dot(x, y, {options})")
    assert_error_ratio(found, product(x, y), 2e-3 if "'tf32'" in options else 1e-5)


def test_nan_and_infinity_in_dot(rng, buffers, covers):
    """NaN and infinity in an operand reach exactly the results that use them."""
    covers("dot with NaN", "float32")
    x, y = random_values(rng, (32, 32), "float32"), random_values(rng, (32, 32), "float32", 0.5, 1)
    x[3, 5], x[7, 1] = np.nan, np.inf
    found = run_dot(buffers, x, y, "float32", "float32").numpy()
    assert np.isnan(found[3]).all()
    assert (found[7] == np.inf).all()
    assert np.isfinite(np.delete(found, [3, 7], axis=0)).all()


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 16, 16), (16, 1, 16), (16, 16, 1), (2, 8, 4), (8, 8, 8), (4, 64, 256), (1, 128, 64)]
)
def test_small_dots(m, n, k, rng, buffers, covers):
    """Sides below 16 multiply too."""
    covers("dot small", "float32")
    x, y = random_values(rng, (m, k), "float32"), random_values(rng, (k, n), "float32")
    found = run_dot(buffers, x, y, "float32", "float32")
    assert_error_ratio(found, product(x, y), 1e-5)


@triton.jit
def batched_kernel(out, x, y, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TYPE: tl.constexpr):
    b = tl.arange(0, B)[:, None, None]
    m, n = tl.arange(0, M)[None, :, None], tl.arange(0, N)[None, None, :]
    left = tl.load(x + b * M * K + m * K + tl.arange(0, K)[None, None, :])
    right = tl.load(y + b * K * N + tl.arange(0, K)[None, :, None] * N + n)
    tl.store(out + b * M * N + m * N + n, tl.dot(left, right, input_precision="ieee", out_dtype=TYPE))


@pytest.mark.parametrize(("b", "m", "n", "k"), [(1, 16, 16, 16), (2, 32, 16, 32), (4, 16, 64, 16), (8, 16, 16, 16)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_batched_dot(dtype, b, m, n, k, rng, buffers, covers):
    """A product of rank-three tensors multiplies matrix by matrix."""
    covers("dot 3d", dtype)
    k = max(k, 32) if dtype == "int8" else k
    x, y = random_values(rng, (b, m, k), dtype), random_values(rng, (b, k, n), dtype)
    total = "int32" if dtype == "int8" else "float32"
    out = buffers.empty((b, m, n), total)
    batched_kernel[(1,)](out, buffers.put(x, dtype), buffers.put(y, dtype), B=b, M=m, N=n, K=k, TYPE=getattr(tl, total))
    if dtype == "int8":
        assert_same(out, x.astype(np.int32) @ y.astype(np.int32))
    else:
        assert_error_ratio(out, product(x, y), 1e-5)


@triton.jit
def matmul_kernel(
    a, b, c, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WRAP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    in_group = GROUP * tiles_n
    first = program // in_group * GROUP
    rows = min(tiles_m - first, GROUP)
    tile_m = first + (program % in_group) % rows
    tile_n = (program % in_group) // rows
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if WRAP:
        a_place = a + (m % M)[:, None] * stride_am + k[None, :] * stride_ak
        b_place = b + k[:, None] * stride_bk + (n % N)[None, :] * stride_bn
    else:
        a_place = a + m[:, None] * stride_am + k[None, :] * stride_ak
        b_place = b + k[:, None] * stride_bk + n[None, :] * stride_bn
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        inside = k < K - step * BLOCK_K
        if WRAP:
            left = tl.load(a_place, mask=inside[None, :], other=0.0)
            right = tl.load(b_place, mask=inside[:, None], other=0.0)
        else:
            left = tl.load(a_place, mask=inside[None, :] & (m < M)[:, None], other=0.0)
            right = tl.load(b_place, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        a_place += BLOCK_K * stride_ak
        b_place += BLOCK_K * stride_bk
    place = c + m[:, None] * stride_cm + n[None, :] * stride_cn
    tl.store(place, total.to(c.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 64), (1, 63, 100), (100, 65, 33), (130, 200, 96), (63, 1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_matmul_kernel(dtype, m, n, k, wrap, rng, buffers, covers):
    """A tiled product with ragged edges, masks or wrapped indices, and grouped programs."""
    covers("matmul kernel", dtype)
    x, y = random_values(rng, (m, k), dtype), random_values(rng, (k, n), dtype)
    out = buffers.empty((m, n), dtype)
    grid = (triton.cdiv(m, 32) * triton.cdiv(n, 32),)
    matmul_kernel[grid](buffers.put(x, dtype), buffers.put(y, dtype), out, m, n, k, k, 1, n, 1, n, 1,
                        BLOCK_M=32, BLOCK_N=32, BLOCK_K=16, GROUP=2, WRAP=wrap)  # fmt: skip
    assert_error_ratio(out, product(x, y), max(1e-5, EPSILON[dtype] if dtype != "float32" else 0))


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("blocks", [(64, 64, 32), (16, 128, 64), (128, 16, 16)])
def test_matmul_strides(a_transposed, b_transposed, blocks, rng, buffers, covers):
    """A tiled product reads row-major and column-major operands with any tile shape."""
    covers("matmul kernel", "float32")
    m, n, k = 150, 140, 70
    x, y = random_values(rng, (m, k), "float32"), random_values(rng, (k, n), "float32")
    a = buffers.put(np.ascontiguousarray(x.T) if a_transposed else x, "float32")
    b = buffers.put(np.ascontiguousarray(y.T) if b_transposed else y, "float32")
    out = buffers.empty((m, n), "float32")
    grid = (triton.cdiv(m, blocks[0]) * triton.cdiv(n, blocks[1]),)
    a_strides = (1, m) if a_transposed else (k, 1)
    b_strides = (1, k) if b_transposed else (n, 1)
    matmul_kernel[grid](a, b, out, m, n, k, *a_strides, *b_strides, n, 1, BLOCK_M=blocks[0], BLOCK_N=blocks[1],
                        BLOCK_K=blocks[2], GROUP=4, WRAP=False)  # fmt: skip
    assert_error_ratio(out, product(x, y), 1e-5)


@triton.jit
def attention_kernel(
    out, q_ptr, k_ptr, v_ptr, length, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK_M
    base = tl.program_id(1) * length * D
    m, d = start + tl.arange(0, BLOCK_M), tl.arange(0, D)
    q = tl.load(q_ptr + base + m[:, None] * D + d[None, :], mask=(m < length)[:, None], other=0.0)
    total = tl.zeros((BLOCK_M, D), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    stop = min(start + BLOCK_M, length) if CAUSAL else length
    for first in range(0, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + base + n[:, None] * D + d[None, :], mask=(n < length)[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = (n < length)[None, :]
        if CAUSAL:
            seen = seen & (m[:, None] >= n[None, :])
        score = tl.where(seen, score, -1e30)
        new_top = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp(score - new_top[:, None])
        keep = tl.exp(top - new_top)
        weight = weight * keep + tl.sum(p, axis=1)
        v = tl.load(v_ptr + base + n[:, None] * D + d[None, :], mask=(n < length)[:, None], other=0.0)
        total = total * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    total = total / weight[:, None]
    tl.store(out + base + m[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=(m < length)[:, None])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "d", "block_m", "block_n"), [(128, 64, 64, 32), (100, 16, 32, 32), (1, 32, 16, 16), (63, 64, 16, 64)]
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_kernel(dtype, length, d, block_m, block_n, causal, rng, buffers, covers):
    """A streaming attention with two chained products over a loop matches softmax attention."""
    covers("attention kernel", dtype)
    q, k, v = (random_values(rng, (2, length, d), dtype) for _ in range(3))
    out = buffers.empty((2, length, d), dtype)
    scale = 0.3 / math.sqrt(d)
    attention_kernel[(triton.cdiv(length, block_m), 2)](out, *(buffers.put(t, dtype) for t in (q, k, v)), length, scale,
                                                       D=d, BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal)  # fmt: skip
    score = q.astype(np.float64) @ k.astype(np.float64).swapaxes(1, 2) * scale
    if causal:
        score = np.where(np.tril(np.ones((length, length), bool)), score, -np.inf)
    p = np.exp(score - score.max(-1, keepdims=True))
    expected = p / p.sum(-1, keepdims=True) @ v.astype(np.float64)
    assert_error_ratio(out, expected, {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}[dtype])


@triton.jit
def quantised_kernel(out, x, packed, scales, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    k = tl.arange(0, K // 2)
    byte = tl.load(packed + k[:, None] * N + n[None, :])
    low, high = (byte << 4) >> 4, byte >> 4
    scale = tl.load(scales + n)[None, :]
    even = tl.load(x + m[:, None] * K + 2 * k[None, :])
    odd = tl.load(x + m[:, None] * K + 2 * k[None, :] + 1)
    total = tl.dot(even, low.to(tl.float32), input_precision="ieee")
    total = tl.dot(odd, high.to(tl.float32), total, input_precision="ieee")
    tl.store(out + m[:, None] * N + n[None, :], total * scale)


def test_packed_four_bit_weights(rng, buffers, covers):
    """Nibbles are unpacked by shifts and multiplied."""
    covers("int4 matmul kernel", "int8")
    m, n, k = 16, 32, 64
    weights = rng.integers(-8, 8, (k, n))
    packed = ((weights[0::2] & 15) | ((weights[1::2] & 15) << 4)).astype(np.uint8).view(np.int8)
    x, scales = random_values(rng, (m, k), "float32"), random_values(rng, n, "float32")
    out = buffers.empty((m, n), "float32")
    quantised_kernel[(1,)](
        out, buffers.put(x, "float32"), buffers.put(packed, "int8"), buffers.put(scales, "float32"), M=m, N=n, K=k
    )
    assert_error_ratio(out, x.astype(np.float64) @ (weights * scales), 1e-5)


@triton.jit
def two_products_kernel(out, x, y, N: tl.constexpr, STEPS: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(x + place), tl.load(y + place)
    for _ in range(STEPS):
        product = tl.dot(a, b, input_precision="ieee")
        b = tl.trans(a) + b
        a = product * 0.01
    tl.store(out + place, a)
    tl.store(out + N * N + place, b)


def test_products_carried_by_a_loop(rng, buffers, covers):
    """Operands that a loop carries and exchanges are the right ones in every turn."""
    covers("dot in loops", "float32")
    n = 32
    x, y = random_values(rng, (n, n), "float32"), random_values(rng, (n, n), "float32")
    out = buffers.empty((2, n, n), "float32")
    two_products_kernel[(1,)](out, buffers.put(x, "float32"), buffers.put(y, "float32"), N=n, STEPS=3)
    a, b = x.astype(np.float64), y.astype(np.float64)
    for _ in range(3):
        a, b = a @ b * 0.01, a.T + b
    assert_error_ratio(out[0], a, 1e-5)
    assert_error_ratio(out[1], b, 1e-5)


@pytest.mark.compiled
def test_mismatched_operands_are_refused(rng, buffers):
    """Operands of different dtypes or inner sizes are compile-time errors."""
    x, y = np.ones((16, 16), np.float32), np.ones((16, 16), np.float32)
    for body in ("result = tl.dot(x, y.to(tl.float16))", "result = tl.dot(x, tl.trans(tl.reshape(y, (8, 32))))"):
        with pytest.raises(triton.TritonError):
            run_dot(buffers, x, y, "float32", "float32", body)


@triton.jit
def shared_tile_kernel(out, a_ptr, b_ptr, d_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    rows, columns = i[:, None] * N + i[None, :], i[:, None] + i[None, :] * N
    a, b, d = tl.load(a_ptr + columns), tl.load(b_ptr + columns), tl.load(d_ptr + rows)
    tl.store(out + rows, tl.dot(a, b).to(out.dtype.element_ty))
    tl.store(out + N * N + rows, tl.dot(d, a).to(out.dtype.element_ty))
    tl.store(out + 2 * N * N + rows, tl.dot(a, a).to(out.dtype.element_ty))
    tl.store(out + 3 * N * N + rows, tl.dot(tl.trans(a), a).to(out.dtype.element_ty))


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("n", [16, 32, 64])
def test_one_tile_in_several_products(n, dtype, rng, buffers, covers):
    """A tile may be a left operand, a right one, transposed, or both operands, of several products."""
    covers("dot of shared tiles", dtype)
    numbers = [random_values(rng, (n, n), dtype) for _ in range(3)]
    tensors = [buffers.put(x, dtype) for x in numbers]
    out = buffers.empty((4, n, n), "int32" if dtype == "int8" else "float32")
    shared_tile_kernel[(1,)](out, *tensors, N=n)
    a, b, d = (t.double().numpy() for t in tensors)
    a, b = a.T, b.T
    for found, expected in zip(out, (a @ b, d @ a, a @ a, a.T @ a), strict=True):
        assert_error_ratio(found, expected, 1e-5)
