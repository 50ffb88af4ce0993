"""RMSNorm and LayerNorm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(p_x, p_weight, p_out, N, eps, BLOCK: tl.constexpr):
    """RMSNorm of one row of N elements.

    Numerics:
        Computed in float32.

    Limits:
        BLOCK is at least N.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < N
    x = tl.load(p_x + i_row * N + o_n, mask=m_n, other=0.0).to(tl.float32)
    weight = tl.load(p_weight + o_n, mask=m_n, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / N + eps)
    tl.store(p_out + i_row * N + o_n, (x * scale * weight).to(p_out.dtype.element_ty), mask=m_n)


@triton.jit
def layer_norm_kernel(p_x, p_weight, p_bias, p_out, N, eps, BLOCK: tl.constexpr):
    """LayerNorm of one row of N elements.

    Numerics:
        Computed in float32; the variance from the distances to the mean.

    Limits:
        BLOCK is at least N.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < N
    x = tl.load(p_x + i_row * N + o_n, mask=m_n, other=0.0).to(tl.float32)
    mean = tl.sum(x) / N
    distance = tl.where(m_n, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(distance * distance) / N + eps)
    weight = tl.load(p_weight + o_n, mask=m_n, other=0.0).to(tl.float32)
    bias = tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * N + o_n, (distance * scale * weight + bias).to(p_out.dtype.element_ty), mask=m_n)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: [rows, N], contiguous.
        weight: [N].
        eps: added to the mean square.
    """
    out = torch.empty_like(x)
    rows, n = x.shape
    rms_norm_kernel[(rows,)](x, weight, out, n, eps, triton.next_power_of_2(n))
    return out


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Return (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias.

    Args:
        x: [rows, N], contiguous.
        weight: [N].
        bias: [N].
        eps: added to the variance.
    """
    out = torch.empty_like(x)
    rows, n = x.shape
    layer_norm_kernel[(rows,)](x, weight, bias, out, n, eps, triton.next_power_of_2(n))
    return out
