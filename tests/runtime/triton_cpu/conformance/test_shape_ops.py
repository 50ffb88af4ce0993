"""Shapes: arange, full, broadcast, slices, expand_dims, reshape, trans, permute, join, split, cat, flip."""

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import NUMBERS, assert_same, random_values


def run_shape(buffers, body, x, dtype, out_size, out_dtype=None, y=None):
    """Run a kernel body that turns the flat tensor `x` (and `y`) into a flat `result`."""
    lines = "\n".join("    " + line for line in body.strip().split("\n"))
    second = "    y = tl.load(y_ptr + tl.arange(0, N))\n" if y is not None else ""
    kernel = module_from(
        f"""@triton.jit
def kernel(out, x_ptr, y_ptr, N: tl.constexpr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
{second}{lines}
    tl.store(out + tl.arange(0, SIZE), result)
"""
    ).kernel
    out = buffers.empty(out_size, out_dtype or dtype)
    source = buffers.put(x, dtype)
    kernel[(1,)](out, source, source if y is None else buffers.put(y, dtype), N=len(x), SIZE=out_size)
    return out


@pytest.mark.parametrize(("start", "stop"), [(0, 128), (7, 71), (3, 4), (100, 356), (5, 7)])
def test_arange(start, stop, buffers, covers):
    """`arange` starts anywhere and spans a power of two."""
    covers("arange", "int32")
    n = stop - start
    found = run_shape(buffers, f"result = tl.arange({start}, {stop}) + 0 * x", np.zeros(n, np.int32), "int32", n)
    assert_same(found, np.arange(start, stop, dtype=np.int32))


@pytest.mark.parametrize("dtype", ["int1", *NUMBERS])
def test_full_and_zeros(dtype, buffers, covers):
    """`full`, `zeros` and `zeros_like` fill tensors of any dtype, from numbers and from scalars."""
    covers("full zeros zeros_like", dtype)
    value = 1 if dtype == "int1" else 100
    kernel = module_from(
        f"""@triton.jit
def kernel(out, scalar, N: tl.constexpr):
    offsets = tl.arange(0, N)
    a = tl.full((N,), {value}, tl.{dtype})
    tl.static_assert(a.dtype == tl.{dtype})
    tl.static_assert(a.shape == [N])
    tl.store(out + offsets, a)
    tl.store(out + N + offsets, tl.zeros((N,), dtype=tl.{dtype}))
    tl.store(out + 2 * N + offsets, tl.full((N,), scalar, tl.{dtype}))
    tl.store(out + 3 * N + offsets, tl.zeros_like(a))
    s = tl.full((), {value}, tl.{dtype})
    tl.static_assert(s.shape == [])
    tl.store(out + 4 * N, s)
"""
    ).kernel
    out = buffers.empty(129, dtype)
    kernel[(1,)](out, 1, N=32)
    expected = np.concatenate([np.repeat([value, 0, 1, 0], 32), [value]])
    assert_same(out.float(), expected.astype(np.float32)) if dtype not in ("uint64", "uint32", "uint16") else assert_same(
        out, expected.astype(dtype)
    )


@triton.jit
def broadcast_kernel(out, x, y, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    place = i[:, None] * N + j[None, :]
    row, column = tl.load(y + j), tl.load(x + i)
    a, b = tl.broadcast(tl.load(x + i)[:, None], row[None, :])
    tl.static_assert(a.shape == [M, N])
    tl.store(out + place, a)
    tl.store(out + M * N + place, b)
    tl.store(out + 2 * M * N + place, tl.broadcast_to(column[:, None], (M, N)))
    tl.store(out + 3 * M * N + place, tl.broadcast_to(row[None, :], M, N))
    tl.store(out + 4 * M * N + place, column[:, None] - row)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_broadcast(dtype, rng, buffers, covers):
    """Tensors broadcast to each other and to a given shape."""
    covers("broadcast broadcast_to", dtype)
    x, y = random_values(rng, 8, dtype, -100, 100), random_values(rng, 32, dtype, -100, 100)
    out = buffers.empty((5, 8, 32), dtype)
    broadcast_kernel[(1,)](out, buffers.put(x, dtype), buffers.put(y, dtype), M=8, N=32)
    a, b = np.broadcast_arrays(x[:, None], y[None, :])
    assert_same(out[:4], np.stack([a, b, a, b]))
    if dtype != "bfloat16":
        with np.errstate(all="ignore"):
            assert_same(out[4], a - b)


@triton.jit
def slices_kernel(out, N: tl.constexpr):
    x = tl.arange(0, N)
    tl.static_assert(x[None, :].shape == [1, N])
    tl.static_assert(x[:, None].shape == [N, 1])
    tl.static_assert(x[None, :, None].shape == [1, N, 1])
    tl.static_assert(tl.expand_dims(x, 0).shape == [1, N])
    tl.static_assert(tl.expand_dims(x, -1).shape == [N, 1])
    tl.static_assert(tl.expand_dims(x, (0, -1)).shape == [1, N, 1])
    tl.static_assert(tl.expand_dims(x, (-4, 2, -1)).shape == [1, N, 1, 1])
    scalar = tl.sum(x)
    tl.static_assert(scalar.shape == [])
    tl.static_assert(scalar[None].shape == [1])
    tl.static_assert(scalar[None, None].shape == [1, 1])
    tl.static_assert(tl.expand_dims(scalar, 0).shape == [1])
    tl.static_assert(tl.expand_dims(N, -1).shape == [1])
    tl.store(out + tl.arange(0, 1), scalar[None])
    cube = x[:, None, None] * 10000 + x[None, :, None] * 100 + x[None, None, :]
    place = x[:, None, None] * N * N + x[None, :, None] * N + x[None, None, :]
    tl.store(out + 1 + place, cube)


def test_slices_and_expand_dims(buffers, covers):
    """None in an index and `expand_dims` add dimensions of one, to scalars too."""
    covers("expand_dims slices", "int32")
    out = buffers.empty(1 + 8**3, "int32")
    slices_kernel[(1,)](out, N=8)
    i = np.arange(8)
    cube = i[:, None, None] * 10000 + i[None, :, None] * 100 + i
    assert_same(out, np.concatenate([[28], cube.reshape(-1)]).astype(np.int32))


BAD_SHAPES = {
    "tl.expand_dims(x, 2)": None,
    "tl.expand_dims(x, (0, 0))": None,
    "x[10:]": "unsupported tensor index",
    "x.reshape(3, 5)": None,
    "tl.broadcast_to(x, (N + 1,))": None,
    "tl.arange(0, 3)": "power of 2",
    "tl.arange(5, 5)": "arange",
}


@pytest.mark.compiled
@pytest.mark.parametrize("expression", BAD_SHAPES)
def test_wrong_shapes_are_refused(expression, buffers):
    """Shapes that do not fit are compile-time errors."""
    kernel = module_from(f"@triton.jit\ndef kernel(out, N: tl.constexpr):\n    x = tl.arange(0, N)\n    {expression}\n").kernel
    with pytest.raises(triton.TritonError, match=BAD_SHAPES[expression]):
        kernel[(1,)](buffers.empty(1, "int32"), N=16)


def permuted(axes, shape):
    """Return the body that permutes `x` of a shape."""
    return f"result = tl.ravel(tl.permute(tl.reshape(x, {shape}), {axes}))"


PERMUTES = [((1, 0), (8, 32)), ((1, 0), (64, 4)), ((0, 2, 1), (4, 8, 16)), ((2, 1, 0), (4, 8, 16)), ((1, 2, 0), (2, 16, 8)),
            ((2, 0, 1), (1, 8, 16)), ((0, 1), (8, 8)), ((1, 0, 2), (4, 4, 4))]  # fmt: skip


@pytest.mark.parametrize(("axes", "shape"), PERMUTES)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_permute(axes, shape, dtype, rng, buffers, covers):
    """`permute` reorders the dimensions of ranks two and three."""
    covers("permute", dtype)
    x = random_values(rng, int(np.prod(shape)), dtype)
    found = run_shape(buffers, permuted(axes, shape), x, dtype, len(x))
    assert_same(found, x.reshape(shape).transpose(axes).reshape(-1))


@pytest.mark.parametrize("dtype", ["int1", *NUMBERS])
@pytest.mark.parametrize("form", ["tl.trans(m)", "m.T", "tl.trans(m, 1, 0)", "m.trans(1, 0)"])
def test_trans(dtype, form, rng, buffers, covers):
    """`trans` and `.T` transpose."""
    covers("trans", dtype)
    x = random_values(rng, 128, dtype)
    found = run_shape(buffers, f"m = tl.reshape(x, (4, 32))\nresult = tl.reshape({form}, (128,))", x, dtype, 128)
    assert_same(found, x.reshape(4, 32).T.reshape(-1))


@triton.jit
def transposed_copy_kernel(out, x, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    tile = tl.load(x + i[:, None] * N + j[None, :])
    tl.store(out + j[:, None] * M + i[None, :], tl.trans(tile))


@pytest.mark.parametrize(("m", "n"), [(1, 64), (64, 1), (32, 16), (128, 64)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8"])
def test_transposed_copy(m, n, dtype, rng, buffers, covers):
    """A tile is stored transposed."""
    covers("trans", dtype)
    x, out = random_values(rng, (m, n), dtype), buffers.empty((n, m), dtype)
    transposed_copy_kernel[(1,)](out, buffers.put(x, dtype), M=m, N=n)
    assert_same(out, x.T)


RESHAPES = [(64,), (1, 64), (64, 1), (8, 8), (4, 2, 8), (2, 32), (2, 2, 16)]


@pytest.mark.parametrize("first", RESHAPES)
@pytest.mark.parametrize("second", [(16, 4), (4, 4, 4), (64,)])
def test_reshape(first, second, rng, buffers, covers):
    """`reshape` keeps the row-major order between any shapes."""
    covers("reshape", "int32")
    x = random_values(rng, 64, "int32")
    weights = "tl.reshape(tl.arange(0, 64), " + repr(second) + ")"
    body = f"""a = tl.reshape(x, {first})
b = tl.reshape(a + 1, {second})
result = tl.reshape(b * {weights}, (64,))"""
    with np.errstate(all="ignore"):
        expected = (x + np.int32(1)) * np.arange(64, dtype=np.int32)
    assert_same(run_shape(buffers, body, x, "int32", 64), expected)


@pytest.mark.filterwarnings("ignore:view is deprecated")
@pytest.mark.parametrize(
    "form", ["tl.view(x, (8, 8))", "x.reshape(8, 8)", "x.reshape((8, 8))", "tl.reshape(x, 8, 8)", "x.view(8, 8)"]
)
def test_forms_of_reshape(form, rng, buffers, covers):
    """`view` and `reshape` take a shape as a tuple or as arguments."""
    covers("reshape view", "float32")
    x = random_values(rng, 64, "float32")
    body = f"m = {form}\nresult = tl.ravel(m * 2)"
    assert_same(run_shape(buffers, body, x, "float32", 64), x * np.float32(2))


@pytest.mark.parametrize("dtype", ["int1", *NUMBERS])
def test_join_split_interleave(dtype, rng, buffers, covers):
    """`join` adds a last dimension of two, `split` takes it apart and `interleave` alternates."""
    covers("join split interleave", dtype)
    x, y = random_values(rng, 64, dtype), random_values(rng, 64, dtype)
    both = np.stack([x, y], axis=-1)
    found = run_shape(buffers, "result = tl.ravel(tl.join(x, y))", x, dtype, 128, y=y)
    assert_same(found, both.reshape(-1))
    found = run_shape(buffers, "result = tl.interleave(x, y)", x, dtype, 128, y=y)
    assert_same(found, both.reshape(-1))
    body = "a, b = tl.split(tl.reshape(x, (32, 2)))\nresult = tl.ravel(tl.join(b, a))"
    found = run_shape(buffers, body, x, dtype, 64)
    assert_same(found, x.reshape(32, 2)[:, ::-1].reshape(-1))


@triton.jit
def join_scalars_kernel(out, x, y):
    pair = tl.join(tl.load(x), tl.load(y))
    tl.static_assert(pair.shape == [2])
    tl.store(out + tl.arange(0, 2), pair)
    a, b = tl.split(pair)
    tl.store(out + 2, b)
    tl.store(out + 3, a)


def test_join_and_split_scalars(buffers, covers):
    """Two scalars join to a tensor of two, and split again."""
    covers("join split", "int32")
    out = buffers.empty(4, "int32")
    join_scalars_kernel[(1,)](out, buffers.put(np.array([42]), "int32"), buffers.put(np.array([100]), "int32"))
    assert out.tolist() == [42, 100, 100, 42]


@triton.jit
def join_matrices_kernel(out, x, M: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(x + place)
    both = tl.join(a, a + 1000)
    tl.static_assert(both.shape == [M, N, 2])
    wide = tl.interleave(a, a + 1000)
    tl.static_assert(wide.shape == [M, 2 * N])
    tl.store(out + place[:, :, None] * 2 + tl.arange(0, 2)[None, None, :], both)
    tl.store(out + M * N * 2 + tl.arange(0, M)[:, None] * 2 * N + tl.arange(0, 2 * N)[None, :], wide)
    first, second = both.split()
    tl.store(out + M * N * 4 + place, second - first)


def test_join_matrices(rng, buffers, covers):
    """Matrices join to rank three."""
    covers("join split interleave", "int32")
    x, out = random_values(rng, (8, 16), "int32", 0, 999), buffers.empty(8 * 16 * 5, "int32")
    join_matrices_kernel[(1,)](out, buffers.put(x, "int32"), M=8, N=16)
    both = np.stack([x, x + 1000], axis=-1).reshape(-1)
    assert_same(out, np.concatenate([both, both, np.full(128, 1000)]).astype(np.int32))


@pytest.mark.parametrize("dtype", ["int32", "float16", "int8"])
def test_cat(dtype, rng, buffers, covers):
    """`cat` holds the elements of both tensors, in any order unless asked to keep it."""
    covers("cat", dtype)
    x, y = random_values(rng, 64, dtype), random_values(rng, 64, dtype)
    found = run_shape(buffers, "result = tl.cat(x, y, can_reorder=True)", x, dtype, 128, y=y)
    assert_same(np.sort(found.numpy()), np.sort(np.concatenate([x, y])))


@pytest.mark.since("3.7")
@pytest.mark.compiled
def test_cat_in_order(rng, buffers, covers):
    """`cat` without reordering puts the first tensor before the second."""
    covers("cat in order", "int32")
    x, y = random_values(rng, 64, "int32"), random_values(rng, 64, "int32")
    found = run_shape(buffers, "result = tl.cat(x, y, can_reorder=False, dim=0)", x, "int32", 128, y=y)
    assert_same(found, np.concatenate([x, y]))


@pytest.mark.parametrize("dtype", ["int32", "float16", "float32", "int8"])
@pytest.mark.parametrize(("shape", "axis"), [((64,), 0), ((8, 16), 1), ((8, 16), 0), ((4, 8), -1)])
def test_flip(dtype, shape, axis, rng, buffers, covers):
    """`flip` reverses one dimension, and keeps infinities."""
    covers("flip", dtype)
    x = random_values(rng, int(np.prod(shape)), dtype)
    if dtype.startswith("float"):
        x[3] = np.inf
    body = f"result = tl.ravel(tl.flip(tl.reshape(x, {shape}), {axis}))"
    found = run_shape(buffers, body, x, dtype, len(x))
    assert_same(found, np.flip(x.reshape(shape), axis).reshape(-1))


@triton.jit
def swizzle_kernel(out, rows, columns, group):
    for i in tl.range(0, rows, 1):
        for j in tl.range(0, columns, 1):
            new_i, new_j = tl.swizzle2d(i, j, rows, columns, group)
            tl.store(out + new_i * columns + new_j, i * columns + j)


@pytest.mark.parametrize(("rows", "columns", "group"), [(5, 7, 3), (4, 4, 2), (1, 9, 4)])
def test_swizzle2d(rows, columns, group, buffers, covers):
    """`swizzle2d` numbers the elements column by column within groups of rows."""
    covers("swizzle2d", "int32")
    out = buffers.empty((rows, columns), "int32")
    swizzle_kernel[(1,)](out, rows, columns, group)
    expected, count = np.zeros((rows, columns), np.int32), 0
    for first in range(0, rows, group):
        for j in range(columns):
            for i in range(first, min(first + group, rows)):
                expected[i, j] = count
                count += 1
    assert_same(out, expected)


@pytest.mark.since("3.7")
@pytest.mark.compiled
def test_squeeze_and_unsqueeze(rng, buffers, covers):
    """`squeeze` drops and `unsqueeze` inserts a dimension of one."""
    covers("squeeze unsqueeze", "float32")
    x = random_values(rng, 32, "float32")
    body = """a = tl.unsqueeze(x, 0)
tl.static_assert(a.shape == [1, 32])
result = tl.squeeze(a, 0)"""
    assert_same(run_shape(buffers, body, x, "float32", 32), x)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_ranks(rank, rng, buffers, covers):
    """Elementwise work runs on tensors of rank zero to three."""
    covers(f"rank {rank}", "int32")
    shape = (2, 8, 4)[:rank]
    size = int(np.prod(shape))
    indices = [
        f"tl.arange(0, {n})[{', '.join(':' if k == axis else 'None' for k in range(rank))}]" for axis, n in enumerate(shape)
    ]
    place = "0"
    for index, n in zip(indices, shape, strict=True):
        place = f"({place}) * {n} + {index}"
    kernel = module_from(
        f"@triton.jit\ndef kernel(out, x):\n    tl.store(out + {place}, tl.load(x + {place}) * 3 - 1)\n"
    ).kernel
    x, out = random_values(rng, size, "int32", -100, 100), buffers.empty(size, "int32")
    kernel[(1,)](out, buffers.put(x, "int32"))
    assert_same(out, x * 3 - 1)


@triton.jit
def odd_layout_kernel(out, x, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    tile = tl.load(x + i[:, None] * N + j[None, :])
    t = tl.trans(tile)
    mixed = t + tl.reshape(tile, (N, M))
    again = tl.trans(tl.reshape(mixed, (M, N))) * 2
    tl.store(out + j[:, None] * M + i[None, :], again - t)


def test_chains_of_shape_operations(rng, buffers, covers):
    """Transposes, reshapes and arithmetic mix in one expression."""
    covers("trans reshape chains", "int32")
    x, out = random_values(rng, (16, 32), "int32", -999, 999), buffers.empty((32, 16), "int32")
    odd_layout_kernel[(1,)](out, buffers.put(x, "int32"), M=16, N=32)
    mixed = x.T + x.reshape(32, 16)
    assert_same(out, mixed.reshape(16, 32).T * 2 - x.T)
