"""Timing of kernels on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Benchmarker = Callable[..., Any]

_CACHE_SIZE_FILE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_DEFAULT_CACHE_BYTES = 32 << 20
_SHORTEST_SAMPLE_MS = 0.02


class Event:
    """A point in time, with the methods of `torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = True) -> None:
        self._seconds = 0.0

    def record(self, stream: object = None) -> None:
        """Take the time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Return the milliseconds from this event to `end`."""
        return (end._seconds - self._seconds) * 1e3

    def synchronize(self) -> None:
        """Do nothing: the event has happened when `record` returns."""

    def wait(self, stream: object = None) -> None:
        """Do nothing, see `synchronize`."""

    def query(self) -> bool:
        """Whether the event has happened."""
        return True


class CPUInterface:
    """The part of `torch.cuda`'s interface that Triton uses on a device."""

    Event = Event

    @staticmethod
    def synchronize(device: object = None) -> None:
        """Do nothing: launches return when the kernel has run."""

    @staticmethod
    def current_device() -> str:
        """Return the device."""
        return "cpu"

    @staticmethod
    def set_device(device: object) -> None:
        """Do nothing: there is one device."""

    @staticmethod
    def device_count() -> int:
        """Return the number of devices."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Whether the device can be used."""
        return True


def do_bench(
    fn: Callable[[], object],
    warmup: float = 5,
    rep: float = 25,
    grad_to_none: Iterable[Any] | None = None,
    quantiles: Sequence[float] | None = None,
    return_mode: str = "mean",
) -> Any:
    """Measure a function as `triton.testing.do_bench` does, but with the CPU's caches as the previous call left them.

    Tuners written for GPUs try dozens of configurations, many of which are the same here: the times are short by default.

    Args:
        fn: the function.
        warmup: milliseconds to run before measuring.
        rep: milliseconds to measure for.
        grad_to_none: tensors whose gradient is dropped before each sample.
        quantiles: quantiles to return, in [0, 1]; None to return one number.
        return_mode: "min", "max", "mean", "median" or "all"; used without `quantiles`.

    Returns:
        Milliseconds per call: a list for several quantiles or "all", else a number.
    """
    from triton.testing import _summarize_statistics

    if return_mode not in ("min", "max", "mean", "median", "all"):
        raise ValueError(f"return_mode must be min, max, mean, median or all, got {return_mode!r}")
    tensors = list(grad_to_none or ())

    def sample(calls: int) -> float:
        for tensor in tensors:
            tensor.grad = None
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        return (time.perf_counter() - start) * 1e3 / calls

    fn()
    estimate = min(sample(1) for _ in range(3))
    # The clock is too coarse for the shortest kernels, which are therefore timed several at once.
    calls = 1 if tensors else max(1, int(_SHORTEST_SAMPLE_MS / max(estimate, 1e-6)))
    deadline = time.perf_counter() + warmup / 1e3
    while time.perf_counter() < deadline:
        sample(calls)
    times: list[float] = []
    deadline = time.perf_counter() + rep / 1e3
    while not times or time.perf_counter() < deadline:
        times.append(sample(calls))
    return _summarize_statistics(times, quantiles, return_mode)


def cache_bytes() -> int:
    """Return the size of the last level of the CPU's caches, or a guess."""
    try:
        text = _CACHE_SIZE_FILE.read_text().strip()
        size = int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)
    except (ValueError, OSError):
        size = 0
    return max(size, _DEFAULT_CACHE_BYTES)
