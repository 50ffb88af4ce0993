"""The compiler side of the backend: Triton's stages from the Python source of a kernel to machine code.

Triton looks in this module for exactly one backend class, so that no other may be visible here. It imports the module
whenever it is imported itself, for which reason LLVM is imported where it is used.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from triton import knobs
from triton._C.libtriton import ir, passes
from triton.backends import compiler as triton_compiler
from triton.errors import TritonError

from . import isa
from .binary import VERSION, Binary, pack
from .cache import install_cache
from .errors import BackendError, UnsupportedError
from .generated import Site
from .options import CPUOptions, parse_options

TARGET = "cpu"
BINARY_STAGE = "cpuobj"
ENTRY = "graphwright_launch"


class UnsupportedKernelError(UnsupportedError, TritonError):
    """An `UnsupportedError` that is an error of Triton as well."""

    def __reduce__(self) -> tuple[type[UnsupportedKernelError], tuple[str, str]]:
        return type(self), (self.what, self.line)


class CPUBackend(triton_compiler.BaseBackend):
    """Compiles Triton kernels for the CPU of this host."""

    instrumentation = None

    @staticmethod
    def supports_target(target: triton_compiler.GPUTarget) -> bool:
        """Whether kernels can be compiled for a target."""
        return bool(target.backend == TARGET)

    def __init__(self, target: triton_compiler.GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = BINARY_STAGE
        install_cache()

    def hash(self) -> str:
        """Return a key that changes with whatever else the machine code depends on: this package, LLVM and the CPU."""
        return f"cpu-{VERSION}-{_fingerprint()}-{isa.host_isa().name}"

    def parse_options(self, opts: dict[str, Any]) -> CPUOptions:
        """Return the options of a compilation."""
        return parse_options(opts, fp_fusion=knobs.language.default_fp_fusion)

    def pack_metadata(self, metadata: Any) -> tuple[int, int, int]:
        """Return what is passed to the launcher at each launch."""
        return (metadata.num_warps, metadata.num_ctas, metadata.shared)

    def get_codegen_implementation(self, options: CPUOptions) -> dict[str, Callable[..., Any]]:
        """Return the functions that Triton's front end asks for."""
        return {"convert_custom_types": _convert_custom_types, "min_dot_size": _min_dot_size}

    def get_module_map(self) -> dict[str, ModuleType]:
        """Return the implementation of device libraries: the functions of CUDA's, whose symbols the code generator knows."""
        from triton.language.extra.cuda import libdevice

        return {"triton.language.extra.libdevice": libdevice}

    def load_dialects(self, ctx: Any) -> None:
        """Load further dialects: none."""

    def add_stages(self, stages: dict[str, Callable[..., Any]], options: CPUOptions, language: Any = None) -> None:
        """Add the stages by the suffix of what they make: Triton IR, LLVM IR text, compiled kernel.

        Raises:
            UnsupportedKernelError: the kernel is written in Gluon.
            BackendError: Triton is set to store nothing but GPU binaries.
        """
        if language is not None and language != triton_compiler.Language.TRITON:
            raise UnsupportedKernelError("kernels written in Gluon, which describe a GPU")
        if knobs.compilation.store_binary_only:
            raise BackendError(
                "TRITON_STORE_BINARY_ONLY=1: Triton then keeps only binaries of GPUs, and the CPU's would be lost; unset it"
            )
        stages["ttir"] = lambda module, metadata: make_ttir(module)
        stages["llir"] = lambda module, metadata: make_llir(module, metadata, options)
        stages[BINARY_STAGE] = lambda text, metadata: make_binary(text, metadata, options)
        if knobs.runtime.add_stages_inspection_hook is not None:
            knobs.runtime.add_stages_inspection_hook(self, stages, options, language, None)


def make_ttir(module: Any) -> Any:
    """Return a module of Triton IR, inlined and simplified."""
    manager = ir.pass_manager(module.context)
    manager.enable_debug()
    passes.common.add_inliner(manager)
    # Block pointers and tensor descriptors become plain pointers with masks.
    for name in ("add_rewrite_tensor_pointer", "add_rewrite_tensor_descriptor_to_pointer"):
        if hasattr(passes.ttir, name):
            getattr(passes.ttir, name)(manager)
    passes.common.add_canonicalizer(manager)
    passes.ttir.add_combine(manager)
    passes.ttir.add_reorder_broadcast(manager)
    passes.common.add_cse(manager)
    passes.ttir.add_triton_licm(manager)
    passes.common.add_symbol_dce(manager)
    passes.ttir.add_loop_unroll(manager)
    manager.run(module, "make_ttir")
    return module


def make_llir(module: Any, metadata: dict[str, Any], options: CPUOptions) -> str:
    """Return the LLVM IR of a kernel and its launch, and record in `metadata` what the launcher has to know.

    Raises:
        UnsupportedKernelError: the kernel uses something that is not lowered for the CPU.
    """
    from . import jit
    from .generate import generate
    from .worker import complete_module

    target = isa.detect(options.isa)
    text = str(module)
    try:
        generated = generate(text, target, options)
    except UnsupportedError as error:
        raise UnsupportedKernelError(error.what, error.line) from error
    metadata.update(
        name=generated.name,
        shared=0,
        arguments=list(generated.arguments),
        scratch_bytes=generated.scratch_bytes,
        sites=[asdict(site) for site in generated.sites],
        makes_pointers="tt.int_to_ptr" in text,
    )
    triple, layout = jit.target_description(target)
    return complete_module(generated, ENTRY, triple=triple, layout=layout, vector_bits=target.vector_bits)


def make_binary(text: str, metadata: dict[str, Any], options: CPUOptions) -> bytes:
    """Return the compiled kernel for LLVM IR that `make_llir` made."""
    from . import jit

    return pack(
        Binary(
            name=metadata["name"],
            entry=ENTRY,
            arguments=tuple(metadata["arguments"]),
            scratch_bytes=metadata["scratch_bytes"],
            sites=tuple(Site(**site) for site in metadata["sites"]),
            checked=options.checked,
            object_code=jit.compile_object(text, isa.detect(options.isa)),
        )
    )


def _min_dot_size(lhs: Any, rhs: Any) -> tuple[int, int, int]:
    return (1, 1, 1)


def _convert_custom_types(value: Any, target: Any, rounding: Any = None, *, _semantic: Any) -> Any:
    from .fp8e4b15 import convert

    return convert(value, target, _semantic)


@functools.cache
def _fingerprint() -> str:
    import llvmlite
    import llvmlite.binding as llvm

    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    version = ".".join(map(str, llvm.llvm_version_info))
    features = sorted(llvm.get_host_cpu_features().items())
    digest.update(repr((llvmlite.__version__, version, llvm.get_host_cpu_name(), features)).encode())
    return digest.hexdigest()
