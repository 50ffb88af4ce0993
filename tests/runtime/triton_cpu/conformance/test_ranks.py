"""Tensors of rank four and more."""

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import assert_same, random_values

pytestmark = pytest.mark.compiled


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
    covers(f"rank {len(shape)}", "int32")
    place = place_of(shape)
    kernel = module_from(
        f"@triton.jit\ndef kernel(out, x):\n    tl.store(out + {place}, tl.load(x + {place}) * 3 - 1)\n"
    ).kernel
    x, out = random_values(rng, shape, "int32", -99, 99), buffers.empty(shape, "int32")
    kernel[(1,)](out, buffers.put(x, "int32"))
    assert_same(out, x * 3 - 1)


@pytest.mark.parametrize("axes", [(3, 2, 1, 0), (0, 2, 1, 3), (1, 0, 3, 2), (2, 3, 0, 1)])
def test_permute_rank_four(axes, rng, buffers, covers):
    """Tensors of rank four are permuted."""
    covers("permute of rank 4", "int32")
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
    covers(f"{op} of rank 4", "int32")
    shape = (2, 4, 8, 2)
    out_shape = () if axis is None else tuple(n for k, n in enumerate(shape) if k != axis)
    kernel = module_from(
        f"@triton.jit\ndef kernel(out, x):\n    value = tl.load(x + {place_of(shape)})\n"
        f"    tl.store(out + {place_of(out_shape)}, tl.{op}(value, axis={axis}))\n"
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
    covers("permute of rank 5", "float32")
    x, out = random_values(rng, 128, "float32"), buffers.empty(128, "float32")
    rank_five_kernel[(1,)](out, buffers.put(x, "float32"), N=128)
    assert_same(out, x.reshape(2, 2, 2, 2, 8).transpose(4, 1, 3, 0, 2).reshape(-1))
