"""Addition, SwiGLU, rotary embedding and embedding lookup."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 8192
BLOCK_TOKENS = 16


@triton.jit
def add_kernel(p_x, p_y, p_out, N, BLOCK: tl.constexpr):
    """BLOCK elements of x + y."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    tl.store(p_out + o, tl.load(p_x + o, mask=m) + tl.load(p_y + o, mask=m), mask=m)


@triton.jit
def swiglu_kernel(p_gate, p_up, p_out, N, BLOCK: tl.constexpr):
    """BLOCK elements of silu(gate) * up.

    Numerics:
        Computed in float32.
    """
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    gate = tl.load(p_gate + o, mask=m).to(tl.float32)
    up = tl.load(p_up + o, mask=m).to(tl.float32)
    tl.store(p_out + o, (gate * tl.sigmoid(gate) * up).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def rotary_kernel(p_x, p_cos, p_sin, p_out, heads, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr):
    """Rotate all heads of one token; x is [tokens, heads, HEAD_DIM], cos and sin are [tokens, HEAD_DIM / 2].

    Limits:
        BLOCK_H is at least `heads`.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    o_h, o_d = tl.arange(0, BLOCK_H), tl.arange(0, HALF)
    cos, sin = tl.load(p_cos + token * HALF + o_d), tl.load(p_sin + token * HALF + o_d)
    o_low = token * heads * HEAD_DIM + o_h[:, None] * HEAD_DIM + o_d[None, :]
    o_high = o_low + HALF
    m = o_h[:, None] < heads
    low, high = tl.load(p_x + o_low, mask=m), tl.load(p_x + o_high, mask=m)
    tl.store(p_out + o_low, low * cos[None, :] - high * sin[None, :], mask=m)
    tl.store(p_out + o_high, high * cos[None, :] + low * sin[None, :], mask=m)


@triton.jit
def embedding_kernel(p_index, p_table, p_out, tokens, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a table [rows, DIM] for BLOCK tokens."""
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, DIM)
    m = o_t < tokens
    row = tl.load(p_index + o_t, mask=m, other=0)
    x = tl.load(p_table + row[:, None] * DIM + o_d[None, :])
    tl.store(p_out + o_t[:, None].to(tl.int64) * DIM + o_d[None, :], x, mask=m[:, None])


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return x + y for contiguous tensors of one shape."""
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, out, x.numel(), BLOCK)
    return out


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up for contiguous tensors of one shape."""
    out = torch.empty_like(gate)
    swiglu_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK)
    return out


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x with each pair (x[d], x[d + head_dim / 2]) rotated.

    Args:
        x: [tokens, heads, head_dim], contiguous; head_dim a power of two.
        cos: [tokens, head_dim / 2].
        sin: like `cos`.
    """
    tokens, heads, head_dim = x.shape
    out = torch.empty_like(x)
    rotary_kernel[(tokens,)](x, cos, sin, out, heads, head_dim, triton.next_power_of_2(heads))
    return out


def embedding(index: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return table[index].

    Args:
        index: [tokens], int64.
        table: [rows, dim], contiguous; dim a power of two.
    """
    tokens, dim = index.shape[0], table.shape[1]
    out = table.new_empty(tokens, dim)
    embedding_kernel[(triton.cdiv(tokens, BLOCK_TOKENS),)](index, table, out, tokens, dim, BLOCK_TOKENS)
    return out
