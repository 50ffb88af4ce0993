"""What a machine can do, for predictions of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Bound = Literal["compute", "memory", "call"]
"""What keeps an operation from being faster: the arithmetic, the memory, or that it is called at all."""


@dataclass(frozen=True)
class Target:
    """A machine by its limits.

    Args:
        device: the device type, such as "cpu".
        flops_per_second: floating point operations per second that matrix products reach.
        bytes_per_second: bytes per second that memory delivers.
        call_us: what one operation costs at least, in microseconds.
        cache_bytes: what the caches of the CPU hold: values that are no larger come from there.
        cache_bytes_per_second: bytes per second that they deliver; 0 for as much as memory.
        efficiency: kind of operation -> ratio of the flops per second that it reaches to `flops_per_second`; 1 where a kind
            is missing.
        measured: whether these are measurements of the machine, and no estimate.
        name: of the machine.
    """

    device: str
    flops_per_second: float
    bytes_per_second: float
    call_us: float = 0.0
    cache_bytes: int = 0
    cache_bytes_per_second: float = 0.0
    efficiency: Mapping[str, float] = field(default_factory=dict)
    measured: bool = False
    name: str = ""

    def time_us(self, flops: float, moved_bytes: float, near_bytes: float = 0.0, kind: str = "") -> float:
        """Return the least time that work takes, in microseconds: the longer of computing and moving, and `call_us`.

        Args:
            flops: floating point operations.
            moved_bytes: bytes that come from memory, such as weights.
            near_bytes: bytes of values that were just made, which come from the caches as far as they fit.
            kind: of the operation, for `efficiency`.
        """
        return max(self._limits_us(flops, moved_bytes, near_bytes, kind)) + self.call_us

    def bound(self, flops: float, moved_bytes: float, near_bytes: float = 0.0, kind: str = "") -> Bound:
        """Return what limits work; the arguments are those of `time_us`."""
        computing, moving = self._limits_us(flops, moved_bytes, near_bytes, kind)
        if max(computing, moving) < self.call_us:
            return "call"
        return "compute" if computing >= moving else "memory"

    def _limits_us(self, flops: float, moved_bytes: float, near_bytes: float, kind: str) -> tuple[float, float]:
        computing = flops / (self.flops_per_second * self.efficiency.get(kind, 1.0))
        is_near = self.cache_bytes_per_second > 0 and near_bytes <= self.cache_bytes
        near = near_bytes / (self.cache_bytes_per_second if is_near else self.bytes_per_second)
        return computing * 1e6, (moved_bytes / self.bytes_per_second + near) * 1e6


LAPTOP_CPU = Target("cpu", flops_per_second=200e9, bytes_per_second=40e9, call_us=2.0)
"""A CPU with AVX-512 or two AVX2 units and two memory channels, a few cores of it: an order of magnitude, not a measurement."""

DATACENTRE_GPU = Target("cuda", flops_per_second=400e12, bytes_per_second=3e12, call_us=4.0)
"""A GPU with 16-bit matrix units and stacked memory, at what large products reach: an order of magnitude."""
