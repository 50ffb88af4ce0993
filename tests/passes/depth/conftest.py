"""A small language model whose layers can be taken out, to compare with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphwright
from graphwright.ir.program import Program
from graphwright.passes.base import Context

VOCABULARY = 61


class Layer(nn.Module):
    """Attention and a feed-forward network: "pre" or "post" norm, or "parallel" branches; each can be switched off."""

    def __init__(self, form: str, width: int = 32) -> None:
        super().__init__()
        self.form = form
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 48), nn.Linear(48, width)
        self.off: set[str] = set()

    def attention(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        def attend(y: torch.Tensor) -> torch.Tensor:
            return 0 if "attention" in self.off else self.attention(y, causal)  # type: ignore[return-value]

        def feed(y: torch.Tensor) -> torch.Tensor:
            return 0 if "feed-forward" in self.off else self.down(F.relu(self.up(y)))  # type: ignore[return-value]

        if self.form == "parallel":
            return x + (attend(self.norm1(x)) + feed(self.norm2(x)))
        if self.form == "post":
            x = self.norm1(x + attend(x))
            return self.norm2(x + feed(x))
        x = x + attend(self.norm1(x))
        return x + feed(self.norm2(x))


class Language(nn.Module):
    """Embedding, layers, logits; `streams` keeps what enters each layer and leaves the last."""

    def __init__(self, form: str = "pre", layers: int = 4, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.layers = nn.ModuleList(Layer(form) for _ in range(layers))
        self.norm, self.head, self.causal = nn.LayerNorm(32), nn.Linear(32, VOCABULARY), causal
        with torch.no_grad():
            for k, layer in enumerate(self.layers):
                # Later layers do more, so that each has an importance of its own.
                layer.down.weight.mul_(1.0 + 1.1 * ((k + 2) % layers))
                layer.out.weight.mul_(1.0 + 0.7 * ((k + 1) % layers))
        self.eval()

    def streams(self, ids: torch.Tensor) -> list[torch.Tensor]:
        found = [self.embed(ids)]
        for layer in self.layers:
            found.append(layer(found[-1], self.causal))
        return found

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.streams(ids)[-1]))


def ids(seed: int, batch: int = 3, tokens: int = 17) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@functools.cache
def language(form: str = "pre", causal: bool = True) -> tuple[Language, Program]:
    model = Language(form, causal=causal)
    return model, graphwright.capture(model, ids(0), check=False)


@pytest.fixture
def make() -> Callable[..., tuple[Language, Program]]:
    """Return a function that gives a model of a form and its program; captured once, so that neither may be changed."""
    return language


@pytest.fixture
def context() -> Context:
    """Two calls of calibration: 102 tokens."""
    return Context(tuple({"ids": ids(seed)} for seed in (1, 2)))


@pytest.fixture
def tokens() -> Callable[..., Any]:
    """Return a function that makes token ids."""
    return ids
