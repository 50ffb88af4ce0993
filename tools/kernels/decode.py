"""Attention of one query per head over a quantized cache of keys and values.

The cache is symmetric: a key or value vector is `integers * scale`, with one float32 scale per token and head. Four-bit
vectors are packed in halves: byte d holds element d, plus 8, in its low nibble and element d + head_dim / 2 in its high nibble.
The byte is then 16 * high + low + 8, which the kernel multiplies as a whole, so that only the low nibble need be extracted.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

BLOCK_N = 128
PROGRAMS_PER_THREAD = 4


@triton.jit
def decode_int8_kernel(
    p_q,
    p_k,
    p_k_scale,
    p_v,
    p_v_scale,
    p_acc,
    p_max,
    p_sum,
    length,
    split_length,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Unnormalized attention over one part of one head's cache, 8 bits per element; `scale` includes log2(e)."""
    i_split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, HEAD_DIM)
    q = tl.load(p_q + head * HEAD_DIM + o_d) * scale
    start = i_split * split_length
    stop = tl.minimum(start + split_length, length)
    p_k += head * length * HEAD_DIM
    p_v += head * length * HEAD_DIM
    p_k_scale += head * length
    p_v_scale += head * length
    largest, total = -1e30, 0.0
    acc = tl.zeros([HEAD_DIM], tl.float32)
    for first in range(start, stop, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < stop
        o_kv = o_n[:, None] * HEAD_DIM + o_d[None, :]
        k = tl.load(p_k + o_kv, mask=m_n[:, None], other=0).to(tl.float32)
        scores = tl.sum(k * q[None, :], 1) * tl.load(p_k_scale + o_n, mask=m_n, other=0.0)
        scores = tl.where(m_n, scores, -1e30)
        new = tl.maximum(largest, tl.max(scores, 0))
        p = tl.exp2(scores - new)
        decay = tl.exp2(largest - new)
        total = total * decay + tl.sum(p, 0)
        v = tl.load(p_v + o_kv, mask=m_n[:, None], other=0).to(tl.float32)
        weights = p * tl.load(p_v_scale + o_n, mask=m_n, other=0.0)
        acc = acc * decay + tl.sum(v * weights[:, None], 0)
        largest = new
    part = head * tl.num_programs(0) + i_split
    tl.store(p_acc + part * HEAD_DIM + o_d, acc)
    tl.store(p_max + part, largest)
    tl.store(p_sum + part, total)


@triton.jit
def decode_int4_kernel(
    p_q,
    p_k,
    p_k_scale,
    p_v,
    p_v_scale,
    p_acc,
    p_max,
    p_sum,
    length,
    split_length,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Unnormalized attention over one part of one head's cache, 4 bits per element; `scale` includes log2(e)."""
    HALF: tl.constexpr = HEAD_DIM // 2
    i_split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, HALF)
    # With byte = 16 * high + nibble and nibble = low + 8, for each d:
    # low * q_low + high * q_high = nibble * (q_low - q_high / 16) + byte * q_high / 16 - 8 * q_low
    q_low = tl.load(p_q + head * HEAD_DIM + o_d) * scale
    q_byte = tl.load(p_q + head * HEAD_DIM + HALF + o_d) * (scale / 16)
    q_nibble = q_low - q_byte
    offset = 8 * tl.sum(q_low, 0)
    start = i_split * split_length
    stop = tl.minimum(start + split_length, length)
    p_k += head * length * HALF
    p_v += head * length * HALF
    p_k_scale += head * length
    p_v_scale += head * length
    largest, total = -1e30, 0.0
    acc_low = tl.zeros([HALF], tl.float32)
    acc_byte = tl.zeros([HALF], tl.float32)
    total_weight = 0.0
    for first in range(start, stop, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < stop
        o_kv = o_n[:, None] * HALF + o_d[None, :]
        k = tl.load(p_k + o_kv, mask=m_n[:, None], other=0).to(tl.int32)
        products = (k & 15).to(tl.float32) * q_nibble[None, :] + k.to(tl.float32) * q_byte[None, :]
        scores = tl.sum(products, 1) - offset
        scores *= tl.load(p_k_scale + o_n, mask=m_n, other=0.0)
        scores = tl.where(m_n, scores, -1e30)
        new = tl.maximum(largest, tl.max(scores, 0))
        p = tl.exp2(scores - new)
        decay = tl.exp2(largest - new)
        total = total * decay + tl.sum(p, 0)
        weights = p * tl.load(p_v_scale + o_n, mask=m_n, other=0.0)
        total_weight = total_weight * decay + tl.sum(weights, 0)
        v = tl.load(p_v + o_kv, mask=m_n[:, None], other=0).to(tl.int32)
        # The sum of weights * low is small, and must not be the difference of large sums.
        acc_low = acc_low * decay + tl.sum(((v & 15) - 8).to(tl.float32) * weights[:, None], 0)
        acc_byte = acc_byte * decay + tl.sum(v.to(tl.float32) * weights[:, None], 0)
        largest = new
    part = head * tl.num_programs(0) + i_split
    tl.store(p_acc + part * HEAD_DIM + o_d, acc_low)
    tl.store(p_acc + part * HEAD_DIM + HALF + o_d, (acc_byte - acc_low - 8 * total_weight) / 16)
    tl.store(p_max + part, largest)
    tl.store(p_sum + part, total)


@triton.jit
def decode_merge_kernel(p_acc, p_max, p_sum, p_out, splits, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Merge the parts of one head.

    Limits:
        BLOCK is at least `splits`.
    """
    head = tl.program_id(0)
    o_d, o_s = tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK)
    m_s = o_s < splits
    part = head * splits + o_s
    largest = tl.load(p_max + part, mask=m_s, other=-1e30)
    weight = tl.exp2(largest - tl.max(largest))
    total = tl.sum(weight * tl.load(p_sum + part, mask=m_s, other=0.0))
    acc = tl.load(p_acc + part[:, None] * HEAD_DIM + o_d[None, :], mask=m_s[:, None], other=0.0)
    tl.store(p_out + head * HEAD_DIM + o_d, tl.sum(acc * weight[:, None], 0) / total)


def decode(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, v: torch.Tensor, v_scale: torch.Tensor) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v for one query per head.

    Args:
        q: [heads, head_dim], float32.
        k: [heads, length, head_dim] or, packed, [heads, length, head_dim / 2], int8.
        k_scale: [heads, length], float32.
        v: like `k`.
        v_scale: like `k_scale`.

    Returns:
        [heads, head_dim], float32.
    """
    heads, head_dim = q.shape
    length = k.shape[1]
    # With few heads, the cache of each is cut so that every thread gets several parts.
    wanted = triton.cdiv(PROGRAMS_PER_THREAD * torch.get_num_threads(), heads)
    split_length = triton.cdiv(triton.cdiv(length, wanted), BLOCK_N) * BLOCK_N
    splits = triton.cdiv(length, split_length)
    acc = torch.empty(heads, splits, head_dim)
    largest, total = torch.empty(2, heads, splits)
    kernel = decode_int8_kernel if k.shape[2] == head_dim else decode_int4_kernel
    scale = math.log2(math.e) / math.sqrt(head_dim)
    kernel[(splits, heads)](q, k, k_scale, v, v_scale, acc, largest, total, length, split_length, scale, head_dim, BLOCK_N)
    out = torch.empty_like(q)
    decode_merge_kernel[(heads,)](acc, largest, total, out, splits, head_dim, triton.next_power_of_2(splits))
    return out
