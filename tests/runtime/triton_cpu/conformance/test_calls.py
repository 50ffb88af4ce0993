"""Functions: calls, noinline, tuples, defaults, globals, methods, recursion over constants, aggregates."""

from typing import NamedTuple

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import assert_same, random_values

FACTOR: tl.constexpr = tl.constexpr(7)


@triton.jit
def twice(x):
    return x * 2


@triton.jit
def twice_plus(x, y=3, SCALE: tl.constexpr = 1):
    return twice(x) * SCALE + y


@triton.jit
def both(x, y):
    return x + y, x - y


@triton.jit
def calls_kernel(out, x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    total, difference = both(twice_plus(value), twice_plus(value, SCALE=FACTOR))
    tl.store(out + offsets, total)
    tl.store(out + BLOCK + offsets, difference)
    tl.store(out + 2 * BLOCK, twice_plus(BLOCK, y=tl.sum(value, axis=0)))


def test_calls(rng, buffers, covers):
    """Functions take tensors, constants, defaults and names, and return tuples."""
    covers("call", "int32")
    x, out = random_values(rng, 32, "int32", -99, 99), buffers.empty(65, "int32")
    calls_kernel[(1,)](out, buffers.put(x, "int32"), BLOCK=32)
    a, b = x * 2 + 3, x * 14 + 3
    assert_same(out, np.concatenate([a + b, a - b, [64 + x.sum()]]).astype(np.int32))


NOINLINE = """@triton.jit(noinline=True)
def load_function(places, index):
    return tl.load(places + index)


@triton.jit(noinline=True)
def scalar_function(a, b):
    if a > b:
        return a - b
    return b * 2


@triton.jit(noinline=True)
def pair_function(a, b):
    return a + b, scalar_function(a, b)


@triton.jit(noinline=True)
def vector_function(out, x, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    tl.store(out + offsets, value * 3 + tl.sum(value, axis=0) * 0)


@triton.jit(noinline=True)
def effect_function(place, value):
    if value > 5:
        tl.store(place, value)
        return
    tl.store(place, -value)


@triton.jit
def kernel(out, x, n, BLOCK: tl.constexpr):
    vector_function(out, x, n, BLOCK)
    total, other = pair_function(n, 7)
    tl.store(out + BLOCK, total)
    tl.store(out + BLOCK + 1, other)
    effect_function(out + BLOCK + 2, n)
    for i in range(3):
        effect_function(out + BLOCK + 3 + i, i * 4)
    tl.store(out + BLOCK + 6, load_function(x, 5) + load_function(x, n))
"""


@pytest.mark.compiled
@pytest.mark.parametrize("n", [2, 20])
def test_functions_that_are_not_inlined(n, rng, buffers, covers):
    """`noinline` functions take pointers and scalars, return scalars, return early and have effects."""
    covers("call noinline", "int32")
    x, out = random_values(rng, 32, "int32", -99, 99), buffers.empty(39, "int32")
    module_from(NOINLINE).kernel[(2,)](out, buffers.put(x, "int32"), n, BLOCK=32)
    tail = [n + 7, n - 7 if n > 7 else 14, n if n > 5 else -n, 0, -4, 8, x[5] + x[n]]
    assert_same(out, np.concatenate([x * 3, tail]).astype(np.int32))


CALL_KINDS = ["return", "assign", "branch", "loop"]


@pytest.mark.parametrize("kind", CALL_KINDS)
@pytest.mark.parametrize("noinline", [False, True])
@pytest.mark.compiled
def test_returns_of_functions(kind, noinline, buffers, covers):
    """Functions return from branches and loops, inlined or not."""
    covers("return in functions", "any")
    bodies = {
        "return": "return x + n",
        "assign": "y = x\n    y += n\n    return y",
        "branch": "if n > 0:\n        y = x + n\n    else:\n        y = x\n    return y",
        "loop": "y = x\n    for i in range(n):\n        y += 1\n    return y",
    }
    source = f"""@triton.jit(noinline={noinline})
def function(x, n):
    {bodies[kind]}


@triton.jit
def kernel(out, x_ptr, n):
    place = tl.program_id(0)
    tl.store(out + place, function(tl.load(x_ptr + place), n))
"""
    x, out = np.arange(7, dtype=np.int32), buffers.empty(7, "int32")
    module_from(source).kernel[(7,)](out, buffers.put(x, "int32"), 5)
    assert_same(out, x + 5)


@pytest.mark.compiled
def test_tensors_for_functions_that_are_not_inlined_are_refused(buffers):
    """A `noinline` function called with a tensor is a compile-time error."""
    source = """@triton.jit(noinline=True)
def function(x):
    return x + 1


@triton.jit
def kernel(out):
    tl.store(out + tl.arange(0, 4), function(tl.arange(0, 4)))
"""
    with pytest.raises(triton.TritonError, match="noinline"):
        module_from(source).kernel[(1,)](buffers.empty(4, "int32"))


DEPTH = """@triton.jit
def level0(x):
    return x + 1
{levels}

@triton.jit
def kernel(out, x_ptr, BLOCK: tl.constexpr):
    for i in range(BLOCK):
        tl.store(out + i, level19(tl.load(x_ptr + i)))
"""


@pytest.mark.compiled
@pytest.mark.parametrize("decorator", ["triton.jit", "triton.jit(noinline=True)"])
def test_deep_calls(decorator, rng, buffers, covers):
    """Calls nest twenty deep."""
    covers("call depth", "any")
    levels = "\n".join(f"\n\n@{decorator}\ndef level{i}(x):\n    return level{i - 1}(x) + {i}" for i in range(1, 20))
    x, out = random_values(rng, 32, "int32", -99, 99), buffers.empty(32, "int32")
    module_from(DEPTH.format(levels=levels)).kernel[(1,)](out, buffers.put(x, "int32"), BLOCK=32)
    assert_same(out, x + 1 + sum(range(1, 20)))


@triton.jit
def power(x, N: tl.constexpr):
    if N == 0:  # noqa: SIM108 - a branch of the language
        result = x * 0 + 1
    else:
        result = x * power(x, N - 1)
    return result


@triton.jit
def power_kernel(out, x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, power(tl.load(x + offsets), 3))


def test_recursion_over_constants(rng, buffers, covers):
    """A function calls itself with a smaller constant."""
    covers("recursion over constexpr", "any")
    x, out = random_values(rng, 32, "int32", -9, 9), buffers.empty(32, "int32")
    power_kernel[(1,)](out, buffers.put(x, "int32"), BLOCK=32)
    assert_same(out, x**3)


@triton.jit
def tuple_argument(values, INDEX: tl.constexpr):
    first, second, third = values
    return first + second * third, values[INDEX]


@triton.jit
def tuple_kernel(out, pair, scalars, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    a, b = tl.load(pair[0] + offsets), tl.load(pair[1] + offsets)
    packed = (a, b, scalars[0])
    total, chosen = tuple_argument(packed, 1)
    nested = (packed, (total, 5))
    tl.static_assert(len(packed) == 3)
    tl.store(out + offsets, nested[1][0] + nested[1][1])
    tl.store(out + BLOCK + offsets, chosen + scalars[1])


@pytest.mark.compiled
def test_tuples(rng, buffers, covers):
    """Tuples of pointers, tensors and numbers are arguments, values and results."""
    covers("tuples", "int32")
    a, b = random_values(rng, 32, "int32", -99, 99), random_values(rng, 32, "int32", -99, 99)
    out = buffers.empty(64, "int32")
    tuple_kernel[(1,)](out, (buffers.put(a, "int32"), buffers.put(b, "int32")), (4, 6), BLOCK=32)
    assert_same(out, np.concatenate([a + b * 4 + 5, b + 6]))


class Operands(NamedTuple):
    """A pointer, a scale and a size passed together."""

    source: object
    scale: object
    size: object


@triton.jit
def scaled(operands: Operands, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    return tl.load(operands.source + offsets, mask=offsets < operands.size, other=0) * operands.scale


@triton.jit
def named_tuple_kernel(out, operands: Operands, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), scaled(operands, BLOCK))


@pytest.mark.compiled
def test_named_tuples(rng, buffers, covers):
    """Named tuples pass their fields by name."""
    covers("named tuples", "float32")
    x, out = random_values(rng, 32, "float32"), buffers.empty(32, "float32")
    named_tuple_kernel[(1,)](out, Operands(buffers.put(x, "float32"), 0.5, 20), BLOCK=32)
    assert_same(out, np.where(np.arange(32) < 20, x * np.float32(0.5), np.float32(0)))


@triton.jit
def default_kernel(out, value=5, other=None, BLOCK: tl.constexpr = 16):
    offsets = tl.arange(0, BLOCK)
    if other is None:
        tl.store(out + offsets, value)
    else:
        tl.store(out + offsets, value + tl.load(other + offsets))


def test_default_arguments(buffers, covers):
    """Arguments of a kernel have defaults, None among them."""
    covers("default arguments", "any")
    out, other = buffers.empty(16, "int32"), buffers.put(np.arange(16), "int32")
    default_kernel[(1,)](out)
    assert out.tolist() == [5] * 16
    default_kernel[(1,)](out, other=other)
    assert out.tolist() == list(range(5, 21))
    default_kernel[(1,)](out, 1, BLOCK=8)
    assert out.tolist()[:9] == [1] * 8 + [13]


GLOBALS = """SCALE: tl.constexpr = tl.constexpr({value})


@triton.jit
def kernel(out):
    tl.store(out, SCALE + 1)
"""


@pytest.mark.parametrize("value", [3, -8])
def test_global_constants(value, buffers, covers):
    """A module's constants are read at compile time."""
    covers("globals", "any")
    out = buffers.empty(1, "int32")
    module_from(GLOBALS.format(value=value)).kernel[(1,)](out)
    assert out.item() == value + 1


@pytest.mark.compiled
def test_plain_globals_are_refused(buffers):
    """A global that is not a constant is a compile-time error that names it."""
    kernel = module_from("scale_factor = 3\n\n\n@triton.jit\ndef kernel(out):\n    tl.store(out, scale_factor)\n").kernel
    with pytest.raises(triton.TritonError, match="scale_factor"):
        kernel[(1,)](buffers.empty(1, "int32"))


@triton.constexpr_function
def next_power(n):
    """Return the next power of two."""
    return 1 << (n - 1).bit_length()


@triton.jit
def constexpr_function_kernel(out, N: tl.constexpr):
    SIZE: tl.constexpr = next_power(N)
    offsets = tl.arange(0, SIZE)
    tl.store(out + offsets, offsets, mask=offsets < N)


def test_constexpr_functions(buffers, covers):
    """A Python function computes constants."""
    covers("constexpr_function", "any")
    out = buffers.empty(11, "int32")
    constexpr_function_kernel[(1,)](out, N=11)
    assert out.tolist() == list(range(11))


@triton.jit
def function_argument_kernel(out, x, FUNCTION: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, FUNCTION(tl.load(x + offsets)).to(TYPE))


def test_functions_and_dtypes_as_constants(rng, buffers, covers):
    """Functions and dtypes pass as constants."""
    covers("constexpr arguments", "any")
    x, out = random_values(rng, 16, "int32", -99, 99), buffers.empty(16, "float32")
    function_argument_kernel[(1,)](out, buffers.put(x, "int32"), FUNCTION=twice, TYPE=tl.float32, BLOCK=16)
    assert_same(out, (x * 2).astype(np.float32))


CONSTEXPR = """@triton.jit
def kernel(out, N: tl.constexpr):
    A: tl.constexpr = N * 2 + 1
    B: tl.constexpr = (A // 3) ** 2 % 50
    C: tl.constexpr = A if B > N else N
    D: tl.constexpr = min(A, B) + max(A, C)
    E: tl.constexpr = (A << 2) ^ (B & 6) | 1
    F: tl.constexpr = not (A > B and C < D) or N == 3
    tl.static_assert(A == N * 2 + 1, "A is wrong")
    tl.static_print("A is", A)
    tl.store(out, A)
    tl.store(out + 1, B)
    tl.store(out + 2, C)
    tl.store(out + 3, D)
    tl.store(out + 4, E)
    tl.store(out + 5, F)
    tl.store(out + 6, (tl.full((), 1, tl.int32) << N) - A)
"""


@pytest.mark.compiled
@pytest.mark.parametrize("n", [3, 8])
def test_constant_arithmetic(n, buffers, covers, capfd):
    """Constants compute in Python and mix with run-time values."""
    covers("constexpr arithmetic", "any")
    out = buffers.empty(7, "int32")
    module_from(CONSTEXPR).kernel[(1,)](out, N=n)
    a = n * 2 + 1
    b = (a // 3) ** 2 % 50
    c = a if b > n else n
    d = min(a, b) + max(a, c)
    assert out.tolist() == [a, b, c, d, (a << 2) ^ (b & 6) | 1, int(not (a > b and c < d) or n == 3), (1 << n) - a]


@triton.jit
def two_results(x):
    if tl.max(x, axis=0) > 5:
        value = x + 1
        flag = 1
    else:
        value = x - 1
        flag = 0
    return value, flag


@triton.jit
def two_results_kernel(out, x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value, flag = two_results(tl.load(x + offsets))
    value, flag2 = two_results(value)
    tl.store(out + offsets, value + flag * 10 + flag2 * 100)


@pytest.mark.parametrize("top", [3, 5, 9])
def test_results_from_branches(top, buffers, covers):
    """A function's results come out of its branches."""
    covers("call", "int32")
    x, out = np.arange(top - 15, top + 1, dtype=np.int32), buffers.empty(16, "int32")
    two_results_kernel[(1,)](out, buffers.put(x, "int32"), BLOCK=16)

    def reference(value):
        return (value + 1, 1) if value.max() > 5 else (value - 1, 0)

    value, flag = reference(x)
    value, flag2 = reference(value)
    assert_same(out, (value + flag * 10 + flag2 * 100).astype(np.int32))
