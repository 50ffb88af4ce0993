"""Branches, loops and early returns, with everything that may be carried through them."""

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import assert_same, random_values


def run_scalars(buffers, source, arguments=(), count=1, dtype="int32", grid=(1,), **options):
    """Run a kernel made from source on one output tensor and scalar arguments."""
    out = buffers.empty(count, dtype)
    module_from(source).kernel[grid](out, *arguments, **options)
    return out.numpy().tolist()


BRANCHES = """@triton.jit
def kernel(out, a, b):
    if a > b:
        x = a - b
        y = 1
    elif a == b:
        x = 100 + a
        y = 2
    else:
        x = b - a
        y = 3
    if x % 2 == 0:
        if y == 3:
            x = x * 10
    tl.store(out, x)
    tl.store(out + 1, y)
"""


@pytest.mark.parametrize(("a", "b"), [(9, 4), (7, 7), (3, 8), (3, 9), (-5, 5)])
def test_branches(a, b, buffers, covers):
    """`if`, `elif` and `else` on run-time values choose values and effects."""
    covers("if", "any")
    x, y = (a - b, 1) if a > b else (100 + a, 2) if a == b else (b - a, 3)
    x = x * 10 if x % 2 == 0 and y == 3 else x
    assert run_scalars(buffers, BRANCHES, (a, b), 2) == [x, y]


@triton.jit
def branch_tensors_kernel(out, x, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    scale = tl.full((BLOCK,), 1, tl.int32)
    if n > 10:
        value = value + 1
        scale = scale * 3
        tl.store(out + 2 * BLOCK, 7)
    else:
        if n > 5:
            value = tl.load(x + BLOCK - 1 - offsets)
        tl.store(out + 2 * BLOCK, 8)
    tl.store(out + offsets, value * scale)
    tl.store(out + BLOCK + offsets, scale)


@pytest.mark.parametrize("n", [3, 7, 11])
def test_branches_on_tensors(n, rng, buffers, covers):
    """A branch replaces some tensors and leaves others."""
    covers("if with tensors", "int32")
    x, out = random_values(rng, 32, "int32", -999, 999), buffers.empty(65, "int32")
    branch_tensors_kernel[(1,)](out, buffers.put(x, "int32"), n, BLOCK=32)
    value, scale = (x + 1, 3) if n > 10 else (x[::-1], 1) if n > 5 else (x, 1)
    assert_same(out, np.concatenate([value * scale, np.full(32, scale), [7 if n > 10 else 8]]).astype(np.int32))


@triton.jit
def branch_pointers_kernel(out, a, b, choose, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    if choose > 0:
        source = a
        places = a + offsets
    else:
        source = b
        places = b + (BLOCK - 1 - offsets)
    tl.store(out + offsets, tl.load(source + offsets))
    tl.store(out + BLOCK + offsets, tl.load(places))


@pytest.mark.parametrize("choose", [0, 1])
def test_branches_on_pointers(choose, rng, buffers, covers):
    """A branch chooses a pointer and a tensor of pointers."""
    covers("if with pointers", "float32")
    a, b = random_values(rng, 32, "float32"), random_values(rng, 32, "float32")
    out = buffers.empty(64, "float32")
    branch_pointers_kernel[(1,)](out, buffers.put(a, "float32"), buffers.put(b, "float32"), choose, BLOCK=32)
    assert_same(out, np.concatenate([a, a] if choose else [b, b[::-1]]))


CONDITIONS = [
    "p and q",
    "p or q",
    "not p",
    "p and not q",
    "a > 0 and b > 0 and a > b",
    "p | (b > 3)",
    "p & q",
    "a != b",
    "a",
    "p != q",
]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("a", "b"), [(0, 0), (1, 0), (0, 5), (7, 4)])
def test_conditions(condition, a, b, buffers, covers):
    """Words and comparisons combine into conditions on scalars."""
    covers("conditions", "any")
    source = f"""@triton.jit
def kernel(out, x):
    a = tl.load(x)
    b = tl.load(x + 1)
    p = a > 0
    q = b > 0
    if {condition}:
        tl.store(out, 1)
    else:
        tl.store(out, 0)
"""
    x = buffers.put(np.array([a, b]), "int32")
    assert run_scalars(buffers, source, (x,)) == [int(bool(eval(condition, {"a": a, "b": b, "p": a > 0, "q": b > 0})))]


@triton.jit
def ternary_kernel(out, x, n, FLAG: tl.constexpr):
    first = tl.load(x) if n > 3 else tl.load(x + 1)
    second = 5 if FLAG else 6
    third = n if n > 3 and FLAG else -n
    tl.store(out, first)
    tl.store(out + 1, second)
    tl.store(out + 2, third)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("flag", [False, True])
def test_conditional_expressions(n, flag, buffers, covers):
    """A conditional expression works on run-time and compile-time conditions."""
    covers("conditional expression", "any")
    out = buffers.empty(3, "int32")
    ternary_kernel[(1,)](out, buffers.put(np.array([10, 20]), "int32"), n, FLAG=flag)
    assert out.tolist() == [10 if n > 3 else 20, 5 if flag else 6, n if n > 3 and flag else -n]


@triton.jit
def constexpr_kernel(out, x, MODE: tl.constexpr, FLAG: tl.constexpr, NAME: tl.constexpr, NONE: tl.constexpr):
    if MODE == 0:
        value = tl.load(x)
    elif MODE == 1:
        value = tl.load(x).to(tl.float32) * 0.5
    else:
        value = tl.arange(0, 4)
    if FLAG:
        tl.static_assert(MODE < 3)
    if NAME == "wide":
        tl.store(out + 4 + tl.arange(0, 4), tl.zeros((4,), tl.float32) + 9)
    if NONE is None:
        tl.store(out + 8, 1)
    if MODE == 2:
        tl.store(out + tl.arange(0, 4), value)
    else:
        tl.store(out, value)


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("name", ["wide", "other"])
def test_compile_time_branches(mode, name, buffers, covers):
    """Branches on constants may give a name different types and skip what is not taken."""
    covers("constexpr if", "any")
    out = buffers.put(np.zeros(9), "float32", writable=True)
    constexpr_kernel[(1,)](out, buffers.put(np.array([5]), "int32"), MODE=mode, FLAG=True, NAME=name, NONE=None)
    first = {0: [5, 0, 0, 0], 1: [2.5, 0, 0, 0], 2: [0, 1, 2, 3]}[mode]
    assert out.tolist() == first + ([9] * 4 if name == "wide" else [0] * 4) + [1]


RETURNS = """@triton.jit
def kernel(out, n, FLAG: tl.constexpr):
    program = tl.program_id(0)
    tl.store(out + program, 1)
    if FLAG:
        if program > 90:
            return
    if program >= n:
        return
    tl.store(out + program, 2)
    if program % 2 == 0:
        tl.store(out + program, 3)
        return
    else:
        tl.store(out + program, 4)
    tl.store(out + program, 5)
"""


@pytest.mark.compiled
@pytest.mark.parametrize("n", [0, 4, 10])
def test_early_returns(n, buffers, covers):
    """A kernel may return early, at several places."""
    covers("return", "any")
    found = run_scalars(buffers, RETURNS, (n, True), 10, grid=(10,))
    assert found == [1 if i >= n else 3 if i % 2 == 0 else 5 for i in range(10)]


RANGES = [(0, 5, 1), (3, 20, 4), (0, 0, 1), (5, 2, 1), (10, 0, -3), (-4, 5, 2), (0, -7, -1), (2, 3, 100)]


@pytest.mark.parametrize(("start", "stop", "step"), RANGES)
@pytest.mark.parametrize("kind", ["range", "tl.range"])
def test_ranges(kind, start, stop, step, buffers, covers):
    """`for` runs over run-time bounds with positive and constant negative steps, or not at all."""
    covers("for", "int32")
    source = f"""@triton.jit
def kernel(out, start, stop):
    total = 0
    count = 0
    last = -99
    for i in {kind}(start, stop, {step}):
        total += i * (count + 1)
        count += 1
        last = i
    tl.store(out, total)
    tl.store(out + 1, count)
    tl.store(out + 2, last)
"""
    total, count, last = 0, 0, -99
    for i in range(start, stop, step):
        total += i * (count + 1)
        count += 1
        last = i
    assert run_scalars(buffers, source, (start, stop), 3) == [total, count, last]


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("dtype", ["int8", "int16", "int64", "uint8", "uint32", "uint64"])
@pytest.mark.compiled
def test_loop_indices_of_other_dtypes(dtype, step, buffers, covers):
    """Bounds of other integer dtypes make indices of their promoted dtype."""
    covers("for", dtype)
    source = f"""@triton.jit
def kernel(out, bounds):
    total = tl.zeros((), tl.int64)
    for i in range(tl.load(bounds), tl.load(bounds + 1), {step}):
        total += i.to(tl.int64)
    tl.store(out, total)
"""
    bounds = buffers.put(np.array([2, 120]), dtype)
    assert run_scalars(buffers, source, (bounds,), dtype="int64") == [sum(range(2, 120, step))]


def test_loops_beyond_32_bits(buffers, covers):
    """A loop over int64 bounds does not wrap at 32 bits."""
    covers("for", "int64")
    source = """@triton.jit
def kernel(out, a, b):
    total = a * 0
    for i in range(a, b):
        total += i
    tl.store(out, total)
"""
    a = 2**33
    assert run_scalars(buffers, source, (a, a + 7), dtype="int64") == [sum(range(a, a + 7))]


CARRIED = """@triton.jit
def kernel(out, n):
    a = 0
    b = 1
    for _ in range(n):
        a, b = b, a + b
    x = 1
    y = 2
    z = 3
    for i in range(n):
        x, y, z = y, z, x
    tl.store(out, a)
    tl.store(out + 1, b)
    tl.store(out + 2, x)
    tl.store(out + 3, y)
    tl.store(out + 4, z)
"""


@pytest.mark.parametrize("n", [0, 1, 2, 10])
def test_exchanged_values(n, buffers, covers):
    """Values that a loop exchanges move together."""
    covers("loop-carried values", "int32")
    a, b, x = 0, 1, [1, 2, 3]
    for _ in range(n):
        a, b, x = b, a + b, x[1:] + x[:1]
    assert run_scalars(buffers, CARRIED, (n,), 5) == [a, b, *x]


@triton.jit
def carried_tensors_kernel(out, x, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    a = tl.load(x + offsets)
    b = tl.load(x + BLOCK + offsets)
    first = a
    for i in range(n):
        old = a
        a, b = b, a
        a = a + old * i
        b += tl.sum(a, axis=0)
    tl.store(out + offsets, a)
    tl.store(out + BLOCK + offsets, b)
    tl.store(out + 2 * BLOCK + offsets, first)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_exchanged_tensors(n, rng, buffers, covers):
    """Tensors that a loop exchanges keep their old values until the turn ends."""
    covers("loop-carried tensors", "int32")
    x, out = random_values(rng, 64, "int32", -9, 9), buffers.empty(96, "int32")
    carried_tensors_kernel[(1,)](out, buffers.put(x, "int32"), n, BLOCK=32)
    a, b = x[:32].astype(np.int32), x[32:].astype(np.int32)
    with np.errstate(all="ignore"):
        for i in range(n):
            old = a
            a, b = b, a
            a = a + old * np.int32(i)
            b = b + a.sum(dtype=np.int32)
    assert_same(out, np.concatenate([a, b, x[:32]]))


@triton.jit
def carried_pointers_kernel(out, x, n, stride, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    places = x + offsets
    index = offsets
    scalar = x
    total = tl.zeros((BLOCK,), tl.int32)
    for _ in range(n):
        total += tl.load(places) * 2 + tl.load(x + index) + tl.load(scalar)
        places += stride
        index = (index * 5 + 1) % 64
        scalar += 1
    tl.store(out + offsets, total)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_carried_pointers(n, rng, buffers, covers):
    """Pointers, tensors of pointers and index vectors move from turn to turn."""
    covers("loop-carried pointers", "int32")
    x, out = random_values(rng, 128, "int32", -99, 99), buffers.empty(16, "int32")
    carried_pointers_kernel[(1,)](out, buffers.put(x, "int32"), n, 17, BLOCK=16)
    offsets, index, total = np.arange(16), np.arange(16), np.zeros(16, np.int32)
    for i in range(n):
        total += x[offsets + 17 * i] * 2 + x[index] + x[i]
        index = (index * 5 + 1) % 64
    assert_same(out, total)


NESTED = """@triton.jit
def kernel(out, n, m):
    total = 0
    for i in range(n):
        inner = 0
        for j in range(i, m):
            for k in range(0, 3):
                inner += i * j + k
            if j % 2 == 1:
                total += inner
        total = total * 3 % 1000003
    tl.store(out, total)
"""


def test_nested_loops(buffers, covers):
    """Loops nest with bounds that depend on outer indices, and hold branches."""
    covers("nested for", "int32")
    total = 0
    for i in range(6):
        inner = 0
        for j in range(i, 9):
            for k in range(3):
                inner += i * j + k
            if j % 2 == 1:
                total += inner
        total = total * 3 % 1000003
    assert run_scalars(buffers, NESTED, (6, 9)) == [total]


WHILE = """@triton.jit
def kernel(out, n):
    steps = 0
    value = n
    while value != 1:
        if value % 2 == 0:
            value = value // 2
        else:
            value = 3 * value + 1
        steps += 1
    tl.store(out, steps)
    i = 0
    total = 0
    while i < n and total < 50:
        j = 0
        while j < i:
            total += j
            j += 1
        i += 1
    tl.store(out + 1, i)
    tl.store(out + 2, total)
"""


@pytest.mark.parametrize("n", [1, 6, 27])
def test_while_loops(n, buffers, covers):
    """`while` runs until its condition fails, also nested and not at all."""
    covers("while", "int32")
    steps, value = 0, n
    while value != 1:
        value = value // 2 if value % 2 == 0 else 3 * value + 1
        steps += 1
    i = total = 0
    while i < n and total < 50:
        total += sum(range(i))
        i += 1
    assert run_scalars(buffers, WHILE, (n,), 3) == [steps, i, total]


@triton.jit
def while_tensors_kernel(out, x, limit, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    places = x + offsets
    turns = 0
    while tl.max(value, axis=0) < limit:
        places += BLOCK
        value = value * 2 + tl.load(places)
        turns += 1
    tl.store(out + offsets, value)
    tl.store(out + BLOCK, turns)


@pytest.mark.parametrize("limit", [-5, 50, 400])
def test_while_loops_on_tensors(limit, rng, buffers, covers):
    """`while` carries tensors and pointers, and its condition reduces one."""
    covers("while with tensors", "int32")
    x = random_values(rng, (9, 32), "int32", 0, 9)
    x[:, 0] = 9
    out = buffers.empty(33, "int32")
    while_tensors_kernel[(1,)](out, buffers.put(x, "int32"), limit, BLOCK=32)
    value, turns = x[0].copy(), 0
    while value.max() < limit:
        turns += 1
        value = value * 2 + x[turns]
    assert_same(out, np.append(value, turns).astype(np.int32))


@triton.jit
def static_range_kernel(out, x, N: tl.constexpr):
    total = 0
    for i in tl.static_range(N):
        if i % 2 == 0:
            total += tl.load(x + i)
        tl.store(out + 1 + i, tl.sum(tl.arange(0, 2**i), axis=0))
    for i in tl.static_range(6, 0, -2):
        total += i * 1000
    tl.store(out, total)


def test_static_range(rng, buffers, covers):
    """`static_range` unrolls, with an index that may be a shape, and steps down."""
    covers("static_range", "any")
    x, out = random_values(rng, 5, "int32", 0, 100), buffers.empty(6, "int32")
    static_range_kernel[(1,)](out, buffers.put(x, "int32"), N=5)
    assert out.tolist() == [x[::2].sum() + 12000, *(2**i * (2**i - 1) // 2 for i in range(5))]


RANGE_OPTIONS = [
    "num_stages=3",
    "loop_unroll_factor=2",
    "flatten=True",
    "warp_specialize=False",
    "disallow_acc_multi_buffer=True",
    "disable_licm=True",
]


@pytest.mark.compiled
@pytest.mark.parametrize("options", RANGE_OPTIONS)
@pytest.mark.parametrize("n", [0, 1, 7])
def test_range_options(options, n, buffers, covers):
    """Options of `tl.range` change no result, for counts that no unrolling divides."""
    covers("tl.range options", "any")
    source = f"""@triton.jit
def kernel(out, n):
    total = tl.zeros((16,), tl.int32)
    for i in tl.range(0, n, {options}):
        for j in tl.range(0, 2):
            total += i * 2 + j + tl.arange(0, 16)
    tl.store(out + tl.arange(0, 16), total)
"""
    expected = sum((i * 2 + j + np.arange(16) for i in range(n) for j in range(2)), np.zeros(16, int))
    assert run_scalars(buffers, source, (n,), 16) == expected.tolist()


@triton.jit
def branch_in_loop_kernel(out, x, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    last = 0
    for i in range(n):
        if i % 3 == 0:
            total += tl.load(x + i * BLOCK + offsets)
        elif i % 3 == 1:
            total = total * 0.5
            last = i
        if tl.sum(total, axis=0) > 1e9:
            total = tl.zeros((BLOCK,), tl.float32)
    tl.store(out + offsets, total)
    tl.store(out + BLOCK, last)


def test_branches_in_loops(rng, buffers, covers):
    """Branches inside a loop update some of what it carries."""
    covers("if in for", "float32")
    x, out = random_values(rng, (8, 32), "float32"), buffers.empty(33, "float32")
    branch_in_loop_kernel[(1,)](out, buffers.put(x, "float32"), 8, BLOCK=32)
    total = np.zeros(32, np.float32)
    for i in range(8):
        total = total + x[i] if i % 3 == 0 else total * np.float32(0.5) if i % 3 == 1 else total
    assert_same(out, np.append(total, 7).astype(np.float32))


@triton.jit
def loop_in_branch_kernel(out, x, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    if n > 2:
        total = tl.zeros((BLOCK,), tl.int32)
        for i in range(n):
            total += tl.load(x + i * BLOCK + offsets)
    else:
        total = tl.load(x + offsets)
        while tl.sum(total, axis=0) > 100:
            total = total // 2
    tl.store(out + offsets, total)


@pytest.mark.parametrize("n", [2, 4])
def test_loops_in_branches(n, rng, buffers, covers):
    """Loops inside branches give their results to the code after."""
    covers("for in if", "int32")
    x, out = random_values(rng, (4, 32), "int32", 0, 99), buffers.empty(32, "int32")
    loop_in_branch_kernel[(1,)](out, buffers.put(x, "int32"), n, BLOCK=32)
    expected = x.sum(0, dtype=np.int32) if n > 2 else x[0].copy()
    while n <= 2 and expected.sum() > 100:
        expected = expected // 2
    assert_same(out, expected)


@triton.jit
def stored_in_loop_kernel(out, x, n, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    for first in range(start, n, tl.num_programs(0) * BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        mask = offsets < n
        tl.store(out + offsets, tl.load(x + offsets, mask=mask) * 2, mask=mask)


@pytest.mark.parametrize("programs", [1, 3, 16])
def test_persistent_programs(programs, rng, buffers, covers):
    """A fixed number of programs strides over the work."""
    covers("persistent kernel", "float32")
    x, out = random_values(rng, 1000, "float32"), buffers.empty(1000, "float32")
    stored_in_loop_kernel[(programs,)](out, buffers.put(x, "float32"), 1000, BLOCK=64)
    assert_same(out, x * 2)


@pytest.mark.compiled
def test_types_that_change_in_a_loop_are_refused(buffers):
    """A name whose type differs between turns is a compile-time error that names it."""
    source = """@triton.jit
def kernel(out, n):
    value = 0
    for i in range(n):
        value = value + 0.5
    tl.store(out, value)
"""
    with pytest.raises(triton.TritonError, match="value"):
        run_scalars(buffers, source, (3,))


@pytest.mark.compiled
def test_names_defined_in_one_branch_only_are_refused(buffers):
    """A name that only one run-time branch defines is a compile-time error."""
    source = "@triton.jit\ndef kernel(out, n):\n    if n > 3:\n        value = 1\n    tl.store(out, value)\n"
    with pytest.raises(triton.TritonError):
        run_scalars(buffers, source, (7,))
