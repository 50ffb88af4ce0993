"""Product of a quantized weight matrix and a vector.

Row n of the weights is `integers * scale[n]`. Four-bit rows are packed in halves of groups: byte j of a group of 2 * GROUP
elements holds element j in its low nibble and element j + GROUP in its high nibble.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP = 64
BLOCK_N = 16


@triton.jit
def gemv_int8_kernel(p_x, p_weight, p_scale, p_out, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_N elements of weight[N, K] @ x[K], 8 bits per weight."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, K)
    x = tl.load(p_x + o_k)
    weight = tl.load(p_weight + o_n[:, None] * K + o_k[None, :]).to(tl.float32)
    tl.store(p_out + o_n, tl.sum(weight * x[None, :], 1) * tl.load(p_scale + o_n))


@triton.jit
def gemv_int4_kernel(p_x, p_weight, p_scale, p_out, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_N elements of weight[N, K] @ x[K], 4 bits per weight."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_j = tl.arange(0, K // 2)
    o_low = o_j // GROUP * (2 * GROUP) + o_j % GROUP
    x_low, x_high = tl.load(p_x + o_low), tl.load(p_x + o_low + GROUP)
    weight = tl.load(p_weight + o_n[:, None] * (K // 2) + o_j[None, :])
    low, high = ((weight << 4) >> 4).to(tl.float32), (weight >> 4).to(tl.float32)
    total = tl.sum(low * x_low[None, :] + high * x_high[None, :], 1)
    tl.store(p_out + o_n, total * tl.load(p_scale + o_n))


def gemv_int8(weight: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return (weight * scale[:, None]) @ x.

    Args:
        weight: [N, K], int8; N a multiple of 16, K a power of two.
        scale: [N], float32.
        x: [K], float32.

    Returns:
        [N], float32.
    """
    n, k = weight.shape
    out = torch.empty(n)
    gemv_int8_kernel[(n // BLOCK_N,)](x, weight, scale, out, k, BLOCK_N)
    return out


def gemv_int4(weight: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return (weight * scale[:, None]) @ x.

    Args:
        weight: [N, K / 2], int8, two weights per byte; N a multiple of 16, K a power of two and at least 128.
        scale: [N], float32.
        x: [K], float32.

    Returns:
        [N], float32.
    """
    n, half = weight.shape
    out = torch.empty(n)
    gemv_int4_kernel[(n // BLOCK_N,)](x, weight, scale, out, 2 * half, GROUP, BLOCK_N)
    return out
