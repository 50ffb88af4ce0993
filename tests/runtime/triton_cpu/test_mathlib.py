"""The CPU backend's elementary functions: accuracy against references of higher precision."""

from __future__ import annotations

import ctypes
import functools
import inspect
import re

import llvmlite.binding as llvm
import numpy as np
import pytest
import triton.language.extra.cuda.libdevice as upstream
from scipy import special

from graphwright.runtime.triton_cpu import isa as isa_module
from graphwright.runtime.triton_cpu import mathlib
from graphwright.runtime.triton_cpu.emit import LLVM_TYPES, Emitter, vector_type
from graphwright.runtime.triton_cpu.errors import BackendError, UnsupportedError
from graphwright.runtime.triton_cpu.mathlib import libdevice

ISAS = ["avx512", "avx2", "portable"]
NUMPY = {"f32": np.float32, "f64": np.float64, "i32": np.int32, "i64": np.int64}


def module_text(isa, name, element, lanes, symbol="kernel"):
    """LLVM IR of `void kernel(i64 n, ptr..., ptr out)`, which applies the function to arrays."""
    f = mathlib.find(name, element)
    e = Emitter()
    pointers = [f"%a{i}" for i in range(len(f.args))]
    with e.loop(0, "%n", lanes) as loop:
        operands = []
        for p, kind in zip(pointers, f.args, strict=True):
            at = e.address(LLVM_TYPES[kind], p, loop.index)
            operands.append(e.op(f"load {vector_type(LLVM_TYPES[kind], lanes)}, ptr {at}, align 1"))
        result = mathlib.call(e, isa, name, element, lanes, operands)
        at = e.address(LLVM_TYPES[f.result], "%out", loop.index)
        e.raw(f"store {vector_type(LLVM_TYPES[f.result], lanes)} {result}, ptr {at}, align 1")
    e.raw("ret void")
    parameters = ", ".join(f"ptr {p}" for p in [*pointers, "%out"])
    body = "\n".join(["entry:", *e.lines])
    return "\n".join([*e.declarations.values(), f"define void @{symbol}(i64 %n, {parameters}) {{\n{body}\n}}"])


class Jit:
    """A compiled module; calling it applies the function to NumPy arrays."""

    def __init__(self, isa, name, element, lanes):
        self.function = mathlib.find(name, element)
        self.lanes = lanes
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = llvm.parse_assembly(module_text(isa, name, element, lanes))
        target = llvm.Target.from_default_triple()
        machine = target.create_target_machine(cpu=isa.cpu, features=isa.features, opt=3, jit=True)
        manager = llvm.create_new_module_pass_manager()
        manager.add_always_inliner_pass()
        manager.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=0)))
        self.assembly = machine.emit_assembly(module)
        self.engine = llvm.create_mcjit_compiler(module, machine)
        self.engine.finalize_object()
        address = self.engine.get_function_address("kernel")
        self.pointer = ctypes.CFUNCTYPE(None, ctypes.c_int64, *[ctypes.c_void_p] * (len(self.function.args) + 1))(address)

    def __call__(self, *args):
        n = len(args[0])
        assert n % self.lanes == 0
        arrays = [np.ascontiguousarray(a, NUMPY[k]) for a, k in zip(args, self.function.args, strict=True)]
        out = np.empty(n, NUMPY[self.function.result])
        self.pointer(n, *[a.ctypes.data for a in arrays], out.ctypes.data)
        return out


@functools.cache
def jit(isa_name, name, element, lanes):
    """Compile a function, or skip the test where the host lacks the instruction set."""
    try:
        isa = isa_module.detect(isa_name)
    except BackendError as error:
        pytest.skip(str(error))
    return Jit(isa, name, element, lanes)


def ulps(got, exact, element):
    """Distance from the exact result in units of the last place of the result, elementwise."""
    kind = NUMPY[element]
    exact = exact.astype(np.longdouble)
    with np.errstate(all="ignore"):
        rounded = exact.astype(kind)
        size = np.maximum(np.abs(np.where(np.isfinite(rounded), rounded, 1)), np.finfo(kind).tiny)
        error = np.abs(got.astype(np.longdouble) - exact) / np.spacing(size.astype(kind)).astype(np.longdouble)
    error[(got == rounded) & ~np.isfinite(rounded)] = 0
    error[np.isnan(got) & np.isnan(rounded)] = 0
    error[np.isnan(got) != np.isnan(rounded)] = np.inf
    return error


SPECIAL = [
    0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 3.0, -3.0, 10.0, -10.0, 1e-45, -1e-45, 1e-40,
    1.1754944e-38, 3.4028235e38, -3.4028235e38, 88.72283, 88.72284, -87.33654, -87.33655, -104.0, 127.99999, 128.0, -126.0,
    1048576.0, 1048577.0, 1e22, 0.99999994, 1.0000001, 16777216.0, 8388607.5, 1000.0, -1000.0,
]  # fmt: skip


@functools.cache
def samples(element, arity):
    """Operands: random bit patterns, uniform ones in narrow ranges, and special values in all combinations."""
    rng = np.random.default_rng(7)
    kind, bits, whole = (np.float32, np.uint32, 2**32) if element == "f32" else (np.float64, np.uint64, 2**64)
    columns = []
    for column in range(arity):
        special = np.array(SPECIAL, kind)
        if arity == 2:
            special = np.repeat(special, len(special)) if column == 0 else np.tile(special, len(special))
        ranges = [rng.uniform(-r, r, 4096).astype(kind) for r in (1, 4, 100)]
        near_one = rng.uniform(0.5, 2, 4096).astype(kind)
        patterns = rng.integers(0, whole, 16384, dtype=np.uint64).astype(bits).view(kind)
        # A signalling NaN and one with a payload in its low bits.
        payload = np.array([0x7F800001, 0x7FC00123] if element == "f32" else [0x7FF0000000000001, 0x7FF8000000000123], bits)
        everything = np.concatenate([special, *ranges, near_one, patterns, payload.view(kind)])
        columns.append(np.resize(everything, -(-len(everything) // 64) * 64))
    return columns


def half_turns(function, x):
    """sin(pi * x) or cos(pi * x), without losing the bits next to the zeros."""
    whole = np.rint(x)
    r = x - whole
    pi = 4 * np.arctan(np.ones_like(x))
    value = np.sin(pi * r) if function is np.sin else np.sin(pi * (0.5 - np.abs(r)))
    return np.where(whole % 2 == 1, -value, value)


def lgamma(x):
    # C and SciPy disagree on the sign at -inf.
    return np.where(np.isinf(x), np.inf, special.gammaln(x))


def tgamma(x):
    return np.where((x == np.rint(x)) & (x < 0), np.nan, special.gamma(x))


def bessel_i(order, x):
    """Power series of I0 or I1: its terms are positive, so that nothing cancels. SciPy is up to 9 ulp off."""
    x = x.astype(np.longdouble)
    bounded = np.clip(x, -720, 720)
    total = term = np.ones_like(x)
    for k in range(1, 700):
        term = term * (bounded / 2) ** 2 / (k * (k + order))
        total = total + term
    total = total * (bounded / 2) ** order
    return np.where(np.abs(x) > 720, np.copysign(np.inf, total), total)


TEN = np.longdouble(10)
# name: (reference, operands, bound in ulp); "f64" functions that call the C library are compared with looser bounds.
F32 = {
    "exp": (np.exp, 1, 1.2), "exp2": (np.exp2, 1, 1.2), "exp10": (lambda x: TEN**x, 1, 1.3),
    "log": (np.log, 1, 1.2), "log2": (np.log2, 1, 1.3), "log10": (np.log10, 1, 1.7),
    "erf": (special.erf, 1, 1.3), "tanh": (np.tanh, 1, 1.4), "sqrt": (np.sqrt, 1, 0.5),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 1, 1.5),
    "sin": (np.sin, 1, 1.0), "cos": (np.cos, 1, 1.0), "tan": (np.tan, 1, 1.5),
    "asin": (np.arcsin, 1, 0.6), "acos": (np.arccos, 1, 0.6), "atan": (np.arctan, 1, 0.6), "atan2": (np.arctan2, 2, 0.6),
    "sinh": (np.sinh, 1, 0.6), "cosh": (np.cosh, 1, 0.6), "expm1": (np.expm1, 1, 0.6), "log1p": (np.log1p, 1, 0.6),
    "asinh": (np.arcsinh, 1, 0.6), "acosh": (np.arccosh, 1, 0.6), "atanh": (np.arctanh, 1, 0.6),
    "pow": (np.power, 2, 0.6), "cbrt": (np.cbrt, 1, 0.6), "rcbrt": (lambda x: 1 / np.cbrt(x), 1, 0.6),
    "hypot": (np.hypot, 2, 0.6), "rhypot": (lambda x, y: 1 / np.hypot(x, y), 2, 0.6),
    "erfc": (special.erfc, 1, 0.6), "erfcx": (special.erfcx, 1, 0.6), "normcdf": (special.ndtr, 1, 0.6),
    "erfinv": (special.erfinv, 1, 0.8), "erfcinv": (special.erfcinv, 1, 0.9), "normcdfinv": (special.ndtri, 1, 0.9),
    "sinpi": (lambda x: half_turns(np.sin, x), 1, 0.6), "cospi": (lambda x: half_turns(np.cos, x), 1, 0.6),
    "i0": (lambda x: bessel_i(0, x), 1, 0.6), "i1": (lambda x: bessel_i(1, x), 1, 0.6),
    "lgamma": (lgamma, 1, 0.6), "tgamma": (tgamma, 1, 0.6), "fmod": (np.fmod, 2, 0.0), "rcp": (lambda x: 1 / x, 1, 0.5),
    "floor": (np.floor, 1, 0.0), "ceil": (np.ceil, 1, 0.0), "trunc": (np.trunc, 1, 0.0), "rint": (np.rint, 1, 0.0),
    "round": (lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x), 1, 0.0), "fabs": (np.abs, 1, 0.0),
    "copysign": (np.copysign, 2, 0.0), "fdim": (lambda x, y: np.where(x <= y, 0, x - y), 2, 0.5),
    "saturate": (lambda x: np.where(np.isnan(x), 0, np.clip(x, 0, 1)), 1, 0.0), "div": (np.divide, 2, 0.5),
}  # fmt: skip
F64 = {
    "exp": (np.exp, 1, 1.3), "exp2": (np.exp2, 1, 1.3), "exp10": (lambda x: TEN**x, 1, 1.5),
    "log": (np.log, 1, 1.1), "log2": (np.log2, 1, 1.3), "log10": (np.log10, 1, 1.8), "sqrt": (np.sqrt, 1, 0.51),
    "sin": (np.sin, 1, 1.0), "atan2": (np.arctan2, 2, 1.0), "pow": (np.power, 2, 1.0), "tanh": (np.tanh, 1, 3.0),
    "erf": (special.erf, 1, 3.0), "hypot": (np.hypot, 2, 1.0), "sinpi": (lambda x: half_turns(np.sin, x), 1, 3.0),
    "i0": (lambda x: bessel_i(0, x), 1, 5.0), "i1": (lambda x: bessel_i(1, x), 1, 5.0),
}  # fmt: skip
CASES = [("f32", n) for n in F32] + [("f64", n) for n in F64]
FLUSHED = ("exp", "exp2", "exp10")
MEASURED: dict[tuple[str, str, str], float] = {}


@functools.cache
def reference(element, name):
    function, arity, bound = (F32 if element == "f32" else F64)[name]
    columns = samples(element, arity)
    # f64 holds f32 references; SciPy's f64 functions have no wider version.
    wide = np.float64 if element == "f32" or name == "erf" else np.longdouble
    with np.errstate(all="ignore"):
        return columns, function(*[c.astype(wide) for c in columns]), bound


@pytest.fixture(scope="module", autouse=True)
def print_table():
    """Print the largest error of every function when the module is done (`pytest -s` shows it)."""
    yield
    for element, name in CASES:
        row = [MEASURED.get((isa, element, name)) for isa in ISAS]
        if any(v is not None for v in row):
            cells = "".join(f"{i}: {v:.3f}  " for i, v in zip(ISAS, row, strict=True) if v is not None)
            print(f"\n{name:11}{element}  max ulp  {cells}", end="")
    print()


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize(("element", "name"), CASES)
def test_accuracy(isa_name, element, name):
    """Every function is within its bound over all magnitudes, special values included, at every width."""
    columns, exact, bound = reference(element, name)
    for lanes in (16, 4, 1):
        got = jit(isa_name, name, element, lanes)(*columns)
        error = ulps(got, exact, element)
        if name in FLUSHED:
            error[(got == 0) & (np.abs(exact) < np.finfo(NUMPY[element]).tiny)] = 0
        worst = int(np.argmax(error))
        key = (isa_name, element, name)
        MEASURED[key] = max(MEASURED.get(key, 0.0), float(error[worst]))
        operands = [float(c[worst]) for c in columns]
        assert error[worst] <= bound, f"{lanes} lanes: {name}{operands} = {got[worst]!r}, exactly {exact[worst]!r}"


ODD = ["sin", "tan", "asin", "atan", "sinh", "tanh", "asinh", "atanh", "erf", "expm1", "log1p", "cbrt", "sqrt", "floor",
       "ceil", "trunc", "rint", "round", "erfinv", "sinpi", "i1"]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_negative_zero_stays(name):
    """Odd functions keep the sign of zero, and of the least denormal."""
    x = np.full(16, -0.0, np.float32)
    assert np.signbit(jit("portable", name, "f32", 16)(x)).all()
    if name not in ("sqrt", "ceil", "trunc", "rint", "round", "floor"):
        assert np.signbit(jit("portable", name, "f32", 16)(x - np.float32(1e-45))).all()


def test_signed_results():
    """Zeros and infinities come with C's signs."""
    inf = np.inf
    cases = {
        "atan2": [((0.0, -1.0), np.pi), ((-0.0, -1.0), -np.pi), ((-0.0, 1.0), -0.0), ((0.0, -0.0), np.pi)],
        "pow": [((-0.0, 3.0), -0.0), ((-0.0, -3.0), -inf), ((-0.0, 2.0), 0.0), ((-inf, 3.0), -inf), ((-inf, -3.0), -0.0),
                ((-2.0, 3.0), -8.0), ((-1.0, inf), 1.0), ((np.nan, 0.0), 1.0), ((1.0, np.nan), 1.0), ((-inf, 0.5), inf)],
        "fmod": [((-4.0, 2.0), -0.0), ((5.0, inf), 5.0)],
        "copysign": [((1.0, -0.0), -1.0)],
        "hypot": [((inf, np.nan), inf)],
        "nextafter": [((0.0, -1.0), -1e-45)],
        "remainder": [((5.0, 3.0), -1.0)],
        "fdim": [((3.0, 1.0), 2.0), ((1.0, 3.0), 0.0)],
    }  # fmt: skip
    for name, rows in cases.items():
        columns = [np.array([r[0][k] for r in rows], np.float32) for k in range(2)]
        for isa_name in ("avx512", "portable"):
            try:
                isa_module.detect(isa_name)
            except BackendError:
                continue
            got = jit(isa_name, name, "f32", 1)(*columns)
            want = np.array([r[1] for r in rows], np.float32)
            np.testing.assert_array_equal(got, want, err_msg=name)
            np.testing.assert_array_equal(np.signbit(got), np.signbit(want), err_msg=name)


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("name", ["exp", "log", "sin", "fma", "lgamma", "isnan", "f32_to_i64_rn"])
def test_every_width(name, lanes):
    """All widths give the same bits."""
    f = mathlib.find(name, "f32")
    rng = np.random.default_rng(3)
    columns = [rng.uniform(-3e6, 3e6, 128).astype(np.float32) for _ in f.args]
    best = isa_module.detect("").name
    np.testing.assert_array_equal(jit(best, name, "f32", lanes)(*columns), jit(best, name, "f32", 1)(*columns))


@pytest.mark.parametrize("isa_name", ISAS)
def test_vector_functions_call_nothing(isa_name):
    """The functions that kernels use most are straight code, and leave no helper behind."""
    for name in ("exp", "exp2", "log", "log2", "erf", "tanh", "atan", "erfc", "pow"):
        assembly = jit(isa_name, name, "f32", 16).assembly
        assert "call" not in assembly, name
        assert "gw." not in assembly, name
    if isa_name == "avx512":
        assert "vscalefps" in jit(isa_name, "exp", "f32", 16).assembly


def test_two_calls_share_a_helper():
    """A function is defined once per width, however often it is called."""
    e = Emitter()
    isa = isa_module.detect("portable")
    for _ in range(2):
        mathlib.call(e, isa, "exp", "f32", 4, ["%x"])
    assert [s for s in e.declarations if s.startswith("gw.")] == ["gw.exp.v4f32"]


def test_unknown_function():
    """An unknown name is refused, with the nearest one that is known."""
    with pytest.raises(UnsupportedError, match="math function 'exq' on f32; did you mean 'exp'"):
        mathlib.find("exq", "f32")
    with pytest.raises(UnsupportedError, match="'pow' with 1 operands; it takes 2"):
        mathlib.call(Emitter(), isa_module.detect("portable"), "pow", "f32", 4, ["%x"])


def signed(x, bits):
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def reverse(x, bits):
    return int(format(x % (1 << bits), f"0{bits}b")[::-1], 2)


def permute(x, y, s):
    both = (x % 2**32) | (y % 2**32) << 32
    return sum((both >> 8 * (s >> 4 * k & 7) & 255) << 8 * k for k in range(4))


U = 2**32
INTEGER = {
    ("clz", "i32"): lambda x: 32 - (x % U).bit_length(), ("clz", "i64"): lambda x: 64 - (x % 2**64).bit_length(),
    ("popc", "i32"): lambda x: (x % U).bit_count(), ("popc", "i64"): lambda x: (x % 2**64).bit_count(),
    ("ffs", "i32"): lambda x: (x & -x).bit_length(), ("ffs", "i64"): lambda x: (x & -x).bit_length(),
    ("brev", "i32"): lambda x: reverse(x, 32), ("brev", "i64"): lambda x: reverse(x, 64),
    ("iabs", "i32"): abs, ("iabs", "i64"): abs,
    ("mulhi", "i32"): lambda x, y: x * y >> 32, ("umulhi", "i32"): lambda x, y: (x % U) * (y % U) >> 32,
    ("mulhi", "i64"): lambda x, y: x * y >> 64, ("umulhi", "i64"): lambda x, y: (x % 2**64) * (y % 2**64) >> 64,
    ("hadd", "i32"): lambda x, y: x + y >> 1, ("rhadd", "i32"): lambda x, y: x + y + 1 >> 1,
    ("uhadd", "i32"): lambda x, y: (x % U + y % U) >> 1, ("urhadd", "i32"): lambda x, y: (x % U + y % U + 1) >> 1,
    ("mul24", "i32"): lambda x, y: signed(x, 24) * signed(y, 24), ("umul24", "i32"): lambda x, y: (x % 2**24) * (y % 2**24),
    ("sad", "i32"): lambda x, y, z: abs(x - y) + z, ("usad", "i32"): lambda x, y, z: abs(x % U - y % U) + z,
    ("byte_perm", "i32"): permute,
}  # fmt: skip


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize(("name", "element"), INTEGER)
def test_integers(name, element, lanes):
    """Integer functions match arbitrary-precision arithmetic, wrapped to their width."""
    f = mathlib.find(name, element)
    bits = int(element[1:])
    rng = np.random.default_rng(5)
    edges = [0, 1, -1, 2**31 - 1, -(2**31), 255, 256, 7]
    columns = [
        np.concatenate([np.roll(edges, k), rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 120)]).astype(NUMPY[element])
        for k in range(len(f.args))
    ]
    got = jit("portable", name, element, lanes)(*columns)
    want = [signed(INTEGER[name, element](*row), int(f.result[1:])) for row in zip(*[c.tolist() for c in columns], strict=True)]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("target", ["i32", "ui32", "i64", "ui64"])
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_float_to_integer(source, target, isa_name):
    """Conversions round as their suffix says, saturate, and turn a NaN into 0."""
    signed_target, bits = target[0] == "i", int(target[-2:])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed_target else (0, 2**bits - 1)
    rng = np.random.default_rng(5)
    values = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30, 3e9, 2147483647.5, 1e19]
    x = np.concatenate([values, rng.uniform(-10, 10, 48)]).astype(NUMPY[source])
    functions = {"rn": np.rint, "rz": np.trunc, "rd": np.floor, "ru": np.ceil}
    for rounding, function in functions.items():
        got = jit(isa_name, f"{source}_to_{target}_{rounding}", source, 16)(x)
        exact = [0 if np.isnan(v) else min(max(v, low - 1), high + 1) for v in function(x).tolist()]
        want = [signed(min(max(int(v), low), high), bits) for v in exact]
        np.testing.assert_array_equal(got, want, err_msg=rounding)


@pytest.mark.parametrize("lanes", [1, 16])
def test_directed_narrowing(lanes):
    """f64 to f32 rounds in the direction asked for, across zero too."""
    rng = np.random.default_rng(5)
    x = np.concatenate([[0.0, -0.0, 1e-300, -1e-300, 1e300, -1e300, 1.0, np.inf, -np.inf, 1e-46, -1e-46], rng.normal(size=53)])
    with np.errstate(over="ignore"):
        near = x.astype(np.float32)
    down = np.where(near.astype(np.float64) > x, np.nextafter(near, np.float32(-np.inf)), near)
    up = np.where(near.astype(np.float64) < x, np.nextafter(near, np.float32(np.inf)), near)
    for rounding, want in {"rn": near, "rd": down, "ru": up, "rz": np.where(x > 0, down, up)}.items():
        got = jit("portable", f"f64_to_f32_{rounding}", "f64", lanes)(x)
        np.testing.assert_array_equal(got, want, err_msg=rounding)


def test_mixed_operands():
    """Functions with an integer operand or result follow C."""
    best = isa_module.detect("").name
    x = np.array([1.5, -3.0, 0.0, np.inf, 1e-40, 7.0, 0.1, 2.0] * 2, np.float32)
    n = np.array([3, -2, 5, 0, 10, 2, -1, 127] * 2, np.int32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(jit(best, "ldexp", "f32", 16)(x, n), np.ldexp(x, n))
        np.testing.assert_allclose(jit(best, "powi", "f32", 16)(x, n), np.float64(x) ** n, rtol=1e-7, atol=1e-45)
        # SciPy has NaN at infinity, where C has the limit.
        bessel = np.where(np.isinf(x), 0, special.jv(n, x.astype(np.float64)))
        np.testing.assert_allclose(jit(best, "powi", "f64", 16)(x, n), np.float64(x) ** n, rtol=1e-15)
    finite = np.abs(x[[0, 1, 5, 6] * 4])
    np.testing.assert_array_equal(jit(best, "ilogb", "f32", 16)(finite), np.floor(np.log2(finite)))
    np.testing.assert_allclose(jit(best, "jn", "f32", 16)(n, x), bessel, rtol=1e-4, atol=1e-7)
    bits = x.view(np.int32)
    np.testing.assert_array_equal(jit(best, "f32_as_i32", "f32", 16)(x), bits)
    np.testing.assert_array_equal(jit(best, "i32_as_f32", "i32", 16)(bits), x)
    d = x.astype(np.float64)
    high, low = jit(best, "double2hiint", "f64", 16)(d), jit(best, "double2loint", "f64", 16)(d)
    np.testing.assert_array_equal(jit(best, "hiloint2double", "f64", 16)(high, low), d)
    for name, want in {
        "isnan": np.isnan(x),
        "isinf": np.isinf(x),
        "isfinite": np.isfinite(x),
        "signbit": np.signbit(x),
    }.items():
        np.testing.assert_array_equal(jit(best, name, "f32", 16)(x), want)
    y = x[::-1].copy()
    for isa_name in {best, "portable"}:
        # The product and the sum of f32 values are exact in the wider type here.
        want = (x.astype(np.longdouble) * y + 1).astype(np.float32)
        np.testing.assert_array_equal(jit(isa_name, "fma", "f32", 16)(x, y, np.ones_like(x)), want)


NO_COUNTERPART = re.compile(
    r"__nv_([fd](add|sub|mul|div|rcp|sqrt)|fmaf?|u?(int|ll)2float|ull2float|u?ll2double)_r[zdu]"
    r"|__nv_(rcp64h|erfinv|erfcinv|erfcx|normcdfinv)"
)


def upstream_symbols():
    """(symbol, operand types, result type) of everything in Triton's libdevice module."""
    source = inspect.getsource(upstream)
    kinds = {"fp32": "f32", "fp64": "f64", "int32": "i32", "uint32": "i32", "int64": "i64", "uint64": "i64"}
    pattern = r'\(((?:core\.dtype\("\w+"\),?\s*)+)\)\s*:\s*\("(__nv_\w+)",\s*core\.dtype\("(\w+)"\)\)'
    for operands, symbol, result in re.findall(pattern, source):
        yield symbol, tuple(kinds[k] for k in re.findall(r'"(\w+)"', operands)), kinds[result]


def test_libdevice_symbols():
    """Every symbol of Triton's libdevice is there with its signature, or is one of those that a CPU has no match for."""
    found = {}
    for symbol, operands, result in upstream_symbols():
        found[symbol] = operands
        if NO_COUNTERPART.fullmatch(symbol):
            with pytest.raises(UnsupportedError, match=symbol):
                libdevice.lookup(symbol)
            continue
        entry = libdevice.lookup(symbol)
        assert (entry.args, entry.result) == (operands, result), symbol
    assert len(found) > 300
    assert set(libdevice.LIBDEVICE) <= set(found)


def test_every_function_assembles():
    """All functions in one module, at a vector and at the scalar width, are valid LLVM IR."""
    isa = isa_module.detect("portable")
    for name, element in mathlib.FUNCTIONS:
        for lanes in (1, 4):
            llvm.parse_assembly(module_text(isa, name, element, lanes)).verify()
