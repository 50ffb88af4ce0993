"""Measuring the rivals on a row: first that they are right, then in turns how fast they are."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from graphwright.ir.errors import InputError

from .rivals import EAGER, OURS, RIVALS, Case, Run, forget_compiled
from .rows import Row, real_positions

SAMPLE_S = 4e-3
"""A sample is this long at least: shorter calls are repeated."""

SETTLE_S = 10e-3
"""Before a sample: thread pools of the rival before spin for a while after their work."""

ROUNDS_BUDGET_S = 90.0
"""After this long the rounds end early, but not before FEWEST_ROUNDS."""

FEWEST_ROUNDS = 3

TOLERANCE = 1e-4
"""Largest error allowed, relative to the largest element of eager's result."""

_STRAY_SHARE, _STRAY_S = 1.3, 5e-3


@dataclass(frozen=True)
class Timing:
    """One rival in one row.

    Args:
        median_ms: median time per call.
        p20_ms: what a fifth of the samples stay below.
        samples: number of samples.
        disturbed: during how many of them the system gave one of our processors to someone else.
        error: largest absolute difference from eager's result, padding left out.
        ready_s: time to make the rival ready, up to and including its first result; caches on disk are used.
    """

    median_ms: float
    p20_ms: float
    samples: int
    disturbed: int
    error: float
    ready_s: float


@dataclass
class Result:
    """A row at one number of threads.

    Args:
        row: the row's name.
        threads: number of threads of every rival.
        bar: ratio that we want at least.
        timings: rival -> what was measured.
        failures: rival -> why there is no timing.
        best: the competitor with the lowest median; "" without competitors.
        ratio: median over the rounds of its time / our time: above 1, we are faster. None without either.
        ratio_p20: the same of the two p20.
    """

    row: str
    threads: int
    bar: float
    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    best: str = ""
    ratio: float | None = None
    ratio_p20: float | None = None

    @property
    def below_bar(self) -> bool:
        """Whether the ratio is known and misses the bar."""
        return self.ratio is not None and self.ratio < self.bar


class WrongResultError(Exception):
    """A rival computes something else than eager."""


class StrayThreadsError(Exception):
    """A rival works in other threads than the calling one although it was given one only."""


def measure(
    row: Row, threads: int, names: Sequence[str], repeat: int, *, ragged: bool = False, tell: Callable[[str], None] = print
) -> Result:
    """Make the rivals ready, check them, and time those that are right.

    Args:
        row: what they run.
        threads: number of threads. With 1 the clock is the thread's own CPU time, with more it is wall time.
        names: rivals, keys of RIVALS.
        repeat: number of rounds; each rival has one sample a round.
        ragged: whether sequences shall differ in length and be padded.
        tell: called with what is being done now.
    """
    before = torch.get_num_threads()
    result = Result(row.name, threads, row.bar)
    try:
        torch.set_num_threads(threads)
        forget_compiled()
        tell("loading")
        try:
            case = Case(row, row.load(), row.inputs(ragged), threads)
        except (InputError, ImportError) as error:
            result.failures = dict.fromkeys(names, reason(error))
            return result
        expected = RIVALS[EAGER](case)()
        runs: dict[str, Run] = {}
        checked: dict[str, tuple[float, float]] = {}
        for name in names:
            tell(f"making {name} ready")
            start = time.perf_counter()
            # Whatever keeps a rival from running is its result, and the others are still worth measuring.
            try:
                run = RIVALS[name](case)
                output = run()
                ready_s = time.perf_counter() - start
                checked[name] = error_of(output, expected, real_positions(case.inputs)), ready_s
                if threads == 1:
                    refuse_strays(run)
            except Exception as error:  # noqa: BLE001
                result.failures[name] = reason(error)
            else:
                runs[name] = run
        samples, disturbed = rounds(runs, threads, repeat, tell)
        for name, times in samples.items():
            result.timings[name] = Timing(
                median_ms=statistics.median(times) * 1e3,
                p20_ms=p20(times) * 1e3,
                samples=len(times),
                disturbed=disturbed[name],
                error=checked[name][0],
                ready_s=checked[name][1],
            )
        _compare(result, samples)
    finally:
        torch.set_num_threads(before)
    return result


def reason(error: Exception) -> str:
    """Return an error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def p20(times: Sequence[float]) -> float:
    """Return what a fifth of the times stay below, interpolated."""
    return statistics.quantiles(times, n=5, method="inclusive")[0] if len(times) > 1 else times[0]


def error_of(output: torch.Tensor, expected: torch.Tensor, real: torch.Tensor | None) -> float:
    """Return the largest absolute difference.

    Args:
        output: a rival's result.
        expected: eager's result, of the same shape.
        real: the positions to compare, bool, shaped as the first dimensions of both; None for all.

    Raises:
        WrongResultError: the shapes differ, or the difference is above TOLERANCE or not a number.
    """
    if output.shape != expected.shape:
        raise WrongResultError(f"shape {tuple(output.shape)}, eager's is {tuple(expected.shape)}")
    if real is not None:
        output, expected = output[real], expected[real]
    error = (output.double() - expected.double()).abs().max().item()
    allowed = TOLERANCE * expected.abs().max().item()
    if not error <= allowed:
        raise WrongResultError(f"differs from eager by {error:.1e}, allowed {allowed:.1e}")
    return error


def refuse_strays(run: Run) -> None:
    """Raise where CPU time of other threads would be missing from the thread's own: the numbers would flatter."""
    time.sleep(SETTLE_S)
    all_threads, this_thread = time.process_time(), time.thread_time()
    run()
    all_s, this_s = time.process_time() - all_threads, time.thread_time() - this_thread
    if all_s > _STRAY_SHARE * this_s + _STRAY_S:
        raise StrayThreadsError(f"took {all_s * 1e3:.1f} ms of CPU time, of which {this_s * 1e3:.1f} ms in the calling thread")


def rounds(
    runs: Mapping[str, Run], threads: int, repeat: int, tell: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Time runs in turns.

    Args:
        runs: what to time, by name.
        threads: number of threads that they use. With 1 the clock is the thread's own CPU time, with more it is wall time.
        repeat: number of rounds; each run has one sample a round.
        tell: called with what is being done now.

    Returns:
        The seconds per call of each, one number a round, and how many of them were disturbed.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    names = list(runs)
    calls = {name: _calls(run, clock) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    disturbed = dict.fromkeys(runs, 0)
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
                run = runs[name]
                time.sleep(SETTLE_S)
                run()
                preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
                start = clock()
                for _ in range(calls[name]):
                    run()
                samples[name].append((clock() - start) / calls[name])
                disturbed[name] += resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw != preempted
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return samples, disturbed


def _calls(run: Run, clock: Callable[[], float]) -> int:
    """Return how many calls fill a sample."""
    run()
    start = clock()
    run()
    return max(1, min(10_000, int(SAMPLE_S / max(clock() - start, 1e-7))))


def _compare(result: Result, samples: Mapping[str, Sequence[float]]) -> None:
    competitors = [name for name in result.timings if name != OURS]
    if not competitors:
        return
    result.best = min(competitors, key=lambda name: result.timings[name].median_ms)
    if OURS in result.timings:
        pairs = zip(samples[result.best], samples[OURS], strict=True)
        result.ratio = statistics.median(theirs / own for theirs, own in pairs)
        result.ratio_p20 = result.timings[result.best].p20_ms / result.timings[OURS].p20_ms
