"""Binary operators: dtypes of results, wrap-around, C division, shifts, comparisons."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conformance_kernels import module_from, run_elementwise
from conformance_numbers import (
    FLOATS,
    INTEGERS,
    NUMBERS,
    SIGNED,
    assert_same,
    assert_ulps,
    bits,
    convert,
    is_float,
    promoted,
    random_values,
    round_to,
    with_specials,
)

SIZES = (1000, 63, 1)


def small_or_full(rng, size, x, y):
    """Return operands: full ranges for integers, exactly convertible integers next to floats."""
    if is_float(x) == is_float(y):
        return random_values(rng, size, x), random_values(rng, size, y)
    return tuple(random_values(rng, size, name, *(() if is_float(name) else (-100, 100))) for name in (x, y))


def exact(operation, x, y, dtype):
    """Return the result of + - * in a dtype: wrapped integers, floats rounded once."""
    if is_float(dtype):
        wide = operation(x.astype(np.longdouble), y.astype(np.longdouble))
        return round_to(wide, dtype)
    with np.errstate(all="ignore"):
        return operation(x.astype(dtype), y.astype(dtype))


PAIRS = [(x, y) for i, x in enumerate(NUMBERS) for y in NUMBERS[i:]]


@pytest.mark.parametrize(("x_type", "y_type"), PAIRS)
def test_add_subtract_multiply(x_type, y_type, rng, buffers, covers):
    """Sums, differences and products of mixed dtypes have the promoted dtype, wrap and round once."""
    size = SIZES[PAIRS.index((x_type, y_type)) % 3]
    x, y = small_or_full(rng, size, x_type, y_type)
    dtype = promoted(x_type, y_type)
    covers("+ - *", x_type, y_type)
    results = {"x + y": dtype, "x - y": dtype, "y - x": dtype, "x * y": dtype}
    found = run_elementwise(buffers, results, {"x": (x, x_type), "y": (y, y_type)})
    xs, ys = convert(x, dtype), convert(y, dtype)
    wanted = (exact(np.add, xs, ys, dtype), exact(np.subtract, xs, ys, dtype), exact(np.subtract, ys, xs, dtype),
              exact(np.multiply, xs, ys, dtype))  # fmt: skip
    for actual, expected in zip(found, wanted, strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize(("x_type", "y_type"), [p for p in PAIRS if p[0][0] == p[1][0] or is_float(p[1])])
def test_true_division(x_type, y_type, rng, buffers, covers):
    """`/` of integers is a float32 division and of floats one in the wider dtype."""
    covers("/", x_type, y_type)
    x, y = small_or_full(rng, 63, x_type, y_type)
    y = np.where(y == 0, y.dtype.type(1), y)
    dtype = promoted(x_type, y_type, division=True)
    dtype = dtype if is_float(dtype) else "float32"
    found = run_elementwise(buffers, {"x / y": dtype}, {"x": (x, x_type), "y": (y, y_type)})[0]
    quotient = convert(x, dtype).astype(np.longdouble) / convert(y, dtype).astype(np.longdouble)
    assert_ulps(found, quotient, dtype, 2)


@pytest.mark.parametrize(
    ("x_type", "y_type"), [p for p in PAIRS if not is_float(p[1]) and p[0].startswith("u") == p[1].startswith("u")]
)
def test_integer_division_and_remainder(x_type, y_type, rng, buffers, covers):
    """`//` and `%` of integers truncate towards zero, as in C."""
    covers("// %", x_type, y_type)
    dtype = promoted(x_type, y_type)
    x, y = random_values(rng, 1000, x_type), random_values(rng, 1000, y_type)
    y[:500] = random_values(rng, 500, y_type, -9, 9)
    y[y == 0] = 3
    if dtype in SIGNED:
        y[(y == -1) & (x == np.iinfo(x_type).min)] = 7
    results = {"x // y": dtype, "x % y": dtype}
    found = run_elementwise(buffers, results, {"x": (x, x_type), "y": (y, y_type)})
    wide = [int(a) for a in x], [int(b) for b in y]
    quotients = [abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) for a, b in zip(*wide, strict=True)]
    remainders = [a - q * b for a, b, q in zip(*wide, quotients, strict=True)]
    assert_same(found[0], np.array(quotients, dtype=dtype))
    assert_same(found[1], np.array(remainders, dtype=dtype))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_division_by_constants(dtype, rng, buffers, covers):
    """`//` and `%` by constants, powers of two and others, agree with division by a tensor."""
    covers("// %", dtype)
    x = with_specials(rng, 63, dtype)
    divisors = (1, 2, 3, 7, 16, 100)
    results = {f"x {op} {d}": dtype for d in divisors for op in ("//", "%")}
    found = run_elementwise(buffers, results, {"x": (x, dtype)})
    wanted = []
    for d in divisors:
        quotients = [abs(int(a)) // d * (-1 if a < 0 else 1) for a in x]
        wanted += [quotients, [int(a) - q * d for a, q in zip(x, quotients, strict=True)]]
    for actual, expected in zip(found, wanted, strict=True):
        assert_same(actual, np.array(expected, dtype=dtype))


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint32"])
def test_division_by_zero_does_not_trap(dtype, buffers, covers):
    """Integer division by zero, and of the least integer by -1, leaves the other elements right."""
    covers("// %", dtype)
    x = np.array([7, np.iinfo(dtype).min, 9, 20], dtype=dtype)
    y = np.array([0, 0 if dtype.startswith("u") else -1, 2, 3], dtype=dtype)
    found = run_elementwise(buffers, {"x // y": dtype, "x % y": dtype}, {"x": (x, dtype), "y": (y, dtype)})
    assert found[0][2:].tolist() == [4, 6]
    assert found[1][2:].tolist() == [1, 2]


@pytest.mark.parametrize(("x_type", "y_type"), [("int32", "uint32"), ("uint8", "int64"), ("int16", "uint16")])
@pytest.mark.parametrize("operator", ["%", "//", "/"])
@pytest.mark.compiled
def test_mixed_signedness_division_is_refused(x_type, y_type, operator, rng, buffers):
    """Division of a signed by an unsigned integer tensor is a compile-time error."""
    inputs = {"x": (np.ones(4, x_type), x_type), "y": (np.ones(4, y_type), y_type)}
    with pytest.raises(triton.TritonError, match="different signedness"):
        run_elementwise(buffers, {f"x {operator} y": "int32"}, inputs)


@pytest.mark.parametrize("x_type", FLOATS)
@pytest.mark.parametrize("y_type", FLOATS)
def test_float_remainder(x_type, y_type, rng, buffers, covers):
    """`%` of floats is C's fmod."""
    covers("%", x_type, y_type)
    dtype = promoted(x_type, y_type, division=True)
    x, y = random_values(rng, 63, x_type) * 8, random_values(rng, 63, y_type)
    y[y == 0] = 1
    found = run_elementwise(buffers, {"x % y": dtype}, {"x": (x, x_type), "y": (y, y_type)})[0]
    assert_same(found, np.fmod(x.astype(dtype), y.astype(dtype)))


@pytest.mark.parametrize(("x_type", "y_type"), [p for p in PAIRS if not is_float(p[1]) and (bits(p[0]) >= 32 or p[0] == p[1])])
def test_bitwise(x_type, y_type, rng, buffers, covers):
    """`&`, `|`, `^` and `~` work on the bits of the promoted integer dtype."""
    covers("& | ^", x_type, y_type)
    dtype = promoted(x_type, y_type)
    x, y = random_values(rng, 63, x_type), random_values(rng, 63, y_type)
    results = {"x & y": dtype, "x | y": dtype, "x ^ y": dtype}
    found = run_elementwise(buffers, results, {"x": (x, x_type), "y": (y, y_type)})
    xs, ys = x.astype(dtype), y.astype(dtype)
    for actual, expected in zip(found, (xs & ys, xs | ys, xs ^ ys), strict=True):
        assert_same(actual, expected)


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", INTEGERS)
def test_complement_and_negation(dtype, rng, buffers, covers):
    """`~` flips every bit and `-` wraps, for unsigned integers too."""
    covers("~ unary -", dtype)
    x = with_specials(rng, 63, dtype)
    found = run_elementwise(buffers, {"~x": dtype, "-x": dtype}, {"x": (x, dtype)})
    with np.errstate(all="ignore"):
        for actual, expected in zip(found, (~x, np.zeros_like(x) - x), strict=True):
            assert_same(actual, expected)


@pytest.mark.parametrize("operator", ["&", "|", "^", "<<", ">>"])
@pytest.mark.compiled
def test_bitwise_on_floats_is_refused(operator, buffers):
    """Bit operators on floats are a compile-time error."""
    inputs = {"x": (np.ones(4, np.float32), "float32"), "y": (np.ones(4, np.float32), "float32")}
    with pytest.raises(triton.TritonError, match="invalid operands of type"):
        run_elementwise(buffers, {f"x {operator} y": "float32"}, inputs)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_shifts(dtype, rng, buffers, covers):
    """`<<` drops high bits; `>>` copies the sign of signed and fills zeros into unsigned integers."""
    covers("<< >>", dtype)
    x = with_specials(rng, 1000, dtype)
    y = rng.integers(0, bits(dtype), 1000).astype(f"uint{bits(dtype)}").astype(dtype)
    results = {"x << y": dtype, "x >> y": dtype, "x << 3": dtype, "x >> 3": dtype, "(x << 4) >> 4": dtype}
    found = run_elementwise(buffers, results, {"x": (x, dtype), "y": (y, dtype)})
    three, four = np.array(3, dtype), np.array(4, dtype)
    for actual, expected in zip(found, (x << y, x >> y, x << three, x >> three, (x << four) >> four), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize(
    ("x_type", "y_type"), [("int8", "uint32"), ("uint8", "uint64"), ("int64", "uint8"), ("int16", "uint8")]
)
def test_shifts_of_mixed_widths(x_type, y_type, rng, buffers, covers):
    """Shifts by an unsigned tensor of another width keep the sign rule of the left operand's kind."""
    covers("<< >>", x_type)
    width = max(bits(x_type), bits(y_type))
    dtype = f"{x_type.rstrip('0123456789')}{width}"
    computed = promoted(x_type, y_type)
    x, y = random_values(rng, 63, x_type), random_values(rng, 63, y_type, 0, min(bits(x_type), width) - 1)
    found = run_elementwise(buffers, {"x << y": dtype}, {"x": (x, x_type), "y": (y, y_type)})[0]
    assert_same(found, (x.astype(computed) << y.astype(computed)).astype(dtype))


COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")


@pytest.mark.parametrize(
    ("x_type", "y_type"),
    [(t, t) for t in NUMBERS]
    + [("int8", "uint8"), ("int32", "uint32"), ("int64", "uint32"), ("int16", "uint64"), ("int32", "int64")]
    + [("float16", "float32"), ("bfloat16", "float64"), ("int32", "float32"), ("uint8", "bfloat16"), ("int64", "float16")],
)
def test_comparisons(x_type, y_type, rng, buffers, covers):
    """Comparisons happen in the promoted dtype, and with NaN only `!=` is true."""
    covers("== != < <= > >=", x_type, y_type)
    dtype = promoted(x_type, y_type)
    x, y = small_or_full(rng, 1000, x_type, y_type)
    y[100:200] = convert(x[100:200], y_type)
    if is_float(x_type) and x_type == y_type:
        x[:12], y[:12] = with_specials(rng, 12, x_type), np.roll(with_specials(rng, 12, x_type), 1)
        x[12:24] = y[12:24] = with_specials(rng, 12, x_type)
    results = {f"x {op} y": "int1" for op in COMPARISONS}
    found = run_elementwise(buffers, results, {"x": (x, x_type), "y": (y, y_type)})
    xs, ys = convert(x, dtype), convert(y, dtype)
    wanted = (xs == ys, xs != ys, xs < ys, xs <= ys, xs > ys, xs >= ys)
    for actual, expected in zip(found, wanted, strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_python_numbers_take_the_dtype_of_the_tensor(dtype, rng, buffers, covers):
    """A Python number of the same or a lower kind does not widen a tensor, on either side."""
    covers("+ - *", dtype)
    x = random_values(rng, 63, dtype)
    results = {"x + 3": dtype, "3 - x": dtype, "x * 5": dtype, "x > 2": "int1", "2 <= x": "int1"}
    found = run_elementwise(buffers, results, {"x": (x, dtype)})
    c3, c5, c2 = (convert(np.full(63, v), dtype) for v in (3, 5, 2))
    xs = convert(x, dtype)
    wanted = (exact(np.add, xs, c3, dtype), exact(np.subtract, c3, xs, dtype), exact(np.multiply, xs, c5, dtype),
              xs > c2, c2 <= xs)  # fmt: skip
    for actual, expected in zip(found, wanted, strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint16", "int64"])
def test_float_numbers_make_integers_float32(dtype, rng, buffers, covers):
    """A Python float next to an integer tensor gives float32."""
    covers("+ - *", dtype)
    x = random_values(rng, 63, dtype, -1000, 1000)
    found = run_elementwise(buffers, {"x * 0.5": "float64", "x + 0.1": "float64"}, {"x": (x, dtype)})
    assert_same(found[0], x.astype(np.float32).astype(np.float64) * 0.5)
    assert_same(found[1], (x.astype(np.float32) + np.float32(0.1)).astype(np.float64))


@pytest.mark.compiled
def test_number_out_of_range_is_refused(buffers):
    """A Python integer that the tensor's dtype cannot hold is a compile-time error."""
    with pytest.raises(triton.TritonError, match="out of range"):
        run_elementwise(buffers, {"x + 300": "int8"}, {"x": (np.ones(4, np.int8), "int8")})


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", NUMBERS)
def test_maximum_and_minimum(dtype, rng, buffers, covers):
    """`maximum` and `minimum` ignore one NaN, and signed and unsigned integers order differently."""
    covers("maximum minimum", dtype)
    x, y = with_specials(rng, 63, dtype), random_values(rng, 63, dtype)
    if is_float(dtype):
        y[20] = np.nan
    results = {"tl.maximum(x, y)": dtype, "tl.minimum(x, y)": dtype, "tl.maximum(x, 3)": dtype}
    found = run_elementwise(buffers, results, {"x": (x, dtype), "y": (y, dtype)})
    greater, lesser = (np.fmax, np.fmin) if is_float(dtype) else (np.maximum, np.minimum)
    wanted = (greater(x, y), lesser(x, y), greater(x, x.dtype.type(3)))
    for actual, expected in zip(found, wanted, strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_maximum_and_minimum_propagate_nan(dtype, rng, buffers, covers):
    """With PropagateNan.ALL a NaN on either side is the result."""
    covers("maximum minimum propagate_nan", dtype)
    x, y = with_specials(rng, 63, dtype), random_values(rng, 63, dtype)
    y[20] = np.nan
    all_ = "propagate_nan=tl.PropagateNan.ALL"
    results = {f"tl.maximum(x, y, {all_})": dtype, f"tl.minimum(x, y, {all_})": dtype}
    found = run_elementwise(buffers, results, {"x": (x, dtype), "y": (y, dtype)})
    assert_same(found[0], np.maximum(x, y))
    assert_same(found[1], np.minimum(x, y))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_clamp(dtype, rng, buffers, covers):
    """`clamp` limits values to a range, and keeps or replaces NaN as asked."""
    covers("clamp", dtype)
    x = with_specials(rng, 63, dtype)
    low, high = np.full(63, -1, x.dtype), np.full(63, 2, x.dtype)
    results = {
        "tl.clamp(x, low, high)": dtype,
        "tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)": dtype,
    }
    found = run_elementwise(buffers, results, {"x": (x, dtype), "low": (low, dtype), "high": (high, dtype)})
    known = ~np.isnan(x)
    assert_same(found[0][torch.from_numpy(known)], np.clip(x[known], -1, 2))
    assert_same(found[1], np.clip(x, -1, 2))


@pytest.mark.parametrize("dtype", NUMBERS)
def test_where(dtype, rng, buffers, covers):
    """`where` picks by element between tensors, scalars and numbers."""
    covers("where", dtype)
    x, y, c = random_values(rng, 1000, dtype), random_values(rng, 1000, dtype), random_values(rng, 1000, "int1")
    results = {"tl.where(c, x, y)": dtype, "tl.where(c, x, 0)": dtype, "tl.where(x > y, 1, y)": dtype}
    found = run_elementwise(buffers, results, {"x": (x, dtype), "y": (y, dtype), "c": (c, "int1")})
    one, zero = x.dtype.type(1), x.dtype.type(0)
    for actual, expected in zip(found, (np.where(c, x, y), np.where(c, x, zero), np.where(x > y, one, y)), strict=True):
        assert_same(actual, expected)


@triton.jit
def pick_pointer_kernel(out, a, b, choose, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    picked = tl.where(tl.load(choose + offsets) != 0, a + offsets, b + offsets)
    tl.store(out + offsets, tl.load(picked))
    scalar = tl.where(tl.load(choose) != 0, a, b)
    tl.store(out + BLOCK + offsets, tl.load(scalar + offsets))


def test_where_of_pointers(rng, buffers, covers):
    """`where` picks between pointers, for tensors of pointers and for one pointer."""
    covers("where of pointers", "float32")
    a, b = random_values(rng, 64, "float32"), random_values(rng, 64, "float32")
    c = random_values(rng, 64, "int32", 0, 1)
    out = buffers.empty(128, "float32")
    pick_pointer_kernel[(1,)](out, buffers.put(a, "float32"), buffers.put(b, "float32"), buffers.put(c, "int32"), BLOCK=64)
    assert_same(out, np.concatenate([np.where(c, a, b), a if c[0] else b]))


@triton.jit
def broadcast_where_kernel(out, column, row, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    c = tl.load(column + i)[:, None]
    r = tl.load(row + j)[None, :]
    tl.store(out + i[:, None] * N + j[None, :], tl.where(c > r, c, r))


def test_where_broadcasts(rng, buffers, covers):
    """`where` broadcasts its condition and both values."""
    covers("where", "float32")
    c, r = random_values(rng, 8, "float32"), random_values(rng, 32, "float32")
    out = buffers.empty((8, 32), "float32")
    broadcast_where_kernel[(1,)](out, buffers.put(c, "float32"), buffers.put(r, "float32"), M=8, N=32)
    assert_same(out, np.maximum(c[:, None], r))


LOGICAL = {
    "x and y": lambda x, y: x & y,
    "x or y": lambda x, y: x | y,
    "not x": lambda x, y: ~x,
    "x & y": lambda x, y: x & y,
    "x ^ y": lambda x, y: x ^ y,
    "x == y": lambda x, y: x == y,
    "x.logical_and(y)": lambda x, y: x & y,
}


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:Logical operators")
def test_booleans(rng, buffers, covers):
    """Boolean tensors combine by words, signs and comparisons."""
    covers("and or not", "int1")
    x, y = random_values(rng, 1000, "int1"), random_values(rng, 1000, "int1")
    found = run_elementwise(buffers, dict.fromkeys(LOGICAL, "int1"), {"x": (x, "int1"), "y": (y, "int1")})
    for actual, reference in zip(found, LOGICAL.values(), strict=True):
        assert_same(actual, reference(x, y))


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_high_half_of_products(dtype, rng, buffers, covers):
    """`umulhi` returns the upper half of the unsigned product."""
    covers("umulhi", dtype)
    unsigned = f"uint{bits(dtype)}"
    x, y = random_values(rng, 63, unsigned), random_values(rng, 63, unsigned)
    found = run_elementwise(buffers, {"tl.umulhi(x, y)": dtype}, {"x": (x.view(dtype), dtype), "y": (y.view(dtype), dtype)})[0]
    wanted = [(int(a) * int(b)) >> bits(dtype) for a, b in zip(x, y, strict=True)]
    assert_same(found.numpy().view(unsigned), np.array(wanted, dtype=unsigned))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounded_division(dtype, rng, buffers, covers):
    """`div_rn` rounds correctly and `fdiv` is within two units of the last place."""
    covers("div_rn fdiv", dtype)
    x, y = random_values(rng, 1000, dtype), random_values(rng, 1000, dtype)
    wanted = x.astype(np.longdouble) / y.astype(np.longdouble)
    results = {"tl.fdiv(x, y)": dtype} | ({"tl.div_rn(x, y)": dtype} if dtype == "float32" else {})
    found = run_elementwise(buffers, results, {"x": (x, dtype), "y": (y, dtype)})
    assert_ulps(found[0], wanted, dtype, 2)
    if dtype == "float32":
        assert_same(found[1], x / y)


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fused_multiply_add(dtype, rng, buffers, covers):
    """`fma` rounds once."""
    covers("fma", dtype)
    x, y = random_values(rng, 1000, dtype), random_values(rng, 1000, dtype)
    z = (-(x * y)).astype(dtype)
    found = run_elementwise(buffers, {"tl.fma(x, y, z)": dtype}, {"x": (x, dtype), "y": (y, dtype), "z": (z, dtype)})[0]
    if dtype == "float32":
        assert_same(found, (x.astype(np.float64) * y + z).astype(np.float32))
    else:
        wanted = [float(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))) for a, b, c in zip(x, y, z, strict=True)]
        assert_same(found, np.array(wanted))


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:builtin m")
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_builtin_min_and_max(dtype, rng, buffers, covers):
    """Python's `min` and `max` work on tensors by element."""
    covers("min max", dtype)
    x, y = random_values(rng, 63, dtype), random_values(rng, 63, dtype)
    found = run_elementwise(buffers, {"min(x, y)": dtype, "max(x, y)": dtype}, {"x": (x, dtype), "y": (y, dtype)})
    assert_same(found[0], np.minimum(x, y))
    assert_same(found[1], np.maximum(x, y))


def test_cdiv(rng, buffers, covers):
    """`cdiv` rounds the quotient up."""
    covers("cdiv", "int32")
    x, y = random_values(rng, 63, "int32", 0, 10000), random_values(rng, 63, "int32", 1, 50)
    found = run_elementwise(buffers, {"tl.cdiv(x, y)": "int32"}, {"x": (x, "int32"), "y": (y, "int32")})[0]
    assert_same(found, -(-x // y))


def test_unsigned_and_signed_names_do_not_collide(rng, buffers, covers):
    """`abs` of uint32 changes nothing while `abs` of int32 drops the sign, in one kernel."""
    covers("abs", "uint32", "int32")
    x, y = random_values(rng, 63, "uint32"), random_values(rng, 63, "int32")
    found = run_elementwise(buffers, {"tl.abs(x)": "uint32", "tl.abs(-y)": "int32"}, {"x": (x, "uint32"), "y": (y, "int32")})
    assert_same(found[0], x)
    assert_same(found[1], np.abs(-y))


SCALAR_FORMS = """@triton.jit
def kernel(z, x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    left = tl.load(x_ptr)
    right = tl.load(y_ptr)
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets)
    tl.store(z + offsets, left {op} y)
    tl.store(z + BLOCK + offsets, x {op} right)
    tl.store(z + 2 * BLOCK, left {op} right)
"""


SCALAR_CASES = [
    (op, dtype)
    for op in ("+", "-", "*", "//", "%", "&", "<<", "<")
    for dtype in ("int32", "uint8", "float32")
    if dtype != "float32" or op not in ("//", "&", "<<")
]


@pytest.mark.parametrize(("op", "dtype"), SCALAR_CASES)
def test_scalar_tensors(op, dtype, rng, buffers, covers):
    """A loaded scalar combines with a tensor from either side, and with a scalar."""
    covers("scalar operands", dtype)
    x, y = random_values(rng, 32, dtype, 0, 50), random_values(rng, 32, dtype, 1, 7)
    kernel = module_from(SCALAR_FORMS.replace("{op}", op)).kernel
    out = buffers.empty(65, "int32" if op == "<" else dtype)
    kernel[(1,)](out, buffers.put(x, dtype), buffers.put(y, dtype), BLOCK=32)
    functions = {"+": np.add, "-": np.subtract, "*": np.multiply, "//": np.floor_divide, "%": np.fmod,
                 "&": np.bitwise_and, "<<": np.left_shift, "<": np.less}  # fmt: skip
    function = functions[op]
    wanted = np.concatenate([function(x[0], y), function(x, y[0]), function(x[:1], y[:1])])
    assert_same(out, wanted.astype(as_dtype(out)))


def as_dtype(tensor):
    """Return NumPy's dtype of a tensor."""
    return tensor.numpy().dtype
