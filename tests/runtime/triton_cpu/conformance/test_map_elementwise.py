"""`tl.map_elementwise`: functions of scalars, with branches, several operands and results, and several elements at a time."""

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import assert_same, random_values

pytestmark = pytest.mark.compiled


@triton.jit
def order(a, b):
    if a < b:
        return -1
    elif a == b:
        return 0
    else:
        return 1


@triton.jit
def order_kernel(out, x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    tl.store(out + offsets, tl.map_elementwise(order, x, y))


def test_branches(buffers, rng, covers):
    """A function of scalars, branches included, is applied to each element."""
    covers("map_elementwise", "int32")
    x, y = rng.integers(-3, 3, 128), rng.integers(-3, 3, 128)
    out = buffers.empty(128, "int32")
    order_kernel[(1,)](out, buffers.put(x, "int32"), buffers.put(y, "int32"), BLOCK=128)
    assert (out.numpy() == np.sign(x - y)).all()


PACKED = """@triton.jit
def function({arguments}):
    return {results}


@triton.jit
def kernel(low, high, x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x, y = tl.load(x_ptr + place), tl.load(y_ptr + place)
    first, second = tl.map_elementwise(function, x, y, pack={pack})
    tl.store(low + place, first)
    tl.store(high + place, second)
"""


@pytest.mark.parametrize("pack", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("m", "n"), [(1, 512), (16, 32), (64, 2), (8, 4), (256, 1)])
@pytest.mark.parametrize("dtype", ["int32", "float32", "int8"])
def test_packs(dtype, m, n, pack, buffers, rng, covers):
    """A function takes neighbours in row-major order: all of the first operand's, then those of the second."""
    covers("map_elementwise in packs", dtype)
    if m * n < pack:
        pytest.skip("the tensor is smaller than a pack")
    names = [[f"{letter}{k}" for k in range(pack)] for letter in "xy"]
    # Each result depends on its place in the pack and on a neighbour.
    sums = [f"{x} + {k} * {y}" for k, (x, y) in enumerate(zip(*names, strict=True))]
    differences = [f"{names[0][pack - 1 - k]} - {y}" for k, y in enumerate(names[1])]
    arguments, results = ", ".join(names[0] + names[1]), ", ".join(sums + differences)
    kernel = module_from(PACKED.format(arguments=arguments, results=results, pack=pack)).kernel
    x, y = (np.round(random_values(rng, (m, n), dtype, -3, 3)) for _ in range(2))
    low, high = buffers.empty((m, n), dtype), buffers.empty((m, n), dtype)
    kernel[(1,)](low, high, buffers.put(x, dtype), buffers.put(y, dtype), M=m, N=n)
    flat_x, flat_y = x.reshape(-1, pack), y.reshape(-1, pack)
    assert_same(low, (flat_x + np.arange(pack) * flat_y).astype(x.dtype).reshape(m, n))
    assert_same(high, (flat_x[:, ::-1] - flat_y).reshape(m, n))


@triton.jit
def swap_if_greater(a, b):
    if a > b:
        return b, a
    else:
        return a, b


@triton.jit
def swap_kernel(out, x, n, N: tl.constexpr):
    i = tl.arange(0, N)
    values = tl.load(x + i, mask=i < n, other=0)
    tl.store(out + i, tl.map_elementwise(swap_if_greater, values * 2, pack=2)[0] + 1, mask=i < n)


def test_packs_with_branches(buffers, rng, covers):
    """A packed function may branch, on computed operands, and feed further work."""
    covers("map_elementwise in packs", "int64")
    x = random_values(rng, 100, "int64", -1000, 1000)
    out = buffers.empty(100, "int64")
    swap_kernel[(1,)](out, buffers.put(x, "int64"), 100, N=128)
    assert_same(out, (np.sort(x.reshape(50, 2) * 2, axis=1) + 1).reshape(-1))


@triton.jit
def average(a, b):
    return (a + b) // 2, (a - b).to(tl.float32)


@triton.jit
def broadcast_kernel(out, x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    mean, difference = tl.map_elementwise(average, tl.load(x + i)[:, None], tl.load(y + i)[None, :])
    tl.store(out + i[:, None] * N + i[None, :], mean + difference)


def test_broadcast_operands_and_mixed_results(buffers, rng, covers):
    """Operands are broadcast against each other, and results may be of different dtypes."""
    covers("map_elementwise", "int32", "float32")
    x, y = random_values(rng, 16, "int32", 0, 99), random_values(rng, 16, "int32", 0, 99)
    out = buffers.empty((16, 16), "float32")
    broadcast_kernel[(1,)](out, buffers.put(x, "int32"), buffers.put(y, "int32"), N=16)
    assert_same(out, ((x[:, None] + y) // 2 + x[:, None] - y).astype(np.float32))
