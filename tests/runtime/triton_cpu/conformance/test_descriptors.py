"""Tensor descriptors, made in kernels and on the host."""

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import assert_same, random_values, round_to
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.compiled


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
    expected[:, :columns] = (
        round_to(x[:, :columns].astype(np.float64) + 1, dtype) if dtype == "bfloat16" else x[:, :columns] + x.dtype.type(1)
    )
    assert_same(out, expected)


def test_descriptors_from_the_host(rng, buffers, covers):
    """A descriptor made on the host is an argument."""
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


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


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
