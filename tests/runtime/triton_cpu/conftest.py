"""What the tests of the CPU backend share: Triton on the CPU whatever else the machine has, and kernels in LLVM IR."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import triton

from graphwright.runtime.triton_cpu import isa, jit, worker
from graphwright.runtime.triton_cpu.driver import CPUDriver
from graphwright.runtime.triton_cpu.faults import FaultRecord
from graphwright.runtime.triton_cpu.generated import Generated, Site
from graphwright.runtime.triton_cpu.launch_code import launch_code

SIGNATURE = (
    "define internal void @program(ptr noalias %scratch, ptr %fault, i32 %pid0, i32 %pid1, i32 %pid2, "
    "i32 %np0, i32 %np1, i32 %np2"
)


@pytest.fixture(autouse=True)
def cpu_driver() -> Iterator[None]:
    """Let Triton run on the CPU."""
    triton.runtime.driver.set_active(CPUDriver())
    yield
    triton.runtime.driver.reset_active()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Return torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class IrKernel:
    """A kernel in LLVM IR, launched through ctypes.

    Args:
        body: text of `@program` after its fixed parameters: the others, attributes and the body.
        arguments: TTIR element types of the others.
        scratch_bytes: as in `Generated`.
        sites: as in `Generated`.
        before: module text in front of the function.
        target: name of the instruction set; '' for the best.
    """

    def __init__(
        self,
        body: str,
        arguments: Sequence[str] = (),
        *,
        scratch_bytes: int = 0,
        sites: Sequence[Site] = (),
        before: str = "",
        target: str = "",
    ) -> None:
        chosen = isa.detect(target)
        self.generated = Generated("kernel", before + SIGNATURE + body, tuple(arguments), scratch_bytes, tuple(sites))
        triple, layout = jit.target_description(chosen)
        self.text = worker.complete_module(
            self.generated, "entry", triple=triple, layout=layout, vector_bits=chosen.vector_bits
        )
        self.object_code = jit.compile_object(self.text, chosen)
        code = jit.load(self.object_code, {worker.PARALLEL: launch_code().parallel})
        self.function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32)(code.function("entry"))

    def run(self, grid: tuple[int, int, int], threads: int, *values: int) -> FaultRecord:
        """Run the kernel with the bits of its arguments and return the fault record."""
        record = FaultRecord()
        total = grid[0] * grid[1] * grid[2]
        header = worker.CONTEXT_HEADER.pack(0, total, 0, *grid, 0, ctypes.addressof(record))
        context = ctypes.create_string_buffer(header + struct.pack(f"<{len(values)}q", *values))
        self.function(ctypes.addressof(context), threads)
        return record


@pytest.fixture
def ir_kernel() -> type[IrKernel]:
    """Return the class of kernels in LLVM IR."""
    return IrKernel


@pytest.fixture
def python(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts a script in a process of its own, with its own Triton cache."""
    started = []

    def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        path = tmp_path / "script.py"
        path.write_text(script)
        variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_DEFAULT_BACKEND": "cpu", **environment}
        process = subprocess.Popen(
            [sys.executable, str(path), *arguments],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        # Its children hold the pipes as well.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def run_python(python: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Return a function that runs a script in a process of its own and returns what it prints."""

    def run(script: str, *arguments: str, **environment: str) -> str:
        process = python(script, *arguments, **environment)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, f"{out}\n{err}"
        return out

    return run
