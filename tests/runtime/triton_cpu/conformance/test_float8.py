"""float8: copies, conversions, arithmetic and products."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import FLOAT8, as_numpy, assert_error_ratio, assert_same, random_values, round_to, torch_dtype

pytestmark = pytest.mark.compiled


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
    assert_same(out.to(torch.float64), as_numpy(x))


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


@pytest.mark.parametrize(
    ("x_type", "y_type"), [("float8e4nv", "float8e4nv"), ("float8e5", "float8e5"), ("float8e4nv", "float8e5")]
)
def test_float8_dot(x_type, y_type, rng, buffers, covers):
    """A product of float8 accumulates in float32."""
    covers("dot", x_type, y_type)
    x, y = random_values(rng, (32, 64), x_type), random_values(rng, (64, 32), y_type)
    out = buffers.empty((32, 32), "float32")
    dot_kernel[(1,)](out, buffers.put(x, x_type), buffers.put(y, y_type), M=32, N=32, K=64)
    assert_error_ratio(out, x.astype(np.float64) @ y.astype(np.float64), 1e-4)


def to_torch(values, dtype):
    """Return the float8 tensor that values narrow to: torch's own, with what is too large limited before."""
    greatest = torch.finfo(torch_dtype(dtype)).max
    return values.clamp(-greatest, greatest).to(torch_dtype(dtype))


def assert_same_bytes(actual, expected):
    """Fail unless two float8 tensors are equal byte by byte, but for the sign of NaN."""
    found, wanted = (torch.where(x.isnan(), 0xFF, x.view(torch.uint8)) for x in (actual, expected))
    where = torch.nonzero(found != wanted)[:5, 0]
    assert torch.equal(found, wanted), f"at {where.tolist()}: {found[where].tolist()} instead of {wanted[where].tolist()}"


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("wide", ["float16", "bfloat16"])
def test_float8_narrows_as_torch(dtype, wide, buffers, covers):
    """Every 16-bit float narrows to torch's byte, NaN and negative zero included; too large ones are limited."""
    covers("cast to float8", wide, dtype)
    x = torch.arange(65536).to(torch.uint16).view(torch_dtype(wide))
    out = buffers.empty(65536, dtype)
    copy(buffers.put(x, wide), out, f"x.to(tl.{dtype})")
    assert_same_bytes(out, to_torch(x, dtype))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_narrows_at_ties(dtype, rng, buffers, covers):
    """Numbers of float32 and float64 beside the middle of two neighbours round to the nearer one, ties to even."""
    covers("cast to float8", dtype, "float32", "float64")
    codes = torch.arange(128, dtype=torch.uint8).view(torch_dtype(dtype)).to(torch.float64)
    values = codes[~codes.isnan() & ~codes.isinf()].numpy()
    middles = (values[1:] + values[:-1]) / 2
    for wide, kind in [("float32", np.float32), ("float64", np.float64)]:
        at = middles.astype(kind)
        x = np.concatenate([values, at, np.nextafter(at, kind(0)), np.nextafter(at, kind(np.inf))]).astype(kind)
        x = np.concatenate([x, -x, [np.nan, np.inf, -np.inf, np.finfo(kind).max, np.finfo(kind).tiny]]).astype(kind)
        bits = rng.integers(0, 256, 4096 * kind().itemsize, dtype=np.uint8).view(kind)
        x = np.concatenate([x, np.where(np.isnan(bits), kind(np.nan), bits)])
        out = buffers.empty(len(x), dtype)
        copy(buffers.put(x, wide), out, f"x.to(tl.{dtype})")
        assert_same(as_numpy(out), round_to(x, dtype))


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("wide", ["float16", "bfloat16", "float32", "float64"])
def test_float8_truncates(dtype, wide, rng, buffers, covers):
    """`fp_downcast_rounding="rtz"` gives the largest float8 that is not larger in magnitude."""
    covers("cast rtz", dtype, wide)
    codes = torch.arange(128, dtype=torch.uint8).view(torch_dtype(dtype)).to(torch.float64)
    values = np.sort(codes[~codes.isnan() & ~codes.isinf()].numpy())
    near = np.concatenate([values, np.nextafter(values, 0), np.nextafter(values, np.inf), values * 1.07, [1e30]])
    x = np.concatenate([near, -near, rng.standard_normal(1000) * 30])
    x = torch.from_numpy(x).to(torch_dtype(wide))
    x = x[torch.isfinite(x)]
    out = buffers.empty(len(x), dtype)
    copy(buffers.put(x, wide), out, f'x.to(tl.{dtype}, fp_downcast_rounding="rtz")')
    exact = x.to(torch.float64).numpy()
    expected = np.copysign(values[np.searchsorted(values, np.abs(exact), side="right") - 1], exact)
    assert_same(as_numpy(out), expected)


@pytest.mark.parametrize("source", FLOAT8)
@pytest.mark.parametrize("target", FLOAT8)
def test_float8_to_float8(source, target, buffers, covers):
    """One float8 dtype narrows to another as its value in float32 does."""
    covers("cast to float8", source)
    x = torch.arange(256).to(torch.uint8).view(torch_dtype(source))
    out = buffers.empty(256, target)
    copy(buffers.put(x, source), out, f"x.to(tl.{target})")
    if source == target:
        assert_same_bytes(out, x)
    else:
        assert_same_bytes(out, to_torch(x.to(torch.float32), target))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_absolute_value(dtype, buffers, covers):
    """The absolute value of every float8, infinities and NaN included."""
    covers("tl.abs", dtype)
    x = torch.arange(256).to(torch.uint8).view(torch_dtype(dtype))
    out = buffers.empty(256, dtype)
    copy(buffers.put(x, dtype), out, "tl.abs(x)")
    assert_same(as_numpy(out), np.abs(as_numpy(x)))


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize(
    ("expression", "reference"),
    [("-x", torch.neg), ("x + x", lambda x: x + x), ("x * x", lambda x: x * x)],
)
def test_float8_own_arithmetic(dtype, expression, reference, buffers, covers):
    """Arithmetic on float8 is that of float32, narrowed."""
    covers(expression, dtype)
    x = torch.arange(256).to(torch.uint8).view(torch_dtype(dtype))
    out = buffers.empty(256, dtype)
    copy(buffers.put(x, dtype), out, expression)
    expected = to_torch(reference(x.to(torch.float32)), dtype)
    assert_same(as_numpy(out), as_numpy(expected))


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("operator", ["<", "<=", "==", "!=", ">", ">="])
def test_float8_comparisons(dtype, operator, rng, buffers, covers):
    """Comparisons follow the values: NaN compares unequal, zeros of both signs equal."""
    covers(operator, dtype)
    x, y = (torch.from_numpy(rng.integers(0, 256, 1024, dtype=np.uint8)).view(torch_dtype(dtype)) for _ in range(2))
    kernel = module_from(
        f"""@triton.jit
def kernel(out, x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, (tl.load(x_ptr + i) {operator} tl.load(y_ptr + i)).to(tl.int8))
"""
    ).kernel
    out = buffers.empty(1024, "int8")
    kernel[(1,)](out, buffers.put(x, dtype), buffers.put(y, dtype), N=1024)
    a, b = as_numpy(x), as_numpy(y)
    expected = {"<": a < b, "<=": a <= b, "==": a == b, "!=": a != b, ">": a > b, ">=": a >= b}[operator]
    assert_same(out, expected.astype(np.int8))


@pytest.mark.since("3.7")
@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_constants_and_where(dtype, rng, buffers, covers):
    """Constants, masked loads with `other`, and selections hold float8."""
    covers("constants where", dtype)
    x = random_values(rng, 200, dtype)
    out = buffers.empty(256, dtype)
    kernel = module_from(
        f"""@triton.jit
def kernel(out, x_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i, mask=i < n, other=-3.5)
    half = tl.full((N,), 0.5, tl.{dtype})
    y = tl.where(x > tl.zeros((N,), tl.{dtype}), x, half)
    tl.store(out + i, y)
    if n < 0:
        tl.store(out, -1.75)
"""
    ).kernel
    kernel[(1,)](out, buffers.put(x, dtype), 200, N=256)
    padded = np.concatenate([x, np.full(56, -3.5)])
    assert_same(as_numpy(out), np.where(padded > 0, padded, 0.5))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_shapes(dtype, rng, buffers, covers):
    """Shape operations move float8."""
    covers("shape operations", dtype)
    raw = torch.from_numpy(rng.integers(0, 256, (16, 32), dtype=np.uint8))
    out = buffers.empty((2, 32, 16), dtype)
    kernel = module_from(
        """@triton.jit
def kernel(out, x_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    a, b = tl.split(tl.join(x, tl.flip(x, 1)))
    at = out + n[:, None] * M + m[None, :]
    tl.store(at, tl.trans(a))
    tl.store(at + M * N, tl.reshape(tl.trans(b), (N, M)))
"""
    ).kernel
    kernel[(1,)](out, buffers.put(raw.view(torch_dtype(dtype)), dtype), M=16, N=32)
    assert torch.equal(out.view(torch.uint8), torch.stack([raw.T, raw.flip(1).T]))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_control_flow(dtype, rng, buffers, covers):
    """Branches, loops, gathers, scans and sorts carry float8, scalars and tensors."""
    covers("control flow", dtype)
    x = random_values(rng, 64, dtype, -2, 2)
    out = buffers.empty((5, 64), dtype)
    kernel = module_from(
        """@triton.jit
def kernel(out, x_ptr, count, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    low, high = tl.load(x_ptr), tl.load(x_ptr + 1)
    if low > high:
        low, high = high, low
    total = tl.zeros((N,), x.dtype)
    for _ in range(count):
        total += x
    tl.store(out + i, tl.full((N,), 0.0, x.dtype) + low)
    tl.store(out + N + i, total)
    tl.store(out + 2 * N + i, tl.gather(x, N - 1 - i, 0))
    tl.store(out + 3 * N + i, tl.sort(x))
    tl.store(out + 4 * N + i, tl.associative_scan(x, 0, tl.standard._elementwise_max))
"""
    ).kernel
    kernel[(1,)](out, buffers.put(x, dtype), 3, N=64)
    wide = x.astype(np.float64)
    total = round_to(round_to(wide + wide, dtype) + wide, dtype)
    expected = [np.full(64, wide[:2].min()), total, wide[::-1], np.sort(wide), np.maximum.accumulate(wide)]
    assert_same(as_numpy(out), np.stack(expected))


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_reductions(dtype, rng, buffers, covers):
    """The largest and the smallest of float8 rows."""
    covers("tl.max tl.min", dtype)
    x = random_values(rng, (8, 64), dtype)
    out = buffers.empty((2, 8), dtype)
    kernel = module_from(
        """@triton.jit
def kernel(out, x_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(out + m, tl.max(x, 1))
    tl.store(out + M + m, tl.min(x, 1))
"""
    ).kernel
    kernel[(1,)](out, buffers.put(x, dtype), M=8, N=64)
    assert_same(as_numpy(out), np.stack([x.max(1), x.min(1)]).astype(np.float64))


@triton.jit
def long_dot_kernel(out, x, y, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    total = tl.zeros((M, N), TYPE)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        a = tl.load(x + m[:, None] * K + k[None, :])
        b = tl.load(y + n[None, :] * K + k[:, None])
        total = tl.dot(a, b, total, out_dtype=TYPE)
    tl.store(out + m[:, None] * N + n[None, :], total)


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("accumulator", ["float16", "float32"])
def test_float8_dot_in_a_loop(dtype, accumulator, rng, buffers, covers):
    """Products of float8 accumulate over a loop, the second operand transposed."""
    covers("dot", dtype)
    x, y = (random_values(rng, (32, 128), dtype, -1, 1) for _ in range(2))
    out = buffers.empty((32, 32), accumulator)
    kind = getattr(tl, accumulator)
    long_dot_kernel[(1,)](out, buffers.put(x, dtype), buffers.put(y, dtype), M=32, N=32, K=128, BLOCK=32, TYPE=kind)
    assert_error_ratio(out, x.astype(np.float64) @ y.astype(np.float64).T, 1e-5 if accumulator == "float32" else 2e-3)


@pytest.mark.parametrize("operation", ["atomic_add", "atomic_max", "atomic_xchg"])
def test_float8_atomics_are_refused(operation, buffers, covers):
    """Atomics on float8 raise Triton's error at compile time."""
    covers("atomics", "float8e4nv", supported=False)
    kernel = module_from(f"@triton.jit\ndef kernel(out, x):\n    tl.{operation}(out, tl.load(x))\n").kernel
    with pytest.raises(triton.TritonError, match="does not support fp8e4nv"):
        kernel[(1,)](buffers.empty(1, "float8e4nv"), buffers.put(np.ones(1), "float8e4nv"))


def test_float8e4b15_conversions(buffers, covers):
    """float8e4b15 is fp16 with fewer bits: every byte widens exactly, and narrowing limits, then rounds ties up."""
    covers("cast to float", "float8e4b15")
    covers("cast to float8", "float8e4b15")
    source = """@triton.jit
def kernel(out, x_ptr, n, TARGET: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x_ptr + i, mask=i < n).to(TARGET), mask=i < n)
"""
    kernel = module_from(source).kernel
    codes = torch.arange(256).to(torch.uint8)
    halves = ((codes.int() & 0x80) << 8 | (codes.int() & 0x7F) << 7).to(torch.uint16).view(torch.float16)
    packed = triton.reinterpret(buffers.put(codes, "uint8"), tl.float8e4b15)
    for name in ("float16", "bfloat16", "float32"):
        out = buffers.empty(256, name)
        kernel[(2,)](out, packed, 256, TARGET=getattr(tl, name), BLOCK=128)
        assert torch.equal(out, halves.to(torch_dtype(name)))
    x = torch.arange(65536).to(torch.uint16)
    magnitude = (x.int() & 0x7FFF).clamp(max=0x3F00)
    expected = ((magnitude + 0x40) >> 7 | (x.int() & 0x8000) >> 8).to(torch.uint8)
    for name in ("float16", "float32"):
        out = buffers.empty(65536, "uint8")
        wide = buffers.put(x.view(torch.float16).to(torch_dtype(name)), name)
        target = tl.float8e4b15
        kernel[(512,)](triton.reinterpret(out, target), wide, 65536, TARGET=target, BLOCK=128)
        assert torch.equal(out, expected)
