"""Where temporary buffers lie: as few bytes as possible in one arena."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .schedule import KernelStep, MatmulStep, Schedule, Step, View

ALIGNMENT = 64
"""Of each buffer's first byte: a cache line, and more than any vector load asks for."""


@dataclass(frozen=True)
class Lifetime:
    """The steps during which a buffer's contents matter, both ends included."""

    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        """Whether there is a step at which both are alive."""
        return self.first <= other.last and other.first <= self.last


def buffers_of(step: Step) -> frozenset[str]:
    """Return the names of the buffers that a step reads or writes."""
    if isinstance(step, KernelStep):
        views = {argument.buffer for argument in step.arguments if isinstance(argument, View)}
        return frozenset({*step.reads, *step.writes, *views})
    if isinstance(step, MatmulStep):
        return frozenset({step.x.buffer, step.weight, step.out.buffer})
    return frozenset({view.buffer for view in views_in((step.arguments, step.keywords))} | {name for name in step.outs if name})


def views_in(value: Any) -> Iterator[View]:
    """Yield the views in nested lists, tuples and mappings."""
    if isinstance(value, View):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from views_in(entry)
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from views_in(entry)


def lifetimes(schedule: Schedule) -> dict[str, Lifetime]:
    """Return when each temporary buffer is alive; one that no step uses is left out.

    A view keeps its whole buffer alive, and a result keeps it to the end.
    """
    found: dict[str, Lifetime] = {}
    for k, step in enumerate(schedule.steps):
        for name in buffers_of(step):
            if schedule.buffers[name].kind == "temporary":
                found[name] = Lifetime(found[name].first if name in found else k, k)
    end = len(schedule.steps)
    for view in views_in(schedule.outputs):
        if view.buffer in found:
            found[view.buffer] = Lifetime(found[view.buffer].first, end)
    return found


class MemoryPlanner:
    """Places the temporary buffers of one schedule for any sizes.

    Args:
        alive: when each buffer is alive.
    """

    def __init__(self, alive: Mapping[str, Lifetime]) -> None:
        self._conflicts = _conflicts(alive)

    def place(self, sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
        """Return the offset of each buffer and the size of the arena, in bytes.

        The largest buffers are placed first, each into the tightest gap among those it must not overlap, or behind them.

        Args:
            sizes: bytes of each buffer.
        """
        padded = {name: -(-sizes[name] // ALIGNMENT) * ALIGNMENT for name in self._conflicts}
        offsets: dict[str, int] = {}
        total = 0
        for name in sorted(padded, key=lambda name: (-padded[name], name)):
            size = padded[name]
            taken = [(offsets[other], padded[other]) for other in self._conflicts[name] if other in offsets]
            offsets[name] = _tightest_gap(sorted(taken), size)
            total = max(total, offsets[name] + size)
        return offsets, total


def _conflicts(alive: Mapping[str, Lifetime]) -> dict[str, list[str]]:
    """Return for each buffer those that are alive at the same time as it at some step."""
    conflicts: dict[str, list[str]] = {name: [] for name in alive}
    current: list[tuple[int, str]] = []
    for name in sorted(alive, key=lambda name: (alive[name].first, name)):
        while current and current[0][0] < alive[name].first:
            current.pop(0)
        for _, other in current:
            conflicts[name].append(other)
            conflicts[other].append(name)
        insort(current, (alive[name].last, name))
    return conflicts


def _tightest_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Return the offset of the smallest hole that holds `size` bytes, or of the end.

    Args:
        taken: offset and size of what is in the way, by offset.
        size: bytes to place.
    """
    best, best_gap, end = -1, -1, 0
    for offset, length in taken:
        gap = offset - end
        if gap >= size and (best < 0 or gap < best_gap):
            best, best_gap = end, gap
        end = max(end, offset + length)
    return best if best >= 0 else end
