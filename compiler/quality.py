"""How far results are from the original's: errors of every tensor, and what they mean for a language or embedding model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from graphwright.ir.program import Program, calls

aten = torch.ops.aten


@dataclass(frozen=True)
class Quality:
    """How far results are from the original's, over all sample calls.

    Args:
        relative_error: the largest difference of an element over the largest value of its tensor, of all tensors of floating
            point numbers; infinite where one is finite and the other not.
        different: elements of other tensors that differ.
        cosine: the mean cosine similarity of the vectors that the results consist of; None where there are logits, and for
            results without such tensors.
        kl: Kullback-Leibler divergence of the next token's distribution from the original's, in nats, the mean over tokens;
            None without logits.
        top1_agreement: ratio of the tokens at which both find the same token the likeliest to all; None without logits.
        nll_change: by how much the negative log-likelihood of the sample's next token rises, in nats per token; None unless
            the model is causal.
        tokens: how many tokens these rest on; 0 without logits.
    """

    relative_error: float
    different: int
    cosine: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    nll_change: float | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Logits:
    """Where a language model's logits are.

    Args:
        result: the number of the result that holds them, [B, T, V].
        ids: the number of the input of token ids, [B, T].
        mask: the number of the input that is 0 for padding; None for none.
    """

    result: int
    ids: int
    mask: int | None


def find_logits(program: Program) -> Logits | None:
    """Return where the logits are: scores for each token of the table that the token ids are looked up in; None for none."""
    for node in calls(program.graph, aten.embedding.default):
        ids, table = node.args[1], node.args[0]
        if not isinstance(ids, fx.Node) or ids.op != "placeholder" or ids.meta["val"].dim() != 2:
            continue
        shape = (*program.shape(ids), program.shape(table)[0])  # type: ignore[arg-type]
        for at, result in enumerate(program.results):
            if isinstance(result, fx.Node) and result.meta["val"].is_floating_point() and program.shape(result) == shape:
                masks = [k for k, spec in enumerate(program.signature.tensors) if spec.name.endswith("attention_mask")]
                same = [k for k in masks if program.shape(program.inputs[k]) == program.shape(ids)]
                return Logits(at, program.inputs.index(ids), same[0] if same else None)
    return None


class Comparison:
    """Collects how far results are from the original's.

    Args:
        logits: where they are; None for a model without.
        causal: whether the logits of a token depend on no later one.
    """

    def __init__(self, logits: Logits | None, causal: bool) -> None:
        self._logits, self._causal = logits, causal
        self._error, self._different = 0.0, 0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, inputs: Sequence[torch.Tensor], expected: Sequence[Any], found: Sequence[Any]) -> None:
        """Take the results of one call in.

        Args:
            inputs: its tensors.
            expected: the original's results, flat.
            found: the results to judge, flat.
        """
        for one, other in zip(expected, found, strict=True):
            if not isinstance(one, torch.Tensor):
                self._different += int(one != other)
            elif not one.is_floating_point():
                self._different += int((one != other).sum())
            elif one.numel():
                self._error = max(self._error, relative_error(one, other))
                if self._logits is None and one.dim():
                    self._add("cosine", F.cosine_similarity(one.double(), other.double(), dim=-1))
        if self._logits is not None:
            self._language(inputs, expected[self._logits.result], found[self._logits.result])

    def quality(self) -> Quality:
        """Return what was found."""
        means = {name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]}
        return Quality(self._error, self._different, **means, tokens=self._counts.get("kl", 0))

    def _language(self, inputs: Sequence[torch.Tensor], expected: torch.Tensor, found: torch.Tensor) -> None:
        assert self._logits is not None
        one, other = (F.log_softmax(logits.double(), -1) for logits in (expected, found))
        mask = inputs[self._logits.mask] != 0 if self._logits.mask is not None else torch.ones(one.shape[:2], dtype=torch.bool)
        self._add("kl", (one.exp() * (one - other)).nan_to_num(0.0).sum(-1)[mask])
        self._add("top1_agreement", (one.argmax(-1) == other.argmax(-1)).double()[mask])
        if self._causal:
            after = inputs[self._logits.ids][:, 1:, None].long()
            rise = (one[:, :-1].gather(2, after) - other[:, :-1].gather(2, after))[..., 0]
            self._add("nll_change", rise[mask[:, 1:]])

    def _add(self, name: str, values: torch.Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(values.sum())
        self._counts[name] = self._counts.get(name, 0) + values.numel()


def relative_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the largest difference over the largest value; infinite where shapes or what is finite differ."""
    if expected.shape != found.shape or bool((expected.isfinite() != found.isfinite()).any()):
        return math.inf
    gap = (expected.double() - found.double()).abs()[expected.isfinite()]
    largest = float(gap.max()) if gap.numel() else 0.0
    scale = float(expected.double()[expected.isfinite()].abs().max()) if gap.numel() else 0.0
    return largest / scale if scale else largest


def with_last_changed(inputs: Sequence[torch.Tensor], logits: Logits) -> list[torch.Tensor]:
    """Return the tensors of a call with another last token, by which a causal model is told."""
    changed = list(inputs)
    changed[logits.ids] = ids = inputs[logits.ids].clone()
    ids[:, -1] = torch.where(ids[:, -1] == 0, 1, 0)
    return changed


def names_of(quality: Quality) -> Mapping[str, float]:
    """Return what there is, by name, without what is None."""
    return {name: value for name, value in vars(quality).items() if value is not None}
