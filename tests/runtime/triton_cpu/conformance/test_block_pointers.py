"""Block pointers: shapes, orders, boundary checks, padding and advances."""

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import assert_error_ratio, assert_same, random_values

pytestmark = [pytest.mark.compiled, pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")]


SOURCE = """@triton.jit
def kernel(out, x, rows, columns, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.program_id(0) * M, tl.program_id(1) * N
    source = tl.make_block_ptr(x, (rows, columns), (columns, 1), (i, j), (M, N), (1, 0))
    target = tl.make_block_ptr(out, (rows, columns), (columns, 1), (i, j), (M, N), order=(1, 0))
    value = tl.load(source, boundary_check=(0, 1), padding_option={padding!r})
    tl.store(target, value + value, boundary_check=(0, 1))
"""


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int64", "bfloat16"])
@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (37, 63), (1, 1)])
def test_copies(dtype, rows, columns, rng, buffers, covers):
    """A checked load and store stay inside a ragged matrix."""
    covers("block pointers", dtype)
    x, out = random_values(rng, (rows, columns), dtype, -50, 50), buffers.empty((rows, columns), dtype)
    grid = (triton.cdiv(rows, 16), triton.cdiv(columns, 32))
    module_from(SOURCE.format(padding="zero")).kernel[grid](out, buffers.put(x, dtype), rows, columns, M=16, N=32)
    assert_same(out, x + x)


PADDED = """@triton.jit
def kernel(out, x, n, N: tl.constexpr):
    source = tl.make_block_ptr(x, (n,), (1,), (0,), (N,), (0,))
    value = tl.load(source, boundary_check=(0,), padding_option={padding!r})
    tl.store(out + tl.arange(0, N), value)
"""


@pytest.mark.parametrize(("padding", "filler"), [("zero", 0.0), ("nan", np.nan)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_padding(padding, filler, dtype, rng, buffers, covers):
    """Elements outside the shape are zero or NaN as asked."""
    covers("block pointers padding", dtype)
    x, out = random_values(rng, 20, dtype), buffers.empty(32, dtype)
    module_from(PADDED.format(padding=padding)).kernel[(1,)](out, buffers.put(x, dtype), 20, N=32)
    assert_same(out, np.concatenate([x, np.full(12, filler, x.dtype)]))


@triton.jit
def advance_kernel(out, x, y, m, n, k, BLOCK: tl.constexpr):
    left = tl.make_block_ptr(x, (m, k), (k, 1), (tl.program_id(0) * BLOCK, 0), (BLOCK, BLOCK), (1, 0))
    right = tl.make_block_ptr(y, (k, n), (1, k), (0, tl.program_id(1) * BLOCK), (BLOCK, BLOCK), (0, 1))
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(0, k, BLOCK):
        a = tl.load(left, boundary_check=(0, 1), padding_option="zero")
        b = tl.load(right, boundary_check=(0, 1), padding_option="zero")
        total = tl.dot(a, b, total, input_precision="ieee")
        left = tl.advance(left, (0, BLOCK))
        right = tl.advance(right, (BLOCK, 0))
    target = tl.make_block_ptr(
        out, (m, n), (n, 1), (tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK), (BLOCK, BLOCK), (1, 0)
    )
    tl.store(target, total.to(out.dtype.element_ty), boundary_check=(0, 1))


@pytest.mark.parametrize(("m", "n", "k"), [(32, 32, 64), (33, 50, 70)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_matmul_with_advances(m, n, k, dtype, rng, buffers, covers):
    """Block pointers advance through a matrix product, one of them column-major."""
    covers("block pointers advance", dtype)
    x, y = random_values(rng, (m, k), dtype), random_values(rng, (k, n), dtype)
    out = buffers.empty((m, n), dtype)
    grid = (triton.cdiv(m, 16), triton.cdiv(n, 16))
    advance_kernel[grid](out, buffers.put(x, dtype), buffers.put(np.ascontiguousarray(y.T), dtype), m, n, k, BLOCK=16)
    assert_error_ratio(out, x.astype(np.float64) @ y.astype(np.float64), 1e-5 if dtype == "float32" else 1e-3)


@triton.jit
def cube_kernel(out, x, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    source = tl.make_block_ptr(x, (A, B, C), (B * C, C, 1), (0, 0, 0), (A, B, C), (2, 1, 0))
    target = tl.make_block_ptr(out, (C, B, A), (B * A, A, 1), (0, 0, 0), (C, B, A), (2, 1, 0))
    tl.store(target, tl.permute(tl.load(source), (2, 1, 0)))


def test_three_dimensions(rng, buffers, covers):
    """Block pointers have rank three too."""
    covers("block pointers", "int32")
    x, out = random_values(rng, (2, 4, 8), "int32"), buffers.empty((8, 4, 2), "int32")
    cube_kernel[(1,)](out, buffers.put(x, "int32"), A=2, B=4, C=8)
    assert_same(out, x.transpose(2, 1, 0))
