"""What a first backend may leave out: sorts, histograms, gathers, descriptors, float8, ranks above three."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import FLOAT8, as_numpy, assert_error_ratio, assert_same, random_values, round_to, torch_dtype, ulps

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


@triton.jit
def histogram_kernel(out, x, n, M: tl.constexpr, BINS: tl.constexpr, MASKED: tl.constexpr):
    offsets = tl.arange(0, M)
    value = tl.load(x + offsets)
    if MASKED:
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


@pytest.mark.parametrize(("shape", "index_shape", "axis"), [((8, 16), (4, 16), 0), ((8, 16), (8, 64), 1), ((32, 4), (32, 4), 1), ((64, 2), (128, 2), 0)])
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


@triton.jit
def descriptor_kernel(out, x, rows, columns, stride, M: tl.constexpr, N: tl.constexpr):
    source = tl.make_tensor_descriptor(x, shape=[rows, columns], strides=[stride, 1], block_shape=[M, N])
    target = tl.make_tensor_descriptor(out, shape=[rows, columns], strides=[stride, 1], block_shape=[M, N])
    i, j = tl.program_id(0) * M, tl.program_id(1) * N
    target.store([i, j], source.load([i, j]) + 1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int32", "bfloat16"])
@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (37, 50), (1, 1)])
def test_descriptors(dtype, rows, columns, rng, buffers, covers):
    """A descriptor made in the kernel loads zeros outside and stores nothing there."""
    covers("tensor descriptors", dtype)
    stride = 64
    x = random_values(rng, (rows, stride), dtype, -50, 50)
    out = buffers.put(np.zeros((rows, stride)), dtype, writable=True)
    grid = (triton.cdiv(rows, 16), triton.cdiv(columns, 32))
    descriptor_kernel[grid](out, buffers.put(x, dtype), rows, columns, stride, M=16, N=32)
    expected = np.zeros_like(x)
    expected[:, :columns] = round_to(x[:, :columns].astype(np.float64) + 1, dtype) if dtype == "bfloat16" else x[:, :columns] + x.dtype.type(1)
    assert_same(out, expected)


def test_descriptors_from_the_host(rng, buffers, covers):
    """A descriptor made on the host is an argument."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    covers("host tensor descriptors", "float32")
    kernel = module_from(
        """@triton.jit
def kernel(out, descriptor, M: tl.constexpr, N: tl.constexpr):
    value = descriptor.load([tl.program_id(0) * M, 0])
    place = (tl.program_id(0) * M + tl.arange(0, M))[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + place, value * 2)
"""
    ).kernel
    x, out = random_values(rng, (32, 64), "float32"), buffers.empty((32, 64), "float32")
    kernel[(4,)](out, TensorDescriptor.from_tensor(buffers.put(x, "float32"), [8, 64]), M=8, N=64)
    assert_same(out, x * 2)


REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@pytest.mark.parametrize("op", REDUCTIONS)
def test_descriptor_reductions(op, rng, buffers, covers):
    """A descriptor combines a tile with memory atomically."""
    covers(f"descriptor atomic_{op}", "int32")
    kernel = module_from(
        f"""@triton.jit
def kernel(out, x, M: tl.constexpr, N: tl.constexpr):
    target = tl.make_tensor_descriptor(out, shape=[M, N], strides=[N, 1], block_shape=[M, N])
    value = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    target.atomic_{op}([0, 0], value)
"""
    ).kernel
    x, y = random_values(rng, (8, 16), "int32", 0, 99), random_values(rng, (8, 16), "int32", 0, 99)
    out = buffers.put(y, "int32", writable=True)
    kernel[(1,)](out, buffers.put(x, "int32"), M=8, N=16)
    assert_same(out, REDUCTIONS[op](y, x))


def place_of(shape):
    """Return the row-major index of every element of a shape as Triton source."""
    place = "0"
    for axis, n in enumerate(shape):
        slots = ", ".join(":" if k == axis else "None" for k in range(len(shape)))
        place = f"({place}) * {n} + tl.arange(0, {n})[{slots}]"
    return place


@pytest.mark.parametrize("shape", [(2, 4, 2, 8), (2, 2, 4, 2, 4), (1, 2, 1, 2, 1, 4)])
def test_higher_ranks(shape, rng, buffers, covers):
    """Tensors of rank four and more are loaded, broadcast and stored."""
    covers("ranks", str(len(shape)))
    place = place_of(shape)
    kernel = module_from(f"@triton.jit\ndef kernel(out, x):\n    tl.store(out + {place}, tl.load(x + {place}) * 3 - 1)\n").kernel
    x, out = random_values(rng, shape, "int32", -99, 99), buffers.empty(shape, "int32")
    kernel[(1,)](out, buffers.put(x, "int32"))
    assert_same(out, x * 3 - 1)


@pytest.mark.parametrize("axes", [(3, 2, 1, 0), (0, 2, 1, 3), (1, 0, 3, 2), (2, 3, 0, 1)])
def test_permute_rank_four(axes, rng, buffers, covers):
    """Tensors of rank four are permuted."""
    covers("permute", "rank 4")
    shape = (2, 4, 8, 2)
    kernel = module_from(
        f"@triton.jit\ndef kernel(out, x):\n    value = tl.load(x + {place_of(shape)})\n"
        f"    tl.store(out + {place_of(tuple(shape[a] for a in axes))}, tl.permute(value, {axes}))\n"
    ).kernel
    x, out = random_values(rng, shape, "int32"), buffers.empty(tuple(shape[a] for a in axes), "int32")
    kernel[(1,)](out, buffers.put(x, "int32"))
    assert_same(out, x.transpose(axes))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, None])
@pytest.mark.parametrize("op", ["sum", "max"])
def test_reduce_rank_four(axis, op, rng, buffers, covers):
    """Tensors of rank four are reduced."""
    covers(op, "rank 4")
    shape = (2, 4, 8, 2)
    out_shape = () if axis is None else tuple(n for k, n in enumerate(shape) if k != axis)
    kernel = module_from(
        f"@triton.jit\ndef kernel(out, x):\n    value = tl.load(x + {place_of(shape)})\n    tl.store(out + {place_of(out_shape)}, tl.{op}(value, axis={axis}))\n"
    ).kernel
    x, out = random_values(rng, shape, "int32", -99, 99), buffers.empty(out_shape, "int32")
    kernel[(1,)](out, buffers.put(x, "int32"))
    assert_same(out, np.asarray(getattr(np, op)(x, axis=axis)).astype(np.int32))


@triton.jit
def rank_five_kernel(out, x, N: tl.constexpr):
    value = tl.load(x + tl.arange(0, N))
    cube = tl.reshape(value, (2, 2, 2, 2, N // 16))
    tl.store(out + tl.arange(0, N), tl.ravel(tl.permute(cube, (4, 1, 3, 0, 2))))


def test_reshape_to_rank_five(rng, buffers, covers):
    """A vector becomes a tensor of rank five, is permuted and flattened."""
    covers("reshape permute", "rank 5")
    x, out = random_values(rng, 128, "float32"), buffers.empty(128, "float32")
    rank_five_kernel[(1,)](out, buffers.put(x, "float32"), N=128)
    assert_same(out, x.reshape(2, 2, 2, 2, 8).transpose(4, 1, 3, 0, 2).reshape(-1))


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


@pytest.mark.parametrize(("x_type", "y_type"), [("float8e4nv", "float8e4nv"), ("float8e5", "float8e5"), ("float8e4nv", "float8e5")])
def test_float8_dot(x_type, y_type, rng, buffers, covers):
    """A product of float8 accumulates in float32."""
    covers("dot", x_type, y_type)
    x, y = random_values(rng, (32, 64), x_type), random_values(rng, (64, 32), y_type)
    out = buffers.empty((32, 32), "float32")
    dot_kernel[(1,)](out, buffers.put(x, x_type), buffers.put(y, y_type), M=32, N=32, K=64)
    assert_error_ratio(out, x.astype(np.float64) @ y.astype(np.float64), 1e-4)


MAP = """@triton.jit
def order(a, b):
    if a < b:
        return -1
    elif a == b:
        return 0
    else:
        return 1


@triton.jit
def divide(a, b):
    return a // b, a % b


@triton.jit
def kernel(out, x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    tl.store(out + offsets, tl.map_elementwise(order, x, y))
    quotient, remainder = tl.map_elementwise(divide, x, y)
    tl.store(out + BLOCK + offsets, quotient)
    tl.store(out + 2 * BLOCK + offsets, remainder)
"""


@pytest.mark.compiled
def test_map_elementwise(rng, buffers, covers):
    """A function with scalar control flow maps over elements."""
    covers("map_elementwise", "int32")
    x, y = random_values(rng, 64, "int32", 0, 9), random_values(rng, 64, "int32", 1, 9)
    out = buffers.empty(192, "int32")
    module_from(MAP).kernel[(1,)](out, buffers.put(x, "int32"), buffers.put(y, "int32"), BLOCK=64)
    assert_same(out, np.concatenate([np.sign(x - y), x // y, x % y]))
