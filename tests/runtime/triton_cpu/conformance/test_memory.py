"""Loads and stores: masks, other values, strides, gathers, alignment, order of loads and stores, specialisation."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import NUMBERS, assert_same, convert, random_values, torch_dtype


@triton.jit
def copy_kernel(out, x, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets, mask=offsets < n), mask=offsets < n)


@pytest.mark.parametrize("size", [1, 63, 1000, 1024])
@pytest.mark.parametrize("dtype", ["int1", *NUMBERS])
def test_masked_copy(size, dtype, rng, buffers, covers):
    """A masked copy moves every bit of any dtype and touches nothing beyond the mask."""
    covers("load store", dtype)
    raw = torch.from_numpy(rng.integers(0, 256 if dtype != "int1" else 2, size * torch_dtype(dtype).itemsize, dtype=np.uint8))
    x, out = buffers.put(raw.view(torch_dtype(dtype)), dtype), buffers.empty(size, dtype)
    copy_kernel[(triton.cdiv(size, 256),)](out, x, size, BLOCK=256)
    assert torch.equal(out.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("out_offset", [0, 1, 3])
@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("dtype", ["int8", "float16", "float32", "int64"])
def test_unaligned_pointers(out_offset, offset, dtype, rng, buffers, covers):
    """Pointers at any element, aligned to vectors or not, load and store right."""
    covers("unaligned", dtype)
    values = random_values(rng, 1000, dtype)
    x, out = buffers.put(values, dtype, offset), buffers.empty(1000, dtype, out_offset)
    copy_kernel[(4,)](out, x, 1000, BLOCK=256)
    assert_same(out, values)


@triton.jit
def other_kernel(out, x, mask, other, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    m = tl.load(mask + offsets)
    tl.store(out + offsets, tl.load(x + offsets, mask=m, other=7))
    tl.store(out + BLOCK + offsets, tl.load(x + offsets, mask=m, other=tl.load(other + offsets)))
    tl.store(out + 2 * BLOCK + offsets, tl.load(x + offsets, mask=m, other=tl.load(other)))


@pytest.mark.parametrize("dtype", ["int1", *NUMBERS])
def test_other_values(dtype, rng, buffers, covers):
    """Masked-off elements take a number, a tensor or a scalar, converted to the element type."""
    covers("load other", dtype)
    x, mask, other = random_values(rng, 64, dtype), random_values(rng, 64, "int1"), random_values(rng, 64, "int16", 0, 100)
    out = buffers.empty(192, dtype)
    other_kernel[(1,)](out, buffers.put(x, dtype), buffers.put(mask, "int1"), buffers.put(other, "int16"), BLOCK=64)
    others = [convert(values, dtype) for values in (np.full(64, 7), other, np.full(64, other[0]))]
    assert_same(out, np.concatenate([np.where(mask, x, value) for value in others]))


@triton.jit
def whole_mask_kernel(out, x, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    enabled = n > 3
    tl.store(out + offsets, tl.load(x + offsets, mask=enabled, other=-1))
    tl.store(out + BLOCK + offsets, tl.load(x + offsets), mask=enabled)
    tl.store(out + 2 * BLOCK + offsets, tl.load(x + offsets, mask=offsets < 0, other=-2))


@pytest.mark.parametrize("n", [2, 4])
def test_scalar_masks(n, rng, buffers, covers):
    """A scalar mask switches a whole load or store, and a mask that is false everywhere loads nothing."""
    covers("scalar mask", "float32")
    x = random_values(rng, 32, "float32")
    out = buffers.put(np.full(96, 55.0), "float32", writable=True)
    whole_mask_kernel[(1,)](out, buffers.put(x, "float32"), n, BLOCK=32)
    loaded, stored = (x, x) if n > 3 else (np.full(32, -1.0), np.full(32, 55.0))
    assert_same(out, np.concatenate([loaded, stored, np.full(32, -2.0)]).astype(np.float32))


@triton.jit
def scalar_kernel(out, x, n):
    value = tl.load(x)
    tl.store(out, value)
    tl.store(out + 1, tl.load(x + n, mask=n < 5, other=9))
    tl.store(out + 2, tl.load(x + n, mask=n >= 5, other=9))
    tl.store(out + 3, value + value, mask=n < 5)
    tl.store(out + 4, value, mask=n >= 5)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_scalars(dtype, rng, buffers, covers):
    """One element loads and stores through a pointer, with and without a mask."""
    covers("scalar load store", dtype)
    x = random_values(rng, 4, dtype, 0, 50)
    out = buffers.put(np.full(5, 3), dtype, writable=True)
    scalar_kernel[(1,)](out, buffers.put(x, dtype), 2)
    assert_same(out, convert(np.array([x[0], x[2], 9, x[0] + x[0], 3], dtype=np.float64), dtype))


@triton.jit
def strided_kernel(out, x, rows, columns, row_stride, column_stride, out_row, out_column, M: tl.constexpr, N: tl.constexpr):
    i = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    j = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    inside = (i < rows) & (j < columns)
    value = tl.load(x + i * row_stride + j * column_stride, mask=inside, other=0)
    tl.store(out + i * out_row + j * out_column, value * 2, mask=inside)


STRIDES = [
    ((37, 63), (63, 1), (63, 1)),
    ((37, 63), (1, 37), (63, 1)),
    ((37, 63), (63, 1), (1, 37)),
    ((16, 64), (128, 2), (64, 1)),
    ((1, 1000), (1000, 1), (1000, 1)),
    ((63, 1), (1, 1), (1, 63)),
    ((8, 8), (0, 1), (8, 1)),
    ((8, 8), (8, 0), (1, 8)),
]


@pytest.mark.parametrize(("shape", "strides", "out_strides"), STRIDES)
@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_strides(shape, strides, out_strides, dtype, rng, buffers, covers):
    """Two-dimensional tiles with ragged edges follow any strides, zero included."""
    covers("strided load store", dtype)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    flat = random_values(rng, extent, dtype, -100, 100)
    out = buffers.empty(shape[0] * shape[1], dtype)
    grid = (triton.cdiv(shape[0], 16), triton.cdiv(shape[1], 32))
    strided_kernel[grid](out, buffers.put(flat, dtype), *shape, *strides, *out_strides, M=16, N=32)
    view = np.lib.stride_tricks.as_strided(flat, shape, [s * flat.itemsize for s in strides])
    expected = np.zeros(shape[0] * shape[1], flat.dtype)
    np.lib.stride_tricks.as_strided(expected, shape, [s * flat.itemsize for s in out_strides])[:] = view * 2
    assert_same(out, expected)


@triton.jit
def reverse_kernel(out, x, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out + offsets, tl.load(x + (n - 1) - offsets, mask=mask), mask=mask)
    tl.store(out + n + (n - 1 - offsets), tl.load(x + offsets, mask=mask), mask=mask)


@pytest.mark.parametrize("n", [1, 63, 64])
def test_negative_steps(n, rng, buffers, covers):
    """Addresses that fall as the index rises load and store right."""
    covers("negative stride", "float32")
    x = random_values(rng, n, "float32")
    out = buffers.empty(2 * n, "float32")
    reverse_kernel[(1,)](out, buffers.put(x, "float32"), n, BLOCK=64)
    assert_same(out, np.concatenate([x[::-1], x[::-1]]))


@triton.jit
def gather_kernel(out, x, index, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    place = tl.load(index + offsets, mask=mask, other=0)
    tl.store(out + offsets, tl.load(x + place, mask=mask), mask=mask)
    tl.store(out + n + place, offsets, mask=mask)


@pytest.mark.parametrize("index", ["int32", "int64", "int16", "uint8", "uint32", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "int64", "float16", "int8"])
def test_gather_and_scatter(index, dtype, rng, buffers, covers):
    """Loaded indices of any integer dtype gather and scatter."""
    covers("gather scatter", dtype, index)
    n = 100
    x, places = random_values(rng, n, dtype), rng.permutation(n).astype(index)
    out = buffers.empty(2 * n, dtype)
    gather_kernel[(1,)](out, buffers.put(x, dtype), buffers.put(places, index), n, BLOCK=128)
    expected = np.zeros(n, x.dtype)
    expected[places] = np.arange(n)
    assert_same(out, np.concatenate([x[places], expected]))


@triton.jit
def narrow_index_kernel(out, x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    narrow = offsets.to(tl.uint8) + 200
    tl.store(out + offsets, tl.load(x + narrow))
    signed = (offsets * 2).to(tl.int8)
    tl.store(out + BLOCK + offsets, tl.load(x + 128 + signed))
    tl.store(out + 2 * BLOCK + offsets, tl.load(x + (offsets * 3) % 64))
    tl.store(out + 3 * BLOCK + offsets, tl.load(x + (offsets // 4) * 4 + (offsets & 1)))


def test_indices_that_wrap(rng, buffers, covers):
    """Index arithmetic in narrow dtypes wraps before it becomes an address."""
    covers("index arithmetic", "int8", "uint8")
    x = random_values(rng, 256, "float32")
    out = buffers.empty(1024, "float32")
    narrow_index_kernel[(1,)](out, buffers.put(x, "float32"), BLOCK=256)
    i = np.arange(256)
    places = ((i + 200) % 256, 128 + (i * 2).astype(np.int8).astype(int), i * 3 % 64, i // 4 * 4 + (i & 1))
    assert_same(out, np.concatenate([x[p] for p in places]))


@triton.jit
def unsigned_offset_kernel(out, x, offset_ptr, BLOCK: tl.constexpr):
    base = tl.load(offset_ptr)
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + base + offsets))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int8", "int64"])
def test_scalar_offsets(dtype, rng, buffers, covers):
    """A scalar offset of any integer dtype moves a pointer, unsigned ones never backwards."""
    covers("pointer + scalar", dtype)
    x = random_values(rng, 300, "float32")
    offset = 200 if dtype != "int8" else 100
    out = buffers.empty(32, "float32")
    offsets = buffers.put(np.array([offset]), dtype)
    unsigned_offset_kernel[(1,)](out, buffers.put(x, "float32"), offsets, BLOCK=32)
    assert_same(out, x[offset : offset + 32])


@triton.jit
def hazard_kernel(x, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    before = tl.load(x + offsets)
    tl.store(x + offsets, before + 1)
    after = tl.load(x + offsets)
    tl.store(x + offsets, after * 10)
    tl.store(out + offsets, before)
    tl.store(out + BLOCK + offsets, after)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_load_keeps_its_value_across_stores(dtype, rng, buffers, covers):
    """A value loaded before a store to the same place stays what it was."""
    covers("order of loads and stores", dtype)
    x = random_values(rng, 64, dtype, -6, 6)
    place, out = buffers.put(x, dtype, writable=True), buffers.empty(128, dtype)
    hazard_kernel[(1,)](place, out, BLOCK=64)
    one, ten = x.dtype.type(1), x.dtype.type(10)
    assert_same(out, np.concatenate([x, x + one]))
    assert_same(place, (x + one) * ten)


@triton.jit
def swap_kernel(x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    low, high = tl.load(x + offsets), tl.load(x + 2 * BLOCK - 1 - offsets)
    tl.store(x + offsets, high)
    tl.store(x + 2 * BLOCK - 1 - offsets, low)


@triton.jit
def shift_kernel(x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x + offsets + 1, tl.load(x + offsets))


@triton.jit
def transpose_in_place_kernel(x, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(x + i * N + j, tl.load(x + j * N + i))


def test_overlapping_moves(rng, buffers, covers):
    """A store of a block happens after the whole block was loaded, even where they overlap."""
    covers("order of loads and stores", "int32")
    values = random_values(rng, 257, "int32")
    x = buffers.put(values[:256], "int32", writable=True)
    swap_kernel[(1,)](x, BLOCK=128)
    assert_same(x, values[:256][::-1])
    x = buffers.put(values, "int32", writable=True)
    shift_kernel[(1,)](x, BLOCK=256)
    assert_same(x, np.concatenate([values[:1], values[:256]]))
    x = buffers.put(values[:256], "int32", writable=True)
    transpose_in_place_kernel[(1,)](x, N=16)
    assert_same(x, values[:256].reshape(16, 16).T.reshape(-1))


@triton.jit
def loop_hazard_kernel(x, out, steps, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    for step in range(steps):
        tl.store(x + offsets, value + step)
        value = tl.load(x + (BLOCK - 1 - offsets))
    tl.store(out + offsets, value)


def test_loads_and_stores_in_a_loop(rng, buffers, covers):
    """Each turn of a loop sees what the turns before it stored."""
    covers("order of loads and stores", "float32")
    x = random_values(rng, 32, "float32", -8, 8).round()
    place, out = buffers.put(x, "float32", writable=True), buffers.empty(32, "float32")
    loop_hazard_kernel[(1,)](place, out, 5, BLOCK=32)
    memory, value = x.copy(), x.copy()
    for step in range(5):
        memory = value + step
        value = memory[::-1].copy()
    assert_same(out, value.astype(np.float32))
    assert_same(place, memory.astype(np.float32))


@triton.jit
def duplicate_store_kernel(out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets // 8, offsets // 8)
    tl.store(out + BLOCK // 8, 42)
    tl.store(out + BLOCK // 8 + 1 + offsets * 0, tl.full((BLOCK,), 7, tl.int32))


def test_many_lanes_store_to_one_place(buffers, covers):
    """Several elements may store one value to one address."""
    covers("store", "int32")
    out = buffers.empty(10, "int32")
    duplicate_store_kernel[(1,)](out, BLOCK=64)
    assert out.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 42, 7]


@triton.jit
def broadcast_store_kernel(out, value, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), value)
    tl.store(out + BLOCK + tl.arange(0, BLOCK), 3)


@pytest.mark.parametrize("dtype", ["float32", "int64", "float16"])
def test_a_scalar_is_stored_to_every_address(dtype, buffers, covers):
    """A scalar or number stored through a tensor of pointers goes to each."""
    covers("store of a scalar", dtype)
    out = buffers.empty(128, dtype)
    broadcast_store_kernel[(1,)](out, 5, BLOCK=64)
    assert_same(out, np.repeat([5, 3], 64).astype(out.numpy().dtype))


@pytest.mark.parametrize("load_modifier", ["", ".ca", ".cg", ".cv"])
@pytest.mark.parametrize("store_modifier", ["", ".wb", ".cs", ".wt", ".cg"])
def test_cache_modifiers(load_modifier, store_modifier, rng, buffers, covers):
    """Cache modifiers, eviction policies and volatility change no value."""
    covers("cache modifiers", "float32")
    kernel = module_from(
        f"""@triton.jit
def kernel(out, x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets, cache_modifier={load_modifier!r}, eviction_policy="evict_last")
    again = tl.load(x + offsets, volatile=True, eviction_policy="evict_first")
    tl.store(out + offsets, value + again, cache_modifier={store_modifier!r}, eviction_policy="evict_first")
"""
    ).kernel
    x, out = random_values(rng, 64, "float32"), buffers.empty(64, "float32")
    kernel[(1,)](out, buffers.put(x, "float32"), BLOCK=64)
    assert_same(out, x + x)


@triton.jit
def hints_kernel(out, x, n, stride, BLOCK: tl.constexpr):
    offsets = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), BLOCK), BLOCK)
    step = tl.multiple_of(stride, 8)
    tl.assume(n >= 0)
    tl.assume(stride > 0)
    mask = tl.max_constancy(offsets < n, 8)
    tl.debug_barrier()
    tl.store(out + offsets, tl.load(x + offsets * step, mask=mask, other=0))


def test_hints(rng, buffers, covers):
    """True hints about divisibility, contiguity and ranges change no value."""
    covers("multiple_of max_contiguous max_constancy assume debug_barrier", "any")
    x, out = random_values(rng, 1024, "float32"), buffers.empty(128, "float32")
    hints_kernel[(1,)](out, buffers.put(x, "float32"), 64, 8, BLOCK=128)
    assert_same(out, np.where(np.arange(128) < 64, x[::8], 0).astype(np.float32))


@triton.jit
def specialised_kernel(out, x, stride, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets * stride, mask=offsets < n, other=0) + n)


@pytest.mark.parametrize("stride", [1, 2, 16, 17])
@pytest.mark.parametrize("n", [1, 16, 31, 32])
def test_specialised_integers(stride, n, rng, buffers, covers):
    """Arguments that are 1, multiples of 16 and neither give the same results."""
    covers("argument specialisation", "int32")
    x, out = random_values(rng, 32 * 17, "int32", 0, 1000), buffers.empty(32, "int32")
    specialised_kernel[(1,)](out, buffers.put(x, "int32"), stride, n, BLOCK=32)
    i = np.arange(32)
    assert_same(out, np.where(i < n, x[i * stride], 0) + np.int32(n))


@triton.jit
def arguments_kernel(floats, ints, a, b, c, d, e, f):
    tl.store(floats, a)
    tl.store(floats + 1, b)
    tl.store(ints, c)
    tl.store(ints + 1, d)
    tl.store(ints + 2, e.to(tl.int64))
    if f is not None:
        tl.store(ints + 3, 1)
    else:
        tl.store(ints + 3, 0)


@pytest.mark.compiled
@pytest.mark.parametrize("c", [0, 1, -1, 2**31 - 1, -(2**31), 2**31, 2**32 + 5, -(2**63), 2**63 - 1])
def test_scalar_arguments(c, buffers, covers):
    """Floats, integers of every width, booleans and None arrive as passed."""
    covers("scalar arguments", "int32", "int64", "float32", "int1")
    floats, ints = buffers.empty(2, "float64"), buffers.empty(4, "int64")
    arguments_kernel[(1,)](floats, ints, 1.5, -0.25, c, 7, True, None)
    assert floats.tolist() == [1.5, -0.25]
    assert ints.tolist() == [c, 7, 1, 0]


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_large_unsigned_arguments(value, buffers, covers):
    """An integer above the signed range arrives as uint64."""
    covers("scalar arguments", "uint64")
    out = buffers.empty(1, "uint64")
    one_kernel[(1,)](out, value)
    assert out.numpy().tolist() == [value]


@triton.jit
def one_kernel(out, value):
    tl.store(out, value)


@pytest.mark.parametrize("value", [0.1, 1e-40, 1e300, float("inf"), float("-inf"), float("nan")])
def test_float_arguments(value, buffers, covers):
    """A Python float arrives as float32."""
    covers("scalar arguments", "float32")
    out = buffers.empty(1, "float32")
    one_kernel[(1,)](out, value)
    with np.errstate(all="ignore"):
        wanted = np.array([value]).astype(np.float32)
    if value == 1e-40:
        assert abs(out.item() - value) <= 1e-40
    elif value != 1e300:
        assert_same(out, wanted)


TYPED = [("i8", -5, "int8"), ("u8", 250, "int32"), ("i16", -300, "int32"), ("u16", 65000, "int32"), ("i64", 5, "int64"),
         ("u32", 2**32 - 1, "int64"), ("fp16", 0.5, "float32"), ("bf16", 0.25, "float32"), ("fp64", 0.1, "float64"),
         ("fp32", 0.1, "float64")]  # fmt: skip


@pytest.mark.compiled
@pytest.mark.parametrize(("annotation", "value", "out_dtype"), TYPED)
def test_annotated_arguments(annotation, value, out_dtype, buffers, covers):
    """A scalar argument with a type annotation has that type whatever Python passes."""
    names = {"fp": "float", "bf": "bfloat", "i": "int", "u": "uint"}
    prefix = annotation.rstrip("0123456789")
    full = names[prefix] + annotation[len(prefix) :]
    covers("annotated arguments", full)
    kernel = module_from(
        f"@triton.jit\ndef kernel(out, value: tl.{full}):\n"
        f"    tl.static_assert(value.dtype == tl.{full})\n    tl.store(out, value)\n"
    ).kernel
    out = buffers.empty(1, out_dtype)
    kernel[(1,)](out, value)
    assert out.item() == (np.float32(0.1).astype(np.float64) if annotation == "fp32" else value)


@triton.jit
def table_kernel(out, table, sizes, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    x = tl.load(table + program).to(tl.pointer_type(tl.float32))
    n = tl.load(sizes + program)
    offsets = tl.arange(0, BLOCK)
    tl.store(out + program * BLOCK + offsets, tl.load(x + offsets, mask=offsets < n, other=0.0))


def test_pointers_loaded_from_memory(rng, buffers, covers):
    """Addresses stored in a tensor become pointers to other tensors."""
    covers("pointer casts", "float32")
    arrays = [random_values(rng, n, "float32") for n in (5, 32, 17)]
    tensors = [buffers.put(a, "float32") for a in arrays]
    table = buffers.put(np.array([t.data_ptr() for t in tensors]), "int64")
    out = buffers.empty((3, 32), "float32")
    table_kernel[(3,)](out, table, buffers.put(np.array([5, 32, 17]), "int32"), BLOCK=32)
    assert_same(out, np.stack([np.pad(a, (0, 32 - len(a))) for a in arrays]))


@triton.jit
def grid_kernel(out):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    nx, ny, nz = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    place = (z * ny + y) * nx + x
    tl.store(out + place, x + 100 * y + 10000 * z + 0 * nz)


@pytest.mark.parametrize("grid", [(1,), (7,), (3, 5), (2, 3, 4), (1, 1, 9), (300, 1, 1), (1, 40, 2)])
def test_grids(grid, buffers, covers):
    """Every program of a grid of one to three dimensions runs once with its own indices."""
    covers("program_id num_programs", "any")
    nx, ny, nz = (*grid, 1, 1)[:3]
    out = buffers.empty((nz, ny, nx), "int32")
    grid_kernel[grid](out)
    z, y, x = np.meshgrid(np.arange(nz), np.arange(ny), np.arange(nx), indexing="ij")
    assert_same(out, x + 100 * y + 10000 * z)


def test_grid_from_a_function(buffers, covers):
    """A grid may be a function of the kernel's arguments."""
    covers("grid function", "any")
    x, out = buffers.put(np.arange(1000), "int32"), buffers.empty(1000, "int32")
    copy_kernel[lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)](out, x, n=1000, BLOCK=128)
    assert_same(out, np.arange(1000))


def test_empty_kernel_and_options(buffers, covers):
    """A kernel without effects and every launch option are accepted."""
    covers("launch options", "any")
    kernel = module_from("@triton.jit\ndef kernel(x, N: tl.constexpr):\n    pass\n").kernel
    x = buffers.empty(4, "float32")
    for options in ({}, {"num_warps": 1}, {"num_warps": 8, "num_stages": 4}):
        kernel[(1,)](x, N=4, **options)


@triton.jit
def add_order_kernel(out, x, SWAP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    if SWAP:
        tl.store(offsets + out, tl.load(offsets + x))
    else:
        back = out + BLOCK - (BLOCK - offsets)
        tl.store(back, tl.load((x + BLOCK) - (BLOCK - offsets)))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "float64", "float32"])
def test_pointer_arithmetic(swap, dtype, rng, buffers, covers):
    """Offsets add to pointers from either side and subtract from them."""
    covers("pointer arithmetic", dtype)
    x, out = random_values(rng, 128, dtype), buffers.empty(128, dtype)
    add_order_kernel[(1,)](out, buffers.put(x, dtype), SWAP=swap, BLOCK=128)
    assert_same(out, x)


def test_non_contiguous_torch_views(rng, buffers, covers):
    """A view's data pointer is where the kernel starts."""
    covers("views", "float32")
    x = buffers.put(random_values(rng, (10, 100), "float32"), "float32")
    out = buffers.empty(50, "float32")
    copy_kernel[(1,)](out, x[3, 7:57], 50, BLOCK=64)
    assert torch.equal(out, x[3, 7:57])


@triton.jit
def half_kernel(out, x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets) >> 1)


def test_reinterpreted_tensors(buffers, covers):
    """`triton.reinterpret` gives a tensor another element type for a launch."""
    covers("reinterpret", "uint32")
    x, out = buffers.put(np.full(16, -2), "int32"), buffers.empty(16, "int32")
    half_kernel[(1,)](triton.reinterpret(out, tl.uint32), triton.reinterpret(x, tl.uint32), BLOCK=16)
    assert out.tolist() == [2**31 - 1] * 16


@pytest.mark.parametrize("size", [4096, 65536])
def test_large_blocks(size, rng, buffers, covers):
    """Blocks of tens of thousands of elements load and store."""
    covers("block sizes", "float32")
    x, out = random_values(rng, size, "float32"), buffers.empty(size, "float32")
    copy_kernel[(1,)](out, buffers.put(x, "float32"), size, BLOCK=size)
    assert_same(out, x)


def test_empty_tensors_and_large_grids(rng, buffers, covers):
    """A masked kernel over no elements runs, and thousands of programs all run."""
    covers("grids", "any")
    copy_kernel[(1,)](buffers.empty(0, "float32"), buffers.empty(0, "float32"), 0, BLOCK=64)
    values = random_values(rng, 20001, "int32")
    out = buffers.empty(20001, "int32")
    copy_kernel[(triton.cdiv(20001, 4),)](out, buffers.put(values, "int32"), 20001, BLOCK=4)
    assert_same(out, values)
