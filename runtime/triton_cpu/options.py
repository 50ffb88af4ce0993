"""Options of a compilation for the CPU."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from . import isa

CHECKED_VARIABLE = "TRITON_CPU_CHECKED"
"""Set to 1, kernels compare every access with the extents of the tensors passed to the launch."""

GPU_ONLY = frozenset({"num_warps", "num_ctas", "num_stages", "warp_size", "maxnreg", "cluster_dims"}) | {
    "launch_cooperative_grid",
    "launch_pdl",
}
"""Options that are accepted and change nothing."""

_TRUE = frozenset({"1", "true", "on", "yes", "y"})


@dataclass(frozen=True)
class CPUOptions:
    """What a kernel can be compiled with: everything that Triton passes to a backend, and what only this one knows.

    Those that describe a GPU (warps, stages, clusters, ...) are accepted and change nothing.

    Args:
        debug: keep `device_assert`.
        sanitize_overflow: with `debug`, assert that integer arithmetic does not overflow.
        enable_fp_fusion: let a multiplication and an addition be one fused operation.
        default_dot_input_precision: precision of `tl.dot` where the kernel names none; all are computed as "ieee".
        checked: compare every access with the extents of the tensors passed to the launch.
        isa: instruction set to generate for; '' for the best of this CPU.
    """

    num_warps: int = 4
    num_ctas: int = 1
    num_stages: int = 3
    warp_size: int = 1
    maxnreg: int | None = None
    cluster_dims: tuple[int, int, int] = (1, 1, 1)
    ir_override: str | None = None
    enable_fp_fusion: bool = True
    launch_cooperative_grid: bool = False
    launch_pdl: bool = False
    supported_fp8_dtypes: tuple[str, ...] = ("fp8e4b15", "fp8e4b8", "fp8e4nv", "fp8e5", "fp8e5b16")
    deprecated_fp8_dot_operand_dtypes: tuple[str, ...] = ()
    default_dot_input_precision: str = "ieee"
    allowed_dot_input_precisions: tuple[str, ...] = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
    max_num_imprecise_acc_default: int = 0
    extern_libs: tuple[tuple[str, str], ...] = ()
    debug: bool = False
    sanitize_overflow: bool = True
    backend_name: str = "cpu"
    arch: str = ""
    instrumentation_mode: str = ""
    checked: bool = False
    isa: str = ""

    def __post_init__(self) -> None:
        # Triton's callers expect this class of error for this mistake.
        if self.num_warps < 1 or self.num_warps & (self.num_warps - 1):
            raise AssertionError(f"num_warps must be a power of 2, got {self.num_warps}")

    def hash(self) -> str:
        """Return a key that differs between options that give different code.

        What describes a GPU is left out, so that the configurations of an autotuner that differ in nothing else are compiled
        once.
        """
        chosen = {name: value for name, value in asdict(self).items() if name not in GPU_ONLY}
        return hashlib.sha256(repr(sorted(chosen.items())).encode()).hexdigest()


def parse_options(given: dict[str, Any], *, fp_fusion: bool) -> CPUOptions:
    """Return the options of a compilation.

    Args:
        given: options by name; other names, and those that are None, are left out.
        fp_fusion: value of `enable_fp_fusion` where it is not given.
    """
    names = {field.name for field in fields(CPUOptions)}
    chosen = {name: value for name, value in given.items() if name in names and value is not None}
    chosen.setdefault("enable_fp_fusion", fp_fusion)
    chosen.setdefault("checked", checked_by_default())
    chosen["isa"] = isa.detect(chosen.get("isa") or os.environ.get(isa.ENVIRONMENT_VARIABLE, "")).name
    libraries = chosen.get("extern_libs", ())
    chosen["extern_libs"] = tuple(sorted(libraries.items())) if isinstance(libraries, dict) else tuple(map(tuple, libraries))
    for name in ("cluster_dims", "supported_fp8_dtypes", "deprecated_fp8_dot_operand_dtypes", "allowed_dot_input_precisions"):
        if name in chosen:
            chosen[name] = tuple(chosen[name])
    return CPUOptions(**chosen)


def checked_by_default() -> bool:
    """Whether the environment asks for checked kernels."""
    return os.environ.get(CHECKED_VARIABLE, "").lower() in _TRUE
