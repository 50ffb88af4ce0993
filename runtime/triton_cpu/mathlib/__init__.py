"""Elementary functions of vectors, emitted as LLVM IR.

`call` emits a call of a function by name. The modules register what they implement in `FUNCTIONS`.

In f32 every function is within 1.6 ulp of the exact result over the whole range, those computed in f64 within 0.8; each
module says more. NaN, infinities, both zeros and denormal arguments behave as in C; results of exp, exp2 and exp10 below
the smallest normal number are 0. Results do not depend on the number of lanes.
"""

from __future__ import annotations

from . import (
    basic,
    bessel,
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
    basic, bessel, conversion, errorfunction, exponential, hyperbolic, integer, libm, logarithm, normal, powers, trigonometric,
)  # fmt: skip
"""Importing them fills the table."""

__all__ = ["FUNCTIONS", "Function", "call", "find"]
