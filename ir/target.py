"""What a machine can do, for predictions of time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A machine by its two limits.

    Args:
        device: the device type, such as "cpu".
        flops_per_second: floating point operations per second that matrix products reach.
        bytes_per_second: bytes per second that memory delivers.
        call_us: what one operation costs at least, in microseconds.
    """

    device: str
    flops_per_second: float
    bytes_per_second: float
    call_us: float = 0.0

    def time_us(self, flops: float, moved_bytes: float) -> float:
        """Return the least time that work takes, in microseconds: the longer of computing and moving, and `call_us`."""
        return max(flops / self.flops_per_second * 1e6, moved_bytes / self.bytes_per_second * 1e6) + self.call_us


LAPTOP_CPU = Target("cpu", flops_per_second=200e9, bytes_per_second=40e9, call_us=2.0)
"""A CPU with AVX-512 or two AVX2 units and two memory channels, a few cores of it: an order of magnitude, not a measurement."""

DATACENTRE_GPU = Target("cuda", flops_per_second=400e12, bytes_per_second=3e12, call_us=4.0)
"""A GPU with 16-bit matrix units and stacked memory, at what large products reach: an order of magnitude."""
