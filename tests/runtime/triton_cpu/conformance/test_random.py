"""Random numbers: Philox bit for bit, uniform and normal distributions."""

import numpy as np
import pytest
import scipy.stats
import triton
import triton.language as tl
from conformance_numbers import assert_same


def philox(seed, counter, rounds=10, width=32):
    """Return the four Philox-4 words of counters [n], whose upper halves fill the second word."""
    mask = (1 << width) - 1
    if width == 32:
        multipliers, keys = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
    else:
        multipliers, keys = (0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
    words = []
    for value in counter:
        c = [int(value) & mask, int(value) >> width, 0, 0]
        k = [seed & mask, (seed >> 32) & 0xFFFFFFFF if width == 32 else 0]
        for _ in range(rounds):
            a, b = multipliers[1] * c[2], multipliers[0] * c[0]
            c = [(a >> width) ^ c[1] ^ k[0], a & mask, (b >> width) ^ c[3] ^ k[1], b & mask]
            k = [(k[0] + keys[0]) & mask, (k[1] + keys[1]) & mask]
        words.append(c)
    return np.array(words, dtype=f"uint{width}").T


@triton.jit
def randint_kernel(out, seed, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.randint(seed, offsets), mask=offsets < n)


@triton.jit
def randint_rounds_kernel(out, seed, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.randint(seed, offsets, n_rounds=ROUNDS))


@pytest.mark.parametrize("seed", [0, 42, 124, 54, 2**32 - 1, 2**40 + 77, 0xFFFFFFFFFFFFFF])
@pytest.mark.parametrize("n", [63, 1000])
def test_randint(seed, n, buffers, covers):
    """`randint` gives the first Philox word of each offset."""
    covers("randint", "int32")
    out = buffers.empty(n, "int32")
    randint_kernel[(triton.cdiv(n, 256),)](out, seed, n, BLOCK=256)
    assert_same(out.numpy().view(np.uint32), philox(seed, range(n))[0])


@pytest.mark.parametrize("rounds", [1, 6, 10])
def test_rounds(rounds, buffers, covers):
    """The number of rounds is respected."""
    covers("randint", "int32")
    out = buffers.empty(64, "int32")
    randint_rounds_kernel[(1,)](out, 7, ROUNDS=rounds, BLOCK=64)
    assert_same(out.numpy().view(np.uint32), philox(7, range(64), rounds)[0])


@triton.jit
def randint4x_kernel(out, seed, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(seed, offsets)
    tl.store(out + offsets, a)
    tl.store(out + BLOCK + offsets, b)
    tl.store(out + 2 * BLOCK + offsets, c)
    tl.store(out + 3 * BLOCK + offsets, d)


def test_randint4x(buffers, covers):
    """`randint4x` gives all four words."""
    covers("randint4x", "int32")
    out = buffers.empty((4, 64), "int32")
    randint4x_kernel[(1,)](out, 99, BLOCK=64)
    assert_same(out.numpy().view(np.uint32), philox(99, range(64)))


@triton.jit
def offsets64_kernel(out, seed, start, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.randint(seed, start + offsets.to(tl.int64)))


@pytest.mark.parametrize("start", [0, 2**32 - 10, 2**40])
def test_wide_offsets(start, buffers, covers):
    """The upper half of 64-bit offsets counts."""
    covers("randint", "int64")
    out = buffers.empty(64, "int32")
    offsets64_kernel[(1,)](out, 12345, start, BLOCK=64)
    assert_same(out.numpy().view(np.uint32), philox(12345, range(start, start + 64))[0])


@triton.jit
def philox64_kernel(out, seed, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    zero = offsets.to(tl.int64) * 0
    first, _, _, last = tl.philox(seed, offsets.to(tl.int64), zero, zero, zero)
    tl.store(out + offsets, first)
    tl.store(out + BLOCK + offsets, last)


@pytest.mark.compiled
def test_philox_of_64_bits(buffers, covers):
    """Counters of 64 bits give 64-bit words."""
    covers("philox", "uint64")
    out = buffers.empty((2, 64), "uint64")
    philox64_kernel[(1,)](out, 12345, BLOCK=64)
    words = philox(12345, range(64), width=64)
    assert_same(out, words[[0, 3]])


@triton.jit
def rand_kernel(out, seed, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if KIND == "rand":  # noqa: SIM108 - a branch of the language
        value = tl.rand(seed, offsets)
    else:
        value = tl.randn(seed, offsets)
    tl.store(out + offsets, value, mask=offsets < n)


@pytest.mark.parametrize("seed", [0, 42, 2**40 + 1])
def test_rand(seed, buffers, covers):
    """`rand` is the scaled absolute Philox word and is uniform on [0, 1)."""
    covers("rand", "float32")
    out = buffers.empty(20000, "float32")
    rand_kernel[(triton.cdiv(20000, 1024),)](out, seed, 20000, KIND="rand", BLOCK=1024)
    values = out.numpy()
    assert values.min() >= 0
    assert values.max() < 1
    assert scipy.stats.kstest(values, "uniform").statistic < 0.015
    word = philox(seed, range(100))[0].view(np.int32)
    magnitude = np.where(word < 0, -word.astype(np.int64) - 1, word).astype(np.float32)
    assert_same(values[:100], magnitude * np.float32(4.6566127342e-10))


@pytest.mark.parametrize("seed", [0, 42])
def test_randn(seed, buffers, covers):
    """`randn` is normal with mean 0 and deviation 1."""
    covers("randn", "float32")
    out = buffers.empty(20000, "float32")
    rand_kernel[(triton.cdiv(20000, 1024),)](out, seed, 20000, KIND="randn", BLOCK=1024)
    values = out.numpy()
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.03
    assert abs(values.std() - 1) < 0.03
    assert scipy.stats.kstest(values, "norm").statistic < 0.015


@triton.jit
def limits_kernel(out, x, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(out + offsets, tl.random.uint_to_uniform_float(tl.load(x + offsets)))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_ends_of_the_uniform_range(dtype, buffers, covers):
    """Extreme words map into [0, 1)."""
    covers("uint_to_uniform_float", dtype)
    info = np.iinfo(dtype)
    out = buffers.empty(4, "float32")
    limits_kernel[(1,)](out, buffers.put(np.array([info.min, info.max, 0, -1], dtype=dtype), dtype), N=4)
    values = out.numpy()
    assert (values >= 0).all()
    assert (values < 1).all()
    assert values[2] == 0


@triton.jit
def dropout_kernel(out, x, n, p, seed, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    keep = tl.rand(seed, offsets) > p
    tl.store(out + offsets, tl.where(keep, tl.load(x + offsets, mask=mask) / (1 - p), 0.0), mask=mask)


def test_dropout(buffers, covers):
    """A seeded dropout keeps about the share it should and repeats itself."""
    covers("dropout kernel", "float32")
    x = buffers.put(np.ones(5000), "float32")
    first, second = buffers.empty(5000, "float32"), buffers.empty(5000, "float32")
    for out in (first, second):
        dropout_kernel[(triton.cdiv(5000, 512),)](out, x, 5000, 0.25, 123, BLOCK=512)
    assert_same(first, second.numpy())
    kept = first.numpy()[first.numpy() != 0]
    assert abs(len(kept) / 5000 - 0.75) < 0.03
    assert np.allclose(kept, 4 / 3)
