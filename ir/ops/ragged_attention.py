"""`graphwright::ragged_attention`: attention within sequences that lie one after the other."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import sympy
import torch

from .attention import attention_reference
from .definition import define, expect

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

SCHEMA = (
    "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor starts, SymInt longest, *, float scale, float softcap=0.0) -> Tensor"
)


def ragged_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    *,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Return softmax(cap(scale * q k^T)) v, where a query sees the keys of its own sequence.

    Args:
        q: [1, H, P, D], floating point: the tokens of all sequences.
        k: [1, Hk, P, D], H a multiple of Hk: query head h reads key head h // (H / Hk).
        v: [1, Hk, P, Dv].
        starts: int32 [N + 1], ascending from 0 to P: sequence i is the tokens from starts[i] to before starts[i + 1].
        longest: tokens that no sequence has more of; kernels look no further.
        scale: factor of the scores.
        softcap: scores are bent to softcap * tanh(score / softcap); 0 for not.

    Returns:
        [1, H, P, Dv] in q's dtype.
    """
    result = q.new_zeros((*q.shape[:3], v.shape[3]))
    bounds = starts.tolist()
    for first, end in itertools.pairwise(bounds):
        if end > first:
            own_q, own_k, own_v = (t[:, :, first:end] for t in (q, k, v))
            result[:, :, first:end] = attention_reference(own_q, own_k, own_v, [], None, scale=scale, softcap=softcap)
    return result


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    *,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        expect(tensor.dim() == 4, f"{name} must be [1, heads, tokens, features], got {tensor.dim()} sizes")
        expect(tensor.shape[0] == 1, f"{name} must be one batch of all sequences, got {tensor.shape[0]}")
        expect(tensor.dtype == q.dtype, f"{name} is {tensor.dtype}, q is {q.dtype}")
        expect(tensor.shape[2] == q.shape[2], f"{name} has {tensor.shape[2]} tokens, q has {q.shape[2]}")
    expect(k.shape[3] == q.shape[3], f"k has {k.shape[3]} features, q has {q.shape[3]}")
    expect(k.shape[1] == v.shape[1], f"k has {k.shape[1]} heads, v has {v.shape[1]}")
    expect(q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads")
    expect(starts.dim() == 1 and starts.dtype == torch.int32, f"starts must be int32 of one dimension, got {starts.dtype}")
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    _, heads, queries, features = program.shape(node.args[0])  # type: ignore[arg-type]
    values = program.shape(node.args[2])[3]  # type: ignore[arg-type]
    return heads * queries * program.size(node.args[4]) * (2 * features + 2 * values + 8)


ragged_attention = define(SCHEMA, ragged_attention_reference, _fake, _flops)
