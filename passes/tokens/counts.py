"""How many tokens are left after each merge."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from graphwright.ir.program import Program

PARTS = 1024
"""Shares of tokens are counted in so many parts."""

Schedule = Literal["constant", "decreasing", "increasing"]


@dataclass(frozen=True)
class Kept:
    """How many of T tokens are left: max(T * parts / PARTS, rounded up, - less, min(T, least)).

    The size is worked out of the tokens at the start, not of those left by the merge before, so that it stays a short formula
    however many merges there are.

    Args:
        parts: of PARTS tokens at the start, 1 to PARTS.
        less: tokens fewer.
        least: what is never gone below; fewer tokens than that stay as they are.
    """

    parts: int = PARTS
    less: int = 0
    least: int = 0

    def of(self, tokens: int) -> int:
        """Return how many of `tokens` are left."""
        return max(-(-tokens * self.parts // PARTS) - self.less, min(tokens, self.least))

    def __str__(self) -> str:
        share = "tokens" if self.parts == PARTS else f"(tokens * {self.parts} + {PARTS - 1}) // {PARTS}"
        share += f" - {self.less}" if self.less else ""
        return f"max({share}, min(tokens, {self.least}))"

    def node(self, program: Program, tokens: fx.Node) -> fx.Node:
        """Insert the arithmetic that makes the number of them a node.

        Args:
            program: where it is inserted, at its insertion point.
            tokens: the number of tokens at the start.
        """
        share = tokens
        if self.parts != PARTS:
            scaled = program.call(operator.add, program.call(operator.mul, tokens, self.parts), PARTS - 1)
            share = program.call(operator.floordiv, scaled, PARTS)
        if self.less:
            share = program.call(operator.sub, share, self.less)
        return program.call(torch.sym_max, share, program.call(torch.sym_min, tokens, self.least))


def least_for(before: Kept, after: Kept, protect: int) -> int | None:
    """Return the `least` with which a merge is possible for every number of tokens: one in two behind the protected may go.

    Args:
        before: what there is before the merge.
        after: what is left.
        protect: tokens that are never merged.

    Returns:
        None where there is no such number: more than half of the tokens would have to go.
    """
    if before.parts == after.parts:
        return protect + after.less - before.less
    # With f = parts / PARTS and T tokens, T f' - T f + 1 are to go at most, of T f' - protect, and T f is above `least` - 1.
    spare = 2 * after.parts - before.parts
    return None if spare <= 0 else 1 - (-(protect + 2) * after.parts // spare)


def can_go(tokens: int, protect: int) -> int:
    """Return how many of `tokens` one merge can take away."""
    return max(tokens - protect, 0) // 2


def shares(schedule: Schedule, blocks: int) -> list[float]:
    """Return which share of all that is merged is merged up to the end of each block; the last is 1.

    Args:
        schedule: "constant": the same in every block; "decreasing": from twice the average in the first block to none in the
            last; "increasing": the other way round.
        blocks: at least 1.
    """
    weights = [1.0] * blocks
    if schedule != "constant" and blocks > 1:
        weights = [2.0 * k / (blocks - 1) for k in range(blocks)]
    if schedule == "decreasing":
        weights.reverse()
    return [sum(weights[: k + 1]) / sum(weights) for k in range(blocks)]


def constant_counts(merge: int, schedule: Schedule, blocks: int) -> Sequence[Kept]:
    """Return what is left after each block where `merge` tokens go in each, on average."""
    return [Kept(less=int(merge * blocks * share + 0.5)) for share in shares(schedule, blocks)]


def ratio_counts(ratio: float, schedule: Schedule, blocks: int) -> Sequence[Kept]:
    """Return what is left after each block where `ratio` of the tokens is left in the end."""
    return [Kept(parts=PARTS - int(PARTS * (1 - ratio) * share + 0.5)) for share in shares(schedule, blocks)]
