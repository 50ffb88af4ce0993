"""Computing on the calling thread alone, without changing how many threads others compute on."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def single_thread() -> Iterator[bool]:
    """Within it, torch's operations that this thread calls on the CPU run on this thread.

    `torch.set_num_threads` would do it for all threads of the process. Yields whether it is so: where torch was built without
    GNU's or LLVM's OpenMP, the operations keep the threads that they have.
    """
    # Torch sets a thread's count when the thread first asks for it, and would overwrite a count that was there before.
    threads = torch.get_num_threads()
    get, put, put_mkl = _functions()
    if get is None or put is None:
        yield threads == 1
        return
    before = get()
    # MKL's own count goes before OpenMP's. Its setter returns the thread's former count, 0 for the process's.
    before_mkl = put_mkl(1) if put_mkl else 0
    put(1)
    try:
        yield True
    finally:
        put(before)
        if put_mkl:
            put_mkl(before_mkl)


@functools.cache
def _functions() -> tuple[Callable[..., Any] | None, Callable[..., Any] | None, Callable[..., Any] | None]:
    path = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    library = ctypes.CDLL(path) if os.path.exists(path) else None
    names = ("omp_get_max_threads", "omp_set_num_threads", "MKL_Set_Num_Threads_Local")
    get, put, put_mkl = (getattr(library, name, None) for name in names)
    return get, put, put_mkl
