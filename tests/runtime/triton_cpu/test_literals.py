"""Constants as bits and as LLVM literals, against numpy, torch and LLVM."""

from __future__ import annotations

import ctypes
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from graphwright.runtime.triton_cpu import isa, jit
from graphwright.runtime.triton_cpu.buffers import storage_type
from graphwright.runtime.triton_cpu.emit import LLVM_TYPES
from graphwright.runtime.triton_cpu.literals import float_bits, literal
from graphwright.runtime.triton_cpu.values import BYTES

NUMPY = {"f16": (np.float16, np.uint16), "f32": (np.float32, np.uint32), "f64": (np.float64, np.uint64)}
FLOAT8 = {
    "f8E5M2": torch.float8_e5m2, "f8E4M3FN": torch.float8_e4m3fn,
    "f8E5M2FNUZ": torch.float8_e5m2fnuz, "f8E4M3FNUZ": torch.float8_e4m3fnuz,
}  # fmt: skip


@pytest.mark.parametrize("element", sorted(NUMPY))
@given(st.floats(allow_nan=False))
@example(65519.99)
@example(65520.0)
@example(-65520.0)
@example(3.5e38)
@example(-1e-320)
@example(2.0**-25)
@example(-0.0)
@example(math.inf)
def test_float_bits(element: str, value: float) -> None:
    """A number is rounded to the nearest of its type, ties to even, and overflows to infinity."""
    dtype, integer = NUMPY[element]
    with np.errstate(all="ignore"):
        expected = int(np.array(value).astype(dtype).view(integer))
    assert float_bits(value, element) == expected


@given(st.floats(width=32, allow_nan=False))
@example(1.00390625)
@example(1.01171875)
@example(3.4e38)
def test_bfloat16_bits(value: float) -> None:
    """bf16 constants are rounded as torch rounds them."""
    expected = torch.tensor(value).to(torch.bfloat16).view(torch.int16).item() & 0xFFFF
    assert float_bits(value, "bf16") == expected


@pytest.mark.parametrize("element", ["f16", "bf16", "f32", "f64", *FLOAT8])
def test_nan(element: str) -> None:
    """NaN stays NaN in every type."""
    bits = float_bits(math.nan, element)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64, **FLOAT8}[element]
    packed = np.frombuffer(bits.to_bytes(BYTES[element], "little"), np.uint8).copy()
    assert torch.from_numpy(packed).view(dtype).to(torch.float32).isnan().all()


@pytest.mark.parametrize("element", sorted(FLOAT8))
def test_float8_bits(element: str) -> None:
    """Every finite 8-bit float keeps its code."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(FLOAT8[element]).to(torch.float64)
    finite = values.isfinite()
    found = [float_bits(x, element) for x in values[finite].tolist()]
    assert found == codes[finite].tolist()


CONSTANTS = [
    *((x, element) for element in ("f32", "f64", "f16", "bf16") for x in (0.0, -0.0, 0.1, -1.5, 65504.0, math.inf, 1e-7)),
    *((x, element) for element in ("i8", "i16", "i32", "i64") for x in (0, -1, 127, -128)),
    (2**63 - 1, "i64"), (-(2**63), "i64"), (0, "ptr"), (1 << 40, "ptr"),
    (1.5, "f8E5M2"), (-2.5, "f8E4M3FN"),
]  # fmt: skip


def test_llvm_reads_literals() -> None:
    """LLVM reads every literal as the bits that were meant."""
    lines = []
    for k, (value, element) in enumerate(CONSTANTS):
        kind, stored = LLVM_TYPES[element], storage_type(element)
        text = literal(value, element)
        lines.append(f"@g{k} = global {stored} {text if stored == kind else f'ptrtoint (ptr {text} to i64)'}")
    code = jit.load(jit.compile_object("\n".join(lines) + "\n", isa.detect("portable")), {})
    for k, (value, element) in enumerate(CONSTANTS):
        size = BYTES[element]
        found = int.from_bytes(ctypes.string_at(code.variable(f"g{k}"), size), "little")
        expected = float_bits(value, element) if isinstance(value, float) else value % (1 << (8 * size))
        assert found == expected, (value, element)


def test_booleans() -> None:
    """A boolean is its lowest bit."""
    assert [literal(x, "i1") for x in (0, 1, -1, 2)] == ["false", "true", "true", "false"]


def test_f32_literals_are_exact() -> None:
    """A literal of f32 is a double that an f32 can hold: LLVM refuses others."""
    digits = int(literal(0.1, "f32"), 16)
    value = struct.unpack("<d", struct.pack("<Q", digits))[0]
    assert value == np.float32(0.1)
    assert value != 0.1
