"""`graphwright::sparse_attention` and `graphwright::kv_sparse_attention`: attention over the keys that lists name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.nn.functional import pad

from .attention import attention, attention_reference, operand_name
from .block_index import DENSE, FORCED, TILE, tiles
from .definition import define, expect
from .kv import kv_attention, kv_attention_reference

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

SCHEMA = (
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor columns, Tensor[] operands, Tensor? sink, *, "
    "str predicate='', str bias='', float scale, float softcap=0.0, int minimum_tokens=0) -> Tensor"
)
KV_SCHEMA = (
    "kv_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor past, Tensor blocks, Tensor columns, Tensor[] operands, "
    "Tensor? sink, *, str predicate='', str bias='', float scale, float softcap=0.0, int minimum_tokens=0) -> Tensor"
)

RUN = 6
"""Chosen diagonals that a block of keys is expected to cover, for the cost of an attention; those that are forced take two."""


def listed_keys(blocks: torch.Tensor, columns: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return which keys each query's lists name.

    Args:
        blocks: int32 [B, H, N, 1 + M]: for each 64 queries the number of blocks, or -1 for all keys, and their first keys.
        columns: int32 [B, H, N, 1 + V]: likewise the number of single keys, and these.
        tokens: number of queries and of keys T, N = ceil(T / 64).

    Returns:
        bool [B, H, T, T].
    """
    count = blocks.shape[2]
    seen = torch.zeros(*blocks.shape[:3], tokens + 1, dtype=torch.bool, device=blocks.device)
    keys = (blocks[..., 1:, None] + torch.arange(TILE, device=blocks.device)).flatten(-2)
    for numbers, listed, size in ((blocks, keys, TILE), (columns, columns[..., 1:], 1)):
        place = torch.arange(listed.shape[-1], device=listed.device) // size
        inside = (place < numbers[..., :1]) & (listed >= 0) & (listed < tokens)
        # What is not listed marks a key behind the last.
        seen.scatter_(-1, torch.where(inside, listed, tokens).long(), True)
    seen = seen[..., :tokens] | (blocks[..., :1] == DENSE)
    return seen[:, :, :, None].expand(-1, -1, -1, TILE, -1).reshape(*blocks.shape[:2], count * TILE, tokens)[:, :, :tokens]


def sparse_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    columns: torch.Tensor,
    operands: list[torch.Tensor],
    sink: torch.Tensor | None,
    *,
    predicate: str = "",
    bias: str = "",
    scale: float,
    softcap: float = 0.0,
    minimum_tokens: int = 0,
) -> torch.Tensor:
    """Return what `graphwright::attention` gives where a query sees the keys that its lists name and the predicate admits.

    Args:
        q: [B, H, T, D], floating point.
        k: [B, Hk, T, D], H a multiple of Hk: query head h reads key head h // (H / Hk).
        v: [B, Hk, T, Dv].
        blocks: int32 [B, H, N, 1 + M], N = ceil(T / 64): for each 64 queries the number of blocks of 64 keys, and the first key
            of each, descending; or -1: all keys are listed. Blocks must not overlap, and start before the 64 queries end.
        columns: int32 [B, H, N, 1 + V]: for each 64 queries the number of single keys, and these; none may lie in a block, and
            none is after the 64 queries.
        operands: what the expressions read: `in0`, `in1`, ...
        sink: [H], a score per head that joins the softmax's denominator and nothing else; None for none.
        predicate: an index expression over b, h, q, k, true where a listed key is visible; "" for every one.
        bias: an index expression, added to the scaled and capped score; "" for none.
        scale: factor of the scores.
        softcap: scores are bent to softcap * tanh(score / softcap); 0 for not.
        minimum_tokens: in a call of fewer tokens all keys are listed, whatever the lists hold.

    Returns:
        [B, H, T, Dv] in q's dtype. A query that sees no key gives 0.
    """
    options: dict[str, Any] = {"bias": bias, "scale": scale, "softcap": softcap}
    if q.shape[2] < minimum_tokens:
        return attention_reference(q, k, v, operands, sink, predicate=predicate, **options)
    seen = listed_keys(blocks, columns, q.shape[2])
    both = _with_lists(predicate, len(operands))
    return attention_reference(q, k, v, [*operands, seen], sink, predicate=both, **options)


def kv_sparse_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: torch.Tensor,
    blocks: torch.Tensor,
    columns: torch.Tensor,
    operands: list[torch.Tensor],
    sink: torch.Tensor | None,
    *,
    predicate: str = "",
    bias: str = "",
    scale: float,
    softcap: float = 0.0,
    minimum_tokens: int = 0,
) -> torch.Tensor:
    """Return what `graphwright::kv_attention` gives where a query sees the keys that its lists name.

    Lists name the keys of a prompt, from the first token on: those of a sequence that has tokens before must say -1.

    Args:
        q: [B, H, T, D], floating point.
        k: [B, Hk, C, D], H a multiple of Hk; the entries of q's own tokens are in it.
        v: [B, Hk, C, Dv].
        past: [B], int64: the position of the first query of each sequence.
        blocks: see `graphwright::sparse_attention`.
        columns: likewise.
        operands: what the expressions read: `in0`, `in1`, ...
        sink: [H], a score per head that joins the softmax's denominator and nothing else; None for none.
        predicate: an index expression over b, h, and the positions q and k: whether a listed key is visible; "" for all.
        bias: an index expression over the same, added to the scaled and capped score; "" for none.
        scale: factor of the scores.
        softcap: scores are bent to softcap * tanh(score / softcap); 0 for not.
        minimum_tokens: in a call of fewer tokens all keys are listed, whatever the lists hold.

    Returns:
        [B, H, T, Dv] in q's dtype. A query that sees no key gives 0.
    """
    options: dict[str, Any] = {"bias": bias, "scale": scale, "softcap": softcap}
    tokens, capacity = q.shape[2], k.shape[2]
    if tokens < minimum_tokens:
        return kv_attention_reference(q, k, v, past, operands, sink, predicate=predicate, **options)
    listed = listed_keys(blocks, columns, tokens)[..., :capacity]
    listed = pad(listed, (0, capacity - listed.shape[-1]))
    # The mask is read at positions: those of a sequence with tokens before have no lists.
    later = pad(listed, (0, 0, 0, int(past.max()) if len(past) else 0), value=True)
    seen = torch.where((past > 0)[:, None, None, None], torch.ones_like(later), later)
    both = _with_lists(predicate, len(operands))
    return kv_attention_reference(q, k, v, past, [*operands, seen], sink, predicate=both, **options)


def _with_lists(predicate: str, number: int) -> str:
    listed = f"{operand_name(number)}[b, h, q, k]"
    return f"{listed} & ({predicate})" if predicate else listed


def _expect_lists(q: torch.Tensor, blocks: torch.Tensor, columns: torch.Tensor) -> None:
    for name, lists in (("blocks", blocks), ("columns", columns)):
        expect(lists.dim() == 4 and lists.dtype == torch.int32, f"{name} must be int32 of 4 dimensions, got {lists.dtype}")
        for dim, size in enumerate((q.shape[0], q.shape[1], tiles(q.shape[2]))):
            expect(lists.shape[dim] == size, f"{name} is {tuple(lists.shape)} for queries {tuple(q.shape)}")


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    columns: torch.Tensor,
    operands: list[torch.Tensor],
    sink: torch.Tensor | None,
    *,
    predicate: str = "",
    bias: str = "",
    scale: float,
    softcap: float = 0.0,
    minimum_tokens: int = 0,
) -> torch.Tensor:
    expect(q.shape[2] == k.shape[2], f"there are {q.shape[2]} queries and {k.shape[2]} keys")
    _expect_lists(q, blocks, columns)
    result: torch.Tensor = attention(q, k, v, operands, sink, predicate=predicate, bias=bias, scale=scale, softcap=softcap)
    return result


def _kv_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: torch.Tensor,
    blocks: torch.Tensor,
    columns: torch.Tensor,
    operands: list[torch.Tensor],
    sink: torch.Tensor | None,
    *,
    predicate: str = "",
    bias: str = "",
    scale: float,
    softcap: float = 0.0,
    minimum_tokens: int = 0,
) -> torch.Tensor:
    _expect_lists(q, blocks, columns)
    result: torch.Tensor = kv_attention(
        q, k, v, past, operands, sink, predicate=predicate, bias=bias, scale=scale, softcap=softcap
    )
    return result


def _flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    batch, heads, queries, features = program.shape(node.args[0])  # type: ignore[arg-type]
    values = program.shape(node.args[2])[3]  # type: ignore[arg-type]
    return batch * heads * queries * expected_keys(program, node) * (2 * features + 2 * values + 8)


def expected_keys(program: Program, node: fx.Node) -> Any:
    """Return about how many keys a query of a sparse attention is compared with, as an expression of the dimensions."""
    dense = (sympy.sympify(program.shape(node.args[0])[2]) + 1) / 2  # type: ignore[arg-type]
    blocks: Any = node.args[4 if node.target is kv_sparse_attention else 3]
    options = blocks.args[0].kwargs if blocks.op == "call_function" else {}
    if "vertical" not in options:
        return dense
    heads = len(options["vertical"])
    keys = sum(options["vertical"]) + TILE * sum(map(expected_blocks, options["slash"]))
    # In sixths, so that the expression has no rounded numbers in it.
    return sympy.Min(dense, sympy.Rational(round(keys * RUN), RUN * heads))


def expected_blocks(slash: int) -> float:
    """Return about how many blocks of keys cover so many diagonals for 64 queries."""
    return 2 + max(slash - FORCED, 0) / RUN


sparse_attention = define(SCHEMA, sparse_attention_reference, _fake, _flops)
kv_sparse_attention = define(KV_SCHEMA, kv_sparse_attention_reference, _kv_fake, _flops)
