"""Taking the times of steps."""

from __future__ import annotations

import time

import pytest

from graphwright.runtime.profiling import Stopwatch
from graphwright.runtime.schedule import CallStep, KernelStep, MatmulStep, View

STEPS = (
    KernelStep("a", "k", (1,), (), {}, (), ()),
    MatmulStep("b", View("x", (), ()), "w", View("y", (), ())),
    CallStep("c", "aten::f", (), {}, ()),
)


def wait(us):
    end = time.perf_counter() + us / 1e6
    while time.perf_counter() < end:
        pass


def test_times_are_those_of_the_steps_and_of_the_rest():
    """Each step's time is its own, what is spent between steps is overhead, and waiting for the device belongs to the step."""
    pending = []

    def launch():
        wait(2000)
        pending.append(500)

    stopwatch = Stopwatch(lambda: wait(pending.pop()) if pending else None)
    for _ in range(5):
        stopwatch.start()
        wait(3000)
        for run in stopwatch.timed([launch, lambda: wait(1000), int]):
            run()
        stopwatch.stop()
    profile = stopwatch.profile(STEPS)
    assert [(row.name, row.kind) for row in profile.rows] == [("a", "kernel"), ("b", "matmul"), ("c", "call")]
    # Another process may take the CPU at any time, so that times are at least what they should be.
    assert profile.rows[0].us >= 2490
    assert profile.rows[1].us >= 990
    assert profile.overhead_us >= 2900
    assert profile.total_us == pytest.approx(profile.overhead_us + sum(row.us for row in profile.rows))


def test_a_call_without_steps():
    """A program that only hands on its arguments is all overhead."""
    stopwatch = Stopwatch(int)
    for _ in range(3):
        stopwatch.start()
        wait(100)
        stopwatch.stop()
    profile = stopwatch.profile([])
    assert profile.rows == ()
    assert profile.total_us == profile.overhead_us >= 100
