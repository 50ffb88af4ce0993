"""Kernels made from source text, and launches of elementwise expressions."""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from conformance_buffers import Buffers

BLOCK = 256
_HEADER = "import triton\nimport triton.language as tl\nfrom triton.language.extra import libdevice\n\n\n"


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="conformance-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def module_from(source: str) -> ModuleType:
    """Return a module made from Triton source text, in a file so that `inspect` finds its lines."""
    name = "conformance_" + hashlib.sha256(source.encode()).hexdigest()[:16]
    path = _folder() / f"{name}.py"
    path.write_text(_HEADER + source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def elementwise_source(results: Sequence[str], inputs: Sequence[str], scalars: Sequence[str] = ()) -> str:
    """Return the source of a kernel that stores one expression per result over a masked range."""
    outputs = [f"z{index}" for index in range(len(results))]
    pointers = [f"{name}_ptr" for name in inputs]
    lines = [
        "@triton.jit",
        f"def kernel({', '.join([*outputs, *pointers, *scalars])}, n, BLOCK: tl.constexpr):",
        "    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)",
        "    mask = offsets < n",
        *[f"    {name} = tl.load({name}_ptr + offsets, mask=mask, other=1)" for name in inputs],
        *[f"    tl.store({z} + offsets, {text}, mask=mask)" for z, text in zip(outputs, results, strict=True)],
    ]
    return "\n".join(lines) + "\n"


def run_elementwise(
    buffers: Buffers,
    results: Mapping[str, str],
    inputs: Mapping[str, tuple[np.ndarray, str]],
    block: int = BLOCK,
    scalars: Mapping[str, object] | None = None,
) -> list[torch.Tensor]:
    """Compute expressions over arrays with one kernel and return a tensor for each.

    Args:
        buffers: allocator of the tensors.
        results: dtype of the output by expression.
        inputs: values and dtype by the name used in the expressions; all of one length.
        block: elements that one program handles.
        scalars: values of further arguments by name.
    """
    scalars = scalars or {}
    size = len(next(iter(inputs.values()))[0])
    kernel = module_from(elementwise_source(tuple(results), tuple(inputs), tuple(scalars))).kernel
    outputs = [buffers.empty(size, dtype) for dtype in results.values()]
    sources = [buffers.put(values, dtype) for values, dtype in inputs.values()]
    kernel[(-(-size // block),)](*outputs, *sources, *scalars.values(), size, BLOCK=block)
    return outputs
