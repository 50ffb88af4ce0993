"""Compiled kernels that are loaded into this process."""

from __future__ import annotations

from dataclasses import dataclass

from . import jit
from .binary import Binary, unpack
from .launch_code import launch_code
from .worker import PARALLEL

_loaded: dict[bytes, LoadedKernel] = {}


@dataclass(frozen=True, slots=True, eq=False)
class LoadedKernel:
    """A kernel that can run.

    Args:
        binary: what was loaded.
        entry: address of its `void entry(ptr context, i32 threads)`.
    """

    binary: Binary
    entry: int


def load_kernel(data: bytes) -> LoadedKernel:
    """Return the loaded form of a compiled kernel; the same object for the same bytes.

    Raises:
        CorruptBinaryError: the data is not a whole compiled kernel.
    """
    kernel = _loaded.get(data)
    if kernel is None:
        binary = unpack(data)
        code = jit.load(binary.object_code, {PARALLEL: launch_code().parallel})
        kernel = _loaded.setdefault(data, LoadedKernel(binary, code.function(binary.entry)))
    return kernel
