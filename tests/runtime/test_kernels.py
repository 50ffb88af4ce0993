"""Compiled kernels and launches of them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from graphwright.ir.errors import ArtifactError
from graphwright.runtime.kernels import KernelCache, Pointer
from graphwright.runtime.triton_cpu import prepared

AXPY = """import triton
import triton.language as tl


@triton.jit
def axpy(x, BLOCK: tl.constexpr, y, n, alpha, out):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = k < n
    tl.store(out + k, alpha * tl.load(x + k, mask=mask) + tl.load(y + k, mask=mask), mask=mask)
"""


@pytest.fixture
def cache():
    return KernelCache({"axpy": AXPY}, "cpu")


def pointer(tensor):
    return Pointer(tensor.dtype, tensor.data_ptr())


def vectors(n, dtype=torch.float32, offset=0):
    x, y = torch.randn(n + offset).to(dtype)[offset:], torch.randn(n + offset).to(dtype)[offset:]
    return x, y, torch.full((n + offset + 1,), float("nan"), dtype=dtype)[offset : offset + n]


def launch(cache, x, y, out, block=64):
    n = x.numel()
    found = cache.launch("axpy", (-(-n // block),), [pointer(x), pointer(y), n, 2.0, pointer(out)], {"BLOCK": block})
    return found


@pytest.mark.parametrize("n", [1, 16, 63, 64, 1000])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_specialization_computes_the_same(cache, n, offset, dtype):
    """Sizes of 1 and of multiples of 16, unaligned addresses and other dtypes each get the kernel compiled for them."""
    x, y, out = vectors(n, dtype, offset)
    launch(cache, x, y, out).run()
    assert torch.allclose(out, 2 * x + y)


def test_constants_may_stand_anywhere(cache):
    """Arguments are in the kernel's order without its constants, and `places` says where they went."""
    x, y, out = vectors(64)
    found = launch(cache, x, y, out)
    assert found.places == (0, 2, 3, 4, 5)
    assert found.values[1] == 64
    other = torch.randn(64)
    values = list(found.values)
    values[found.places[0]] = other.data_ptr()
    found.run(*values)
    assert torch.allclose(out, 2 * other + y)
    found.run()
    assert torch.allclose(out, 2 * x + y)


def test_known_specializations_are_not_compiled_again(monkeypatch):
    """A size that is like one before is bound without asking Triton."""
    cache = KernelCache({"axpy": f"{AXPY}# Compiled for no other test.\n"}, "cpu")
    launch(cache, *vectors(992))
    launch(cache, *vectors(999))
    monkeypatch.setattr(prepared, "_compile", None)
    for n in (976, 1001, 17, 32):
        x, y, out = vectors(n)
        launch(cache, x, y, out).run()
        assert torch.allclose(out, 2 * x + y)
    with pytest.raises(TypeError):
        launch(cache, *vectors(1))


def test_equal_sources_are_one_kernel():
    """Kernels of one source under several names, in several caches, share what was compiled."""
    first, second = KernelCache({"axpy": AXPY}, "cpu"), KernelCache({"a": AXPY, "b": AXPY}, "cpu")
    assert first._kernels["axpy"] is second._kernels["a"] is second._kernels["b"]


@pytest.mark.parametrize(
    ("name", "arguments", "constants", "message"),
    [
        ("axpx", 5, {"BLOCK": 64}, "no kernel 'axpx'. Did you mean 'axpy'"),
        ("axpy", 4, {"BLOCK": 64}, "takes 5 arguments besides constants, got 4"),
        ("axpy", 5, {}, "takes the constants BLOCK, got none"),
        ("axpy", 5, {"BLOCK": 64, "OTHER": 1}, "takes the constants BLOCK, got BLOCK, OTHER"),
    ],
)
def test_wrong_arguments_are_refused(cache, name, arguments, constants, message):
    """Arguments that are not the kernel's are errors that say what it takes."""
    x, y, out = vectors(64)
    with pytest.raises(ArtifactError, match=message):
        cache.launch(name, (1,), [pointer(x), pointer(y), 64, 2.0, pointer(out)][:arguments], constants)


def test_options_of_the_compilation_may_stand_among_the_constants(cache):
    """num_warps is passed on to Triton where the kernel has no such parameter."""
    x, y, out = vectors(64)
    arguments = [pointer(x), pointer(y), 64, 2.0, pointer(out)]
    cache.launch("axpy", (1,), arguments, {"BLOCK": 64, "num_warps": 2}).run()
    assert torch.allclose(out, 2 * x + y)


@pytest.mark.slow
def test_results_are_found_again_in_another_process(tmp_path):
    """What one process compiled, the next one takes from Triton's cache on disk."""
    script = f"""
import sys, torch
from graphwright.runtime.kernels import KernelCache, Pointer
from graphwright.runtime.triton_cpu import compiler
made = []
original = compiler.make_binary
compiler.make_binary = lambda *args: made.append(1) or original(*args)
x = torch.ones(64)
p = Pointer(x.dtype, x.data_ptr())
KernelCache({{"axpy": {AXPY!r}}}, "cpu").launch("axpy", (1,), [p, p, 64, 2.0, p], {{"BLOCK": 64}}).run()
print(len(made), x.sum().item())
"""
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    for expected in ("1 192.0", "0 192.0"):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == expected
