"""What each format of each layer's cache costs on sample calls, and the formats that a budget leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.ir.errors import PassError
from graphwright.ir.program import Program
from graphwright.ir.signature import evaluate

from .cache_format import LARGEST_GROUP, CacheFormat, Site, attentions, rewrite, site_of
from .derivation import CAPACITY
from .states import exchange_states

CHUNK = 128
"""Tokens of a call: those of one do not read each other's codes."""

LEAST_TOKENS = 16
"""Tokens that scores have to rest on."""


@dataclass(frozen=True)
class Measured:
    """Scores of formats: the mean divergence of the next token's distribution from the exact one, in nats per token.

    Args:
        scores: layer -> bits -> score, with that layer alone in that format.
        tokens: that they rest on.
    """

    scores: Mapping[int, Mapping[int, float]]
    tokens: int

    @classmethod
    def on(
        cls, program: Program, sites: Sequence[Site], forms: Mapping[int, CacheFormat], samples: Sequence[Any], who: str
    ) -> Measured:
        """Return scores measured on sample calls.

        Args:
            program: with caches, all in the model's own dtype.
            sites: the layers to score.
            forms: bits -> the format to score.
            samples: sample calls of the model: (args, kwargs), or named arguments.
            who: the name of the pass, for errors.

        Raises:
            PassError: there are no calls, or none is long enough to be quantised.
        """
        slots = max(form.slots for form in forms.values())
        calls = _long_enough(program, samples, slots + LEAST_TOKENS, who)
        exact = [_predictions(program, ids, slots) for ids in calls]
        scores: dict[int, dict[int, float]] = {}
        for site in sites:
            for bits, form in forms.items():
                changed = _with_one(program, site, form)
                found = [_divergence(old, _predictions(changed, ids, slots)) for old, ids in zip(exact, calls, strict=True)]
                total = sum(one.numel() for one in found)
                mean = sum(float(one.sum()) for one in found) / total
                scores.setdefault(site.layer, {})[bits] = mean if math.isfinite(mean) else math.inf
        return cls(scores, sum(old.shape[0] * old.shape[1] for old in exact))

    def of(self, layer: int) -> dict[int, float]:
        """Return the scores of a layer by the bits."""
        return dict(self.scores[layer])


def choose(costs: Sequence[Mapping[int, float]], scores: Sequence[Mapping[int, float]], budget: float) -> list[int]:
    """Return the bits of each layer: from the most on, what saves most bytes for what it adds to the score goes first.

    Args:
        costs: of each layer, bits -> bytes per token; the most bits are the exact format, without a score.
        scores: of each layer, bits -> score.
        budget: bytes per token of all, at least what the cheapest formats take.
    """
    bits = [max(cost) for cost in costs]

    def moves() -> list[tuple[float, float, int, int]]:
        found = []
        for layer, now in enumerate(bits):
            for other in costs[layer]:
                saved = costs[layer][now] - costs[layer][other]
                if other < now and saved > 0:
                    added = max(scores[layer][other] - scores[layer].get(now, 0.0), 0.0)
                    found.append((added / saved, -saved, layer, other))
        return found

    while sum(cost[now] for cost, now in zip(costs, bits, strict=True)) > budget:
        _, _, layer, other = min(moves())
        bits[layer] = other
    return bits


def _with_one(program: Program, site: Site, form: CacheFormat) -> Program:
    """Return the program with one layer in a format."""
    result = program.copy()
    node = attentions(result)[site.layer]
    found = site_of(result, node, site.layer, lists=True)
    assert isinstance(found, Site)
    exchange_states(result, found.caches, rewrite(result, found, form))
    return result


def _long_enough(program: Program, samples: Sequence[Any], least: int, who: str) -> list[torch.Tensor]:
    """Return the tokens of the calls that are long enough, without rows that have padding."""
    if not samples:
        raise PassError(
            f"{who}: a budget is met by what layers cost on sample calls, and there are none: compile with calibration=[...], "
            f"a list of (args, kwargs) or of dicts of named arguments"
        )
    name = program.signature.tensors[0].name
    found, longest = [], 0
    for number, sample in enumerate(samples):
        args, kwargs = ((), sample) if isinstance(sample, Mapping) else sample
        ids = kwargs.get(name, args[0] if args else None)
        if not isinstance(ids, torch.Tensor) or ids.dim() < 2:
            raise PassError(f"{who}: calibration call {number} has no {name} of [batch, tokens]")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor):
            ids = ids[(mask != 0).all(1)]
        longest = max(longest, ids.shape[1] if len(ids) else 0)
        if len(ids) and ids.shape[1] >= least:
            found.append(ids)
    if not found:
        raise PassError(
            f"{who}: the longest calibration call without padding has {longest} tokens; tokens are quantised when {least} are "
            f"there: give longer calls, or lower residual or group_size"
        )
    return found


def _predictions(program: Program, ids: torch.Tensor, slots: int) -> torch.Tensor:
    """Return the scores of what follows each token that reads codes, [batch, tokens, words]."""
    states = _empty_states(program, ids)
    module = program.module()
    results = []
    start, stop = 0, min(slots, ids.shape[1])
    while start < ids.shape[1]:
        past = torch.full((len(ids),), start, dtype=torch.int64, device=ids.device)
        with torch.no_grad():
            outputs = module(ids[:, start:stop], past, *states)
        for at, number in enumerate(program.states.values()):
            states[at] = outputs[number]
        if start:
            results.append(outputs[0])
        start, stop = stop, min(stop + CHUNK, ids.shape[1])
    return torch.cat(results, 1)


def _empty_states(program: Program, ids: torch.Tensor) -> list[torch.Tensor]:
    sizes = {"batch": len(ids), CAPACITY: -(-ids.shape[1] // LARGEST_GROUP) * LARGEST_GROUP}
    made = []
    for spec in program.signature.tensors:
        if spec.name in program.states:
            shape = [n if isinstance(n, int) else evaluate(n, sizes) for n in spec.shape]
            made.append(torch.zeros(shape, dtype=spec.dtype, device=ids.device))
    return made


def _divergence(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the Kullback-Leibler divergence of each token's distribution from the exact one, [batch, tokens], float64."""
    parts = []
    for pair in zip(torch.split(exact, CHUNK, 1), torch.split(other, CHUNK, 1), strict=True):
        # In float32 it would be lost in the rounding of the logarithms.
        old, new = (scores.double().log_softmax(-1) for scores in pair)
        parts.append((old.exp() * (old - new)).sum(-1))
    return torch.cat(parts, 1)
