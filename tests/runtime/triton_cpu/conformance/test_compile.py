"""Compilation ahead of the first launch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource


@triton.jit
def scale_kernel(out, x, factor, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < size) * factor, mask=at < size)


@pytest.mark.compiled
@pytest.mark.parametrize("size", [1, 63, 1000])
def test_compile_from_source(size, buffers, rng, covers):
    """`triton.compile` of a function with a signature gives a kernel that can be launched."""
    covers("triton.compile", "float32")
    signature = {"out": "*fp32", "x": "*fp32", "factor": "fp32", "size": "i32", "BLOCK": "constexpr"}
    compiled = triton.compile(ASTSource(scale_kernel, signature, {(4,): 256}))
    x = rng.normal(size=size).astype(np.float32)
    out = buffers.empty(size, "float32")
    compiled[(triton.cdiv(size, 256), 1, 1)](out, buffers.put(x, "float32"), 2.5, size, 256)
    torch.testing.assert_close(out, torch.from_numpy(x * np.float32(2.5)), rtol=0, atol=0)
    assert {"ttir", "llir"} <= set(compiled.asm)


@pytest.mark.compiled
def test_warmup_compiles_without_a_launch(buffers, covers):
    """`warmup` compiles for tensors it never touches."""
    covers("warmup", "float32")
    out = buffers.empty(256, "float32")
    before = out.clone()
    compiled = scale_kernel.warmup(out, out, 2.0, 256, BLOCK=256, grid=(1,))
    assert compiled.metadata.name == "scale_kernel"
    torch.testing.assert_close(out, before, rtol=0, atol=0, equal_nan=True)
