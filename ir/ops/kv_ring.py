"""Keys and values of a sliding window: caches of a fixed number of slots that are used again and again.

A ring [B, Hk, R, D] holds the last R tokens of each sequence, the token at position p in slot p mod R; slots of tokens that
there are none of may hold anything, NaN included. `past` [B] says how many tokens each sequence had before the call. A call's
own tokens may be more than R: attention reads the old entries and the new ones side by side, before these overwrite those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch

from .definition import define, expect
from .kv import attend, attention_fake, expect_past

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

READ_SCHEMA = "kv_ring_read(Tensor ring, Tensor new, Tensor past) -> Tensor"
APPEND_SCHEMA = "kv_ring_append(Tensor ring, Tensor new, Tensor past, Tensor? count=None) -> Tensor"
ATTENTION_SCHEMA = (
    "kv_ring_attention(Tensor q, Tensor k, Tensor v, Tensor past, Tensor[] operands, Tensor? sink, *, str predicate='', "
    "str bias='', float scale, float softcap=0.0) -> Tensor"
)


def kv_ring_read_reference(ring: torch.Tensor, new: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """Return the entries of the last R tokens in order, and behind them the new ones.

    Args:
        ring: [B, Hk, R, D].
        new: [B, Hk, T, D], of the ring's dtype.
        past: [B], int64, at least 0.

    Returns:
        [B, Hk, R + T, D]: entry j is that of the token at position past[b] - R + j; zeros where that is below 0.
    """
    slots = ring.shape[2]
    positions = past[:, None] - slots + torch.arange(slots, device=ring.device)
    rows = (positions % slots)[:, None, :, None].expand(*ring.shape)
    old = torch.where((positions >= 0)[:, None, :, None], ring.gather(2, rows), 0)
    return torch.cat((old, new), 2)


def kv_ring_append_reference(
    ring: torch.Tensor, new: torch.Tensor, past: torch.Tensor, count: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the ring with the new tokens in it, as far as they are among the last R.

    Args:
        ring: [B, Hk, R, D].
        new: [B, Hk, T, D], of the ring's dtype.
        past: [B], int64, at least 0.
        count: [B], int64, at most T: how many of the new tokens each sequence has; None for all.

    Returns:
        [B, Hk, R, D].
    """
    slots, tokens = ring.shape[2], new.shape[2]
    if tokens == 0:
        return ring.clone()
    total = (past + (tokens if count is None else count))[:, None]
    # The last token that goes to each slot; what was there before stays where this is not a new one.
    last = total - 1 - (total - 1 - torch.arange(slots, device=ring.device)) % slots
    which = last - past[:, None]
    inside = ((which >= 0) & (which < total - past[:, None]))[:, None, :, None]
    rows = which.clamp(0, tokens - 1)[:, None, :, None].expand(*ring.shape)
    return torch.where(inside, new.gather(2, rows), ring)


def kv_ring_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: torch.Tensor,
    operands: list[torch.Tensor],
    sink: torch.Tensor | None,
    *,
    predicate: str = "",
    bias: str = "",
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Return what `graphwright::kv_attention` gives over the entries that `graphwright::kv_ring_read` returned.

    Positions are those of the whole sequences. No query sees a token after its own, or one that has left the ring.

    Args:
        q: [B, H, T, D], floating point.
        k: [B, Hk, R + T, D], H a multiple of Hk.
        v: [B, Hk, R + T, Dv].
        past: [B], int64: the position of the first query of each sequence.
        operands: what the expressions read: `in0`, `in1`, ...
        sink: [H], a score per head that joins the softmax's denominator and nothing else; None for none.
        predicate: an index expression over b, h, and the positions q and k: whether the key is visible; "" for all.
        bias: an index expression over the same, added to the scaled and capped score; "" for none.
        scale: factor of the scores.
        softcap: scores are bent to softcap * tanh(score / softcap); 0 for not.

    Returns:
        [B, H, T, Dv] in q's dtype. A query that sees no key gives 0.
    """
    first = past[:, None] - (k.shape[2] - q.shape[2])
    positions = past[:, None] + torch.arange(q.shape[2], device=q.device)
    keys = first + torch.arange(k.shape[2], device=q.device)
    return attend(q, k, v, positions, keys, operands, sink, predicate, bias, scale, softcap)


def _expect(ring: torch.Tensor, new: torch.Tensor, past: torch.Tensor) -> None:
    expect(ring.dim() == 4 and new.dim() == 4, "the ring and what is new must be [batch, heads, tokens, features]")
    expect(ring.dtype == new.dtype, f"the ring is {ring.dtype}, what is new is {new.dtype}")
    for dim in (0, 1, 3):
        expect(ring.shape[dim] == new.shape[dim], f"the ring is {tuple(ring.shape)}, what is new is {tuple(new.shape)}")
    expect_past(past, ring.shape[0])


def _read_fake(ring: torch.Tensor, new: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    _expect(ring, new, past)
    batch, heads, slots, size = ring.shape
    return ring.new_empty((batch, heads, slots + new.shape[2], size))


def _append_fake(ring: torch.Tensor, new: torch.Tensor, past: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
    _expect(ring, new, past)
    if count is not None:
        expect_past(count, ring.shape[0])
    return torch.empty_like(ring, memory_format=torch.contiguous_format)


def _flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    batch, heads, queries, features = program.shape(node.args[0])  # type: ignore[arg-type]
    keys, values = program.shape(node.args[2])[2:]  # type: ignore[arg-type]
    return batch * heads * queries * keys * (2 * features + 2 * values + 8)


kv_ring_read = define(READ_SCHEMA, kv_ring_read_reference, _read_fake, lambda program, node: 0)
kv_ring_append = define(APPEND_SCHEMA, kv_ring_append_reference, _append_fake, lambda program, node: 0)
kv_ring_attention = define(ATTENTION_SCHEMA, kv_ring_attention_reference, attention_fake, _flops)
