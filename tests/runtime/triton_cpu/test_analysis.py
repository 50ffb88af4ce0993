"""What is computed whole, and where: loads around writes, values worth a buffer, long chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from graphwright.runtime.triton_cpu import analysis, generate
from graphwright.runtime.triton_cpu.analysis import Plan
from graphwright.runtime.triton_cpu.ttir import Function, Value
from graphwright.runtime.triton_cpu.ttir_parse import parse

assert generate._HANDLERS, "the tables of operations have to be filled"
POINTERS = {"X": "*fp32", "Y": "*fp32", "Z": "*fp32", "B": 16}


def results(function: Function, name: str) -> list[Value]:
    """Results of the operations of a name, in order."""
    return [op.results[0] for op in function.walk() if op.name == name]


@pytest.fixture
def planned(ttir_text: Any) -> Callable[..., tuple[Function, Plan]]:
    """Return a function that plans a kernel."""

    def plan(kernel: Any, signature: dict[str, str | int] = POINTERS) -> tuple[Function, Plan]:
        (function,) = parse(ttir_text(kernel, signature)).values()
        return function, Plan(function)

    return plan


@triton.jit
def read_only_kernel(X, Y, Z, B: tl.constexpr):
    tl.device_print("x", tl.load(X + tl.arange(0, B)))


@triton.jit
def in_place_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(X + i, tl.load(X + i) + 1)


@triton.jit
def two_tensors_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(Z + i, tl.load(X + i) + tl.load(Y + i))


@triton.jit
def masked_in_place_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    m = i < 13
    tl.store(X + i, tl.load(X + i, mask=m, other=2.0) * 3, mask=m)


@triton.jit
def before_a_store_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + i)
    tl.store(Z + i, x)


@triton.jit
def volatile_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.device_print("x", tl.load(X + i, volatile=True))


@triton.jit
def used_after_a_store_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + i)
    tl.store(Y + i, x)
    tl.store(Z + i, x + 1)


@triton.jit
def shifted_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(X + i + 1, tl.load(X + i))


@triton.jit
def reversed_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(X + i, tl.load(X + B - 1 - i))


@triton.jit
def transposed_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    p = i[:, None] * B + i[None, :]
    tl.store(X + p, tl.trans(tl.load(X + p)))


@triton.jit
def used_in_a_loop_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + i)
    for k in range(4):
        tl.store(X + i + k * B, x + k)


@triton.jit
def used_after_an_atomic_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + i)
    tl.atomic_add(X + i, 1.0)
    tl.store(Y + i, x)


@triton.jit
def store_in_a_branch_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + i)
    if tl.program_id(0) == 0:
        tl.store(X + i, i)
    tl.store(Y + i, x)


@triton.jit
def loop_reads_what_it_wrote_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    for k in range(4):
        x = tl.load(X + i + k)
        tl.store(X + i + k + 1, x + 1)


KERNELS = [
    (read_only_kernel, False), (in_place_kernel, False), (two_tensors_kernel, False), (masked_in_place_kernel, False),
    (before_a_store_kernel, False), (volatile_kernel, True), (used_after_a_store_kernel, True), (shifted_kernel, True),
    (reversed_kernel, True), (transposed_kernel, True), (used_in_a_loop_kernel, True), (used_after_an_atomic_kernel, True),
    (store_in_a_branch_kernel, True), (loop_reads_what_it_wrote_kernel, True),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "is_pinned"), KERNELS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_pinned_loads(planned: Any, kernel: Any, is_pinned: bool) -> None:
    """A load is read where it stands if a write might change what it reads before its last use."""
    function, plan = planned(kernel)
    loads = results(function, "tt.load")
    assert loads
    assert all((load in plan.pinned) == is_pinned for load in loads)


@triton.jit
def swap_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + i)
    y = tl.load(Y + i)
    tl.store(X + i, y)
    tl.store(Y + i, x)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (swap_kernel, lambda x, y: (y[:16], x[:16])),
        (shifted_kernel, lambda x, y: (torch.cat([x[:1], x[:15]]), y[:16])),
        (reversed_kernel, lambda x, y: (x[:16].flip(0), y[:16])),
        (used_after_an_atomic_kernel, lambda x, y: (x[:16] + 1, x[:16])),
        (store_in_a_branch_kernel, lambda x, y: (torch.arange(16.0), x[:16])),
        (used_in_a_loop_kernel, lambda x, y: (x[:16], y[:16])),
        (loop_reads_what_it_wrote_kernel, None),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_order_of_memory(kernel: Any, expected: Callable[..., tuple[torch.Tensor, ...]] | None) -> None:
    """Kernels that read and write the same memory do both in the order in which they are written."""
    x, y = torch.randn(80), torch.randn(80)
    if expected is None:
        wanted = x.clone()
        for k in range(4):
            wanted[k + 1 : k + 17] = wanted[k : k + 16].clone() + 1
        kernel[(1,)](x, y, x, B=16)
        torch.testing.assert_close(x, wanted, rtol=0, atol=0)
        return
    wanted_x, wanted_y = expected(x.clone(), y.clone())
    kernel[(1,)](x, y, x, B=16)
    torch.testing.assert_close((x[:16], y[:16]), (wanted_x, wanted_y), rtol=0, atol=0)


@triton.jit
def softmax_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + i)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(Y + i, e / tl.sum(e, 0))


def test_expensive_values(planned: Any) -> None:
    """An expensive value with two uses is computed once; what has one use, or is cheap, is not stored."""
    function, plan = planned(softmax_kernel)
    (exponential,), (quotient,) = results(function, "math.exp"), results(function, "arith.divf")
    assert exponential in plan.planned
    assert exponential not in plan.pinned
    assert quotient not in plan.planned
    assert not plan.planned & set(results(function, "arith.subf"))


@triton.jit
def once_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(Y + i, tl.exp(tl.load(X + i)))


def test_expensive_value_used_once(planned: Any) -> None:
    """An expensive value with one use is computed where it is used."""
    _, plan = planned(once_kernel)
    assert plan.planned == set()


@triton.jit
def remainder_kernel(X, Y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(Y + i, tl.load(X + i % n))
    tl.store(Y + i + B, (i * 0 + tl.program_id(0)) % n)


def test_divided_indices(planned: Any) -> None:
    """The remainder of an index is computed once into a buffer; that of a number that does not vary is not."""
    function, plan = planned(remainder_kernel, {"X": "*fp32", "Y": "*fp32", "n": "i32", "B": 64})
    tensors = [v for v in results(function, "arith.remsi") if v.shape]
    assert plan.planned == {tensors[0]}


@triton.jit
def spread_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    row = tl.load(X + i) * 2 + 1
    tl.store(Z + i[:, None] * B + i[None, :], row[:, None] + tl.load(Y + i)[None, :])


def test_values_that_are_spread(planned: Any) -> None:
    """A computed row that is broadcast is computed once for the matrix; a loaded one is loaded again."""
    function, plan = planned(spread_kernel)
    assert results(function, "arith.addf")[0] in plan.planned
    assert not plan.planned & set(results(function, "tt.load"))


@triton.jit
def outside_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    scale = tl.exp(tl.load(X + i))
    for k in range(8):
        tl.store(Y + k * B + i, tl.load(Z + k * B + i) * scale)


def test_values_from_outside_a_loop(planned: Any) -> None:
    """What a loop reads from outside is known for the loop, and is computed before it if it costs something."""
    function, plan = planned(outside_kernel)
    (scale,) = results(function, "math.exp")
    (loop,) = (op for op in function.walk() if op.name == "scf.for")
    assert scale in plan.planned
    assert scale in plan.outside_uses[loop]
    assert all(v.block is not loop.body for v in plan.outside_uses[loop])


@triton.jit
def combine(a, b):
    return tl.exp(a) + tl.exp(b) * a


@triton.jit
def combine_kernel(X, Y, Z, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(Y, tl.reduce(tl.load(X + i), 0, combine))


def test_combine_functions(planned: Any) -> None:
    """Nothing inside a combine function is computed whole."""
    function, plan = planned(combine_kernel)
    assert len(results(function, "math.exp")) == 2
    assert plan.planned == set()


def chain(length: int, target: str = "%b") -> Function:
    """A kernel that adds to a tensor many times."""
    lines = "\n".join(f"%v{k + 1} = arith.mulf %v{k}, %v0 : tensor<16xf32>" for k in range(length))
    text = f"""module {{
    tt.func public @k(%p: !tt.ptr<f32>) {{
    %r = tt.make_range {{start = 0 : i32, end = 16 : i32}} : tensor<16xi32>
    %s = tt.splat %p : !tt.ptr<f32> -> tensor<16x!tt.ptr<f32>>
    %a = tt.addptr %s, %r : tensor<16x!tt.ptr<f32>>, tensor<16xi32>
    %v0 = tt.load %a : tensor<16x!tt.ptr<f32>>
    {lines}
    %b = tt.addptr %s, %r : tensor<16x!tt.ptr<f32>>, tensor<16xi32>
    tt.store {target}, %v{length} : tensor<16x!tt.ptr<f32>>
    tt.return
    }}
    }}
    """
    (function,) = parse(text).values()
    return function


def test_long_chain_in_place() -> None:
    """A chain of any length between a load and a store to the same place is planned."""
    assert Plan(chain(1500, target="%a")).planned


def longest(value: Value, plan: Plan, known: dict[Value, int]) -> int:
    """Operations in the longest chain behind a value that is evaluated in one go."""
    if value.op is None or value in plan.planned:
        return 0
    if value not in known:
        known[value] = 1 + max((longest(v, plan, known) for v in value.op.operands), default=0)
    return known[value]


@pytest.mark.parametrize("length", [1, 30, 500])
def test_long_chains(length: int) -> None:
    """A long chain of operations is cut by buffers, a short one is not."""
    function = chain(length)
    plan = Plan(function)
    products = results(function, "arith.mulf")
    cut = plan.planned & set(products)
    assert bool(cut) == (length == 500)
    assert cut <= plan.pinned
    known: dict[Value, int] = {}
    assert max(longest(v, plan, known) for v in products) <= analysis.MAX_DEPTH + 2


def test_cost() -> None:
    """The cost of a value is the number of operations that are evaluated for it; moves are free, buffers end it."""
    function = chain(3)
    plan = Plan(function)
    loads, products = results(function, "tt.load"), results(function, "arith.mulf")
    assert plan.cost(loads[0]) == 1
    assert [plan.cost(v) for v in products] == [3, 5, 7]
    assert plan.cost(results(function, "tt.addptr")[0]) == 0
    assert plan.cost(function.args[0]) == 0
