"""Static strides of index tensors, and the dimension that runs along the lanes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from graphwright.runtime.triton_cpu.layout import IRREGULAR, RUNTIME, Layout, for_argument
from graphwright.runtime.triton_cpu.ttir import Function, Op
from graphwright.runtime.triton_cpu.ttir_parse import parse

SIZES = st.sampled_from([1, 2, 4, 8])


def the(function: Function, name: str, number: int = 0) -> Op:
    """The operation of a name; the `number`th of several."""
    return [op for op in function.walk() if op.name == name][number]


def parsed(text: str) -> Function:
    """The only function of a module."""
    (function,) = parse(text).values()
    return function


def body(arguments: str, lines: str) -> Function:
    """A function of hand-written operations."""
    return parsed(f"module {{\ntt.func public @k({arguments}) {{\n{lines}\ntt.return\n}}\n}}\n")


@given(data=st.data(), shape=st.tuples(SIZES, SIZES), scalars=st.tuples(st.integers(-9, 9), st.integers(-9, 9)))
def test_strides(indices: Any, data: st.DataObject, shape: tuple[int, int], scalars: tuple[int, int]) -> None:
    """Elements step by a stride that is a number, and by the same amount where it is known at run time."""
    kernel = indices.kernel(data.draw(indices.trees_without_remainders), shape, scalars)
    lowering, value = kernel.lowering()
    for d, stride in enumerate(lowering.plan.layout.strides(value)):
        steps = np.diff(kernel.expected, axis=d)
        if isinstance(stride, int):
            assert np.all(steps == stride)
        elif stride == RUNTIME and steps.size:
            assert np.all(steps == steps.take([0], axis=d))


@triton.jit
def matrix_kernel(X, Y, s, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + i[:, None] + i[None, :] * s)
    tl.store(Y + i[:, None] * B + i[None, :], x * 2)


MATRIX = {"X": "*fp32", "Y": "*fp32", "s": "i32", "B": 32}


def test_pointers(ttir_text: Any) -> None:
    """Pointers have the strides of their offsets, in elements; a factor that is an argument is known at run time."""
    function = parsed(ttir_text(matrix_kernel, MATRIX))
    layout = Layout()
    assert layout.strides(the(function, "tt.load").operands[0]) == (1, RUNTIME)
    assert layout.strides(the(function, "tt.store").operands[0]) == (32, 1)


def test_lane_of_a_load(ttir_text: Any) -> None:
    """A load runs along its contiguous dimension, and so does what is computed from it."""
    function = parsed(ttir_text(matrix_kernel, MATRIX))
    layout = Layout()
    load, store = the(function, "tt.load"), the(function, "tt.store")
    assert layout.lane(load.result) == 0
    assert layout.lane(the(function, "arith.mulf").result) == 0
    assert layout.contiguous(store.operands[0], 0) == 1


def test_decided_lane(ttir_text: Any) -> None:
    """What was decided of a value outweighs loads, and holds for what is computed from it; loads stay natural."""
    function = parsed(ttir_text(matrix_kernel, MATRIX))
    layout = Layout()
    load, product = the(function, "tt.load").result, the(function, "arith.mulf").result
    assert layout.lane(product) == 0
    layout.decide(load, 1)
    assert (layout.lane(load), layout.natural(load), layout.lane(product)) == (1, 0, 1)


@triton.jit
def transposed_kernel(X, Y, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + i[:, None] * B + i[None, :])
    tl.store(Y + i[:, None] + i[None, :] * B, tl.trans(x) + 1.0)


def test_lane_of_a_transpose(ttir_text: Any) -> None:
    """A transposed tensor runs along the dimension that its source does."""
    function = parsed(ttir_text(transposed_kernel, {"X": "*fp32", "Y": "*fp32", "B": 32}))
    layout = Layout()
    transposed = the(function, "tt.trans").result
    assert layout.lane(transposed.op.operands[0]) == 1
    assert layout.lane(transposed) == 0
    assert layout.lane(the(function, "arith.addf").result) == 0


@triton.jit
def loop_kernel(X, Y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    p = X + i[:, None] * 64 + i[None, :]
    a = tl.zeros((B, B), tl.float32)
    for _ in range(n):
        x = tl.load(p)
        a = tl.dot(x, x, a)
        p += 64 * B
    tl.store(Y + i[:, None] * B + i[None, :], a)


LOOP = {"X": "*fp32", "Y": "*fp32", "n": "i32", "B": 16}


def test_loop_arguments(ttir_text: Any) -> None:
    """A pointer carried round a loop has the strides that it starts with."""
    function = parsed(ttir_text(loop_kernel, LOOP))
    pointer = the(function, "tt.load").operands[0]
    assert pointer.op is None
    assert for_argument(pointer) is the(function, "scf.for")
    assert Layout().strides(pointer) == (64, 1)


def test_lane_of_a_carried_product(ttir_text: Any) -> None:
    """A tensor carried round a loop, and the loop's result, run as the product does that it is replaced by."""
    function = parsed(ttir_text(loop_kernel, LOOP))
    product = the(function, "tt.dot")
    accumulator = product.operands[2]
    result = the(function, "scf.for").results[accumulator.index - 1]
    layout = Layout()
    assert (layout.lane(accumulator), layout.lane(result)) == (1, 1)
    layout.decide(product.result, 0)
    assert (layout.lane(accumulator), layout.lane(result)) == (0, 0)


def test_index_of_a_loop_is_not_carried(ttir_text: Any) -> None:
    """Neither a kernel argument nor a loop's index is carried round a loop."""
    function = parsed(ttir_text(loop_kernel, LOOP))
    assert for_argument(the(function, "scf.for").body.args[0]) is None
    assert for_argument(function.args[0]) is None


def test_remainders(indices: Any) -> None:
    """A remainder counts as stepping like its operand: it nearly always does, and whoever relies on it looks again."""
    lowering, value = indices.kernel(("rem", ("row",), ("constant", 3)), (8, 2), (0, 0)).lowering()
    assert lowering.plan.layout.strides(value) == (1, 0)


def test_loaded_indices_are_irregular() -> None:
    """Nothing is known of what was loaded."""
    function = body(
        "%p: !tt.ptr<i32>",
        """
        %r = tt.make_range {start = 0 : i32, end = 8 : i32} : tensor<8xi32>
        %s = tt.splat %p : !tt.ptr<i32> -> tensor<8x!tt.ptr<i32>>
        %a = tt.addptr %s, %r : tensor<8x!tt.ptr<i32>>, tensor<8xi32>
        %x = tt.load %a : tensor<8x!tt.ptr<i32>>
        %y = arith.addi %x, %r : tensor<8xi32>
        tt.store %a, %y : tensor<8x!tt.ptr<i32>>""",
    )
    layout = Layout()
    assert layout.strides(the(function, "tt.load").result) == (IRREGULAR,)
    assert layout.strides(the(function, "arith.addi").result) == (IRREGULAR,)


@pytest.mark.parametrize(("shape", "lane"), [((8, 4), 1), ((8, 1), 0), ((4, 8, 1), 1), ((1, 1), 1)])
def test_lane_without_a_reason(shape: tuple[int, ...], lane: int) -> None:
    """Where nothing speaks for a dimension, the last one that has elements is taken."""
    size = "x".join(map(str, shape))
    function = body(
        "%p: !tt.ptr<f32>, %x: f32",
        f"""
        %a = tt.splat %x : f32 -> tensor<{size}xf32>
        %b = tt.splat %p : !tt.ptr<f32> -> tensor<{size}x!tt.ptr<f32>>
        tt.store %b, %a : tensor<{size}x!tt.ptr<f32>>""",
    )
    assert Layout().lane(the(function, "tt.splat").result) == lane


def test_long_chains() -> None:
    """A chain of any length is analysed without running out of stack."""
    chain = "\n".join(f"%v{i + 1} = arith.addi %v{i}, %r : tensor<8xi32>" for i in range(3000))
    function = body(
        "%p: !tt.ptr<i32>",
        f"""
        %r = tt.make_range {{start = 0 : i32, end = 8 : i32}} : tensor<8xi32>
        %v0 = arith.addi %r, %r : tensor<8xi32>
        {chain}""",
    )
    last = the(function, "arith.addi", 3000).result
    assert Layout().strides(last) in ((3002,), (IRREGULAR,))
    assert Layout().lane(last) == 0
