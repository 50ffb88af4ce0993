"""Where the tokens of a padded batch are: tensors that are worked out from the mask of every call, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .errors import ArtifactError

Part = Literal["rows", "positions", "sequences", "places", "starts"]
"""What can be worked out of a mask [B, S] that keeps n tokens, in P rows: n rounded up.

Rows stand for the tokens in the order of the mask's elements, so that the tokens of a sequence follow each other; those after
the n-th stand for nothing.

- rows: int64 [1, P], which of the B * S elements a row stands for; -1 for nothing.
- positions: int64 [1, P], its position in its sequence; -1 for nothing.
- sequences: int64 [1, P], its sequence; -1 for nothing.
- places: int64 [B, S], the row of each element; -1 where the mask keeps none.
- starts: int32 [B + 2], the first row of each sequence, then n, then P.
"""

PARTS: tuple[Part, ...] = get_args(Part)
LARGEST_MULTIPLE = 64
"""Rows that stand for nothing are one more sequence, which a block of queries has to hold."""


@dataclass(frozen=True)
class Packing:
    """What is worked out of one of a call's tensors.

    Args:
        mask: its number among the call's tensors; [B, S].
        inverted: whether it keeps the tokens where it is 0, not those where it is not.
        multiple: P is rounded up to a multiple of it, so that calls of nearly as many tokens share what depends on P; 1 to 64.
        parts: what is made, in order.
        dimension: the name of P.

    Raises:
        ArtifactError: a value is out of its range.
    """

    mask: int
    inverted: bool
    multiple: int
    parts: tuple[Part, ...]
    dimension: str

    def __post_init__(self) -> None:
        if not 1 <= self.multiple <= LARGEST_MULTIPLE:
            raise ArtifactError(f"packing: rows must be a multiple of 1 to {LARGEST_MULTIPLE}, got {self.multiple}")
        if not self.parts or len(set(self.parts)) != len(self.parts) or not set(self.parts) <= set(PARTS):
            raise ArtifactError(f"packing: parts must be different ones of {', '.join(PARTS)}, got {self.parts}")
        if self.mask < 0 or not self.dimension.isidentifier():
            raise ArtifactError(
                f"packing: tensor {self.mask} cannot be the mask, or {self.dimension!r} the name of a dimension"
            )

    def shape(self, part: Part, mask_shape: Sequence[int | str]) -> tuple[int | str, ...]:
        """Return the shape of a part as numbers and texts, given that of the mask."""
        batch, tokens = mask_shape
        if part == "places":
            return batch, tokens
        if part == "starts":
            return (batch + 2 if isinstance(batch, int) else f"{batch} + 2",)
        return 1, self.dimension

    def derive(self, mask: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts for a mask.

        Args:
            mask: [B, S], of any dtype.
        """
        kept = mask == 0 if self.inverted else mask != 0
        found = kept.reshape(-1).nonzero().squeeze(1)
        count = found.numel()
        # There is at least one row wherever there is an element that a result must be made for.
        size = -(-max(count, min(kept.numel(), 1)) // self.multiple) * self.multiple
        rows = found.new_full((1, size), -1)
        rows[0, :count] = found
        return [self._part(part, kept, rows, count) for part in self.parts]

    def _part(self, part: Part, kept: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
        batch, tokens = kept.shape
        match part:
            case "rows":
                return rows
            case "positions":
                return torch.where(rows >= 0, rows % max(tokens, 1), -1)
            case "sequences":
                return torch.where(rows >= 0, rows // max(tokens, 1), -1)
            case "places":
                order = kept.reshape(-1).cumsum(0).reshape(batch, tokens) - 1
                return torch.where(kept, order, -1)
            case "starts":
                starts = torch.zeros(batch + 2, dtype=torch.int32, device=kept.device)
                starts[1:-1] = kept.sum(1).cumsum(0)
                starts[-1] = rows.numel()
                return starts
