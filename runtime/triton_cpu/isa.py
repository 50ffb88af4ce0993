"""What the code generator needs to know of a CPU."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

from .errors import BackendError

ENVIRONMENT_VARIABLE = "TRITON_CPU_ISA"
"""Forces an instruction set: "avx512", "avx2" or "portable"."""


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set that code is generated for.

    Args:
        name: "avx512", "avx2" or "portable".
        vector_bits: width of a vector register.
        registers: number of vector registers.
        cpu: LLVM CPU name.
        features: LLVM feature string, '+a,+b,-c'.
        has: names of the optional features that code generation asks for ("vnni", "bf16").
    """

    name: str
    vector_bits: int
    registers: int
    cpu: str
    features: str
    has: frozenset[str] = frozenset()

    @property
    def lanes(self) -> int:
        """Number of 32-bit lanes of a vector register: the chunk width of generated loops."""
        return self.vector_bits // 32


@functools.cache
def detect(name: str) -> Isa:
    """Return the named instruction set on this host, or the best one for `name` = ''.

    Raises:
        BackendError: the name is unknown, or the host lacks the instruction set.
    """
    import llvmlite.binding as llvm

    host = llvm.get_host_cpu_features()
    cpu = llvm.get_host_cpu_name()
    on = {k for k, v in host.items() if v}
    available = []
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= on:
        available.append("avx512")
    if {"avx2", "fma", "f16c"} <= on:
        available.append("avx2")
    available.append("portable")
    if name and name not in ("avx512", "avx2", "portable"):
        raise BackendError(f"{ENVIRONMENT_VARIABLE} must be one of avx512, avx2, portable; got {name!r}")
    if name and name not in available:
        raise BackendError(f"{ENVIRONMENT_VARIABLE}={name}, but this CPU ({cpu}) offers only {', '.join(available)}")
    chosen = name or available[0]
    optional = {"vnni": "avx512vnni", "bf16": "avx512bf16"}
    if chosen == "avx512":
        has = frozenset(k for k, v in optional.items() if v in on)
        return Isa("avx512", 512, 32, cpu, host.flatten(), has)
    if chosen == "avx2":
        has = frozenset({"vnni"}) if "avxvnni" in on else frozenset()
        features = "+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt" + (",+avxvnni" if has else "")
        return Isa("avx2", 256, 16, "x86-64-v3", features, has)
    if llvm.get_default_triple().startswith("x86_64"):
        return Isa("portable", 128, 16, "x86-64-v2", "")
    return Isa("portable", 128, 32, cpu, host.flatten())


def host_isa() -> Isa:
    """The instruction set in force: the best of this host, or the one that the environment variable names."""
    return detect(os.environ.get(ENVIRONMENT_VARIABLE, ""))
