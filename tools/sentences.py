"""A sentence encoder as one module, from token ids to unit vectors, and texts in batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from . import reference


class SentenceEncoder(nn.Module):
    """all-MiniLM-L6-v2 with what its authors put behind the encoder: the mean over the tokens, scaled to length 1.

    Args:
        encoder: a Hugging Face encoder.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return embeddings, float32 [B, E], each of length 1.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, S], 1 for tokens and 0 for padding.
        """
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[:, :, None].to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return functional.normalize(mean, dim=-1)


class Batch(NamedTuple):
    """Texts of about the same length.

    Args:
        rows: the numbers of the texts.
        inputs: the encoder's arguments, padded to the longest text.
        tokens: number of tokens without padding.
    """

    rows: list[int]
    inputs: dict[str, torch.Tensor]
    tokens: int


def load_encoder() -> SentenceEncoder:
    """Return the encoder in evaluation mode.

    Raises:
        InputError: the weights are not installed.
    """
    return SentenceEncoder(reference.load_minilm()).eval()


def batches(texts: Sequence[str], *, size: int, max_tokens: int) -> list[Batch]:
    """Return texts in batches by length, shortest first.

    Args:
        texts: what to encode.
        size: texts in a batch; the last one may have fewer.
        max_tokens: what is longer is cut.

    Raises:
        InputError: the tokenizer is not installed.
    """
    tokenizer = reference.load_minilm_tokenizer()
    encoded: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    order = sorted(range(len(encoded)), key=lambda k: len(encoded[k]))
    return [_batch(order[k : k + size], encoded, tokenizer.pad_token_id) for k in range(0, len(order), size)]


def _batch(rows: list[int], encoded: Sequence[Sequence[int]], padding: int) -> Batch:
    longest = max(len(encoded[k]) for k in rows)
    input_ids = torch.full((len(rows), longest), padding)
    attention_mask = torch.zeros_like(input_ids)
    for row, k in enumerate(rows):
        input_ids[row, : len(encoded[k])] = torch.tensor(encoded[k])
        attention_mask[row, : len(encoded[k])] = 1
    tokens = sum(len(encoded[k]) for k in rows)
    return Batch(rows, {"input_ids": input_ids, "attention_mask": attention_mask}, tokens)
