"""What is measured: prompts that are continued greedily, and when their tokens come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.ir.errors import InputError
from graphwright.tools import reference


@dataclass(frozen=True)
class Case:
    """What a rival is made for.

    Args:
        model: the language model; rivals share it and leave it as it is.
        prompts: [B, P], int64.
        new: tokens that follow each prompt, at least 2.
        threads: number of threads; torch's own number is this one while the rival is made and run.
    """

    model: Any
    prompts: torch.Tensor
    new: int
    threads: int

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.prompts.shape[1] + self.new

    @property
    def clock(self) -> Callable[[], float]:
        """The thread's own CPU time with one thread, wall time with more; in seconds."""
        return time.thread_time if self.threads == 1 else time.perf_counter


@dataclass(frozen=True)
class Decoded:
    """One continuation of all prompts.

    Args:
        tokens: [B, new], int64.
        first_s: time until the first token of each.
        rest_s: time from then until the last.
    """

    tokens: torch.Tensor
    first_s: float
    rest_s: float


Run = Callable[[], Decoded]
"""Continues the case's prompts once."""


def prompts_of(model: Any, batch: int, context: int, new: int) -> torch.Tensor:
    """Return prompts of text that the model has not seen, one part of it after the other, [B, context - new].

    Args:
        model: the language model.
        batch: B, number of prompts.
        context: tokens of a prompt and its answer.
        new: tokens of the answer.

    Raises:
        InputError: the model has fewer positions, there is no room for a prompt, or there is less text.
    """
    positions = model.config.max_position_embeddings
    if not new < context <= positions:
        raise InputError(
            f"decode: a context is a prompt and {new} new tokens, more than {new} and at most the model's {positions} "
            f"positions; got {context}"
        )
    length = context - new
    return reference.held_out_ids(batch * length).view(batch, length)


def streamed(case: Case, generate: Callable[[Callable[[], None]], torch.Tensor]) -> Run:
    """Return what runs a generator.

    Args:
        case: what it continues.
        generate: returns prompts and answers, [B, P + new], and calls what it is given as soon as a token of each is known.
    """

    def run() -> Decoded:
        stamps: list[float] = []
        start = case.clock()
        result = generate(lambda: stamps.append(case.clock()))
        return Decoded(result[:, case.prompts.shape[1] :], stamps[0] - start, stamps[-1] - stamps[0])

    return run


def looped(case: Case, first: Callable[[], torch.Tensor], following: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    """Return what runs a loop of steps.

    Args:
        case: what it continues.
        first: returns the tokens after the prompts, [B, 1].
        following: returns the tokens that follow some, [B, 1].
    """

    def run() -> Decoded:
        start = case.clock()
        tokens = [first()]
        between = case.clock()
        for _ in range(case.new - 1):
            tokens.append(following(tokens[-1]))
        end = case.clock()
        return Decoded(torch.cat(tokens, 1), between - start, end - between)

    return run
