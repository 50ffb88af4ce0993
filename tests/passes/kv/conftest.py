"""Small attention models, with what can be wrong with them by name."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding, pad, scaled_dot_product_attention

import graphwright
from graphwright.pipeline import run_passes

WIDTH, WORDS = 32, 97


class Toy(nn.Module):
    """One attention layer with something more, or another mask.

    Args:
        kind: what is added to the embedding, or what mask there is; "plain" for nothing.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.words = nn.Embedding(WORDS, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WORDS)
        self.register_buffer("table", torch.randn(64, WIDTH))
        self.register_buffer("ids", torch.arange(64)[None])
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.1]))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        batch, tokens = input_ids.shape
        x = self.added(self.words(input_ids), tokens)
        q, k, v = (t.view(batch, tokens, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = self.mask(torch.arange(tokens))
        y = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, WIDTH))

    def added(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        rows = torch.arange(tokens)
        match self.kind:
            case "mean":
                return x + x.mean(1, keepdim=True)
            case "running sum":
                return x + x.cumsum(1)
            case "shift":
                return x + pad(x[:, :-1], (0, 0, 1, 0))
            case "roll":
                return x + torch.roll(x, 1, 1)
            case "flip":
                return x + x.flip(1)
            case "scrambling view":
                return x + x.transpose(1, 2).reshape(x.shape)
            case "length as a factor":
                return x * (1.0 / tokens)
            case "length in a tensor":
                return x + torch.full((1, 1, 1), tokens)
            case "end of a table":
                return x + self.table[64 - tokens :]
            case "positions from the end":
                return x + embedding(torch.arange(tokens - 1, -1, -1), self.table)
            case "last position":
                return x + rows.float().max()
            case "random numbers":
                return x + torch.rand(tokens)[None, :, None]
            case "table":
                return x + self.table[:tokens]
            case "table of positions":
                return x + embedding(self.ids[:, :tokens], self.table)
            case "waves":
                angles = rows[:, None].float() * torch.exp(torch.arange(WIDTH // 2) * -0.3)
                return x + torch.cat([angles.sin(), angles.cos()], -1)
        return x

    def mask(self, rows: torch.Tensor) -> torch.Tensor | None:
        q, k = rows[:, None], rows[None, :]
        masks = {
            "one step ahead": lambda: k <= q + 1,
            "reversed": lambda: (rows.shape[0] - 1 - k) <= q,
            "prefix": lambda: (k <= q) | (k < 3),
            "both ways": lambda: k >= 0,
            "before or own": lambda: (k < q) | (k == q),
            "window": lambda: (k <= q) & (k > q - 4),
            "sinks and window": lambda: (k <= q) & ((k > q - 4) | (k < 2)),
            "triangle": lambda: torch.ones(rows.shape[0], rows.shape[0], dtype=torch.bool).tril(),
            "slopes": lambda: torch.where(k <= q, (k - q).float() * self.slopes[:, None, None], -torch.inf),
        }
        made = masks.get(self.kind)
        return None if made is None else made()[None] if self.kind == "slopes" else made()[None, None]


@pytest.fixture(scope="session")
def toy():
    """Return a toy model by its kind."""

    @functools.cache
    def make(kind: str) -> nn.Module:
        torch.manual_seed(0)
        return Toy(kind).eval()

    return make


@pytest.fixture(scope="session")
def raised(toy):
    """Return a toy's program after recognition, by its kind."""

    @functools.cache
    def make(kind: str):
        ids = torch.randint(0, WORDS, (2, 9), generator=torch.Generator().manual_seed(0))
        return run_passes(graphwright.capture(toy(kind), ids, check=False))

    return make
