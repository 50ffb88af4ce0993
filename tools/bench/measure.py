"""Measuring a case: first that it is right, then how fast it is."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from triton import knobs

from .cases import Case, Rival

SAMPLE_S = 4e-3
"""A sample is this long at least: shorter ones are repeated, so that the clock and a late interrupt count for little."""

PAIR_BUDGET_S = 3.0
"""After this long a comparison ends early, but not before FEWEST_PAIRS."""

FEWEST_PAIRS = 5

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Timing:
    """One rival at one number of threads.

    Args:
        threads: number of threads of both.
        ratio: median of rival's time / our time over the pairs: above 1, we are faster.
        lowest: the lowest of these ratios.
        highest: the highest of these ratios.
        rival_ms: the rival's median time.
        our_ms: our median time.
        pairs: number of pairs that these numbers come from.
        disturbed: how many of them ran while the system gave one of our processors to someone else.
    """

    threads: int
    ratio: float
    lowest: float
    highest: float
    rival_ms: float
    our_ms: float
    pairs: int
    disturbed: int


@dataclass
class Comparison:
    """A case against one rival."""

    rival: str
    bar: float | None
    timings: list[Timing] = field(default_factory=list)

    @property
    def below_bar(self) -> bool:
        """Whether some number of threads misses the bar."""
        return self.bar is not None and any(t.ratio < self.bar for t in self.timings)


@dataclass
class Measurement:
    """A case, measured.

    Args:
        kernel: the kernel's name.
        case: the case's name.
        tolerance: largest error allowed.
        error: largest error found, relative to the reference's largest element.
        problem: why there are no timings; "" if all is well.
        compile_ms: time that Triton and LLVM took for all kernels of the case.
        compilations: number of kernels compiled.
        comparisons: one per rival.
    """

    kernel: str
    case: str
    tolerance: float = 0.0
    error: float = 0.0
    problem: str = ""
    compile_ms: float = 0.0
    compilations: int = 0
    comparisons: list[Comparison] = field(default_factory=list)


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the largest error relative to the reference's largest element; infinite where shape or finiteness differ."""
    if result.shape != reference.shape:
        return float("inf")
    error = (result.double() - reference.double()).abs().max().item()
    scale = reference.double().abs().max().item()
    return error / scale if error == error and scale else (0.0 if error == 0 else float("inf"))


def measure(kernel: str, case: Case, threads: list[int], repeat: int) -> Measurement:
    """Check a case at every number of threads, then time it against its rivals.

    Args:
        kernel: the kernel's name.
        case: the case.
        threads: numbers of threads.
        repeat: pairs per rival and number of threads.
    """
    measurement = Measurement(kernel, case.name, tolerance=case.tolerance)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(max(threads))
        reference = case.reference()
        try:
            with _compilations() as times:
                case.run()
            measurement.compile_ms, measurement.compilations = sum(times) / 1e3, len(times)
            for count in threads:
                torch.set_num_threads(count)
                _poison(reference.numel())
                measurement.error = max(measurement.error, relative_error(case.run(), reference))
        # Whatever a kernel raises is a result too, and the other kernels are still worth measuring.
        except Exception as error:  # noqa: BLE001
            measurement.problem = f"{type(error).__name__}: {error}"
            return measurement
        if not measurement.error <= case.tolerance:
            measurement.problem = f"error {measurement.error:.1e}, allowed {case.tolerance:.0e}"
            return measurement
        for rival in case.rivals:
            comparison = Comparison(rival.name, rival.bar)
            for count in threads:
                torch.set_num_threads(count)
                comparison.timings.append(_compare(rival, case.run, count, repeat))
            measurement.comparisons.append(comparison)
    finally:
        torch.set_num_threads(before)
    return measurement


def _poison(elements: int) -> None:
    """Free memory full of NaN, which the next result is likely to be put in: what a kernel leaves out is then seen."""
    for dtype in (torch.float16, torch.float32):
        torch.full((elements,), float("nan"), dtype=dtype)


@contextlib.contextmanager
def _compilations() -> Iterator[list[int]]:
    """Compile everything anew inside, and yield the microseconds that each compilation took."""
    times: list[int] = []

    def listen(**event: Any) -> None:
        times.append(event["times"].total)

    with knobs.compilation.scope():
        knobs.compilation.always_compile = True
        knobs.compilation.listener = listen
        yield times


def keep_memory() -> None:
    """Let freed memory stay with the process, where the C library can be told so.

    Otherwise a large result costs a page fault for every 4 KB or none at all, depending on what was freed before it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _compare(rival: Rival, ours: Callable[[], object], threads: int, repeat: int) -> Timing:
    # With one thread its own CPU time is what counts, and other processes hardly disturb it.
    clock = time.thread_time if threads == 1 else time.perf_counter
    calls = [_calls(run, clock) for run in (rival.run, ours)]
    calm: list[tuple[float, float]] = []
    disturbed: list[tuple[float, float]] = []
    deadline = time.perf_counter() + PAIR_BUDGET_S
    collecting = gc.isenabled()
    gc.disable()
    try:
        while len(calm) < repeat:
            count = len(calm) + len(disturbed)
            if count >= FEWEST_PAIRS and time.perf_counter() > deadline:
                break
            pair = [0.0, 0.0]
            before = _preemptions()
            # Each goes first in turn.
            for k in (0, 1) if count % 2 == 0 else (1, 0):
                pair[k] = _time((rival.run, ours)[k], calls[k], clock)
            # A thread that is not running holds up the others, so that such wall times say nothing.
            quiet = threads == 1 or _preemptions() == before
            (calm if quiet else disturbed).append((pair[0], pair[1]))
    finally:
        if collecting:
            gc.enable()
    times = calm if len(calm) >= min(repeat, FEWEST_PAIRS) else calm + disturbed
    ratios = [theirs / own for theirs, own in times]
    return Timing(
        threads=threads,
        ratio=statistics.median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        rival_ms=statistics.median(theirs for theirs, _ in times) * 1e3,
        our_ms=statistics.median(own for _, own in times) * 1e3,
        pairs=len(times),
        disturbed=len(times) - len(calm),
    )


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _calls(run: Callable[[], object], clock: Callable[[], float]) -> int:
    """Return how many calls fill a sample."""
    run()
    once = min(_time(run, 1, clock) for _ in range(3))
    return max(1, min(10_000, int(SAMPLE_S / max(once, 1e-7))))


def _time(run: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls
