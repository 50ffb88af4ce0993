"""Product of a quantized weight matrix and a vector.

Row n of the weights is `integers * scale[n]`. Four-bit rows are packed in halves: byte j of a row holds element j, plus 8, in
its low nibble and element j + K / 2 in its high nibble. See `decode` for why.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_N = 64


@triton.jit
def gemv_int8_kernel(p_x, p_weight, p_scale, p_out, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_N elements of weight[N, K] @ x[K], 8 bits per weight."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, K)
    x = tl.load(p_x + o_k)
    weight = tl.load(p_weight + o_n[:, None] * K + o_k[None, :]).to(tl.float32)
    tl.store(p_out + o_n, tl.sum(weight * x[None, :], 1) * tl.load(p_scale + o_n))


@triton.jit
def gemv_int4_kernel(p_x, p_weight, p_scale, p_out, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_N elements of weight[N, K] @ x[K], 4 bits per weight."""
    HALF: tl.constexpr = K // 2
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, HALF)
    # With byte = 16 * high + nibble and nibble = low + 8, for each k:
    # low * x_low + high * x_high = nibble * (x_low - x_high / 16) + byte * x_high / 16 - 8 * x_low
    x_low, x_byte = tl.load(p_x + o_k), tl.load(p_x + HALF + o_k) * (1 / 16)
    x_nibble = x_low - x_byte
    byte = tl.load(p_weight + o_n[:, None] * HALF + o_k[None, :]).to(tl.int32)
    products = (byte & 15).to(tl.float32) * x_nibble[None, :] + byte.to(tl.float32) * x_byte[None, :]
    total = tl.sum(products, 1) - 8 * tl.sum(x_low, 0)
    tl.store(p_out + o_n, total * tl.load(p_scale + o_n))


def gemv_int8(weight: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return (weight * scale[:, None]) @ x.

    Args:
        weight: [N, K], int8; N a multiple of 64, K a power of two.
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
        weight: [N, K / 2], int8, two weights per byte; N a multiple of 64, K a power of two and at least 2.
        scale: [N], float32.
        x: [K], float32.

    Returns:
        [N], float32.
    """
    n, half = weight.shape
    out = torch.empty(n)
    gemv_int4_kernel[(n // BLOCK_N,)](x, weight, scale, out, 2 * half, BLOCK_N)
    return out
