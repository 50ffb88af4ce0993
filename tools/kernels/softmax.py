"""Softmax and cross-entropy over rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_CLASSES = 2048


@triton.jit
def softmax_kernel(p_x, p_out, N, BLOCK: tl.constexpr):
    """Softmax of one row of N elements.

    Numerics:
        Computed in float32, with the row's maximum subtracted before each exponential.

    Limits:
        BLOCK is at least N.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < N
    x = tl.load(p_x + i_row * N + o_n, mask=m_n, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x))
    tl.store(p_out + i_row * N + o_n, (e / tl.sum(e)).to(p_out.dtype.element_ty), mask=m_n)


@triton.jit
def cross_entropy_kernel(p_logits, p_target, p_loss, N, BLOCK: tl.constexpr):
    """Cross-entropy of one row of N logits and the number of its class.

    Numerics:
        Computed in float32, with the running maximum subtracted before each exponential.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_logits += i_row * N
    o_n = tl.arange(0, BLOCK)
    largest, total = -float("inf"), 0.0
    for start in range(0, N, BLOCK):
        x = tl.load(p_logits + start + o_n, mask=start + o_n < N, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new))
        largest = new
    chosen = tl.load(p_logits + tl.load(p_target + i_row)).to(tl.float32)
    tl.store(p_loss + i_row, tl.log(total) + largest - chosen)


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Return the softmax of each row.

    Args:
        x: [rows, N], contiguous.
    """
    out = torch.empty_like(x)
    rows, n = x.shape
    softmax_kernel[(rows,)](x, out, n, triton.next_power_of_2(n))
    return out


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the loss of each row.

    Args:
        logits: [rows, classes], contiguous.
        target: [rows], int64: the class of each row.

    Returns:
        [rows], float32.
    """
    rows, n = logits.shape
    loss = torch.empty(rows)
    cross_entropy_kernel[(rows,)](logits, target, loss, n, BLOCK_CLASSES)
    return loss
