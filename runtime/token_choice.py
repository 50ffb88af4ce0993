"""Choosing the next token from scores: the likeliest, or drawn from the likeliest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphwright.ir.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn: as transformers does it, temperature first, then the k likeliest, then the nucleus.

    Args:
        temperature: scores are divided by it; above 0.
        top_k: only the k likeliest tokens are kept; 0 for all.
        top_p: of these only the likeliest that together have at least this probability, above 0 and at most 1.
        seed: of the random numbers; None for another one each time.

    Raises:
        OptionError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise OptionError(f"generate: temperature must be above 0, got {self.temperature}; do_sample=False is greedy")
        if self.top_k < 0:
            raise OptionError(f"generate: top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"generate: top_p must be above 0 and at most 1, got {self.top_p}")


def filtered(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return scores [B, V] with minus infinity for tokens that must not be drawn.

    Args:
        scores: [B, V], floating point.
        sampling: what is kept.
    """
    scores = scores.float() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = torch.topk(scores, sampling.top_k).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = torch.sort(scores)
        behind = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        # The likeliest always stays.
        behind[..., -1] = False
        scores = scores.masked_fill(behind.scatter(-1, order, behind), -torch.inf)
    return scores


class Chooser:
    """Chooses tokens one after the other.

    Args:
        sampling: how they are drawn; None for the likeliest.
        device: where the scores are.
    """

    def __init__(self, sampling: Sampling | None, device: torch.device) -> None:
        self._sampling = sampling
        self._generator: torch.Generator | None = None
        if sampling is not None:
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the next tokens [B], int64, for scores [B, V]."""
        if self._sampling is None:
            return scores.argmax(-1)
        chances = filtered(scores, self._sampling).softmax(-1)
        return torch.multinomial(chances, 1, generator=self._generator).squeeze(1)
