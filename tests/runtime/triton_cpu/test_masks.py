"""Nests in two versions: which masks are tested beforehand, and that ragged tiles come out right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.runtime.triton_cpu import masks

SIZES = st.sampled_from([1, 2, 4, 8])
SCALARS = st.tuples(st.integers(-9, 9), st.integers(-9, 9))
drawn = settings(max_examples=200)


@drawn
@given(data=st.data(), shape=st.tuples(SIZES, SIZES), scalars=SCALARS)
def test_affine_indices(indices: Any, data: st.DataObject, shape: tuple[int, int], scalars: tuple[int, int]) -> None:
    """What counts as affine grows by the same amount at every step along each dimension."""
    kernel = indices.kernel(data.draw(indices.trees), shape, scalars)
    lowering, value = kernel.lowering()
    if masks.is_affine(lowering, value):
        x = kernel.expected.astype(np.int64)
        rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])
        steps = [x[1, 0] - x[0, 0] if shape[0] > 1 else 0, x[0, 1] - x[0, 0] if shape[1] > 1 else 0]
        np.testing.assert_array_equal(x, x[0, 0] + rows * steps[0] + columns * steps[1])


@drawn
@given(data=st.data(), shape=st.tuples(SIZES, SIZES), scalars=SCALARS)
def test_corners_tell_all(indices: Any, data: st.DataObject, shape: tuple[int, int], scalars: tuple[int, int]) -> None:
    """A mask that counts as monotone holds everywhere if it holds at its corners."""
    kernel = indices.kernel(data.draw(indices.masks), shape, scalars)
    lowering, mask = kernel.lowering()
    corners = kernel.expected[:: max(shape[0] - 1, 1), :: max(shape[1] - 1, 1)]
    if masks.is_monotone(lowering, mask) and corners.all():
        assert kernel.expected.all()


def tree(*parts: Any) -> tuple[Any, ...]:
    """An expression."""
    return parts


ROW, COLUMN, A = ("row",), ("column",), ("scalar", "a")


@pytest.mark.parametrize(
    ("expression", "is_affine", "with_remainders"),
    [
        (tree("add", ("mul", ROW, A), COLUMN), True, True),
        (tree("sub", A, ("trans", ROW)), True, True),
        (tree("mul", ROW, COLUMN), False, False),
        (tree("rem", ("add", ROW, A), ("constant", 8)), False, True),
        (tree("div", ROW, ("constant", 2)), False, False),
    ],
)
def test_is_affine(indices: Any, expression: Any, is_affine: bool, with_remainders: bool) -> None:
    """Sums and products with a scalar are affine; remainders on request; quotients are not."""
    lowering, value = indices.kernel(expression, (8, 8), (3, 5)).lowering()
    assert masks.is_affine(lowering, value) == is_affine
    assert masks.is_affine(lowering, value, remainders=True) == with_remainders


@pytest.mark.parametrize(
    ("expression", "is_monotone"),
    [
        (tree("compare", "slt", ("add", ROW, COLUMN), A), True),
        (tree("and", ("compare", "slt", ROW, A), ("compare", "sge", COLUMN, ("constant", 2))), True),
        (tree("compare", "eq", ROW, A), False),
        (tree("compare", "ne", ROW, A), False),
        (tree("compare", "slt", ("mul", ROW, ROW), A), False),
        (tree("compare", "slt", ("rem", ROW, ("constant", 4)), A), False),
    ],
)
def test_is_monotone(indices: Any, expression: Any, is_monotone: bool) -> None:
    """Orderings of affine indices, and what follows from several of them, are told by their corners."""
    lowering, mask = indices.kernel(expression, (8, 8), (3, 5)).lowering()
    assert masks.is_monotone(lowering, mask) == is_monotone


@triton.jit
def add_kernel(X, Y, Z, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    m = i < n
    tl.store(Z + i, tl.load(X + i, mask=m, other=5.0) + tl.load(Y + i, mask=m), mask=m)


ADD = {"X": "*fp32", "Y": "*fp32", "Z": "*fp32", "n": "i32", "B": 64}


def versions(text: str) -> tuple[str, str]:
    """The instructions for whole tiles and for those at the edge, of a kernel with one nest."""
    _, whole = text.split("\nwhole", 1)
    assert "\nwhole" not in whole
    whole, edge = whole.split("\nedge", 1)
    return whole, edge.split("\nboth", 1)[0]


def test_two_versions(ttir_text: Any, ttir_kernel: Any) -> None:
    """Whole tiles are loaded and stored without a mask, those at the edge with one."""
    whole, edge = versions(ttir_kernel(ttir_text(add_kernel, ADD)).generated.llvm_ir)
    assert "masked" not in whole
    assert "icmp" not in whole
    assert whole.count("= load <") * 2 == whole.count("fadd") * 4
    assert edge.count("llvm.masked.load") == 2 * edge.count("llvm.masked.store") == whole.count("= load <")


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_ragged_tiles(ttir_text: Any, ttir_kernel: Any, name: str) -> None:
    """Every length comes out right, and nothing is written beyond it."""
    kernel = ttir_kernel(ttir_text(add_kernel, ADD), target=name)
    x, y = torch.randn(256), torch.randn(256)
    for n in (*range(0, 20), 63, 64, 65, 100, 127, 128, 129, 191, 192):
        z = torch.full((256,), torch.nan)
        kernel(x, y, z, n, grid=(3, 1, 1))
        torch.testing.assert_close(z[:n], x[:n] + y[:n], rtol=0, atol=0)
        assert z[n:].isnan().all()


@triton.jit
def matrix_kernel(X, Y, m, n, s, B: tl.constexpr, C: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)[:, None]
    j = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    inside = (i < m) & (j < n)
    tl.store(Y + i * s + j, tl.load(X + i * s + j, mask=inside, other=-1.0) * 2, mask=inside)


def test_ragged_matrices(ttir_text: Any, ttir_kernel: Any) -> None:
    """A matrix whose last rows and columns are part of a tile comes out right."""
    kernel = ttir_kernel(
        ttir_text(matrix_kernel, {"X": "*fp32", "Y": "*fp32", "m": "i32", "n": "i32", "s": "i32", "B": 8, "C": 32})
    )
    whole, edge = versions(kernel.generated.llvm_ir)
    assert "masked" not in whole
    assert "masked" in edge
    x = torch.randn(24, 100)
    for m, n in [(1, 1), (8, 32), (9, 33), (16, 64), (17, 96), (24, 96), (23, 95), (7, 96)]:
        y = torch.full((24, 100), torch.nan)
        kernel(x, y, m, n, 100, grid=(3, 3, 1))
        torch.testing.assert_close(y[:m, :n], 2 * x[:m, :n], rtol=0, atol=0)
        assert y[m:].isnan().all()
        assert y[:, n:].isnan().all()


@triton.jit
def summed_kernel(X, Y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(Y, tl.sum(tl.load(X + i, mask=i < n, other=0.0), 0))
    tl.store(Y + 1, tl.max(tl.load(X + i, mask=i < n, other=-9.0), 0))


def test_scalars_of_both_versions(ttir_text: Any, ttir_kernel: Any) -> None:
    """What a nest leaves in registers is right after either version."""
    kernel = ttir_kernel(ttir_text(summed_kernel, {"X": "*fp32", "Y": "*fp32", "n": "i32", "B": 128}))
    assert kernel.generated.llvm_ir.count("\nwhole") == 2
    x = torch.arange(128.0)
    for n in (0, 1, 64, 100, 127, 128):
        y = torch.empty(2)
        kernel(x, y, n)
        assert y.tolist() == [x[:n].sum(), max(n - 1, -9) if n else -9]


@triton.jit
def wrapped_kernel(X, Y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(Y + i, tl.load(X + i % n))


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_wrapped_indices(ttir_text: Any, ttir_kernel: Any, name: str) -> None:
    """Indices modulo a size are loaded as runs where they are runs, and one by one where they wrap."""
    kernel = ttir_kernel(ttir_text(wrapped_kernel, {"X": "*fp32", "Y": "*fp32", "n": "i32", "B": 64}), target=name)
    whole, edge = versions(kernel.generated.llvm_ir)
    assert "gather" not in whole
    assert "gather" in edge
    x = torch.randn(300)
    for n in (1, 2, 3, 5, 16, 31, 63, 64, 65, 96, 100, 128, 192, 193, 300):
        y = torch.full((256,), torch.nan)
        kernel(x, y, n, grid=(4, 1, 1))
        torch.testing.assert_close(y, x[torch.arange(256) % n], rtol=0, atol=0)


@triton.jit
def unmasked_kernel(X, Y, Z, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(Z + i, tl.load(X + i) + tl.load(Y + i))


@triton.jit
def unordered_kernel(X, Y, Z, n, B: tl.constexpr):
    i = tl.arange(0, B)
    m = i != n
    tl.store(Z + i, tl.load(X + i, mask=m) + tl.load(Y + i, mask=m), mask=m)


@pytest.mark.parametrize("kernel", [unmasked_kernel, unordered_kernel], ids=lambda k: k.__name__)
def test_one_version(ttir_text: Any, ttir_kernel: Any, kernel: Any) -> None:
    """Nests without a mask, or with one that its corners do not tell, are emitted once."""
    compiled = ttir_kernel(ttir_text(kernel, ADD))
    assert "\nwhole" not in compiled.generated.llvm_ir
    x, y, z = torch.ones(64), torch.ones(64), torch.zeros(64)
    compiled(x, y, z, 50)
    expected = torch.full((64,), 2.0)
    if kernel is unordered_kernel:
        expected[50] = 0
    torch.testing.assert_close(z, expected)


def test_large_nests(ttir_text: Any, ttir_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nests with more operations than the limit are emitted once."""
    monkeypatch.setattr(masks, "_COST_LIMIT", 2)
    assert "\nwhole" not in ttir_kernel(ttir_text(add_kernel, ADD)).generated.llvm_ir


@triton.jit
def unsigned_kernel(X, Y, Z, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(Z + i, 1.0, mask=(i - 8).to(tl.uint32) >= 4)


def test_unsigned_masks(ttir_text: Any, ttir_kernel: Any) -> None:
    """An unsigned comparison of an index that crosses zero may hold at both ends and not between them."""
    kernel = ttir_kernel(ttir_text(unsigned_kernel, {**ADD, "B": 16}))
    x, y, z = torch.zeros(3, 16).unbind()
    kernel(x, y, z, 16)
    assert z.tolist() == [1.0] * 8 + [0.0] * 4 + [1.0] * 4


@triton.jit
def constant_mask_kernel(X, Y, Z, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(Z + i, tl.load(X + i, mask=i < B, other=0.0), mask=i < B)
    tl.store(Y + i, 1.0, mask=i >= B)


def test_masks_known_when_compiled(ttir_text: Any, ttir_kernel: Any) -> None:
    """A mask that always holds costs nothing."""
    kernel = ttir_kernel(ttir_text(constant_mask_kernel, ADD))
    text = kernel.generated.llvm_ir
    assert text.count("\nwhole") == 0
    assert "llvm.masked.load" not in text
    x, y, z = torch.randn(64), torch.zeros(64), torch.zeros(64)
    kernel(x, y, z, 0)
    torch.testing.assert_close(z, x)
    assert not y.any()
