"""What the machine that runs can do, measured: the target of predictions.

Each rate is the best of several short runs: a roof is what is reached when nothing else disturbs. One thread measures, by its
own CPU time, so that other processes hardly disturb it. That several threads compute and read their caches as many times as
fast is an assumption; that memory gives each of them its share, up to two, another. It takes a quarter of a second, once for a
machine: the result is kept on disk.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from graphwright.ir.target import Target

from .matmul_choice import machine_digest, measurements_folder, second_level_cache_bytes
from .single_thread import single_thread

RUNS = 5
"""Runs of which the best counts."""

MEMORY_THREADS = 2
"""As many threads as memory serves without making them wait for each other."""

FUNCTION_FLOPS = 8
"""What predictions count for one exponential or the like."""

_FORMAT = 1
_FAR_BYTES = 96 << 20
_LOCK = threading.Lock()
_MEASURED: dict[Path, Target] = {}


def this_machine() -> Target:
    """Return what this machine's CPU can do with as many threads as PyTorch uses now."""
    path = measurements_folder() / "machine" / f"{machine_digest()}.json"
    with _LOCK:
        if path not in _MEASURED:
            found = _read(path)
            if found is None:
                found = measure_thread()
                _write(path, found)
            _MEASURED[path] = found
        return with_threads(_MEASURED[path], torch.get_num_threads())


def with_threads(one: Target, threads: int) -> Target:
    """Return what a machine can do with several threads, of which one can do `one`."""
    return dataclasses.replace(
        one,
        flops_per_second=one.flops_per_second * threads,
        bytes_per_second=one.bytes_per_second * min(threads, MEMORY_THREADS),
        cache_bytes=one.cache_bytes * threads,
        cache_bytes_per_second=one.cache_bytes_per_second * threads,
        name=f"{one.name}, {threads} thread{'s' if threads > 1 else ''}",
    )


def measure_thread() -> Target:
    """Return what one thread can do on this machine's CPU, measured now."""
    near_bytes = second_level_cache_bytes() // 4
    with torch.inference_mode(), single_thread() as alone:
        clock = time.thread_time if alone else time.perf_counter
        products = _product_flops(clock)
        rates = {"attention": _attention_flops(clock), "rest": _function_flops(clock)}
        return Target(
            "cpu",
            flops_per_second=products,
            bytes_per_second=_copied(_FAR_BYTES, clock, 1),
            call_us=_call_us(clock),
            cache_bytes=second_level_cache_bytes(),
            cache_bytes_per_second=_copied(near_bytes, clock, 32),
            efficiency={kind: rate / products for kind, rate in rates.items()},
            measured=True,
            name="this machine's CPU",
        )


def _product_flops(clock: Callable[[], float]) -> float:
    size = 512
    a, b, out = (torch.ones(size, size) for _ in range(3))
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), clock)


def _attention_flops(clock: Callable[[], float]) -> float:
    heads, tokens, features = 4, 256, 64
    q = torch.randn(1, heads, tokens, features)
    seconds = _best(lambda: F.scaled_dot_product_attention(q, q, q), clock)
    return heads * tokens * tokens * (4 * features + FUNCTION_FLOPS) / seconds


def _function_flops(clock: Callable[[], float]) -> float:
    x, out = torch.randn(1 << 15), torch.empty(1 << 15)
    return x.numel() * FUNCTION_FLOPS / _best(lambda: torch.exp(x, out=out), clock, 8)


def _copied(size: int, clock: Callable[[], float], calls: int) -> float:
    """Return the bytes per second that are read and written when so many are copied, half of each."""
    source, out = torch.zeros(size // 8), torch.empty(size // 8)
    return 2 * source.numel() * 4 / _best(lambda: out.copy_(source), clock, calls)


def _call_us(clock: Callable[[], float]) -> float:
    x = torch.ones(16)
    return _best(lambda: torch.neg(x, out=x), clock, 200) * 1e6


def _best(run: Callable[[], Any], clock: Callable[[], float], calls: int = 1) -> float:
    """Return the seconds of one call, the best of several runs of `calls` each."""
    run()
    times = []
    for _ in range(RUNS):
        start = clock()
        for _ in range(calls):
            run()
        times.append((clock() - start) / calls)
    return max(min(times), 1e-9)


def _read(path: Path) -> Target | None:
    """Return what a file holds; None if it is not there or not whole."""
    try:
        data = json.loads(path.read_text("utf-8"))
        if data.pop("format") != _FORMAT:
            return None
        found = Target(**data)
        return found if found.flops_per_second > 0 and found.bytes_per_second > 0 else None
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def _write(path: Path, target: Target) -> None:
    # Without a writable folder each process measures for itself.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({"format": _FORMAT, **dataclasses.asdict(target)}, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return
