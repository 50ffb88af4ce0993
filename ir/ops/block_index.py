"""`graphwright::block_index`: which keys each block of queries is to see, estimated from the last queries.

Jiang et al., MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention, 2024, arXiv
2407.02490: few keys are seen by all queries (columns), and few distances are looked back at by all queries (diagonals).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch
from torch.nn.functional import pad

from .definition import define, expect

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

SCHEMA = (
    "block_index(Tensor q, Tensor k, Tensor? past=None, *, Tensor? count=None, int[] vertical, int[] slash, bool[] fixed, "
    "float scale, float softcap=0.0, int minimum_tokens=0) -> (Tensor, Tensor)"
)

TILE = 64
"""Queries that share their keys, and keys of a block."""

FORCED = 30
"""First keys and nearest distances that come before all others."""

DENSE = -1
"""The number of blocks of a list that stands for all keys."""


def tiles(tokens: int) -> int:
    """Return the number of blocks of queries."""
    return (tokens + TILE - 1) // TILE


def block_index_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    past: torch.Tensor | None = None,
    *,
    count: torch.Tensor | None = None,
    vertical: list[int],
    slash: list[int],
    fixed: list[bool],
    scale: float,
    softcap: float = 0.0,
    minimum_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lists of blocks of keys, and of single keys, for every block of queries of a causal attention.

    The attention of the last 64 tokens is summed for each key (a column) and for each distance of key and query (a diagonal),
    and those with the largest sums are taken. A diagonal is covered by blocks of 64 keys that start anywhere; a column is
    listed by itself where no block covers it. No key is listed twice.

    Args:
        q: [B, H, T, D], floating point.
        k: [B, Hk, T, D], H a multiple of Hk: query head h reads key head h // (H / Hk).
        past: [B], int64: tokens before the first one; a sequence that has some gets all keys. None for none.
        count: [B], int64: tokens that count, at least 1; behind them is padding. None for all.
        vertical: [H], columns of each head, at least 0. Those of the first 30 keys come first.
        slash: [H], diagonals of each head, at least 0. The nearest 30 come first.
        fixed: [H], whether a head takes the first columns and the nearest diagonals (an A-shape) instead of those with the
            largest sums.
        scale: factor of the scores.
        softcap: scores are bent to softcap * tanh(score / softcap); 0 for not.
        minimum_tokens: of a call of fewer tokens all keys are taken.

    Returns:
        Two int32 tensors, with a row for each block of 64 queries. [B, H, N, N + 2] for N = ceil(T / 64): the number of blocks,
        or -1 for all keys, and then the first key of each, descending; it may be negative, and blocks may reach past the last
        key. [B, H, N, 1 + max(vertical)]: the number of single keys, and then these, ascending. What is behind means nothing.
    """
    batch, heads, tokens, _ = q.shape
    rows, width = tiles(tokens), max(vertical, default=0)
    blocks = torch.zeros(batch, heads, rows, rows + 2, dtype=torch.int32)
    columns = torch.zeros(batch, heads, rows, 1 + width, dtype=torch.int32)
    counts = [tokens] * batch if count is None else count.tolist()
    before = [0] * batch if past is None else past.tolist()
    group = q.shape[1] // k.shape[1]
    for b in range(batch):
        if tokens < minimum_tokens or before[b] > 0:
            blocks[b, :, :, 0] = DENSE
            continue
        for h in range(heads):
            sums = attention_sums(q[b, h], k[b, h // group], counts[b] - 1, scale, softcap)
            if fixed[h]:
                sums = torch.arange(tokens, 0, -1).float().expand(2, -1)
            chosen = largest(sums[0], vertical[h])
            starts = covering_blocks(largest(sums[1], slash[h]))
            for i in range(rows):
                fill_lists(blocks[b, h, i], columns[b, h, i], i, starts, chosen)
    return blocks.to(q.device), columns.to(q.device)


def attention_sums(q: torch.Tensor, k: torch.Tensor, last: int, scale: float, softcap: float) -> torch.Tensor:
    """Return the attention of the tokens up to `last`, 64 at most, summed for each key and for each distance.

    Args:
        q: [T, D], of one head.
        k: [T, D].
        last: the last token that counts.
        scale: factor of the scores.
        softcap: scores are bent to softcap * tanh(score / softcap); 0 for not.

    Returns:
        [2, T], float32: of key j, and of distance d.
    """
    tokens = len(q)
    rows = torch.arange(max(last - TILE + 1, 0), last + 1, device=q.device)[:, None]
    scores = q[rows[:, 0]].float() @ k.float().T * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    keys = torch.arange(tokens, device=q.device)
    weights = torch.softmax(scores.masked_fill(keys > rows, -torch.inf), -1)
    # Element d of a row is the weight of the key that is d before the row's own token.
    at = rows - keys
    skewed = torch.where(at >= 0, weights.gather(1, at.clamp(min=0)), 0.0)
    return torch.stack((weights.sum(0), skewed.sum(0)))


def ranked(sums: torch.Tensor) -> torch.Tensor:
    """Return the places of sums, the largest first; the first 30 are larger than any, and of equal ones the first is first."""
    forced = pad(sums[FORCED:], (min(FORCED, len(sums)), 0), value=torch.inf)
    return forced.argsort(descending=True, stable=True)


def largest(sums: torch.Tensor, count: int) -> list[int]:
    """Return the places of the largest sums, as they are ranked, ascending."""
    return sorted(ranked(sums)[:count].tolist())


def covering_blocks(distances: list[int]) -> list[int]:
    """Return the first keys, relative to the first of 64 queries, of blocks that cover what all of them see at distances.

    A diagonal crosses 64 keys. Where it ends in a block or next to it, the next block ends where that one starts.
    """
    starts: list[int] = []
    for distance in sorted(distances):
        low = starts[-1] if starts else TILE
        if -distance < low:
            starts.append(min(low, TILE - distance) - TILE)
    return starts


def fill_lists(blocks: torch.Tensor, columns: torch.Tensor, tile: int, starts: list[int], chosen: list[int]) -> None:
    """Write the lists of one block of queries into rows of zeros: what is before the first key or after the last query goes."""
    first = tile * TILE
    listed = [first + start for start in starts if first + start > -TILE]
    covered = {key for start in listed for key in range(start, start + TILE)}
    single = [key for key in chosen if key < first + TILE and key not in covered]
    blocks[0], columns[0] = len(listed), len(single)
    blocks[1 : 1 + len(listed)] = torch.tensor(listed, dtype=torch.int32)
    columns[1 : 1 + len(single)] = torch.tensor(single, dtype=torch.int32)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    past: torch.Tensor | None = None,
    *,
    count: torch.Tensor | None = None,
    vertical: list[int],
    slash: list[int],
    fixed: list[bool],
    scale: float,
    softcap: float = 0.0,
    minimum_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    for name, tensor in (("q", q), ("k", k)):
        expect(tensor.dim() == 4, f"{name} must be [batch, heads, tokens, features], got {tensor.dim()} sizes")
    for dim in (0, 2, 3):
        expect(q.shape[dim] == k.shape[dim], f"q is {tuple(q.shape)} and k {tuple(k.shape)}")
    expect(q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads")
    for name, values in (("vertical", vertical), ("slash", slash), ("fixed", fixed)):
        expect(len(values) == q.shape[1], f"{name} has {len(values)} values, and there are {q.shape[1]} heads")
    expect(min([*vertical, *slash], default=0) >= 0, f"vertical {vertical} and slash {slash} must be at least 0")
    for name, numbers in (("past", past), ("count", count)):
        if numbers is not None:
            expect(numbers.dim() == 1 and numbers.shape[0] == q.shape[0], f"{name} must be [{q.shape[0]}]")
    batch, heads, tokens, _ = q.shape
    rows = tiles(tokens)
    blocks = torch.empty(batch, heads, rows, rows + 2, dtype=torch.int32, device=q.device)
    return blocks, blocks.new_empty(batch, heads, rows, 1 + max(vertical, default=0))


def _flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    batch, heads, tokens, features = program.shape(node.args[0])  # type: ignore[arg-type]
    return batch * heads * tokens * TILE * (4 * features + 16 + 2)


block_index = define(SCHEMA, block_index_reference, _fake, _flops)
