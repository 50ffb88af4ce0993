"""Text for the real models, and how near results are to others."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from graphwright.tools import reference

ROWS, TOKENS = 4, 256
"""A call of the language model: sequences, and tokens of each."""

SENTENCES, SENTENCE = 32, 64
"""A call of the sentence encoder: sentences, and the most tokens of each."""


def language_calls(count: int) -> list[dict[str, Any]]:
    """Return calls of the small language model, text that it was not trained on, each of other text.

    Args:
        count: number of calls.
    """
    rows = reference.held_out_ids(count * ROWS * TOKENS).reshape(count, ROWS, TOKENS)
    return [{"input_ids": ids} for ids in rows]


def sentence_calls(count: int) -> list[dict[str, Any]]:
    """Return calls of MiniLM, padded: first paragraphs of docstrings, in random order, each of other ones.

    Args:
        count: number of calls.
    """
    tokenizer = reference.load_minilm_tokenizer()
    texts = list({d.text.partition("\n\n")[0]: None for d in itertools.islice(reference.each_docstring(), 200 * count)})
    random.Random(0).shuffle(texts)
    groups = [texts[k * SENTENCES : (k + 1) * SENTENCES] for k in range(count)]
    options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": SENTENCE}
    return [dict(tokenizer(group, **options)) for group in groups]


def next_token_quality(
    calls: Sequence[Mapping[str, Any]], expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Return how a language model's predictions differ from the unchanged one's.

    Args:
        calls: with `input_ids`, [batch, tokens].
        expected: logits of the unchanged model, [batch, tokens, words].
        found: logits.

    Returns:
        `nll_change`, the rise of the loss in nats per token; `kl`, the divergence from the unchanged model's distribution in
        nats per token; `top1_agreement`, the share of tokens after which both find the same word the most likely.
    """
    loss = divergence = agreement = 0.0
    tokens = places = 0
    for call, old, new in zip(calls, expected, found, strict=True):
        ids = call["input_ids"][:, 1:].flatten()
        old_log, new_log = (F.log_softmax(logits.double(), -1) for logits in (old, new))
        for sign, log in ((1, new_log), (-1, old_log)):
            loss += sign * F.nll_loss(log[:, :-1].flatten(0, 1), ids, reduction="sum").item()
        divergence += F.kl_div(new_log, old_log, reduction="sum", log_target=True).item()
        agreement += (old.argmax(-1) == new.argmax(-1)).sum().item()
        tokens += ids.numel()
        places += old.shape[:-1].numel()
    return {"nll_change": loss / tokens, "kl": divergence / places, "top1_agreement": agreement / places}


def sentence_quality(
    calls: Sequence[Mapping[str, Any]], expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Return how sentence vectors, means over the tokens that are there, differ from the unchanged model's.

    Args:
        calls: with `attention_mask`, [batch, tokens].
        expected: hidden states of the unchanged model, [batch, tokens, features].
        found: hidden states.

    Returns:
        `cosine`, the mean similarity to the unchanged vectors; `top10_overlap`, the share of the ten nearest other sentences
        by the unchanged vectors that are among the ten nearest.
    """
    old, new = (
        F.normalize(torch.cat([_pooled(call, states) for call, states in zip(calls, all_states, strict=True)]), dim=-1)
        for all_states in (expected, found)
    )
    nearest = []
    for vectors in (old, new):
        similar = (vectors @ vectors.T).fill_diagonal_(-torch.inf)
        nearest.append(similar.topk(min(10, len(vectors) - 1), dim=-1).indices)
    common = (nearest[0][:, :, None] == nearest[1][:, None, :]).any(-1)
    return {"cosine": (old * new).sum(-1).mean().item(), "top10_overlap": common.double().mean().item()}


def _pooled(call: Mapping[str, Any], states: torch.Tensor) -> torch.Tensor:
    mask = call["attention_mask"][..., None].to(states.dtype)
    mean: torch.Tensor = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
    return mean
