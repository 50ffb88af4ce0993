"""Registration with Triton, choice of the device, options, and timing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from graphwright.runtime.triton_cpu import UnsupportedError, native_assembly
from graphwright.runtime.triton_cpu.benchmark import cache_bytes
from graphwright.runtime.triton_cpu.compiler import CPUBackend
from graphwright.runtime.triton_cpu.driver import CPUDriver
from graphwright.runtime.triton_cpu.options import CPUOptions, parse_options


@triton.jit
def double_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) * 2)


@triton.jit
def inline_assembly_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(x_ptr + offsets, y)


def test_registered_once():
    """Triton finds the backend under its key, with this driver and compiler."""
    assert triton.backends.backends["cpu"].driver is CPUDriver
    assert triton.backends.backends["cpu"].compiler is CPUBackend
    assert not CPUBackend.supports_target(GPUTarget("cuda", 90, 32))


@pytest.mark.parametrize("module", ["compiler", "driver", "cache", "prepared", "generate", "jit"])
def test_any_module_may_be_imported_first(run_python, module):
    """The order of imports does not matter, although Triton imports the backend while it is imported."""
    script = f"import graphwright.runtime.triton_cpu.{module}\nimport triton\nprint(sorted(triton.backends.backends))\n"
    assert "'cpu'" in run_python(script)


def test_triton_s_import_does_not_load_llvm(run_python):
    """Whoever imports Triton for another device pays for no compiler."""
    assert run_python("import sys, triton\nprint('llvmlite' in sys.modules, 'torch' in sys.modules)\n") == "False False\n"


def test_active_where_there_is_nothing_else(monkeypatch):
    """Without a selection the driver is active only if no other is."""
    monkeypatch.delenv("TRITON_DEFAULT_BACKEND", raising=False)
    others = [b.driver for name, b in triton.backends.backends.items() if name != "cpu"]
    for driver in others:
        monkeypatch.setattr(driver, "is_active", staticmethod(lambda: False))
    assert CPUDriver.is_active()
    monkeypatch.setattr(others[0], "is_active", staticmethod(lambda: True))
    assert not CPUDriver.is_active()


@pytest.mark.parametrize(("selected", "active"), [("cpu", True), ("nvidia", False)])
def test_selection_by_environment(monkeypatch, selected, active):
    """TRITON_DEFAULT_BACKEND decides."""
    monkeypatch.setenv("TRITON_DEFAULT_BACKEND", selected)
    assert CPUDriver.is_active() is active


def test_kernel_runs_without_any_setting(run_python):
    """On a machine without a GPU, an unchanged script runs on the CPU."""
    if torch.cuda.is_available():
        pytest.skip("the machine has a GPU, which Triton uses")
    script = """import torch, triton, triton.language as tl
@triton.jit
def kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)
x = torch.zeros(1)
kernel[(1,)](x)
print(x.item(), triton.runtime.driver.active.get_active_torch_device())
"""
    assert run_python(script, TRITON_DEFAULT_BACKEND="") == "1.0 cpu\n"


def test_compiled_kernel_shows_its_stages():
    """The texts of the stages, the metadata, and the assembly on request, can be read."""
    kernel = double_kernel[(1,)](torch.zeros(64), BLOCK=64)
    assert set(kernel.asm) == {"source", "ttir", "llir", "cpuobj"}
    assert "tt.store" in kernel.asm["ttir"]
    assert "define internal void @program" in kernel.asm["llir"]
    assert kernel.metadata.arguments == ["ptr"]
    assert kernel.metadata.target.backend == "cpu"
    assert "graphwright_launch" in native_assembly(kernel)


def test_gpu_options_are_accepted():
    """Launch options that only a GPU can use change nothing."""
    x = torch.ones(64)
    double_kernel[(1,)](x, BLOCK=64, num_warps=8, num_stages=4, num_ctas=2, maxnreg=64, launch_pdl=True)
    assert bool((x == 2).all())


def test_options_change_the_key():
    """Every option is part of the key of compiled kernels."""
    base = parse_options({}, fp_fusion=True)
    keys = {base.hash()}
    for name, value in {"debug": True, "checked": True, "isa": "portable", "enable_fp_fusion": False}.items():
        keys.add(parse_options({name: value}, fp_fusion=True).hash())
    assert len(keys) == 5
    assert parse_options({"num_warps": 8, "num_stages": 1}, fp_fusion=True).hash() == base.hash()
    assert base == parse_options({"num_warps": None, "not an option": 1}, fp_fusion=True)
    assert parse_options({"extern_libs": {"b": "2", "a": "1"}}, fp_fusion=True).extern_libs == (("a", "1"), ("b", "2"))


def test_environment_sets_options(monkeypatch):
    """Checking and the instruction set can be chosen from outside."""
    monkeypatch.setenv("TRITON_CPU_CHECKED", "1")
    monkeypatch.setenv("TRITON_CPU_ISA", "portable")
    options = parse_options({}, fp_fusion=True)
    assert options.checked
    assert options.isa == "portable"


def test_backend_hash_follows_the_instruction_set(monkeypatch):
    """Kernels for different instruction sets do not share cache entries."""
    backend = CPUBackend(GPUTarget("cpu", "", 1))
    before = backend.hash()
    assert before == CPUBackend(GPUTarget("cpu", "", 1)).hash()
    monkeypatch.setenv("TRITON_CPU_ISA", "portable")
    assert backend.hash() != before


def test_options_have_what_triton_reads():
    """Triton's front end finds the options that it reads from every backend."""
    options = CPUOptions()
    assert options.default_dot_input_precision in options.allowed_dot_input_precisions
    assert options.enable_fp_fusion


def test_unsupported_operation_names_itself_and_its_line(monkeypatch, tmp_path):
    """A kernel that cannot be lowered fails with one error, each time, and leaves no cache entry."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    for _ in range(2):
        with pytest.raises(UnsupportedError) as caught:
            inline_assembly_kernel[(1,)](torch.zeros(16, dtype=torch.int32), BLOCK=16)
        line = inline_assembly_kernel.starting_line_number + 4
        assert f"{__file__}:{line}" in str(caught.value)
        assert "inline" in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("__grp__")]
    assert not inline_assembly_kernel.device_caches["cpu"][0]


def test_libdevice_functions_are_found():
    """CUDA's libdevice functions can be called."""
    from triton.language.extra import libdevice

    @triton.jit
    def kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        tl.store(y_ptr + offsets, libdevice.tanh(tl.load(x_ptr + offsets)))

    x, y = torch.randn(64), torch.zeros(64)
    kernel[(1,)](x, y, BLOCK=64)
    torch.testing.assert_close(y, torch.tanh(x))


def test_triton_s_benchmark_runs():
    """`triton.testing.do_bench` measures a kernel with every way to summarize."""
    x = torch.zeros(1024)
    bench = triton.testing.do_bench
    assert bench(lambda: double_kernel[(1,)](x, BLOCK=1024), warmup=1, rep=5) > 0
    low, high = bench(lambda: double_kernel[(1,)](x, BLOCK=1024), warmup=1, rep=5, quantiles=[0.2, 0.8])
    assert 0 < low <= high


@pytest.mark.parametrize("mode", ["min", "max", "mean", "median"])
def test_benchmarker(mode):
    """The driver's own benchmark returns milliseconds per call."""
    x = torch.zeros(1024, requires_grad=False)
    bench = CPUDriver().get_benchmarker()
    assert 0 < bench(lambda: x.add_(1), warmup=1, rep=2, return_mode=mode) < 1000
    assert len(bench(lambda: x.add_(1), warmup=1, rep=2, quantiles=(0.5, 0.2, 0.8))) == 3
    assert len(bench(lambda: x.add_(1), warmup=1, rep=2, return_mode="all")) > 1
    assert bench(lambda: x.add_(1), warmup=0, rep=0, grad_to_none=[x]) > 0
    with pytest.raises(ValueError, match="return_mode"):
        bench(lambda: None, return_mode="fastest")


def test_events_measure_time():
    """Events of the device interface tell the time between them."""
    interface = CPUDriver().get_device_interface()
    start, end = interface.Event(enable_timing=True), interface.Event(enable_timing=True)
    start.record()
    torch.randn(1000).sum()
    end.record()
    interface.synchronize()
    assert 0 < start.elapsed_time(end) < 10_000
    assert interface.is_available()
    assert end.query()


def test_autotuner_chooses_and_prepares():
    """An autotuned kernel runs, remembers its choice, and can be prepared."""
    from graphwright.runtime.triton_cpu import prepare

    @triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 256}, num_warps=8)], key=["n"])
    @triton.jit
    def kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)

    x, y = torch.randn(1000), torch.zeros(1000)
    kernel[lambda meta: (triton.cdiv(1000, meta["BLOCK"]),)](x, y, 1000)
    assert torch.equal(x, y)
    assert kernel.best_config.kwargs["BLOCK"] in (64, 256)
    y.zero_()
    prepare(kernel, lambda meta: (triton.cdiv(1000, meta["BLOCK"]),), x, y, 1000)()
    assert torch.equal(x, y)


def test_asynchronous_compilation():
    """Kernels can be compiled in threads ahead of their launch."""
    from concurrent.futures import ThreadPoolExecutor

    x = torch.ones(512)
    with ThreadPoolExecutor(3) as pool, triton.AsyncCompileMode(pool):
        for block in (128, 256, 512):
            double_kernel.warmup(torch.float32, BLOCK=block, grid=(1,))
    for block in (128, 256, 512):
        double_kernel[(512 // block,)](x, BLOCK=block)
    assert bool((x == 8).all())


def test_driver_answers_what_triton_asks():
    """The remaining questions of Triton to a driver have answers."""
    driver = CPUDriver()
    assert driver.get_current_device() == "cpu"
    assert driver.get_current_stream("cpu") == 0
    assert driver.get_active_torch_device() == torch.device("cpu")
    assert driver.map_python_to_cpp_type("*fp32") == "void*"
    assert driver.map_python_to_cpp_type("i64") == "int64_t"
    assert driver.utils.get_device_properties("cpu")["max_shared_mem"] > 1 << 20
    assert driver.get_current_target().warp_size == 1
    assert cache_bytes() >= 1 << 20
    driver.clear_cache(driver.get_empty_cache_for_benchmark())


def test_binary_only_storage_is_refused(monkeypatch):
    """With TRITON_STORE_BINARY_ONLY Triton would drop the CPU's binary, which is said in so many words."""
    monkeypatch.setattr(triton.knobs.compilation, "store_binary_only", True)
    with pytest.raises(RuntimeError, match="TRITON_STORE_BINARY_ONLY"):
        double_kernel[(1,)](torch.zeros(32), BLOCK=32)


def test_ttir_file_compiles(tmp_path: Path):
    """A kernel can be compiled from a file of Triton IR."""
    kernel = double_kernel[(1,)](torch.zeros(64), BLOCK=64)
    path = tmp_path / "kernel.ttir"
    path.write_text(kernel.asm["ttir"])
    compiled = triton.compile(str(path))
    x = torch.ones(64)
    compiled[(1, 1, 1)](x)
    assert bool((x == 2).all())
    assert os.path.exists(compiled.metadata_group[f"{compiled.src.name[:150]}.json"])
