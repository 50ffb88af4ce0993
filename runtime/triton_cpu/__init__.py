"""A CPU backend for upstream Triton: TTIR in, machine code out.

Once the package is installed, Triton finds the backend by itself and uses it where there is no GPU, or where the environment
variable TRITON_DEFAULT_BACKEND is "cpu". `prepare` launches a kernel without Triton's launch path, GPU or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Triton imports modules of this package while it is imported itself, and needs them whole; so it has to come first.
import triton as triton

from .errors import BackendError, KernelFault, UnsupportedError

if TYPE_CHECKING:
    from .prepared import Launch, native_assembly, prepare

__all__ = ["BackendError", "KernelFault", "Launch", "UnsupportedError", "native_assembly", "prepare"]


def __getattr__(name: str) -> Any:
    # Whoever imports Triton imports this package, and most of them never need LLVM.
    if name in ("Launch", "native_assembly", "prepare"):
        from importlib import import_module

        return getattr(import_module(".prepared", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
