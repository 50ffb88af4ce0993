"""The driver side of the backend: which device Triton runs on, and how kernels are loaded, launched and timed.

Triton looks in this module for exactly one driver class, so that no other may be visible here. It imports the module
whenever it is imported itself, for which reason LLVM is imported where it is used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from triton.backends import driver as triton_driver
from triton.backends.compiler import GPUTarget

from . import benchmark, isa

if TYPE_CHECKING:
    from .loaded import LoadedKernel

SELECTION_VARIABLE = "TRITON_DEFAULT_BACKEND"
BACKEND = "cpu"

_CPP_TYPES = {
    "i1": "int8_t", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t",
    "u1": "uint8_t", "u8": "uint8_t", "u16": "uint16_t", "u32": "uint32_t", "u64": "uint64_t",
    "fp16": "double", "bf16": "double", "fp32": "double", "f32": "double", "fp64": "double",
}  # fmt: skip


class CPUUtils:
    """What Triton asks of a driver about binaries and devices."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: object) -> tuple[LoadedKernel, int, int, int, int]:
        """Return the loaded kernel, its address, registers, spills and the largest number of threads.

        Raises:
            CorruptBinaryError: `kernel` is not a whole compiled kernel.
        """
        from .loaded import load_kernel

        loaded = load_kernel(kernel)
        return loaded, loaded.entry, 0, 0, 1 << 30

    def unload_module(self, module: LoadedKernel) -> None:
        """Do nothing: code stays for as long as the process."""

    def get_device_properties(self, device: object) -> dict[str, int]:
        """Return sizes by their CUDA names; shared memory is not a limit here."""
        return {
            "max_shared_mem": 1 << 40,
            "multiprocessor_count": os.cpu_count() or 1,
            "warpSize": 1,
        }


def _make_launcher(source: Any, metadata: Any) -> Any:
    from .launcher import make_launcher

    return make_launcher(source, metadata)


class CPUDriver(triton_driver.DriverBase):
    """Runs kernels on the CPU, on torch's threads."""

    def __init__(self) -> None:
        super().__init__()
        self.utils = CPUUtils()
        self.launcher_cls = _make_launcher

    @classmethod
    def is_active(cls) -> bool:
        """Whether Triton should use the CPU: when told to, or when there is nothing else."""
        selected = os.environ.get(SELECTION_VARIABLE)
        if selected:
            return selected == BACKEND
        from triton.backends import backends

        return not any(backend.driver.is_active() for backend in backends.values() if backend.driver is not cls)

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Return the C++ type that holds an argument of Triton's type `ty`."""
        return "void*" if ty.startswith("*") else _CPP_TYPES[ty]

    def get_current_target(self) -> GPUTarget:
        """Return the target that kernels are compiled for."""
        return GPUTarget(BACKEND, isa.host_isa().name, 1)

    def get_current_device(self) -> str:
        """Return the key of the device in Triton's tables: not a number, which would be a GPU's as well."""
        return BACKEND

    def set_current_device(self, device: object) -> None:
        """Do nothing: there is one device."""

    def get_current_stream(self, device: object) -> int:
        """Return the stream that kernels are launched on; launches return when the kernel has run."""
        return 0

    def get_active_torch_device(self) -> Any:
        """Return torch's name of the device."""
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> type[benchmark.CPUInterface]:
        """Return the counterpart of `torch.cuda`."""
        return benchmark.CPUInterface

    def get_benchmarker(self) -> benchmark.Benchmarker:
        """Return the function that measures kernels for the autotuner."""
        return benchmark.do_bench

    def get_empty_cache_for_benchmark(self) -> Any:
        """Return a buffer that displaces everything from the CPU's caches when it is written."""
        import torch

        return torch.empty(benchmark.cache_bytes(), dtype=torch.int8)

    def clear_cache(self, cache: Any) -> None:
        """Write the buffer."""
        cache.zero_()
