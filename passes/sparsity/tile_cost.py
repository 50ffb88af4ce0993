"""What sparse attention costs in tiles of 64 queries and 64 keys, and from which length on it costs less than dense."""

from __future__ import annotations

import torch

from graphwright.ir.ops.block_index import TILE

ESTIMATE_TILES = 2.5
"""Tiles that the estimate and the lists cost for each 64 tokens: two products without values, sums, and a search."""

LONGEST = 1 << 22
"""Tokens up to which a break-even is looked for."""


def dense_tiles(tokens: int) -> int:
    """Return the tiles of causal attention."""
    rows = -(-tokens // TILE)
    return rows * (rows + 1) // 2


def sparse_tiles(tokens: int, blocks: float, columns: float) -> float:
    """Return about how many tiles sparse causal attention costs, its lists included.

    Args:
        tokens: number of queries and of keys.
        blocks: blocks in the list of 64 queries far from the first.
        columns: single keys in their list.
    """
    rows = torch.arange(1, -(-tokens // TILE) + 1, dtype=torch.float64)
    listed = torch.minimum(rows, blocks + torch.clamp(rows * TILE, max=columns) / TILE)
    return float(listed.sum()) + ESTIMATE_TILES * len(rows)


def break_even(blocks: float, columns: float) -> int:
    """Return the least number of tokens, a multiple of 64, at which sparse attention costs less than dense; at most 2^22."""
    low, high = 0, LONGEST // TILE
    # Dense grows with the square of the length and sparse, once the lists are full, with the length.
    while high - low > 1:
        middle = (low + high) // 2
        if sparse_tiles(middle * TILE, blocks, columns) < dense_tiles(middle * TILE):
            high = middle
        else:
            low = middle
    return high * TILE
