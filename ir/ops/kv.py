"""`graphwright::kv_append` and `graphwright::kv_attention`: keys and values that are kept from call to call.

A cache [B, Hk, C, D] has a slot for each position of each sequence; C is its capacity. `past` [B] says how many slots of each
sequence are filled. Sequences stand side by side with their first tokens in slot 0, so that ragged batches need no padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch

from graphwright.ir.analyses.index_eval import evaluate
from graphwright.ir.analyses.index_text import parse

from .attention import operand_name, operand_type
from .definition import computed_in, define, expect

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

APPEND_SCHEMA = "kv_append(Tensor cache, Tensor new, Tensor past) -> Tensor"
ATTENTION_SCHEMA = (
    "kv_attention(Tensor q, Tensor k, Tensor v, Tensor past, Tensor[] operands, Tensor? sink, *, str predicate='', "
    "str bias='', float scale, float softcap=0.0) -> Tensor"
)


def kv_append_reference(cache: torch.Tensor, new: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """Return the cache with new entries at slots past[b], past[b] + 1, ...; what goes beyond its capacity is left out.

    Args:
        cache: [B, Hk, C, D].
        new: [B, Hk, T, D], of the cache's dtype.
        past: [B], int64, at least 0.

    Returns:
        [B, Hk, C, D].
    """
    capacity, count = cache.shape[2], new.shape[2]
    if count == 0:
        return cache.clone()
    which = torch.arange(capacity, device=cache.device) - past[:, None]
    inside = ((which >= 0) & (which < count))[:, None, :, None]
    rows = which.clamp(0, count - 1)[:, None, :, None].expand(*cache.shape)
    return torch.where(inside, new.gather(2, rows), cache)


def _append_fake(cache: torch.Tensor, new: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    expect(cache.dim() == 4 and new.dim() == 4, "the cache and what is new must be [batch, heads, tokens, features]")
    expect(cache.dtype == new.dtype, f"the cache is {cache.dtype}, what is new is {new.dtype}")
    for dim in (0, 1, 3):
        expect(cache.shape[dim] == new.shape[dim], f"the cache is {tuple(cache.shape)}, what is new is {tuple(new.shape)}")
    expect_past(past, cache.shape[0])
    return torch.empty_like(cache, memory_format=torch.contiguous_format)


def expect_past(past: torch.Tensor, batch: int | torch.SymInt) -> None:
    """Raise unless `past` is int64 [batch]."""
    expect(past.dim() == 1 and past.dtype == torch.int64, f"past must be int64 [batch], got {past.dtype} {tuple(past.shape)}")
    expect(past.shape[0] == batch, f"past has {past.shape[0]} sequences, expected {batch}")


def kv_attention_reference(
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
    """Return what `graphwright::attention` gives for the queries at positions past[b] + 0, 1, ... over the filled slots.

    No query sees a slot after its own; such slots may hold anything, NaN included.

    Args:
        q: [B, H, T, D], floating point.
        k: [B, Hk, C, D], H a multiple of Hk; the entries of q's own tokens are in it.
        v: [B, Hk, C, Dv].
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
    slots = torch.arange(k.shape[2], device=q.device)
    # What no query sees must not be multiplied by: zero times NaN is NaN.
    filled = slots < past[:, None] + q.shape[2]
    k, v = (torch.where(filled[:, None, :, None], cache, 0) for cache in (k, v))
    positions = past[:, None] + torch.arange(q.shape[2], device=q.device)
    return attend(q, k, v, positions, slots[None], operands, sink, predicate, bias, scale, softcap)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    key_positions: torch.Tensor,
    operands: list[torch.Tensor],
    sink: torch.Tensor | None,
    predicate: str,
    bias: str,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Return causal attention of queries at any positions over keys at any positions, below 0 where there is no key.

    Args:
        q: [B, H, T, D].
        k: [B, Hk, K, D], finite.
        v: [B, Hk, K, Dv], finite.
        positions: [B, T], int64.
        key_positions: [B, K] or [1, K], int64.
        operands: see `kv_attention_reference`, as those that follow.
        sink: likewise.
        predicate: likewise.
        bias: likewise.
        scale: likewise.
        softcap: likewise.

    Returns:
        [B, H, T, Dv].
    """
    wide = computed_in(q.dtype)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).to(wide) for x in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at_query, at_key = positions[:, None, :, None], key_positions[:, None, None, :]
    variables = {
        "b": torch.arange(q.shape[0], device=q.device)[:, None, None, None],
        "h": torch.arange(q.shape[1], device=q.device)[:, None, None],
        "q": at_query,
        # What is not there is not looked up either.
        "k": at_key.clamp(min=0),
    }
    loads = {operand_name(at): operand for at, operand in enumerate(operands)}
    types = {name: operand_type(operand.dtype) for name, operand in loads.items()}
    if bias:
        scores = scores + evaluate(parse(bias, types), variables, loads).to(wide)
    seen = (at_key <= at_query) & (at_key >= 0)
    if predicate:
        seen = seen & evaluate(parse(predicate, types), variables, loads).to(torch.bool)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sink is not None:
        scores = torch.cat((scores, sink.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    weights = torch.softmax(scores, -1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    return (weights[..., : k.shape[2]] @ v).to(q.dtype)


def attention_fake(
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
    """Return the result's shape and dtype; the arguments are those of `kv_attention_reference`."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        expect(tensor.dim() == 4, f"{name} must be [batch, heads, tokens, features], got {tensor.dim()} sizes")
        expect(tensor.dtype == q.dtype, f"{name} is {tensor.dtype}, q is {q.dtype}")
        expect(tensor.shape[0] == q.shape[0], f"{name} has batch {tensor.shape[0]}, q has {q.shape[0]}")
    expect(k.shape[3] == q.shape[3], f"k has {k.shape[3]} features, q has {q.shape[3]}")
    expect(q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads")
    for dim in (1, 2):
        expect(k.shape[dim] == v.shape[dim], f"k is {tuple(k.shape)} and v {tuple(v.shape)}")
    if sink is not None:
        expect(tuple(sink.shape) == (q.shape[1],), f"the sink must be [{q.shape[1]}], got {tuple(sink.shape)}")
    expect_past(past, q.shape[0])
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _attention_flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    batch, heads, queries, features = program.shape(node.args[0])  # type: ignore[arg-type]
    capacity, values = program.shape(node.args[2])[2:]  # type: ignore[arg-type]
    return batch * heads * queries * capacity * (2 * features + 2 * values + 8)


kv_append = define(APPEND_SCHEMA, kv_append_reference, _append_fake, lambda program, node: 0)
kv_attention = define(ATTENTION_SCHEMA, kv_attention_reference, attention_fake, _attention_flops)
