"""Choosing the pattern of every head: the one that finds most of the attention of sample calls at an equal cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.errors import InputError, PassError
from graphwright.ir.ops.block_index import FORCED, TILE, attention_sums, covering_blocks, ranked, tiles
from graphwright.ir.program import Program

from .tile_cost import dense_tiles

CANDIDATES: tuple[tuple[bool, int, int], ...] = (
    (True, 100, 800),
    (False, 30, 800),
    (False, 100, 750),
    (False, 500, 700),
    (False, 3500, 100),
    (False, 1000, 4096),
)
"""Whether the first and nearest are taken, columns, diagonals: only their ratio counts, since they are scaled to the cost."""

STEPS = 8
"""Halvings of the logarithm of a candidate's scale."""


@dataclass(frozen=True)
class Pattern:
    """What a head attends to.

    Args:
        fixed: whether it takes the first columns and the nearest diagonals instead of those with the largest sums.
        vertical: columns.
        slash: diagonals.
    """

    fixed: bool
    vertical: int
    slash: int


@dataclass(frozen=True)
class Measured:
    """What a pattern does to the attention of one head on the sample calls.

    Args:
        tiles: tiles of 64 queries and 64 keys that it takes, single keys counted 64 to a tile.
        blocks: blocks in the list of the last 64 queries, the mean over sequences.
        recall: ratio of the attention that it keeps.
    """

    tiles: int
    blocks: float
    recall: float


@dataclass(frozen=True)
class HeadAttention:
    """The attention of one head in one sequence of a sample call.

    Args:
        ranks: [2, T], keys and distances, that with the largest attention of the last queries first.
        rows: [N, T], the weights that 64 queries together give to each key.
    """

    ranks: torch.Tensor
    rows: torch.Tensor

    @property
    def tokens(self) -> int:
        """Length of the sequence, T."""
        return self.rows.shape[1]


def observed(program: Program, nodes: Sequence[fx.Node], samples: Sequence[Any], who: str) -> list[list[list[HeadAttention]]]:
    """Return the attention of each node and head on sample calls: for each node, for each head, all sequences.

    Args:
        program: what the calls are of.
        nodes: attentions of it, causal without other limits.
        samples: each (args, kwargs), or named arguments alone.
        who: the name of the pass, for errors.

    Raises:
        PassError: there are no calls, or one is not what the program takes.
    """
    if not samples:
        raise PassError(f"{who}: patterns are searched on sample calls, and there are none: compile with calibration=[...]")
    found: list[list[list[HeadAttention]]] = [[] for _ in nodes]
    for values in _values(program, nodes, samples, who):
        for heads, node, (q, k) in zip(found, nodes, values, strict=True):
            given = arguments(node)
            group = q.shape[1] // k.shape[1]
            heads.extend([] for _ in range(q.shape[1] - len(heads)))
            for b in range(q.shape[0]):
                for h in range(q.shape[1]):
                    heads[h].append(head_attention(q[b, h], k[b, h // group], given["scale"], given["softcap"]))
    return found


def head_attention(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float = 0.0) -> HeadAttention:
    """Return the causal attention of one head, queries and keys [T, D]."""
    tokens = len(q)
    scores = q.float() @ k.float().T * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), -torch.inf), -1)
    padded = torch.nn.functional.pad(weights, (0, 0, 0, -tokens % TILE))
    rows = padded.reshape(-1, TILE, tokens).sum(1)
    sums = attention_sums(q, k, tokens - 1, scale, softcap)
    return HeadAttention(torch.stack([ranked(part) for part in sums]), rows)


def measure(attention: Sequence[HeadAttention], pattern: Pattern) -> Measured:
    """Return what a pattern costs and keeps of a head's attention in all sequences."""
    cost, blocks, kept, total = 0, 0, 0.0, 0.0
    for sequence in attention:
        counts, seen, single = listed_tiles(sequence, pattern)
        blocks += int(counts[-1])
        cost += int(counts.sum() + (single.sum(1) + TILE - 1).div(TILE, rounding_mode="floor").sum())
        kept += float((sequence.rows * (seen | single)).sum())
        total += float(sequence.rows.sum())
    return Measured(cost, blocks / len(attention), kept / total if total else 1.0)


def listed_tiles(attention: HeadAttention, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return how many blocks each 64 queries have, [N], the keys in them, bool [N, T], and the single keys, likewise.

    They are those of `graphwright::block_index`.

    Args:
        attention: of one head in one sequence.
        pattern: of the head.
    """
    tokens = attention.tokens
    count = tiles(tokens)
    ranks = torch.arange(tokens).expand(2, -1) if pattern.fixed else attention.ranks
    columns = torch.zeros(tokens, dtype=torch.bool)
    columns[ranks[0, : pattern.vertical]] = True
    starts = torch.tensor(covering_blocks(ranks[1, : pattern.slash].tolist()), dtype=torch.int64)
    # Element TILE * count + j is the key that is j after the first query; the last rows look from there.
    covered = torch.zeros(TILE * count + max(tokens, TILE), dtype=torch.bool)
    keys = (starts[:, None] + torch.arange(TILE) + TILE * count).flatten()
    covered[keys[keys >= 0]] = True
    seen = covered[TILE:].unfold(0, tokens, TILE)[:count].flip(0)
    before = torch.arange(tokens) < (torch.arange(count)[:, None] + 1) * TILE
    counts = (torch.arange(count)[:, None] * TILE + starts > -TILE).sum(1)
    return counts, seen, columns & before & ~seen


def search(attention: Sequence[HeadAttention], density: float) -> tuple[Pattern, Measured, Measured]:
    """Return the pattern of a head that keeps most, what it does, and what the first candidate, an A-shape, does.

    Args:
        attention: of the head.
        density: ratio of the tiles that a pattern may take to those of dense attention, above 0.
    """
    budget = density * sum(dense_tiles(sequence.tokens) for sequence in attention)
    longest = max(sequence.tokens for sequence in attention)
    tried = [_scaled(attention, candidate, budget, longest) for candidate in CANDIDATES]
    best = max(tried, key=lambda found: (found[1].recall, -found[1].tiles))
    return (*best, tried[0][1])


def _scaled(
    attention: Sequence[HeadAttention], candidate: tuple[bool, int, int], budget: float, longest: int
) -> tuple[Pattern, Measured]:
    """Return a candidate at the largest scale that fits the budget; the least there is if none does."""
    fixed, vertical, slash = candidate

    def at(scale: float) -> Pattern:
        return Pattern(
            fixed,
            min(max(FORCED, round(vertical * scale)), longest),
            min(max(FORCED, round(slash * scale)), longest),
        )

    best = at(0.0)
    found = measure(attention, best)
    low, high = FORCED / max(vertical, slash), longest / min(vertical, slash)
    for _ in range(STEPS):
        middle = math.sqrt(low * high)
        pattern = at(middle)
        measured = found if pattern == best else measure(attention, pattern)
        if measured.tiles <= budget:
            low, best, found = middle, pattern, measured
        else:
            high = middle
    return best, found


def _values(
    program: Program, nodes: Sequence[fx.Node], samples: Sequence[Any], who: str
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Yield queries and keys of the attentions for each call, in plain PyTorch."""
    part = program.copy()
    copies = {node.name: node for node in part.graph.nodes}
    wanted = [arguments(copies[node.name])[name] for node in nodes for name in "qk"]
    part.output.args = (tuple(wanted),)
    part.drop_unused()
    module = part.module()
    for number, sample in enumerate(samples):
        args, kwargs = ((), sample) if isinstance(sample, dict) else sample
        try:
            tensors = program.signature.flatten(args, kwargs)
        except InputError as error:
            raise PassError(f"{who}: calibration call {number} is not what the model takes: {error}") from error
        with torch.no_grad():
            values = list(module(*tensors))
        yield list(zip(values[::2], values[1::2], strict=True))
