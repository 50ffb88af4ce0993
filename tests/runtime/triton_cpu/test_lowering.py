"""Evaluation chunk by chunk: index expressions and masks have the right value in every lane."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

compiled = settings(max_examples=60)
ISAS = ("avx512", "avx2", "portable")


@compiled
@given(
    data=st.data(),
    shape=st.tuples(st.sampled_from([1, 2, 4, 32]), st.sampled_from([1, 2, 8, 32])),
    scalars=st.tuples(st.integers(-100, 100), st.integers(-100, 100)),
    name=st.sampled_from(ISAS),
)
def test_index_expressions(
    ttir_kernel: Any,
    indices: Any,
    data: st.DataObject,
    shape: tuple[int, int],
    scalars: tuple[int, int],
    name: str,
) -> None:
    """An index expression has in every lane the value that numpy gives it, whatever form it takes."""
    kernel = indices.kernel(data.draw(indices.trees), shape, scalars)
    out = np.full(shape, -77, np.int32)
    ttir_kernel(kernel.text, target=name).run((1, 1, 1), 1, out.ctypes.data, *map(as_argument, scalars))
    np.testing.assert_array_equal(out, kernel.expected)


@compiled
@given(
    data=st.data(),
    shape=st.tuples(st.sampled_from([1, 2, 4, 32]), st.sampled_from([1, 2, 8, 32])),
    scalars=st.tuples(st.integers(-100, 100), st.integers(-100, 100)),
)
def test_masks(ttir_kernel: Any, indices: Any, data: st.DataObject, shape: tuple[int, int], scalars: tuple[int, int]) -> None:
    """A comparison of index expressions holds in the lanes in which it holds for numpy."""
    kernel = indices.kernel(data.draw(indices.masks), shape, scalars)
    out = np.full(shape, 7, np.uint8)
    ttir_kernel(kernel.text).run((1, 1, 1), 1, out.ctypes.data, *map(as_argument, scalars))
    np.testing.assert_array_equal(out, kernel.expected.astype(np.uint8))


def as_argument(value: int) -> int:
    """The bits of an i32 in a slot of arguments."""
    return ctypes.c_uint32(value).value
