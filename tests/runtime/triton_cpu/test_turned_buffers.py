"""Tensors read along one dimension into buffers whose lanes run along the other: squares are transposed in registers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from graphwright.runtime.triton_cpu import isa
from graphwright.runtime.triton_cpu.generate import generate
from graphwright.runtime.triton_cpu.options import CPUOptions


@triton.jit
def scores_kernel(Q, K, O, rows, scale, steps, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    q = tl.load(Q + m[:, None] * D + d[None, :], mask=m[:, None] < rows, other=7.0) * scale
    for i in range(steps):
        k = tl.load(K + (i * N + n)[:, None] * D + d[None, :])
        s = tl.dot(q, tl.trans(k))
        tl.store(O + m[:, None] * N * steps + (i * N + n)[None, :], s)


def text(ttir_text: Any, rows: int, dim: int) -> str:
    signature = {**dict.fromkeys("QKO", "*fp32"), "rows": "i32", "scale": "fp32", "steps": "i32", "D": dim, "M": rows, "N": 16}
    return ttir_text(scores_kernel, signature, "QKO")


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize(("rows", "dim"), [(16, 16), (64, 32), (32, 64), (128, 16), (16, 8), (32, 4)])
@pytest.mark.parametrize("whole", [True, False])
def test_values(ttir_kernel: Any, ttir_text: Any, name: str, rows: int, dim: int, whole: bool) -> None:
    """Every element gets to its place, with and without rows past the end of the tensor."""
    kernel = ttir_kernel(text(ttir_text, rows, dim), target=name)
    # Products of small integers are exact.
    q, k = torch.randint(-9, 9, (rows, dim)).float(), torch.randint(-9, 9, (32, dim)).float()
    out = torch.full((rows, 32), float("nan"))
    present = rows if whole else rows - 3
    half = 0x3F000000
    kernel(q, k, out, present, half, 2)
    expected = q.clone()
    expected[present:] = 7.0
    assert torch.equal(out, expected * 0.5 @ k.T)


def test_no_scattering(ttir_text: Any) -> None:
    """No element is stored by itself."""
    avx512 = isa.Isa("avx512", 512, 32, "skylake-avx512", "")
    code = generate(text(ttir_text, 64, 32), avx512, CPUOptions()).llvm_ir
    assert not re.search(r"store float ", code)
