"""Autotuning, heuristics, hooks, warm-up, caching and what a compiled kernel carries."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conformance_kernels import module_from
from conformance_numbers import assert_same, random_values

pytestmark = pytest.mark.compiled


@triton.jit
def scale_kernel(out, x, n, BLOCK: tl.constexpr, TIMES: tl.constexpr = 2):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out + offsets, tl.load(x + offsets, mask=mask) * TIMES, mask=mask)


def configurations():
    """Return three block sizes."""
    return [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((16, 1), (128, 4), (1024, 8))]


def grid_of(n):
    """Return a grid for n elements."""
    return lambda meta: (triton.cdiv(n, meta["BLOCK"]),)


@pytest.mark.parametrize("n", [1, 1000])
def test_autotune(n, rng, buffers, covers):
    """Autotuning picks a configuration, computes right and remembers it by the key."""
    covers("autotune", "any")
    kernel = triton.autotune(configs=configurations(), key=["n"])(triton.JITFunction(scale_kernel.fn))
    x, out = random_values(rng, n, "float32"), buffers.empty(n, "float32")
    kernel[grid_of(n)](out, buffers.put(x, "float32"), n)
    assert_same(out, x * 2)
    assert kernel.best_config.kwargs["BLOCK"] in (16, 128, 1024)
    assert len(kernel.cache) == 1
    kernel[grid_of(n)](out, buffers.put(x, "float32"), n)
    assert len(kernel.cache) == 1


@triton.jit
def add_in_place_kernel(x, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + offsets, tl.load(x + offsets, mask=offsets < n) + 1, mask=offsets < n)


@pytest.mark.parametrize("option", ["restore_value", "reset_to_zero"])
def test_autotune_restores(option, rng, buffers, covers):
    """Tensors named by `restore_value` and `reset_to_zero` are as before when the chosen kernel runs."""
    covers(f"autotune {option}", "any")
    kernel = triton.autotune(configs=configurations(), key=["n"], **{option: ["x"]})(triton.JITFunction(add_in_place_kernel.fn))
    values = random_values(rng, 100, "float32") if option == "restore_value" else np.zeros(100, np.float32)
    x = buffers.put(values, "float32", writable=True)
    kernel[grid_of(100)](x, 100)
    assert_same(x, values + np.float32(1))


def test_autotune_prunes(rng, buffers, covers):
    """`early_config_prune` and hooks see the arguments."""
    covers("autotune prune", "any")
    seen = []

    def prune(configs, named_args, **kwargs):
        seen.append(named_args["n"])
        return [config for config in configs if config.kwargs["BLOCK"] <= 128]

    kernel = triton.autotune(configs=configurations(), key=["n"], prune_configs_by={"early_config_prune": prune})(
        triton.JITFunction(scale_kernel.fn)
    )
    x, out = random_values(rng, 100, "float32"), buffers.empty(100, "float32")
    kernel[grid_of(100)](out, buffers.put(x, "float32"), 100)
    assert seen == [100]
    assert kernel.best_config.kwargs["BLOCK"] <= 128
    assert_same(out, x * 2)


def test_heuristics(rng, buffers, covers):
    """Heuristics compute constants from the arguments."""
    covers("heuristics", "any")
    kernel = triton.heuristics({"BLOCK": lambda args: triton.next_power_of_2(args["n"]), "TIMES": lambda args: 3})(
        triton.JITFunction(scale_kernel.fn)
    )
    x, out = random_values(rng, 63, "float32"), buffers.empty(63, "float32")
    kernel[(1,)](out, buffers.put(x, "float32"), 63)
    assert_same(out, x * np.float32(3))


def test_compiled_kernels_are_reused(rng, buffers, covers):
    """Arguments of the same kind reuse a compiled kernel, and others compile another."""
    covers("specialisation cache", "any")
    kernel = triton.JITFunction(scale_kernel.fn)
    x, out = random_values(rng, 64, "float32"), buffers.empty(64, "float32")
    source = buffers.put(x, "float32")

    def compiled():
        return sum(len(entry[0]) for entry in kernel.device_caches.values())

    for n, expected in ((64, 1), (48, 1), (63, 2), (1, 3), (62, 3)):
        kernel[(1,)](out, source, n, BLOCK=64)
        assert compiled() == expected
    assert_same(out[:62], x[:62] * 2)
    kernel[(1,)](out, source, 64, BLOCK=32)
    assert compiled() == 4
    ints = buffers.put(np.arange(64), "int32")
    kernel[(1,)](buffers.empty(64, "int32"), ints, 64, BLOCK=64)
    assert compiled() == 5


def test_dropped_specialisation(buffers, covers):
    """`do_not_specialize` keeps one kernel for every value."""
    covers("do_not_specialize", "any")
    kernel = triton.JITFunction(scale_kernel.fn, do_not_specialize=["n"])
    x, out = buffers.put(np.arange(64), "int32"), buffers.empty(64, "int32")
    for n in (64, 1, 63):
        kernel[(1,)](out, x, n, BLOCK=64)
    assert sum(len(entry[0]) for entry in kernel.device_caches.values()) == 1
    assert out.tolist() == [2 * i for i in range(64)]


def test_hooks(buffers, covers):
    """Launch hooks run before and after a launch with the kernel's metadata."""
    covers("launch hooks", "any")
    calls = []

    def enter(metadata):
        calls.append(("enter", metadata.get()["name"]))

    def leave(metadata):
        calls.append(("exit", metadata.get()["name"]))

    triton.knobs.runtime.launch_enter_hook.add(enter)
    triton.knobs.runtime.launch_exit_hook.add(leave)
    try:
        scale_kernel[(1,)](buffers.empty(16, "int32"), buffers.put(np.arange(16), "int32"), 16, BLOCK=16)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(enter)
        triton.knobs.runtime.launch_exit_hook.remove(leave)
    assert calls == [("enter", "scale_kernel"), ("exit", "scale_kernel")]


def test_pre_run_hook(buffers, covers):
    """A hook added to a kernel runs before each launch."""
    covers("pre-run hooks", "any")
    kernel = triton.JITFunction(scale_kernel.fn)
    calls = []
    kernel.add_pre_run_hook(lambda *args, **kwargs: calls.append(kwargs["BLOCK"]))
    kernel[(1,)](buffers.empty(16, "int32"), buffers.put(np.arange(16), "int32"), 16, BLOCK=16)
    assert calls == [16]


def test_warmup_and_returned_kernels(rng, buffers, covers):
    """`warmup` compiles without running, from dtypes too, and the result can be launched."""
    covers("warmup", "any")
    compiled = scale_kernel.warmup(torch.float32, torch.float32, 64, BLOCK=64, grid=(1,))
    assert "tt.func" in compiled.asm["ttir"]
    x, out = random_values(rng, 64, "float32"), buffers.empty(64, "float32")
    source = buffers.put(x, "float32")
    launched = scale_kernel[(1,)](out, source, 64, BLOCK=64)
    assert_same(out, x * 2)
    assert launched.metadata.name == "scale_kernel"
    assert {"ttir"} <= set(launched.asm)
    out.zero_()
    launched[(1, 1, 1)](out, source, 64, 64, 2)
    assert_same(out, x * 2)


def test_a_second_process_uses_the_cache(tmp_path, covers):
    """A kernel compiled by one process runs in another from the cache."""
    import os
    import subprocess
    import sys

    covers("cache", "any")
    script = tmp_path / "cached.py"
    script.write_text(
        "import torch, triton, triton.language as tl\n\n@triton.jit\n"
        "def kernel(out, x, N: tl.constexpr):\n    i = tl.arange(0, N)\n"
        "    tl.store(out + i, tl.exp(tl.load(x + i)))\n\nx = torch.linspace(-1, 1, 64)\nout = torch.empty(64)\n"
        "kernel[(1,)](out, x, N=64)\nassert torch.allclose(out, x.exp())\n"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    stamps = []
    for _ in range(2):
        subprocess.run([sys.executable, str(script)], check=True, timeout=100, env=environment)
        stamps.append({str(p): p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.json")})
    assert stamps[0]
    assert stamps[0] == stamps[1]


def test_benchmarker(covers):
    """`do_bench` times a function on this device."""
    covers("do_bench", "any")
    assert 0 < triton.testing.do_bench(lambda: sum(range(1000)), warmup=1, rep=5) < 1000


def test_devices_are_the_cpu(covers):
    """The active driver says that tensors live on the CPU."""
    covers("driver", "any")
    assert triton.runtime.driver.active.get_active_torch_device() == torch.device("cpu")
    assert triton.runtime.driver.active.get_current_target().backend == "cpu"


def test_source_changes_recompile(buffers, covers):
    """Two kernels of one name and different bodies do not share code."""
    covers("cache", "any")
    results = []
    for number in (1, 2):
        out = buffers.empty(1, "int32")
        module_from(f"@triton.jit\ndef kernel(out):\n    tl.store(out, {number})\n").kernel[(1,)](out)
        results.append(out.item())
    assert results == [1, 2]


def test_launches_from_threads(rng, buffers, covers):
    """Threads launch kernels at the same time."""
    import threading

    covers("threads", "any")
    x = random_values(rng, 5000, "float32")
    source = buffers.put(x, "float32")
    outs = [buffers.empty(5000, "float32") for _ in range(4)]

    def work(out):
        for _ in range(20):
            scale_kernel[(20,)](out, source, 5000, BLOCK=256)

    threads = [threading.Thread(target=work, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in outs:
        assert_same(out, x * 2)


def test_wrong_arguments_are_refused(buffers):
    """Missing arguments, unknown names and tensors of unknown dtypes raise before anything runs."""
    x = buffers.put(np.arange(16), "int32")
    with pytest.raises(TypeError):
        scale_kernel[(1,)](x, x, BLOCK=16)
    with pytest.raises((KeyError, TypeError)):
        scale_kernel[(1,)](x, x, 16, BLOCK=16, no_such_option=1)
    with pytest.raises(Exception, match=r"complex|dtype|type"):
        scale_kernel[(1,)](x, torch.zeros(16, dtype=torch.complex64), 16, BLOCK=16)
