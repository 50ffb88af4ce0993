"""How long a rival takes to its first result, and how much memory it needs: each measured in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
"""Environment variables that say where compilers keep what they made."""

_TIMEOUT_S = 900
_CALLS = 3


@dataclass(frozen=True)
class Startup:
    """One rival in one row.

    Args:
        row: the row's name.
        rival: the rival's name.
        threads: number of threads.
        cold_s: from the loaded model to the first result, with empty caches on disk.
        warm_s: the same again, with what the first process left in them.
        ready_peak_bytes: highest resident memory up to the first result, warm; model and libraries included.
        call_peak_bytes: highest resident memory during later calls.
        failure: why there are no numbers; "" if all is well.
    """

    row: str
    rival: str
    threads: int
    cold_s: float = 0.0
    warm_s: float = 0.0
    ready_peak_bytes: int = 0
    call_peak_bytes: int = 0
    failure: str = ""


def measure_startup(row: str, rival: str, threads: int) -> Startup:
    """Run a rival twice in a fresh process, first with empty caches.

    Args:
        row: name of the row, a key of ROWS.
        rival: name of the rival, a key of RIVALS.
        threads: number of threads.
    """
    with tempfile.TemporaryDirectory(prefix="graphwright-startup-") as folder:
        environment = {**os.environ, **{name: str(Path(folder) / name.lower()) for name in _CACHES}}
        try:
            cold, warm = (_in_own_process([row, rival, str(threads)], environment) for _ in range(2))
        except RuntimeError as error:
            return Startup(row, rival, threads, failure=str(error))
    return Startup(
        row,
        rival,
        threads,
        cold_s=cold["ready_s"],
        warm_s=warm["ready_s"],
        ready_peak_bytes=int(warm["ready_peak_bytes"]),
        call_peak_bytes=int(warm["call_peak_bytes"]),
    )


def _in_own_process(argv: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, *argv]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no result within {_TIMEOUT_S} s") from None
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    # Compilers may have printed something before.
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def startup(row_name: str, rival: str, threads: int) -> dict[str, float]:
    """Make a rival ready in this process.

    Args:
        row_name: a key of ROWS.
        rival: a key of RIVALS.
        threads: number of threads.

    Returns:
        `ready_s`, seconds from the loaded model to the first result; `ready_peak_bytes` and `call_peak_bytes`, the highest
        resident memory of this process until then and during later calls.
    """
    import torch

    from .rivals import RIVALS, Case
    from .rows import ROWS

    torch.set_num_threads(threads)
    row = ROWS[row_name]
    case = Case(row, row.load(), row.inputs(False), threads)
    _forget_peak()
    start = time.perf_counter()
    run = RIVALS[rival](case)
    run()
    ready_s = time.perf_counter() - start
    ready_peak = _peak_bytes()
    _forget_peak()
    for _ in range(_CALLS):
        run()
    return {"ready_s": ready_s, "ready_peak_bytes": ready_peak, "call_peak_bytes": _peak_bytes()}


def _forget_peak() -> None:
    """Let the highest resident memory start anew, where the system can do so."""
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # Where there is no /proc it cannot start anew; Linux and the BSDs count in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(startup(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
