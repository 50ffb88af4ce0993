"""Atomic operations: results, masks, contention between programs, duplicates, compare-and-swap as a lock."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import as_numpy, assert_same, random_values

SOURCE = """@triton.jit
def kernel(place, old, x, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    value = tl.load(x + offsets, mask=mask)
    before = tl.atomic_{op}(place + offsets, value, mask=mask{extra})
    tl.store(old + offsets, before, mask=mask)
"""
WHOLE = ("int32", "uint32", "int64", "uint64")
CASES = (
    [(op, dtype) for op in ("add", "max", "min", "and", "or", "xor", "xchg") for dtype in WHOLE]
    + [("add", d) for d in ("float16", "bfloat16", "float32", "float64")]
    + [("max", "float32"), ("max", "float64"), ("min", "float32")]
    + [
        pytest.param(*case, marks=pytest.mark.compiled)
        for case in (("min", "float64"), ("xchg", "float32"), ("xchg", "float64"))
    ]
)
FUNCTIONS = {
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "xchg": lambda a, b: b,
}


@pytest.mark.parametrize(("op", "dtype"), CASES)
@pytest.mark.parametrize("n", [63, 1])
def test_elementwise_atomics(op, dtype, n, rng, buffers, covers):
    """Each element's place is updated and its former value returned; masked-off places stay."""
    covers(f"atomic_{op}", dtype)
    before, x = random_values(rng, 64, dtype), random_values(rng, n, dtype)
    place = buffers.put(before, dtype, writable=True)
    old = buffers.empty(n, dtype)
    module_from(SOURCE.format(op=op, extra="")).kernel[(1,)](place, old, buffers.put(x, dtype), n, BLOCK=64)
    expected = before.copy()
    with np.errstate(all="ignore"):
        expected[:n] = FUNCTIONS[op](before[:n], x)
    if dtype == "bfloat16":
        expected = torch.from_numpy(expected).bfloat16().double().numpy()
    assert_same(place, expected)
    assert_same(old, before[:n])


@pytest.mark.parametrize("sem", ["acquire", "release", "acq_rel", "relaxed"])
@pytest.mark.parametrize("scope", ["cta", "gpu", "sys"])
def test_orders_and_scopes(sem, scope, rng, buffers, covers):
    """Every memory order and scope is accepted."""
    covers("atomic sem scope", "int32")
    x = random_values(rng, 64, "int32", -99, 99)
    place, old = buffers.put(np.zeros(64), "int32", writable=True), buffers.empty(64, "int32")
    kernel = module_from(SOURCE.format(op="add", extra=f", sem={sem!r}, scope={scope!r}")).kernel
    kernel[(1,)](place, old, buffers.put(x, "int32"), 64, BLOCK=64)
    assert_same(place, x)


CONTENDED = """@triton.jit
def kernel(total, old, x, STEPS: tl.constexpr):
    program = tl.program_id(0)
    value = tl.load(x + program)
    before = tl.atomic_{op}(total, value)
    tl.store(old + program, before)
"""


@pytest.mark.parametrize(
    ("op", "dtype"),
    [("add", "int32"), ("add", "uint64"), ("add", "float32"), ("add", "float64"), ("add", "float16"), ("max", "int64"),
     ("min", "uint32"), ("max", "float32"), ("min", "float32"), ("xor", "int32"), ("or", "uint32"), ("and", "int64"),
     ("max", "float64"), ("add", "bfloat16")],
)  # fmt: skip
def test_contention(op, dtype, rng, buffers, covers):
    """Programs that update one scalar lose no update."""
    covers(f"atomic_{op} contended", dtype)
    x = (
        random_values(rng, 967, dtype, -10, 10)
        if dtype not in ("uint32", "uint64")
        else random_values(rng, 967, dtype, 0, 1000)
    )
    if op == "add" and "float" in dtype:
        x = (
            rng.integers(0, 2, 967).astype(np.float32)
            if dtype != "bfloat16"
            else np.where(np.arange(967) < 100, 1, 0).astype(np.float32)
        )
    start = {"add": 0, "max": 0, "min": 3, "xor": 5, "or": 0, "and": -1}[op]
    total = buffers.put(np.array([start]), dtype, writable=True)
    old = buffers.empty(967, dtype)
    module_from(CONTENDED.format(op=op)).kernel[(967,)](total, old, buffers.put(x, dtype), STEPS=1)
    expected = FUNCTIONS[op].reduce(np.concatenate([np.array([start], x.dtype), x]))
    assert_same(total, np.array([expected]))
    if op == "add" and dtype == "int32":
        assert start in old.tolist()


@triton.jit
def histogram_kernel(counts, bins, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    place = tl.load(bins + offsets, mask=mask, other=0)
    tl.atomic_add(counts + place, 1, mask=mask)


@pytest.mark.parametrize("dtype", ["int32", "float32", "int64"])
def test_duplicates_within_a_tensor(dtype, rng, buffers, covers):
    """Elements of one tensor that share a place all count."""
    covers("atomic_add duplicates", dtype)
    bins = rng.integers(0, 7, 3000)
    counts = buffers.put(np.zeros(7), dtype, writable=True)
    histogram_kernel[(triton.cdiv(3000, 256),)](counts, buffers.put(bins, "int32"), 3000, BLOCK=256)
    assert_same(counts, np.bincount(bins, minlength=7).astype(counts.numpy().dtype))


@triton.jit
def tile_kernel(out, x, M: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    value = tl.load(x + place)
    tl.atomic_add(out + tl.arange(0, N)[None, :] + 0 * place, value)
    tl.atomic_max(out + N + tl.arange(0, M), tl.max(value, axis=1))
    tl.atomic_add(out + N + M, tl.sum(value))


def test_tiles(rng, buffers, covers):
    """Matrices of atomics fold rows together, and reductions feed atomics."""
    covers("atomic_add 2d", "int32")
    x = random_values(rng, (8, 32), "int32", 0, 1000)
    out = buffers.put(np.zeros(41), "int32", writable=True)
    tile_kernel[(3,)](out, buffers.put(x, "int32"), M=8, N=32)
    assert_same(out, np.concatenate([3 * x.sum(0), x.max(1), [3 * x.sum()]]).astype(np.int32))


@triton.jit
def scalar_mask_kernel(out, n):
    program = tl.program_id(0)
    before = tl.atomic_add(out, 1, mask=program < n)
    if program < n:
        tl.atomic_add(out + 1, before)


def test_scalar_masks(buffers, covers):
    """A scalar atomic obeys its mask."""
    covers("atomic_add masked scalar", "int32")
    out = buffers.put(np.zeros(2), "int32", writable=True)
    scalar_mask_kernel[(50,)](out, 13)
    assert out.tolist() == [13, sum(range(13))]


@triton.jit
def lock_kernel(lock, total, x, N: tl.constexpr):
    value = tl.load(x + tl.program_id(0) * N + tl.arange(0, N))
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    place = total + tl.arange(0, N)
    tl.store(place, tl.load(place) + value)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@pytest.mark.parametrize("programs", [1, 64])
def test_compare_and_swap_is_a_lock(programs, rng, buffers, covers):
    """A spin lock by compare-and-swap protects a plain load and store."""
    covers("atomic_cas lock", "int32")
    x = random_values(rng, (programs, 32), "int32", -999, 999)
    total = buffers.put(np.zeros(32), "int32", writable=True)
    lock = buffers.put(np.zeros(1), "int32", writable=True)
    lock_kernel[(programs,)](lock, total, buffers.put(x, "int32"), N=32)
    assert_same(total, x.sum(0, dtype=np.int32))
    assert lock.item() == 0


@triton.jit
def serialised_kernel(data, lock):
    mine = tl.program_id(0)
    while tl.atomic_cas(lock, mine, mine) != mine:
        pass
    before = tl.load(data)
    tl.store(data, before + mine)
    tl.debug_barrier()
    tl.atomic_xchg(lock, mine + 1)


@pytest.mark.compiled
def test_programs_wait_for_earlier_ones(buffers, covers):
    """A program may wait for programs of lower index, which are started before it."""
    covers("ordered programs", "int32")
    data, lock = buffers.put(np.zeros(1), "int32", writable=True), buffers.put(np.zeros(1), "int32", writable=True)
    serialised_kernel[(200,)](data, lock)
    assert (data.item(), lock.item()) == (sum(range(200)), 200)


@triton.jit
def tensor_cas_kernel(old, place, expected, desired, N: tl.constexpr):
    offsets = tl.arange(0, N)
    before = tl.atomic_cas(place + offsets, tl.load(expected + offsets), tl.load(desired + offsets))
    tl.store(old + offsets, before)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64", "float32", "float64", "int16", "uint16", "float16"])
@pytest.mark.compiled
def test_compare_and_swap_of_tensors(dtype, rng, buffers, covers):
    """Each element is swapped where it equals the expected value, and its former value returned."""
    covers("atomic_cas", dtype)
    before, desired = random_values(rng, 64, dtype), random_values(rng, 64, dtype)
    expected = np.where(rng.random(64) < 0.5, before, before + before.dtype.type(1))
    place, old = buffers.put(before, dtype, writable=True), buffers.empty(64, dtype)
    tensor_cas_kernel[(1,)](old, place, buffers.put(expected, dtype), buffers.put(desired, dtype), N=64)
    assert_same(place, np.where(expected == before, desired, before))
    assert_same(old, before)


@triton.jit
def ticket_kernel(order, counter):
    ticket = tl.atomic_add(counter, 1)
    tl.store(order + ticket, tl.program_id(0))


def test_tickets(buffers, covers):
    """Returned values of contended additions are all different."""
    covers("atomic_add tickets", "int32")
    order, counter = buffers.empty(500, "int32"), buffers.put(np.zeros(1), "int32", writable=True)
    ticket_kernel[(500,)](order, counter)
    assert sorted(order.tolist()) == list(range(500))


@triton.jit
def unused_result_kernel(x):
    tl.atomic_max(x, 5)
    tl.atomic_min(x + 1, 5)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "float32", "int64"])
def test_numbers_as_values(dtype, buffers, covers):
    """Python numbers take the element type of the pointer."""
    covers("atomic_max atomic_min", dtype)
    x = buffers.put(np.array([3, 9]), dtype, writable=True)
    unused_result_kernel[(4,)](x)
    assert x.tolist() == [5, 5]


def test_float_extremes_of_both_signs(rng, buffers, covers):
    """Float maxima and minima order negative and positive numbers, zeros and infinities."""
    covers("atomic_max atomic_min", "float32")
    a = np.array([-1.5, -0.5, 2.0, -3.0, np.inf, -np.inf, 0.0, 7.0], np.float32)
    b = np.array([-2.5, 0.25, -8.0, -1.0, 5.0, -9.0, -1.0, np.inf], np.float32)
    for op in ("max", "min"):
        place, old = buffers.put(a, "float32", writable=True), buffers.empty(8, "float32")
        module_from(SOURCE.format(op=op, extra="")).kernel[(1,)](place, old, buffers.put(b, "float32"), 8, BLOCK=8)
        assert_same(place, FUNCTIONS[op](a, b))


def test_sums_of_random_floats(rng, buffers, covers):
    """A contended float sum has the error of some order of additions."""
    covers("atomic_add contended", "float32")
    x = random_values(rng, 967, "float32")
    total, old = buffers.put(np.zeros(1), "float32", writable=True), buffers.empty(967, "float32")
    module_from(CONTENDED.format(op="add")).kernel[(967,)](total, old, buffers.put(x, "float32"), STEPS=1)
    bound = 1e-5 * np.abs(x).sum()
    assert abs(as_numpy(total)[0] - x.astype(np.float64).sum()) <= bound


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", ["int1", "int8", "int16"])
def test_unsupported_dtypes_are_refused(dtype, buffers):
    """Atomics on booleans and narrow integers are compile-time errors."""
    place, old = buffers.put(np.zeros(8), dtype, writable=True), buffers.empty(8, dtype)
    with pytest.raises(triton.TritonError):
        module_from(SOURCE.format(op="add", extra="")).kernel[(1,)](place, old, buffers.put(np.zeros(8), dtype), 8, BLOCK=8)
