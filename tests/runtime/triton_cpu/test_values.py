"""The forms that a chunk of a tensor takes, and the arithmetic of their types."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.runtime.triton_cpu.emit import LLVM_TYPES
from graphwright.runtime.triton_cpu.values import (
    BYTES,
    INTEGER_BITS,
    MAX_DIVISOR,
    Affine,
    Coord,
    Pointer,
    Uniform,
    Vector,
    lanes_of,
    widths_of,
    wrap,
)

DTYPES = {
    "i1": torch.bool, "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64,
    "f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64,
    "f8E5M2": torch.float8_e5m2, "f8E4M3FN": torch.float8_e4m3fn,
    "f8E5M2FNUZ": torch.float8_e5m2fnuz, "f8E4M3FNUZ": torch.float8_e4m3fnuz,
}  # fmt: skip


@given(st.integers(-(2**70), 2**70), st.sampled_from(sorted(INTEGER_BITS)))
def test_wrap(value: int, element: str) -> None:
    """Wrapping changes a number by a multiple of 2^bits, into the signed range of its type."""
    bits = INTEGER_BITS[element]
    wrapped = wrap(value, element)
    assert (wrapped - value) % (1 << bits) == 0
    low, high = (0, 1) if bits == 1 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    assert low <= wrapped <= high
    assert wrap(wrapped, element) == wrapped


@pytest.mark.parametrize("element", sorted(DTYPES))
def test_bytes_in_memory(element: str) -> None:
    """An element takes as many bytes as torch's."""
    assert BYTES[element] == DTYPES[element].itemsize


def test_types_agree() -> None:
    """Every type that has a register has a size in memory."""
    assert set(LLVM_TYPES) == set(BYTES)


def test_chunks() -> None:
    """The lanes of a chunk are those of its dimensions that are wider than one."""
    coords = (Coord("%i", 1), Coord(0, 4), Coord("%j", 1, 8), Coord(16, 8))
    assert widths_of(coords) == (4, 8)
    assert lanes_of(coords) == 32
    assert widths_of(()) == ()
    assert lanes_of(()) == 1


@pytest.mark.parametrize(("value", "divisor"), [(0, MAX_DIVISOR), (1, 1), (-1, 1), (6, 2), (-24, 8), (1024, 1024)])
def test_divisor_of_a_constant(value: int, divisor: int) -> None:
    """The known divisor of a constant is its largest power of two."""
    assert Uniform(value, "i32").known_divisor == divisor


def test_divisor_of_a_name() -> None:
    """What is computed at run time has the divisor that it was given."""
    assert Uniform("%n", "i32").known_divisor == 1
    assert Uniform("%n", "i32", 16).known_divisor == 16


def test_signs() -> None:
    """The sign of a constant is known; of a name, only what it was given."""
    assert Uniform(0, "i32").is_nonnegative
    assert not Uniform(-1, "i32", nonnegative=True).is_nonnegative
    assert not Uniform("%n", "i32").is_nonnegative
    assert Uniform("%n", "i32", nonnegative=True).is_nonnegative


def test_constants() -> None:
    """Python numbers are constants, names are not."""
    assert Uniform(0, "i32").is_constant
    assert Uniform(0.5, "f32").is_constant
    assert not Uniform("%n", "i32").is_constant


def test_lanes_of_a_vector() -> None:
    """A vector has the lanes of all its dimensions."""
    assert Vector("%v", "f32", (2, 8)).lanes == 16


def test_forms_are_keys() -> None:
    """Equal forms are one key of a memo table."""

    def make() -> Affine:
        return Affine(Uniform("%b", "i32"), (Uniform(1, "i32"),), (8,), "i32")

    assert len({make(), make(), Pointer("%p", make(), "f32"), Pointer("%p", make(), "f32")}) == 2
    assert Pointer(None, make(), "f32").element == "ptr"
