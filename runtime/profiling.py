"""Where the time of a call goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from .plan import Run
from .schedule import KernelStep, MatmulStep, Step

_KINDS = {KernelStep: "kernel", MatmulStep: "matmul"}


@dataclass(frozen=True)
class ProfileRow:
    """A step's time.

    Args:
        name: the step's name.
        kind: "kernel", "matmul" or "call".
        us: median time, in microseconds.
    """

    name: str
    kind: str
    us: float


@dataclass(frozen=True)
class Profile:
    """Where a call's time goes.

    Args:
        rows: the steps, in order.
        overhead_us: median of the time outside of steps, in microseconds: reading arguments, making results, and the gaps
            between steps.
    """

    rows: tuple[ProfileRow, ...]
    overhead_us: float

    @property
    def total_us(self) -> float:
        """Time of a call, in microseconds."""
        return self.overhead_us + sum(row.us for row in self.rows)


class Stopwatch:
    """Takes the times of several calls and of the steps in them.

    Args:
        synchronize: waits until a step has run.
    """

    def __init__(self, synchronize: Callable[[], object]) -> None:
        self._synchronize = synchronize
        self._steps: list[list[int]] = []
        self._totals: list[int] = []
        self._start = 0

    def start(self) -> None:
        """Begin a call."""
        self._steps.append([])
        self._start = time.perf_counter_ns()

    def stop(self) -> None:
        """End a call."""
        self._totals.append(time.perf_counter_ns() - self._start)

    def timed(self, runs: Sequence[Run]) -> list[Run]:
        """Return the same steps, such that their times are taken."""
        return [self._timed(run, self._steps[-1]) for run in runs]

    def _timed(self, run: Run, times: list[int]) -> Run:
        def timed() -> None:
            start = time.perf_counter_ns()
            run()
            self._synchronize()
            times.append(time.perf_counter_ns() - start)

        return timed

    def profile(self, steps: Sequence[Step]) -> Profile:
        """Return the medians over all calls.

        Args:
            steps: what was timed, in order.
        """
        inside, outside = self._own_times()
        rows = tuple(
            ProfileRow(step.name, _KINDS.get(type(step), "call"), max(median(taken) - inside, 0.0) / 1e3)
            for step, taken in zip(steps, zip(*self._steps, strict=True), strict=True)
        )
        gaps = [total - sum(taken) - outside * len(steps) for total, taken in zip(self._totals, self._steps, strict=True)]
        return Profile(rows, max(median(gaps), 0.0) / 1e3)

    def _own_times(self) -> tuple[float, float]:
        """Return what timing a step adds to its time, and to the time between steps, in nanoseconds."""
        times: list[int] = []
        nothing = self._timed(int, times)
        start = time.perf_counter_ns()
        for _ in range(100):
            nothing()
        total = time.perf_counter_ns() - start
        return median(times), (total - sum(times)) / 100
