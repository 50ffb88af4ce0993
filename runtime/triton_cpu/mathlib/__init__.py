"""Elementary functions of vectors, emitted as LLVM IR.

`call` emits a call of a function by name. The modules register what they implement in `FUNCTIONS`.
"""

from __future__ import annotations

from . import (
    basic,
    conversion,
    errorfunction,
    exponential,
    hyperbolic,
    integer,
    libm,
    logarithm,
    normal,
    powers,
    trigonometric,
)
from .registry import FUNCTIONS, Function, call, find

_MODULES = (
    basic, conversion, errorfunction, exponential, hyperbolic, integer, libm, logarithm, normal, powers, trigonometric,
)  # fmt: skip
"""Importing them fills the table."""

__all__ = ["FUNCTIONS", "Function", "call", "find"]
