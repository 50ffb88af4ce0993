"""Steps that run one after the other without going back to Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .schedule import Step

if TYPE_CHECKING:
    from .triton_cpu.chain import Link

Run = Callable[[], object]
Move = tuple[int, int, int]
"""An address that differs from call to call: where it stands in the link's context, which of the call's tensors it is in, and
how far from its first element, in bytes."""


@dataclass(frozen=True, slots=True)
class BoundStep:
    """A step bound to memory.

    Args:
        step: what it is.
        run: runs it from Python.
        link: runs it from a chain; None where only Python can.
        moves: the addresses in the link that differ from call to call.
    """

    step: Step
    run: Run
    link: Link | None = None
    moves: tuple[Move, ...] = ()


@dataclass(slots=True)
class ChainedRun:
    """Several steps as one call.

    Args:
        steps: what it runs, in order.
        run: runs them.
        running: tells which of them was running when `run` raised.
    """

    steps: tuple[Step, ...]
    run: Run
    running: Callable[[], Step] = field(repr=False)


def chained(bound: Sequence[BoundStep], pointers: list[int]) -> tuple[ChainedRun, ...]:
    """Return the runs of steps with those next to each other joined that can be.

    Args:
        bound: the steps, in order.
        pointers: where the addresses of the call's tensors stand while it runs.
    """
    runs: list[ChainedRun] = []
    for linked, group in groupby(bound, key=lambda entry: entry.link is not None):
        entries = list(group)
        if linked and len(entries) > 1:
            runs.append(_chain(entries, pointers))
        else:
            runs.extend(alone(entry.step, entry.run) for entry in entries)
    return tuple(runs)


def alone(step: Step, run: Run) -> ChainedRun:
    """Return the run of a single step."""
    return ChainedRun((step,), run, lambda: step)


def _chain(entries: Sequence[BoundStep], pointers: list[int]) -> ChainedRun:
    from .triton_cpu.chain import Chain

    chain = Chain([entry.link for entry in entries if entry.link is not None])
    moves = [
        (chain.slot(number, offset), slot, shift) for number, entry in enumerate(entries) for offset, slot, shift in entry.moves
    ]
    steps = tuple(entry.step for entry in entries)
    # The links call by address what the steps' own runs keep alive.
    owners = tuple(entry.run for entry in entries)
    function = chain.function

    def run(kept: Any = owners) -> None:
        for address, slot, shift in moves:
            address.value = pointers[slot] + shift
        function()

    return ChainedRun(steps, run if moves else _keeping(function, owners), lambda: steps[chain.failed])


def _keeping(function: Run, owners: object) -> Run:
    def run(kept: object = owners) -> None:
        function()

    return run
