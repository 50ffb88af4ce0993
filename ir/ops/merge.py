"""Merging tokens that are alike: which, into which, and the tensors before and after.

A merge takes six operations, of which each gives a small tensor that the next reads, so that kernels need no memory of their
own: `merge_metric` (what tokens are compared by), `merge_match` (the best partner of every token that may go), `merge_rank`
(the order in which they go), `merge_plan` (the row that every token ends up in), `merge` and, for results that have every
token, `unmerge`. Source: Bolya et al., Token Merging: Your ViT But Faster, 2022, arXiv 2210.09461.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.nn import functional

from .definition import computed_in, define, expect

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

PADDING_SCORE = 3.0
"""The score of a token of size 0, which is better than any cosine: that it goes costs nothing."""

UNLIKE_SCORE = -2.0
"""The score of a token with content and one without, which is worse than any cosine."""

_INDEX = torch.int64


def merge_metric_reference(keys: torch.Tensor) -> torch.Tensor:
    """Return what tokens are compared by: the mean of their keys over the heads, scaled to length 1.

    Args:
        keys: [B, Hk, T, D], floating point.

    Returns:
        [B, T, D], float32; zeros for a token whose mean is zero.
    """
    return functional.normalize(keys.to(torch.float32).mean(1), dim=-1)


def merge_match_reference(metric: torch.Tensor, size: torch.Tensor, protect: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for every token that may go the other token that is most like it, and how like they are.

    Of the tokens behind the protected ones the first, third, ... may go, the second, fourth, ... take them in.

    Args:
        metric: [B, T, D], float32, rows of length 1.
        size: [B, T], float32: how many tokens each stands for; 0 for padding.
        protect: the first so many tokens neither go nor take in; at least 0.

    Returns:
        score: [B, T], float32: the cosine of a token that may go and its partner; `PADDING_SCORE` if it is padding and
            `UNLIKE_SCORE` if only its partner is; -inf for a token that stays. A cosine that is no number counts as -1.
        partner: [B, T], int64: the token that would take it in, the first of those that are equally like; itself for a
            token that stays. Padding's is padding, and content's is content, where there is any.
    """
    batch, tokens, _ = metric.shape
    score = metric.new_full((batch, tokens), -torch.inf)
    partner = torch.arange(tokens, device=metric.device).expand(batch, tokens).clone()
    sources, targets = slice(protect, None, 2), slice(protect + 1, None, 2)
    if tokens - protect < 2:
        return score, partner
    cosine = (metric[:, sources] @ metric[:, targets].transpose(1, 2)).nan_to_num(nan=-1.0)
    there = size > 0
    alike = there[:, sources, None] == there[:, None, targets]
    likeness = torch.where(alike, cosine, UNLIKE_SCORE)
    best = likeness.amax(-1)
    # Unlike max(), argmax() of zeros and ones promises the first of equals.
    first = (likeness == best[..., None]).to(torch.int8).argmax(-1)
    score[:, sources] = torch.where(there[:, sources], best, PADDING_SCORE)
    partner[:, sources] = protect + 1 + 2 * first
    return score, partner


def merge_rank_reference(score: torch.Tensor) -> torch.Tensor:
    """Return how many tokens of the same sequence go before each one: those of a better score, and earlier ones of an equal.

    Args:
        score: [B, T], float32, no NaN.

    Returns:
        [B, T], int64: a permutation of 0 to T - 1 in each row.
    """
    return score.argsort(stable=True, dim=-1, descending=True).argsort(-1)


def merge_plan_reference(rank: torch.Tensor, partner: torch.Tensor, kept: int) -> torch.Tensor:
    """Return the row that every token is in after the best T - kept went; the others stay in their order.

    Args:
        rank: [B, T], int64: the order in which tokens go.
        partner: [B, T], int64: which token takes each in. It must not go itself.
        kept: the number of rows, at most T. T - kept must be no more than the tokens that may go.

    Returns:
        [B, T], int64, from 0 to kept - 1.
    """
    goes = rank < rank.shape[1] - kept
    row = (~goes).to(_INDEX).cumsum(1) - 1
    return torch.where(goes, row.gather(1, partner), row)


def merge_reference(
    x: torch.Tensor, size: torch.Tensor, destination: torch.Tensor, kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of the tokens that share a row, weighted by their sizes, and the sums of the sizes.

    A token that is alone in its row keeps its bits. What has size 0 has no weight beside what has not; alone with its like, all
    weigh the same.

    Args:
        x: [B, T, F], floating point; computed in float32, float64 for float64.
        size: [B, T], float32, no less than 0.
        destination: [B, T], int64, from 0 to kept - 1: the row of every token.
        kept: the number of rows.

    Returns:
        merged: [B, kept, F] in x's dtype.
        sizes: [B, kept], float32.
    """
    sizes = size.new_zeros(size.shape[0], kept).scatter_add(1, destination, size)
    count = size.new_zeros(size.shape[0], kept).scatter_add(1, destination, torch.ones_like(size))
    own = torch.where(sizes == 0, 1.0, 0.0).gather(1, destination) + size
    weight = own / torch.where(sizes == 0, count, sizes).gather(1, destination)
    rows = destination[..., None].expand(x.shape)
    wide = computed_in(x.dtype)
    merged = x.new_zeros((x.shape[0], kept, x.shape[2]), dtype=wide)
    return merged.scatter_add(1, rows, x.to(wide) * weight[..., None]).to(x.dtype), sizes


def unmerge_reference(x: torch.Tensor, destination: torch.Tensor) -> torch.Tensor:
    """Return a tensor with every token again: each has what it was merged into.

    Args:
        x: [B, kept, ...], any dtype.
        destination: [B, T], int64, from 0 to kept - 1: the row of every token.

    Returns:
        [B, T, ...] in x's dtype.
    """
    rest = x.shape[2:]
    rows = destination.reshape(*destination.shape, *(1 for _ in rest)).expand(*destination.shape, *rest)
    return x.gather(1, rows)


def _metric_fake(keys: torch.Tensor) -> torch.Tensor:
    expect(keys.dim() == 4, f"keys must be [batch, heads, tokens, features], got {keys.dim()} sizes")
    expect(keys.dtype.is_floating_point, f"keys must be floating point, got {keys.dtype}")
    return keys.new_empty((keys.shape[0], keys.shape[2], keys.shape[3]), dtype=torch.float32)


def _match_fake(metric: torch.Tensor, size: torch.Tensor, protect: int) -> tuple[torch.Tensor, torch.Tensor]:
    expect(metric.dim() == 3, f"the metric must be [batch, tokens, features], got {metric.dim()} sizes")
    _expect_per_token("size", size, torch.float32, metric)
    expect(protect >= 0, f"protect must be at least 0, got {protect}")
    return metric.new_empty(size.shape), metric.new_empty(size.shape, dtype=_INDEX)


def _rank_fake(score: torch.Tensor) -> torch.Tensor:
    expect(score.dim() == 2, f"the score must be [batch, tokens], got {score.dim()} sizes")
    return score.new_empty(score.shape, dtype=_INDEX)


def _plan_fake(rank: torch.Tensor, partner: torch.Tensor, kept: int) -> torch.Tensor:
    _expect_per_token("rank", rank, _INDEX, partner)
    return partner.new_empty(partner.shape)


def _merge_fake(x: torch.Tensor, size: torch.Tensor, destination: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    expect(x.dim() == 3, f"x must be [batch, tokens, features], got {x.dim()} sizes")
    expect(x.dtype.is_floating_point, f"x must be floating point, got {x.dtype}")
    _expect_per_token("size", size, torch.float32, x)
    _expect_per_token("destination", destination, _INDEX, x)
    return x.new_empty((x.shape[0], kept, x.shape[2])), size.new_empty((x.shape[0], kept))


def _unmerge_fake(x: torch.Tensor, destination: torch.Tensor) -> torch.Tensor:
    expect(x.dim() >= 2, f"x must be [batch, rows, ...], got {x.dim()} sizes")
    expect(destination.dim() == 2, f"destination must be [batch, tokens], got {destination.dim()} sizes")
    expect(destination.dtype == _INDEX, f"destination must be int64, got {destination.dtype}")
    return x.new_empty((*destination.shape, *x.shape[2:]))


def _expect_per_token(name: str, tensor: torch.Tensor, dtype: torch.dtype, like: torch.Tensor) -> None:
    expect(tensor.dim() == 2 and tensor.dtype == dtype, f"{name} must be {dtype} [batch, tokens], got {tensor.dtype}")
    for dim in (0, 1):
        expect(tensor.shape[dim] == like.shape[dim], f"{name} is {tuple(tensor.shape)}, expected {tuple(like.shape[:2])}")


def _first_shape(program: Program, node: fx.Node) -> tuple[Any, ...]:
    return program.shape(node.args[0])  # type: ignore[arg-type]


def _metric_flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    batch, heads, tokens, features = _first_shape(program, node)
    return batch * tokens * features * (heads + 4)


def _match_flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    batch, tokens, features = _first_shape(program, node)
    # Half of the tokens meet the other half.
    return batch * tokens * tokens * (features + 1) // 2


def _rank_flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    batch, tokens = _first_shape(program, node)
    return 2 * batch * tokens * tokens


def _merge_flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    batch, tokens, features = _first_shape(program, node)
    return 2 * batch * tokens * features


merge_metric = define("merge_metric(Tensor keys) -> Tensor", merge_metric_reference, _metric_fake, _metric_flops)
merge_match = define(
    "merge_match(Tensor metric, Tensor size, int protect) -> (Tensor, Tensor)", merge_match_reference, _match_fake, _match_flops
)
merge_rank = define("merge_rank(Tensor score) -> Tensor", merge_rank_reference, _rank_fake, _rank_flops)
merge_plan = define(
    "merge_plan(Tensor rank, Tensor partner, SymInt kept) -> Tensor", merge_plan_reference, _plan_fake, _rank_flops
)
merge = define(
    "merge(Tensor x, Tensor size, Tensor destination, SymInt kept) -> (Tensor, Tensor)",
    merge_reference,
    _merge_fake,
    _merge_flops,
)
unmerge = define("unmerge(Tensor x, Tensor destination) -> Tensor", unmerge_reference, _unmerge_fake, lambda program, node: 0)
