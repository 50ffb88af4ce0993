"""Tile products against numpy in float64, for every instruction set that the host can run."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from numpy.typing import NDArray

from graphwright.runtime.triton_cpu.emit import LLVM_TYPES, Emitter, vector_type
from graphwright.runtime.triton_cpu.errors import BackendError, UnsupportedError
from graphwright.runtime.triton_cpu.isa import Isa, detect
from graphwright.runtime.triton_cpu.microkernel import Operand, emit_product
from graphwright.runtime.triton_cpu.microkernel_elements import ACCUMULATOR_TYPES
from graphwright.runtime.triton_cpu.microkernel_groups import Packing, pack, packing_of

Array = NDArray[Any]
DTYPES = {
    "f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": np.uint16,
    "i8": np.int8, "i16": np.int16, "i32": np.int32,
}  # fmt: skip
EPSILON = {"f32": 2.0**-23, "f64": 2.0**-52}
engines: list[llvm.ExecutionEngine] = []


def compiled(e: Emitter, arguments: int, isa: Isa) -> ctypes._CFunctionType:
    """Compile the emitted function of pointers %a0, %a1, ... without any IR pass."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    parameters = ", ".join(f"ptr %a{i}" for i in range(arguments))
    declared = "\n".join(e.declarations.values())
    body = "\n".join(e.lines)
    module = llvm.parse_assembly(f"{declared}\ndefine void @f({parameters}) {{\nentry:\n{body}\n  ret void\n}}\n")
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=isa.cpu, features=isa.features, opt=3)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    engines.append(engine)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(engine.get_function_address("f"))


def isa_or_skip(name: str) -> Isa:
    """Return the instruction set, or skip the test on a host without it."""
    try:
        return detect(name)
    except BackendError as error:
        pytest.skip(str(error))


def aligned(shape: tuple[int, ...], element: str) -> Array:
    """An array whose address is aligned to its elements and to nothing more."""
    dtype = np.dtype(DTYPES[element])
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 64 + dtype.itemsize, np.uint8)
    start = -raw.ctypes.data % 64 + dtype.itemsize
    return raw[start : start + size].view(dtype).reshape(shape)


def filled(shape: tuple[int, ...], element: str, seed: int) -> Array:
    """An array of random values, the extremes of integers included."""
    rng = np.random.default_rng(seed)
    out = aligned(shape, element)
    if element.startswith("i"):
        low = -128
        out[...] = rng.integers(low, 127, shape, endpoint=True)
    elif element == "bf16":
        out[...] = rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16
    else:
        out[...] = rng.standard_normal(shape)
    return out


def exact(values: Array, element: str) -> NDArray[np.float64]:
    """The values in float64."""
    if element == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


@functools.cache
def product(
    isa: Isa,
    m: int,
    n: int,
    k: int,
    elements: tuple[str, str],
    accumulator: str,
    transposed: bool,
    pitch: int,
    dynamic: bool,
) -> ctypes._CFunctionType:
    """Compile out[m, n] = c[m, n] + A @ B, with B's rows `pitch` elements apart."""
    e = Emitter()
    scalar = ACCUMULATOR_TYPES[accumulator]
    strides: tuple[int | str, int | str] = (1, m) if transposed else (k, 1)
    row: int | str = pitch
    if dynamic:
        strides = tuple(e.op(f"add i64 {s}, 0") for s in strides)  # type: ignore[assignment]
        row = e.op(f"add i64 {pitch}, 0")

    def place(base: str, row: int | str, column: int | str) -> str:
        return e.address(scalar, base, e.combine((row, n), (column, 1)))

    def initial(row: int | str, column: int | str, lanes: int) -> str:
        return e.op(f"load {vector_type(scalar, lanes)}, ptr {place('%a2', row, column)}, align 4")

    def store(row: int | str, column: int | str, lanes: int, value: str) -> None:
        e.raw(f"store {vector_type(scalar, lanes)} {value}, ptr {place('%a3', row, column)}, align 4")

    a = Operand("%a0", elements[0], strides)
    b = Operand("%a1", elements[1], (row, 1))
    emit_product(e, isa, m, n, k, a, b, accumulator, initial, store)
    return compiled(e, 4, isa)


def check(
    isa: Isa,
    m: int,
    n: int,
    k: int,
    elements: tuple[str, str],
    accumulator: str,
    *,
    transposed: bool = False,
    padding: int = 0,
    dynamic: bool = False,
) -> None:
    """Compare a product with float64 within the rounding of k additions."""
    a = filled((k, m) if transposed else (m, k), elements[0], 1)
    b = filled((k, n + padding), elements[1], 2)
    c = filled((m, n), accumulator, 3)
    guarded = aligned((m + 2, n), accumulator)
    guarded[...] = np.nan if accumulator != "i32" else 77
    out = guarded[1 : m + 1]
    run = product(isa, m, n, k, elements, accumulator, transposed, n + padding, dynamic)
    run(a.ctypes.data, b.ctypes.data, c.ctypes.data, out.ctypes.data)
    left, right = exact(a.T if transposed else a, elements[0]), exact(b[:, :n], elements[1])
    expected = c.astype(np.float64) + left @ right
    if accumulator == "i32":
        np.testing.assert_array_equal(out, expected.astype(np.int64))
    else:
        bound = (np.abs(c) + np.abs(left) @ np.abs(right)) * EPSILON[accumulator] * (k + 2)
        assert np.all(np.abs(out - expected) <= bound)
    untouched = guarded[[0, m + 1]]
    assert np.all(untouched == 77) if accumulator == "i32" else np.all(np.isnan(untouched))


ISAS = ("avx512", "avx2", "portable")
SHAPES = [
    (1, 1, 1), (1, 16, 3), (2, 2, 2), (8, 8, 8), (16, 16, 16), (1, 64, 64), (2, 32, 16), (63, 63, 63), (64, 64, 64),
    (100, 100, 100), (64, 1, 64), (7, 100, 5), (64, 128, 32), (128, 16, 64), (16, 256, 100), (8, 64, 1),
    (12, 128, 128), (13, 48, 17),
]  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ISAS)
def test_f32(name: str, shape: tuple[int, int, int], transposed: bool) -> None:
    """f32 products agree for every shape and both layouts of A."""
    check(isa_or_skip(name), *shape, ("f32", "f32"), "f32", transposed=transposed, padding=5)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("name", ISAS)
def test_strides_at_run_time(name: str, transposed: bool) -> None:
    """Strides may be values of the running kernel."""
    check(isa_or_skip(name), 20, 72, 12, ("f32", "f32"), "f32", transposed=transposed, padding=3, dynamic=True)


ELEMENTS = [
    ("f64", "f64"), ("f16", "f16"), ("bf16", "bf16"), ("i32", "i32"), ("i8", "i8"), ("i16", "i16"), ("f32", "f16"),
    ("f64", "f32"),
]  # fmt: skip


@pytest.mark.parametrize("elements", ELEMENTS, ids="-".join)
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 8, 8), (17, 37, 6), (64, 64, 64)], ids=str)
@pytest.mark.parametrize("name", ISAS)
def test_elements(name: str, shape: tuple[int, int, int], elements: tuple[str, str]) -> None:
    """Elements of another type than the accumulator are converted as they are read."""
    accumulator = "i32" if elements[0].startswith("i") else "f64" if "f64" in elements else "f32"
    check(isa_or_skip(name), *shape, elements, accumulator)


def test_types_that_do_not_fit() -> None:
    """Integers cannot be summed in floating point."""
    with pytest.raises(UnsupportedError, match="i8 into f32"):
        emit_product(
            Emitter(), detect("portable"), 1, 1, 1, Operand("%a", "i8", (1, 1)), Operand("%b", "i8", (1, 1)), "f32",
            lambda row, column, lanes: "0.0", lambda row, column, lanes, value: None,
        )  # fmt: skip


def test_half_without_hardware() -> None:
    """The integer conversion of f16 agrees for every bit pattern."""
    values = np.arange(65536, dtype=np.uint16).view(np.float16)
    one, out = np.ones(1, np.float32), np.empty(65536, np.float32)
    zero = np.zeros(65536, np.float32)
    run = product(detect("portable"), 1, 65536, 1, ("f32", "f16"), "f32", False, 65536, False)
    run(one.ctypes.data, values.ctypes.data, zero.ctypes.data, out.ctypes.data)
    np.testing.assert_array_equal(out, values.astype(np.float32))


@functools.cache
def packed_product(isa: Isa, m: int, n: int, k: int, element: str, accumulator: str, packing: Packing) -> ctypes._CFunctionType:
    """Compile out[m, n] = c[m, n] + A @ B, where B is packed into a buffer first."""
    e = Emitter()
    stored, scalar = LLVM_TYPES[element], ACCUMULATOR_TYPES[accumulator]

    def load(row: int | str, column: int | str, lanes: int) -> str:
        address = e.address(stored, "%a1", e.combine((row, n), (column, 1)))
        return e.op(f"load {vector_type(stored, lanes)}, ptr {address}, align 1")

    def initial(row: int | str, column: int | str, lanes: int) -> str:
        address = e.address(scalar, "%a2", e.combine((row, n), (column, 1)))
        return e.op(f"load {vector_type(scalar, lanes)}, ptr {address}, align 4")

    def store(row: int | str, column: int | str, lanes: int, value: str) -> None:
        address = e.address(scalar, "%a3", e.combine((row, n), (column, 1)))
        e.raw(f"store {vector_type(scalar, lanes)} {value}, ptr {address}, align 4")

    b = pack(e, isa, packing, k, n, element, load, "%a4")
    emit_product(e, isa, m, n, k, Operand("%a0", packing.element, (k, 1)), b, accumulator, initial, store)
    return compiled(e, 5, isa)


@pytest.mark.parametrize("element", ["i8", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 2, 2), (8, 8, 8), (17, 37, 12), (63, 63, 4), (64, 64, 64), (100, 100, 100)])
@pytest.mark.parametrize("name", [*ISAS, "avx512 without vnni", "avx2 without vnni"])
def test_groups(name: str, shape: tuple[int, int, int], element: str) -> None:
    """Products in groups agree: exactly for integers, to the rounding of the sums for bf16."""
    isa = isa_or_skip(name.split()[0])
    if "without" in name:
        isa = dataclasses.replace(isa, has=frozenset())
    m, n, k = shape
    packing = packing_of(isa, element, k)
    if packing is None:
        assert element == "bf16"
        assert "bf16" not in isa.has
        return
    accumulator = "i32" if element == "i8" else "f32"
    a, b, c = filled((m, k), element, 1), filled((k, n), element, 2), filled((m, n), accumulator, 3)
    if element == "i8":
        a[0], b[:, 0] = -128, -128
    expected = exact(c, accumulator) + exact(a, element) @ exact(b, element)
    scale = np.abs(exact(c, accumulator)) + np.abs(exact(a, element)) @ np.abs(exact(b, element))
    widened = np.ascontiguousarray(a, DTYPES[packing.element])
    buffer = np.full(packing.bytes(k, n) + 64, 0xAB, np.uint8)
    out = aligned((m, n), accumulator)
    run = packed_product(isa, m, n, k, element, accumulator, packing)
    run(widened.ctypes.data, b.ctypes.data, c.ctypes.data, out.ctypes.data, buffer.ctypes.data)
    if element == "i8":
        np.testing.assert_array_equal(out, expected.astype(np.int64))
    else:
        assert np.all(np.abs(out - expected) <= scale * EPSILON["f32"] * (k + 2))
    assert np.all(buffer[packing.bytes(k, n) :] == 0xAB)


@pytest.mark.parametrize(
    ("a", "b", "k", "accumulator", "message"),
    [
        (("i8", (8, 1)), ("i8", (64, 4), 4), 6, "i32", "k is 6"),
        (("i8", (1, 8)), ("i8", (64, 4), 4), 8, "i32", "need rows"),
        (("i16", (8, 1)), ("i16", (32, 2), 2), 8, "f32", "not summed in f32"),
        (("f16", (8, 1)), ("f16", (32, 2), 2), 8, "f32", "no product of f16 in groups of 2"),
    ],
)
def test_groups_that_do_not_fit(a: tuple[Any, ...], b: tuple[Any, ...], k: int, accumulator: str, message: str) -> None:
    """Operands that no instruction multiplies are refused."""
    isa = dataclasses.replace(detect("portable"), has=frozenset({"vnni"}), cpu="x86-64-v2")
    with pytest.raises(ValueError, match=message):
        emit_product(
            Emitter(), isa, 1, 16, k, Operand("%a", *a), Operand("%b", *b), accumulator,
            lambda row, column, lanes: "0", lambda row, column, lanes, value: None,
        )  # fmt: skip
