"""How tokens are merged in ONNX: products, TopK, and sums by ScatterElements.

What is merged is a sum divided by a sum: the mean that PyTorch's scatter can take has no form in ONNX, and is exported as one
value written over another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from graphwright.ir import dialect
from graphwright.ir.ops.merge import (
    PADDING_SCORE,
    UNLIKE_SCORE,
    merge_metric_reference,
    merge_plan_reference,
    merge_reference,
    unmerge_reference,
)


def merge_match(metric: torch.Tensor, size: torch.Tensor, protect: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `graphwright::merge_match` without slices, whose sizes would have to be told apart for short sequences.

    As many sources and partners are taken as there can be without protected tokens; those past the end are left out by value.
    """
    tokens = metric.shape[1]
    there = size > 0
    place = torch.arange(tokens, device=metric.device)
    pair = 2 * torch.arange(tokens // 2 + 1, device=metric.device) + protect
    source, target = pair.clamp(max=tokens - 1), (pair + 1).clamp(max=tokens - 1)
    cosine = metric.index_select(1, source) @ metric.index_select(1, target).transpose(1, 2)
    cosine = torch.where(cosine.isnan(), -1.0, cosine)
    alike = there.index_select(1, source)[:, :, None] == there.index_select(1, target)[:, None, :]
    likeness = torch.where(pair + 1 < tokens, torch.where(alike, cosine, UNLIKE_SCORE), -torch.inf)
    number = ((place - protect) // 2).clamp(min=0)
    best = likeness.amax(-1).index_select(1, number)
    at = likeness.argmax(-1).index_select(1, number)
    goes = (place >= protect) & ((place - protect) % 2 == 0) & (best > -torch.inf)
    score = torch.where(goes, torch.where(there, best, PADDING_SCORE), -torch.inf)
    return score, torch.where(goes, 2 * at + (protect + 1), place)


def merge_rank(score: torch.Tensor) -> torch.Tensor:
    """Return `graphwright::merge_rank` as TopK, which puts the earlier of equals first, turned round."""
    order = score.topk(score.shape[1]).indices
    place = torch.arange(score.shape[1], device=score.device).expand(score.shape)
    return torch.zeros_like(order).scatter(1, order, place)


LOWERINGS: Mapping[Any, Callable[..., Any]] = {
    dialect.merge_metric: merge_metric_reference,
    dialect.merge_match: merge_match,
    dialect.merge_rank: merge_rank,
    dialect.merge_plan: merge_plan_reference,
    dialect.merge: merge_reference,
    dialect.unmerge: unmerge_reference,
}
"""Operation -> what is traced in its place."""
