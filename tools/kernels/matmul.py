"""Matrix product."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

TILES = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": g})
    for m, n, k, g in [(64, 64, 64, 8), (128, 64, 128, 8), (128, 128, 128, 4), (256, 256, 128, 4), (512, 256, 128, 2)]
]


@triton.jit
def matmul_tile_kernel(
    p_a,
    p_b,
    p_c,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    stride_cn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of c[M, N] = a[M, K] @ b[K, N].

    Numerics:
        Products are summed in float32.
    """
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Neighbouring programs share rows of `a` and columns of `b` in the cache.
    group = pid // (GROUP_M * blocks_n)
    first_m = group * GROUP_M
    group_m = tl.minimum(blocks_m - first_m, GROUP_M)
    i_m = first_m + pid % (GROUP_M * blocks_n) % group_m
    i_n = pid % (GROUP_M * blocks_n) // group_m

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    p_a += o_m[:, None] * stride_am + o_k[None, :] * stride_ak
    p_b += o_k[:, None] * stride_bk + o_n[None, :] * stride_bn
    m_m, m_n = o_m[:, None] < M, o_n[None, :] < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(p_a, mask=m_m & (o_k[None, :] < K - start), other=0.0)
        b = tl.load(p_b, mask=m_n & (o_k[:, None] < K - start), other=0.0)
        acc = tl.dot(a, b, acc)
        p_a += BLOCK_K * stride_ak
        p_b += BLOCK_K * stride_bk
    p_c += o_m[:, None] * stride_cm + o_n[None, :] * stride_cn
    tl.store(p_c, acc.to(p_c.dtype.element_ty), mask=m_m & m_n)


matmul_kernel = triton.autotune(TILES, key=["M", "N", "K"])(matmul_tile_kernel)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b, with the tile that is fastest for these sizes; the first call tries them all.

    Args:
        a: [M, K], float32, float16 or bfloat16.
        b: [K, N], of the same dtype.

    Returns:
        [M, N], of the same dtype.
    """
    (m, k), n = a.shape, b.shape[1]
    c = a.new_empty(m, n)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    matmul_kernel[grid](a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride())
    return c
