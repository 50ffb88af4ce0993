"""Flash attention."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

BLOCK_M, BLOCK_N = 64, 64


@triton.jit
def _attend(
    acc,
    row_max,
    row_sum,
    q,
    p_k,
    p_v,
    o_m,
    o_d,
    start,
    stop,
    length,
    scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Take keys `start` to `stop` into the running softmax; `scale` includes log2(e)."""
    for first in range(start, stop, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        o_kv = o_n[:, None] * HEAD_DIM + o_d[None, :]
        if MASKED:
            k = tl.load(p_k + o_kv, mask=o_n[:, None] < length, other=0.0)
            v = tl.load(p_v + o_kv, mask=o_n[:, None] < length, other=0.0)
        else:
            k = tl.load(p_k + o_kv)
            v = tl.load(p_v + o_kv)
        scores = tl.dot(q, tl.trans(k)) * scale
        if MASKED:
            seen = o_n[None, :] < length
            if CAUSAL:
                seen &= o_n[None, :] <= o_m[:, None]
            scores = tl.where(seen, scores, -1e30)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None])
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def attention_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    length,
    scale,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of one block of queries in one head; every tensor is [heads, length, HEAD_DIM], contiguous.

    Numerics:
        Scores and sums are float32; the running maximum is subtracted before each exponential.
    """
    # The last blocks see the most keys; started first, they do not leave one thread working alone at the end.
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64) * length * HEAD_DIM
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, HEAD_DIM)
    o_q = head + o_m[:, None] * HEAD_DIM + o_d[None, :]
    q = tl.load(p_q + o_q, mask=o_m[:, None] < length, other=0.0)
    row_max = tl.full([BLOCK_M], -1e30, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)

    # Blocks of keys that every query sees whole need no mask; what is left is the end, or the diagonal.
    if CAUSAL:
        seen = i_m * BLOCK_M // BLOCK_N * BLOCK_N
        stop = tl.minimum((i_m + 1) * BLOCK_M, length)
    else:
        seen = length // BLOCK_N * BLOCK_N
        stop = length
    p_k += head
    p_v += head
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, p_k, p_v, o_m, o_d, 0, seen, length, scale, False, CAUSAL, BLOCK_N, HEAD_DIM
    )
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, p_k, p_v, o_m, o_d, seen, stop, length, scale, True, CAUSAL, BLOCK_N, HEAD_DIM
    )
    out = acc / row_sum[:, None]
    tl.store(p_out + o_q, out.to(p_out.dtype.element_ty), mask=o_m[:, None] < length)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v.

    Args:
        q: [heads, length, head_dim], contiguous; head_dim a power of two and at least 16.
        k: like `q`.
        v: like `q`.
        causal: whether a query sees only the keys up to its own position.

    Returns:
        A tensor like `q`.
    """
    heads, length, head_dim = q.shape
    out = torch.empty_like(q)
    scale = math.log2(math.e) / math.sqrt(head_dim)
    grid = (triton.cdiv(length, BLOCK_M), heads)
    attention_kernel[grid](q, k, v, out, length, scale, causal, head_dim, BLOCK_M, BLOCK_N)
    return out
