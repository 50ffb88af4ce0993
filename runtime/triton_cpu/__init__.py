"""A CPU backend for upstream Triton: TTIR in, machine code out.

Once the package is installed, Triton finds the backend by itself and uses it where there is no GPU, or where the environment
variable TRITON_DEFAULT_BACKEND is "cpu". `prepare` launches a kernel without Triton's launch path, GPU or not.
"""

from __future__ import annotations

# Triton imports modules of this package while it is imported itself, and needs them whole; so it has to come first.
import triton as triton

from .errors import BackendError, KernelFault, UnsupportedError
from .prepare import Launch, native_assembly, prepare

__all__ = ["BackendError", "KernelFault", "Launch", "UnsupportedError", "native_assembly", "prepare"]
