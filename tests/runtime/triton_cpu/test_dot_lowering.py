"""How products are lowered: no gathers, which operand is read as vectors, and where the result goes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from graphwright.runtime.triton_cpu import dot, isa
from graphwright.runtime.triton_cpu.analysis import Plan
from graphwright.runtime.triton_cpu.dot import plan_dots
from graphwright.runtime.triton_cpu.errors import UnsupportedError
from graphwright.runtime.triton_cpu.generate import generate
from graphwright.runtime.triton_cpu.lowering import Lowering
from graphwright.runtime.triton_cpu.options import CPUOptions
from graphwright.runtime.triton_cpu.ttir import Function, Value
from graphwright.runtime.triton_cpu.ttir_parse import parse

ISAS = ("avx512", "avx2", "portable")


@triton.jit
def attention_kernel(Q, K, V, O, S, scale, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    rows = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1) * S * D
    d = tl.arange(0, D)
    q = tl.load(Q + head + rows[:, None] * D + d[None, :], mask=rows[:, None] < S, other=0.0)
    m = tl.full([M], -1e30, tl.float32)
    l = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for n in range(0, S, N):
        columns = n + tl.arange(0, N)
        k = tl.load(K + head + columns[:, None] * D + d[None, :], mask=columns[:, None] < S, other=0.0)
        s = tl.where(columns[None, :] < S, tl.dot(q, tl.trans(k)) * scale, -1e30)
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - new[:, None])
        alpha = tl.exp(m - new)
        l = l * alpha + tl.sum(p, 1)
        v = tl.load(V + head + columns[:, None] * D + d[None, :], mask=columns[:, None] < S, other=0.0)
        acc = tl.dot(p.to(V.dtype.element_ty), v, acc * alpha[:, None])
        m = new
    tl.store(O + head + rows[:, None] * D + d[None, :], acc / l[:, None], mask=rows[:, None] < S)


def attention(element: str) -> dict[str, str | int]:
    """The signature of the attention kernel."""
    return {**dict.fromkeys("QKV", f"*{element}"), "O": "*fp32", "S": "i32", "scale": "fp32", "D": 64, "M": 64, "N": 32}


@triton.jit
def matmul_kernel(A, B, C, m, n, k, am, ak, bk, bn, cm, cn, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, G: tl.constexpr):
    pid = tl.program_id(0)
    across, down = tl.cdiv(n, N), tl.cdiv(m, M)
    group = pid // (G * across)
    first = group * G
    size = min(down - first, G)
    row, column = first + (pid % (G * across)) % size, (pid % (G * across)) // size
    i, j, kk = (row * M + tl.arange(0, M)) % m, (column * N + tl.arange(0, N)) % n, tl.arange(0, K)
    a, b = A + i[:, None] * am + kk[None, :] * ak, B + kk[:, None] * bk + j[None, :] * bn
    acc = tl.zeros((M, N), tl.float32)
    for step in range(0, tl.cdiv(k, K)):
        x = tl.load(a, mask=kk[None, :] < k - step * K, other=0.0)
        y = tl.load(b, mask=kk[:, None] < k - step * K, other=0.0)
        acc = tl.dot(x, y, acc)
        a += K * ak
        b += K * bk
    i, j = row * M + tl.arange(0, M), column * N + tl.arange(0, N)
    tl.store(C + i[:, None] * cm + j[None, :] * cn, acc, mask=(i[:, None] < m) & (j[None, :] < n))


def matmul(element: str) -> dict[str, str | int]:
    """The signature of the tutorial's matmul for dense row-major matrices (Triton makes a stride of 1 a constant)."""
    pointers = {"A": f"*{element}", "B": f"*{element}", "C": "*fp32"}
    strides = {"am": "i32", "ak": 1, "bk": "i32", "bn": 1, "cm": "i32", "cn": 1}
    return {**pointers, **dict.fromkeys("mnk", "i32"), **strides, "M": 64, "N": 64, "K": 32, "G": 4}


def generated(text: str, name: str) -> str:
    """LLVM IR of a kernel for an instruction set, or skip the test on a host without it."""
    try:
        target = isa.detect(name)
    except isa.BackendError as error:
        pytest.skip(str(error))
    return generate(text, target, CPUOptions(isa=name)).llvm_ir


def planned(text: str, name: str = "") -> tuple[Function, Plan]:
    """A kernel and the plan of its products."""
    (function,) = parse(text).values()
    plan = Plan(function)
    plan_dots(plan, function, isa.detect(name))
    return function, plan


@pytest.mark.parametrize("element", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ISAS)
def test_no_gathers_in_attention(ttir_text: Any, name: str, element: str) -> None:
    """Attention gathers and scatters nothing: neither the transposed keys nor the tiles of the last rows."""
    text = generated(ttir_text(attention_kernel, attention(element)), name)
    assert "llvm.masked.gather" not in text
    assert "llvm.masked.scatter" not in text


@pytest.mark.parametrize("element", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ISAS)
def test_no_gathers_in_matmul(ttir_text: Any, name: str, element: str) -> None:
    """The tutorial's matmul gathers nothing in tiles that do not wrap, nor in its inner loop's product."""
    text = generated(ttir_text(matmul_kernel, matmul(element)), name)
    assert "llvm.masked.scatter" not in text
    blocks = re.split(r"\n(?=[A-Za-z]\w*:\n)", text)
    whole = False
    for block in blocks:
        label = block.split(":")[0]
        whole = label.startswith("whole") or (whole and not label.startswith(("edge", "both")))
        assert not (whole and "llvm.masked.gather" in block.replace("declare", ""))


def test_transposed_keys(ttir_text: Any) -> None:
    """q @ k^T is computed transposed: the keys are broadcast as they lie, and q is packed with its rows along the lanes."""
    function, plan = planned(ttir_text(attention_kernel, attention("fp32")))
    first, second = (op for op in function.walk() if op.name == "tt.dot")
    assert plan.transposed == {first}
    q, transposed_k = first.operands[:2]
    assert plan.layout.lane(q) == 0
    assert plan.layout.natural(transposed_k) == 0
    assert plan.layout.lane(first.result) == 0
    assert plan.layout.lane(second.result) == 1


@triton.jit
def product_kernel(X, W, Y, B: tl.constexpr, KIND: tl.constexpr):
    i = tl.arange(0, B)
    place = i[:, None] * B + i[None, :]
    x, w = tl.load(X + place), tl.load(W + place)
    if KIND == "x w^T":
        y = tl.dot(x, tl.trans(w))
    elif KIND == "x^T w":
        y = tl.dot(tl.trans(x), w)
    elif KIND == "x^T w^T":
        y = tl.dot(tl.trans(x), tl.trans(w))
    else:
        y = tl.dot(x, w)
    tl.store(Y + place, y)


KINDS = {
    "x w": (False, lambda x, w: x @ w),
    "x w^T": (False, lambda x, w: x @ w.T),
    "x^T w": (False, lambda x, w: x.T @ w),
    "x^T w^T": (True, lambda x, w: x.T @ w.T),
}


@pytest.mark.parametrize("kind", KINDS)
def test_choice_of_the_transposed_product(ttir_text: Any, kind: str) -> None:
    """A product whose operands all run down columns is computed transposed; one that would be packed each time is not."""
    text = ttir_text(product_kernel, {"X": "*fp32", "W": "*fp32", "Y": "*fp32", "B": 32, "KIND": tl.constexpr(kind)})
    _, plan = planned(text)
    assert bool(plan.transposed) == KINDS[kind][0]


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_transposed_operands(kind: str, size: int) -> None:
    """Operands may be transposed in any combination."""
    x, w, y = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    product_kernel[(1,)](x, w, y, B=size, KIND=kind)
    torch.testing.assert_close(y, KINDS[kind][1](x, w), rtol=1e-4, atol=1e-4)


@triton.jit
def accumulating_kernel(X, W, Y, n, B: tl.constexpr, KIND: tl.constexpr):
    i = tl.arange(0, B)
    place = i[:, None] * B + i[None, :]
    acc = tl.zeros((B, B), tl.float32)
    for k in range(n):
        x, w = tl.load(X + k * B * B + place), tl.load(W + k * B * B + place)
        if KIND == "in place":
            acc = tl.dot(x, w, acc)
        elif KIND == "scaled":
            acc = tl.dot(x, w, acc * 0.5)
        elif KIND == "twice":
            acc = tl.dot(w, x, tl.dot(x, w, acc))
        elif KIND == "also read":
            acc = tl.dot(x, w, acc)
            tl.store(Y + B * B + place, acc)
        elif KIND == "old value":
            new = tl.dot(x, w, acc)
            tl.store(Y + B * B + place, acc)
            acc = new
        elif KIND == "transposed":
            acc = tl.dot(x, w, tl.trans(acc))
        else:
            acc = tl.dot(x, acc, acc)
    tl.store(Y + place, acc)


def accumulated(kind: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """What `accumulating_kernel` leaves in Y."""
    acc = torch.zeros(32, 32)
    other = torch.zeros(32, 32)
    for a, b in zip(x, w, strict=True):
        if kind == "scaled":
            acc = acc * 0.5 + a @ b
        elif kind == "twice":
            acc = acc + a @ b + b @ a
        elif kind == "transposed":
            acc = acc.T + a @ b
        elif kind == "operand":
            acc = acc + a @ acc
        else:
            new = acc + a @ b
            other = acc if kind == "old value" else new
            acc = new
    return torch.stack([acc, other if kind in ("also read", "old value") else torch.full_like(acc, 7)])


def in_place_results(monkeypatch: pytest.MonkeyPatch) -> set[Value]:
    """Collect the products that are found to write over the tensor they add to."""
    found: set[Value] = set()
    find = dot.find_in_place

    def spy(lowering: Lowering, *args: Any) -> None:
        find(lowering, *args)
        found.update(lowering.in_place)

    monkeypatch.setattr(dot, "find_in_place", spy)
    return found


IN_PLACE = {
    "in place": True, "scaled": True, "twice": True, "also read": True,
    "old value": False, "transposed": False, "operand": False,
}  # fmt: skip


@pytest.mark.parametrize("kind", IN_PLACE)
def test_accumulators(ttir_text: Any, ttir_kernel: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A product writes over the tensor it adds to, if nothing else reads that; the sums are right either way."""
    found = in_place_results(monkeypatch)
    signature = {"X": "*fp32", "W": "*fp32", "Y": "*fp32", "n": "i32", "B": 32, "KIND": tl.constexpr(kind)}
    kernel = ttir_kernel(ttir_text(accumulating_kernel, signature))
    for steps in (0, 1, 2, 5):
        x, w, y = torch.randn(steps, 32, 32) / 4, torch.randn(steps, 32, 32) / 4, torch.full((2, 32, 32), 7.0)
        kernel(x, w, y, steps)
        expected = accumulated(kind, x, w)
        if not steps:
            expected[1] = 7
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert bool(found) == IN_PLACE[kind]


def test_accumulator_of_attention(ttir_text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's accumulator is scaled and added to where it is."""
    found = in_place_results(monkeypatch)
    generated(ttir_text(attention_kernel, attention("fp32")), "")
    assert [v.op.operands[2].op.name for v in found] == ["arith.mulf"]


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("length", [64, 100, 33])
def test_attention(ttir_text: Any, ttir_kernel: Any, name: str, length: int) -> None:
    """Attention agrees with torch's, for lengths that leave part of a tile."""
    kernel = ttir_kernel(ttir_text(attention_kernel, attention("fp32")), target=name)
    q, k, v = torch.randn(3, 2, length, 64).unbind()
    o = torch.empty(2, length, 64)
    scale = int(torch.tensor(0.125).view(torch.int32))
    kernel(q, k, v, o, length, scale, grid=(triton.cdiv(length, 64), 2, 1))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("shape", [(64, 64, 32), (128, 96, 64), (70, 65, 33), (1, 1, 1), (64, 200, 100)])
def test_matmul(ttir_text: Any, ttir_kernel: Any, name: str, shape: tuple[int, int, int]) -> None:
    """The tutorial's matmul agrees with torch's, for sizes whose last tiles wrap."""
    m, n, k = shape
    kernel = ttir_kernel(ttir_text(matmul_kernel, matmul("fp32")), target=name)
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.full((m, n), torch.nan)
    grid = (triton.cdiv(m, 64) * triton.cdiv(n, 64), 1, 1)
    kernel(a, b, c, m, n, k, k, n, n, grid=grid)
    torch.testing.assert_close(c, a @ b, rtol=1e-4, atol=1e-4)


def test_unsupported_result(ttir_text: Any) -> None:
    """A product into a type that is not summed in is refused by its name and place."""
    text = """module {
    tt.func public @k(%a: !tt.ptr<i32>) {
    %x = arith.constant dense<1> : tensor<16x16xi64>
    %c = arith.constant dense<0> : tensor<16x16xi64>
    %d = tt.dot %x, %x, %c : tensor<16x16xi64> * tensor<16x16xi64> -> tensor<16x16xi64> loc("kernel.py":7:1)
    tt.return
    }
    }
    """
    with pytest.raises(UnsupportedError, match=r"kernel\.py:7: .*tl\.dot with a result of i64"):
        generated(text, "portable")
