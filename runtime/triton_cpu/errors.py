"""Errors of the CPU backend.

BackendError
├── UnsupportedError    a kernel uses something that the backend does not lower
├── KernelFault         a running kernel failed (device_assert, or an access outside its tensors in checked mode)
└── TtirSyntaxError     the TTIR text is not of the form that the parser knows
"""

from __future__ import annotations


class BackendError(RuntimeError):
    """Base of the backend's errors."""


class UnsupportedError(BackendError):
    """A kernel uses an operation or type that the backend does not lower.

    Args:
        what: the operation or type, in the words of the Triton language where possible.
        line: 'file:line' of the kernel's source, or ''.
    """

    def __init__(self, what: str, line: str = "") -> None:
        self.what = what
        self.line = line
        super().__init__(f"{line + ': ' if line else ''}not supported on the CPU: {what}")


class KernelFault(BackendError):
    """A kernel failed while it ran."""


class TtirSyntaxError(BackendError):
    """The TTIR text could not be read."""
