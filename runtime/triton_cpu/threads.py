"""The threads that programs run on: those of torch's own OpenMP pool."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

GET_NUM_THREADS = "_ZN2at15get_num_threadsEv"
"""`at::get_num_threads()`: knows torch.set_num_threads in every thread, where OpenMP's own count is per thread."""


@dataclass(frozen=True, slots=True)
class ThreadPool:
    """Addresses of C functions; 0 where there is none, and programs then run on the calling thread.

    Args:
        parallel: `GOMP_parallel(void (*worker)(void *), void *context, unsigned threads, unsigned flags)`.
        count: `int count(void)`, the number of threads that torch would use if called from this thread.
    """

    parallel: int
    count: int


@functools.cache
def thread_pool() -> ThreadPool:
    """Return the pool that torch computes on.

    Symbols are looked up through the library of torch's CPU kernels, whose own dependencies the search covers: with several
    OpenMP runtimes in the process this finds the one that torch is linked with, be it bundled or the system's.
    """
    for path in _torch_libraries():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        parallel, count = _address(library, "GOMP_parallel"), _address(library, GET_NUM_THREADS)
        if parallel:
            count = count or _address(library, "omp_get_max_threads")
            return ThreadPool(parallel, count) if count else ThreadPool(0, 0)
    return ThreadPool(0, 0)


def _torch_libraries() -> Iterator[str]:
    import torch

    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    for stem in ("libtorch_cpu", "libtorch", "libtorch_global_deps"):
        for extension in (".so", ".dylib"):
            path = os.path.join(folder, stem + extension)
            if os.path.exists(path):
                yield path


def _address(library: ctypes.CDLL, symbol: str) -> int:
    try:
        function = library[symbol]
    except AttributeError:
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
