"""`graphwright::kv_quantized_sparse_attention`: prompts over the keys that lists name, all else over a quantised cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch

from .definition import define
from .kv_quantized import kv_quantized_attention, kv_quantized_attention_reference
from .sparse_attention import kv_sparse_attention, kv_sparse_attention_reference

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

SCHEMA = (
    "kv_quantized_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor past, Tensor k_codes, Tensor k_scale, "
    "Tensor k_minimum, Tensor k_ring, Tensor v_codes, Tensor v_scale, Tensor v_minimum, Tensor v_ring, Tensor blocks, "
    "Tensor columns, Tensor[] operands, Tensor? sink, *, int bits, int group, str predicate='', str bias='', float scale, "
    "float softcap=0.0, int minimum_tokens=0) -> Tensor"
)


def kv_quantized_sparse_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: torch.Tensor,
    k_codes: torch.Tensor,
    k_scale: torch.Tensor,
    k_minimum: torch.Tensor,
    k_ring: torch.Tensor,
    v_codes: torch.Tensor,
    v_scale: torch.Tensor,
    v_minimum: torch.Tensor,
    v_ring: torch.Tensor,
    blocks: torch.Tensor,
    columns: torch.Tensor,
    operands: list[torch.Tensor],
    sink: torch.Tensor | None,
    *,
    bits: int,
    group: int,
    predicate: str = "",
    bias: str = "",
    scale: float,
    softcap: float = 0.0,
    minimum_tokens: int = 0,
) -> torch.Tensor:
    """Return `kv_sparse_attention` of sequences that start with this call, `kv_quantized_attention` of those that go on.

    A prompt that starts a sequence reads its own keys and values, which are exact, and of these those that its lists name.

    Args:
        q: [B, H, T, D], floating point.
        k: [B, Hk, T, D], keys of the queries' own tokens.
        v: [B, Hk, T, Dv].
        past: [B], int64: the position of the first query of each sequence.
        k_codes: with all up to `v_ring` the states before the call, see `graphwright::kv_quantized_attention`.
        k_scale: see there.
        k_minimum: see there.
        k_ring: see there.
        v_codes: see there.
        v_scale: see there.
        v_minimum: see there.
        v_ring: see there.
        blocks: lists of the queries' own keys, see `graphwright::sparse_attention`.
        columns: likewise.
        operands: what the expressions read.
        sink: [H] or None.
        bits: of a code.
        group: tokens of a group of keys.
        predicate: over b, h and the positions q and k.
        bias: likewise.
        scale: factor of the scores.
        softcap: 0 for none.
        minimum_tokens: in a call of fewer tokens all keys are listed, whatever the lists hold.

    Returns:
        [B, H, T, Dv] in q's dtype. A query that sees no key gives 0.
    """
    options: dict[str, Any] = {"predicate": predicate, "bias": bias, "scale": scale, "softcap": softcap}
    first = kv_sparse_attention_reference(
        q, k, v, torch.zeros_like(past), blocks, columns, operands, sink, minimum_tokens=minimum_tokens, **options
    )
    states = (k_codes, k_scale, k_minimum, k_ring, v_codes, v_scale, v_minimum, v_ring)
    later = kv_quantized_attention_reference(q, k, v, past, *states, operands, sink, bits=bits, group=group, **options)
    return torch.where((past == 0)[:, None, None, None], first, later)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: torch.Tensor,
    k_codes: torch.Tensor,
    k_scale: torch.Tensor,
    k_minimum: torch.Tensor,
    k_ring: torch.Tensor,
    v_codes: torch.Tensor,
    v_scale: torch.Tensor,
    v_minimum: torch.Tensor,
    v_ring: torch.Tensor,
    blocks: torch.Tensor,
    columns: torch.Tensor,
    operands: list[torch.Tensor],
    sink: torch.Tensor | None,
    *,
    bits: int,
    group: int,
    predicate: str = "",
    bias: str = "",
    scale: float,
    softcap: float = 0.0,
    minimum_tokens: int = 0,
) -> torch.Tensor:
    options: dict[str, Any] = {"predicate": predicate, "bias": bias, "scale": scale, "softcap": softcap}
    kv_sparse_attention(q, k, v, past, blocks, columns, operands, sink, minimum_tokens=minimum_tokens, **options)
    states = (k_codes, k_scale, k_minimum, k_ring, v_codes, v_scale, v_minimum, v_ring)
    result: torch.Tensor = kv_quantized_attention(q, k, v, past, *states, operands, sink, bits=bits, group=group, **options)
    return result


def _flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    batch, heads, queries, features = program.shape(node.args[0])  # type: ignore[arg-type]
    capacity, values = program.shape(node.args[4])[2], program.shape(node.args[2])[3]  # type: ignore[arg-type]
    return batch * heads * queries * capacity * (2 * features + 2 * values + 8)


kv_quantized_sparse_attention = define(SCHEMA, kv_quantized_sparse_attention_reference, _fake, _flops)
