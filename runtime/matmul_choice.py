"""Measured times of the ways to multiply by a weight, kept on disk.

Which way is fastest depends on the CPU, the sizes and the threads, and no table foretells it. What counts is the time with
weights that are not in the cache, because a forward pass sweeps through all weights before it comes back to one.

One thread measures, whatever the number that will compute: the ways differ in how a core reads the weight, and the time that
several threads take tells more of what else the machine is doing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from .single_thread import single_thread

Call = Callable[[], object]
Times = dict[str, float]

ROW_CLASSES = (1, 8, 32, 128, 512)
"""Numbers of rows that are measured; others are taken for the next larger one."""

_SECONDS_PER_CANDIDATE = 0.006
_FLOPS_PER_CALL = 6e8
_LARGEST_WEIGHT_BYTES = 16 << 20
_FORMAT = 2
_LOCK = threading.Lock()
_MEASURED: dict[Path, dict[str, Times]] = {}


def row_class(rows: int) -> int:
    """Return the number of rows, of `ROW_CLASSES`, that stands for `rows`."""
    return next((size for size in ROW_CLASSES if rows <= size), ROW_CLASSES[-1])


def measured_rows(rows: int, n: int, k: int) -> int:
    """Return how many rows to measure with in place of `rows` so that one call stays short."""
    return min(rows, max(32, int(_FLOPS_PER_CALL / (2 * max(n * k, 1)))))


def measured_columns(n: int, row_bytes: int) -> int:
    """Return how many of a weight's N rows, each of `row_bytes`, to measure with."""
    return min(n, max(64, _LARGEST_WEIGHT_BYTES // max(row_bytes, 1)))


def copies_for(weight_bytes: int) -> int:
    """Return how many copies of a weight, used in turn, are cold whenever they are used."""
    return min(64, 4 * second_level_cache_bytes() // max(weight_bytes, 1) + 1)


def times(key: str, candidates: Mapping[str, Callable[[], Sequence[Call]]]) -> Times:
    """Return the time of a call of each candidate in seconds, on one thread, measured once per machine.

    Args:
        key: what is measured, such as "float32 384x1536 m128".
        candidates: name -> function that makes the calls, equal but for their weights' addresses.
    """
    with _LOCK:
        path = _path()
        if path not in _MEASURED:
            _MEASURED[path] = _read(path)
        found = _MEASURED[path].get(key, {})
        if not candidates.keys() <= found.keys():
            with single_thread() as alone:
                # Time on the CPU leaves out what other processes take, but also what other threads do for a call.
                clock = time.thread_time if alone else time.perf_counter
                found = _measure({name: make() for name, make in candidates.items()}, clock)
            # Another process may have written since.
            _MEASURED[path] = {**_read(path), **_MEASURED[path], key: found}
            _write(path, _MEASURED[path])
        return {name: found[name] for name in candidates}


def _measure(candidates: Mapping[str, Sequence[Call]], clock: Callable[[], float]) -> Times:
    """Return the median time of each candidate's calls. They take turns: what slows the machine for a while slows all."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for calls in candidates.values():
        calls[0]()
    enough, most = _SECONDS_PER_CANDIDATE * len(candidates), 2 * max(len(calls) for calls in candidates.values())
    turn, total = 0, 0.0
    while turn < 3 or (total < enough and turn < most):
        turn += 1
        for name, calls in candidates.items():
            call = calls[turn % len(calls)]
            start = clock()
            call()
            taken[name].append(clock() - start)
            total += taken[name][-1]
    return {name: statistics.median(found) for name, found in taken.items()}


def _path() -> Path:
    return measurements_folder() / "matmul" / f"{machine_digest()}.json"


def measurements_folder() -> Path:
    """Return the folder in which what was measured on this machine is kept."""
    triton, xdg = os.environ.get("TRITON_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    return Path(triton) if triton else (Path(xdg) if xdg else Path.home() / ".cache") / "graphwright"


@functools.cache
def machine_digest() -> str:
    """Return a digest of what measured times depend on."""
    # Virtual machines call all CPUs by one name, hence the model number and the features.
    wanted = ("model name", "vendor_id", "cpu family", "model\t", "stepping", "flags", "Features", "CPU part")
    facts = sorted({line for line in _lines(Path("/proc/cpuinfo")) if line.startswith(wanted)})
    text = "\n".join([str(_FORMAT), torch.__version__, os.environ.get("TRITON_CPU_ISA", ""), *facts])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@functools.cache
def second_level_cache_bytes() -> int:
    """Return the size of a core's second-level cache; 2 MiB where the system does not tell."""
    for line in _lines(Path("/sys/devices/system/cpu/cpu0/cache/index2/size")):
        if line.endswith("K") and line[:-1].isdigit():
            return int(line[:-1]) << 10
    return 2 << 20


def _lines(path: Path) -> Iterable[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return ()


def _read(path: Path) -> dict[str, Times]:
    """Return what a file holds; nothing if it is not there or not whole."""
    try:
        stored = json.loads(path.read_text())
        return {str(key): {str(name): float(t) for name, t in entry.items()} for key, entry in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, measured: Mapping[str, Times]) -> None:
    # Without a writable folder each process measures for itself.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(measured, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return
