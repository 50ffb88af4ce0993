"""Flash attention as a Triton kernel, run on this CPU and compared with PyTorch.

    python -m graphwright.tools.demo_kernel

Nothing in the kernel or in its launch is particular to the CPU.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from torch.nn import functional

HEADS, LENGTH, HEAD_DIM = 8, 1000, 64
TOLERANCE = 1e-5
REPETITIONS = 10


@triton.jit
def flash_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    length,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Causal attention of one block of queries in one head; every tensor is [heads, length, HEAD_DIM], contiguous.

    Numerics:
        Scores and sums are accumulated in float32, with the running maximum subtracted before each exponential.
    """
    # The last blocks see the most keys; started first, they do not leave one thread working alone at the end.
    i_block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64) * length * HEAD_DIM
    o_m = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, HEAD_DIM)
    in_rows = o_m[:, None] < length
    q = tl.load(q_ptr + head + o_m[:, None] * HEAD_DIM + o_d[None, :], mask=in_rows, other=0.0)

    row_max = tl.full([BLOCK_M], -1e30, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(0, tl.minimum((i_block + 1) * BLOCK_M, length), BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        kv_offsets = head + o_n[:, None] * HEAD_DIM + o_d[None, :]
        in_keys = o_n[:, None] < length
        k = tl.load(k_ptr + kv_offsets, mask=in_keys, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(o_m[:, None] >= o_n[None, :], scores, -1e30)

        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp(scores - new_max[:, None])
        decay = tl.exp(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(p, 1)
        v = tl.load(v_ptr + kv_offsets, mask=in_keys, other=0.0)
        acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v)
        row_max = new_max

    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head + o_m[:, None] * HEAD_DIM + o_d[None, :], out, mask=in_rows)


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return causal attention.

    Args:
        q: [heads, length, head_dim], contiguous; head_dim a power of two and at least 16.
        k: like `q`.
        v: like `q`.

    Returns:
        A tensor like `q`.
    """
    heads, length, head_dim = q.shape
    out = torch.empty_like(q)
    block = 64
    grid = (triton.cdiv(length, block), heads)
    flash_attention_kernel[grid](q, k, v, out, length, 1 / math.sqrt(head_dim), head_dim, BLOCK_M=block, BLOCK_N=block)
    return out


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return causal attention, computed by PyTorch."""
    # With a batch dimension PyTorch takes its fused CPU kernel; without, it would write out the score matrix.
    return functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def time_pair_ms(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Return the median wall time of each in milliseconds, called in turns so that a busy machine slows both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPETITIONS):
        for function, record in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            record.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> int:
    """Run the comparison, print it, and return 0 if the results agree."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, HEADS, LENGTH, HEAD_DIM)
    start = time.perf_counter()
    out = flash_attention(q, k, v)
    first_s = time.perf_counter() - start
    error = (out - reference(q, k, v)).abs().max().item()
    agree = error < TOLERANCE
    triton_ms, torch_ms = time_pair_ms(lambda: flash_attention(q, k, v), lambda: reference(q, k, v))

    table = Table(show_header=False, title="Causal flash attention, a Triton kernel on this CPU")
    table.add_row("shape", f"{HEADS} heads x {LENGTH} tokens x {HEAD_DIM}, float32")
    table.add_row("threads", str(torch.get_num_threads()))
    table.add_row("largest difference from PyTorch", f"{error:.1e} ({'within' if agree else 'OVER'} {TOLERANCE:.0e})")
    table.add_row("first call, compiling included", f"{first_s:.2f} s")
    table.add_row("Triton kernel", f"{triton_ms:.2f} ms")
    table.add_row("torch scaled_dot_product_attention", f"{torch_ms:.2f} ms")
    Console().print(table)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
