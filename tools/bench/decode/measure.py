"""Measuring the rivals on a case: first that their tokens are right, then in turns how fast they come."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from graphwright.ir.errors import InputError
from graphwright.tools.bench.models.measure import (
    FEWEST_ROUNDS,
    ROUNDS_BUDGET_S,
    SETTLE_S,
    WrongResultError,
    p20,
    reason,
    refuse_strays,
)
from graphwright.tools.bench.models.rivals import forget_compiled

from .case import Case, Decoded, Run, prompts_of
from .rivals import GENERATE, OURS, RIVALS

BAR = 3.0
"""Ratio that we want at least where one sequence is continued."""


@dataclass(frozen=True)
class Timing:
    """One rival in one case.

    Args:
        tokens_per_s: new tokens of all sequences in a second, median; what comes with the first token is not counted.
        step_ms: median time from one token of each sequence to the next.
        step_p20_ms: what a fifth of the samples stay below.
        first_ms: median time until the first token of each sequence.
        samples: number of samples.
        disturbed: during how many of them the system gave one of our processors to someone else.
    """

    tokens_per_s: float
    step_ms: float
    step_p20_ms: float
    first_ms: float
    samples: int
    disturbed: int


@dataclass
class Result:
    """A case at one number of threads.

    Args:
        batch: number of sequences.
        context: tokens of a prompt and its answer.
        new: tokens of an answer.
        threads: number of threads of every rival.
        bar: ratio that we want at least; None for none.
        timings: rival -> what was measured.
        failures: rival -> why there is no timing.
        best: the competitor with the lowest median time of a step; "" without competitors.
        ratio: median over the rounds of its time / our time: above 1, we are faster. None without either.
        ratio_p20: the same of the two p20.
    """

    batch: int
    context: int
    new: int
    threads: int
    bar: float | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    best: str = ""
    ratio: float | None = None
    ratio_p20: float | None = None

    @property
    def name(self) -> str:
        """Batch and context as a short text."""
        return f"{self.batch} x {self.context}"

    @property
    def below_bar(self) -> bool:
        """Whether the ratio is known and misses the bar."""
        return self.ratio is not None and self.bar is not None and self.ratio < self.bar


def measure(
    model: Any,
    batch: int,
    context: int,
    new: int,
    threads: int,
    names: Sequence[str],
    repeat: int,
    *,
    tell: Callable[[str], None] = print,
) -> Result:
    """Make the rivals ready, check their tokens, and time those that are right.

    Args:
        model: the language model.
        batch: number of sequences.
        context: tokens of a prompt and its answer.
        new: tokens of an answer, at least 2.
        threads: number of threads. With 1 the clock is the thread's own CPU time, with more it is wall time.
        names: rivals, keys of RIVALS.
        repeat: number of rounds; each rival has one sample a round.
        tell: called with what is being done now.
    """
    before = torch.get_num_threads()
    result = Result(batch, context, new, threads, BAR if batch == 1 else None)
    try:
        torch.set_num_threads(threads)
        forget_compiled()
        try:
            case = Case(model, prompts_of(model, batch, context, new), new, threads)
        except InputError as error:
            result.failures = dict.fromkeys(names, reason(error))
            return result
        tell("generating what is right")
        expected = RIVALS[GENERATE](case)().tokens
        runs: dict[str, Run] = {}
        for name in names:
            tell(f"making {name} ready")
            # Whatever keeps a rival from running is its result, and the others are still worth measuring.
            try:
                run = RIVALS[name](case)
                check_tokens(run().tokens, expected)
                if threads == 1:
                    refuse_strays(partial(_tokens, run))
            except Exception as error:  # noqa: BLE001
                result.failures[name] = reason(error)
            else:
                runs[name] = run
        samples, disturbed = _rounds(runs, repeat, tell)
        for name, taken in samples.items():
            result.timings[name] = _timing(taken, batch, new, disturbed[name])
        _compare(result, samples)
    finally:
        torch.set_num_threads(before)
    return result


def _tokens(run: Run) -> torch.Tensor:
    return run().tokens


def check_tokens(tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare a rival's tokens with those of transformers.

    Args:
        tokens: [B, new].
        expected: likewise.

    Raises:
        WrongResultError: they differ; the message says where first.
    """
    if tokens.shape != expected.shape:
        raise WrongResultError(f"tokens {list(tokens.shape)}, those of transformers are {list(expected.shape)}")
    wrong = (tokens != expected).nonzero()
    if len(wrong):
        row, at = wrong[0].tolist()
        raise WrongResultError(
            f"token {at} of sequence {row} is {int(tokens[row, at])}, that of transformers {int(expected[row, at])}"
        )


def _rounds(
    runs: Mapping[str, Run], repeat: int, tell: Callable[[str], None]
) -> tuple[dict[str, list[Decoded]], dict[str, int]]:
    """Return each rival's samples, one a round, and how many of them were disturbed."""
    names = list(runs)
    samples: dict[str, list[Decoded]] = {name: [] for name in names}
    disturbed = dict.fromkeys(names, 0)
    deadline = time.perf_counter() + ROUNDS_BUDGET_S
    collecting = gc.isenabled()
    gc.disable()
    try:
        for count in range(repeat):
            if count >= FEWEST_ROUNDS and time.perf_counter() > deadline:
                break
            tell(f"round {count + 1} of {repeat}")
            # The neighbours in time change sides every other round.
            for name in names if count % 2 == 0 else reversed(names):
                time.sleep(SETTLE_S)
                preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
                samples[name].append(runs[name]())
                disturbed[name] += resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw != preempted
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return samples, disturbed


def _timing(samples: Sequence[Decoded], batch: int, new: int, disturbed: int) -> Timing:
    steps = [sample.rest_s / (new - 1) for sample in samples]
    step = statistics.median(steps)
    first = statistics.median(sample.first_s for sample in samples)
    return Timing(batch / step, step * 1e3, p20(steps) * 1e3, first * 1e3, len(samples), disturbed)


def _compare(result: Result, samples: Mapping[str, Sequence[Decoded]]) -> None:
    competitors = [name for name in result.timings if name != OURS]
    if not competitors:
        return
    result.best = min(competitors, key=lambda name: result.timings[name].step_ms)
    if OURS in result.timings:
        pairs = zip(samples[result.best], samples[OURS], strict=True)
        result.ratio = statistics.median(theirs.rest_s / own.rest_s for theirs, own in pairs)
        result.ratio_p20 = result.timings[result.best].step_p20_ms / result.timings[OURS].step_p20_ms
