"""Triton text of the operations that kernels are made of."""

from __future__ import annotations

import math

import torch

from graphwright.ir.errors import LoweringError

OPERATIONS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "and": "{} & {}",
    "or": "{} | {}",
    "xor": "{} ^ {}",
    "truncdiv": "{} // {}",
    "truncmod": "{} % {}",
    "where": "tl.where({}, {}, {})",
    "exp": "tl.exp({})",
    "exp2": "tl.exp2({})",
    "log": "tl.log({})",
    "log2": "tl.log2({})",
    "sqrt": "tl.sqrt({})",
    "rsqrt": "tl.rsqrt({})",
    "sin": "tl.sin({})",
    "cos": "tl.cos({})",
    "erf": "tl.erf({})",
    "abs": "tl.abs({})",
    "floor": "tl.floor({})",
    "ceil": "tl.ceil({})",
    "sigmoid": "tl.sigmoid({})",
    "trunc": "libdevice.trunc({})",
    "round": "libdevice.nearbyint({})",
    "tanh": "libdevice.tanh({})",
    "tan": "libdevice.tan({})",
    "asin": "libdevice.asin({})",
    "acos": "libdevice.acos({})",
    "atan": "libdevice.atan({})",
    "sinh": "libdevice.sinh({})",
    "cosh": "libdevice.cosh({})",
    "erfc": "libdevice.erfc({})",
    "expm1": "libdevice.expm1({})",
    "log1p": "libdevice.log1p({})",
    "log10": "libdevice.log10({})",
    "fmod": "libdevice.fmod({}, {})",
    "pow": "libdevice.pow({}, {})",
}

TYPED = {name for name, text in OPERATIONS.items() if text.startswith("libdevice.")}
"""Operations whose operands must all have a dtype, numbers included."""

IDENTITIES = {"sum": 0, "max": -math.inf, "min": math.inf, "max_nan": -math.inf, "min_nan": math.inf, "any": 0, "all": 1}
"""What a reduction starts with."""

COMBINED = {
    "sum": "{} + {}",
    "max": "tl.maximum({}, {})",
    "min": "tl.minimum({}, {})",
    "max_nan": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "min_nan": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "any": "{} | {}",
    "all": "{} & {}",
}
"""How a reduction takes in two numbers."""


def dtype_text(dtype: torch.dtype) -> str:
    """Return a dtype as Triton writes it.

    Raises:
        LoweringError: Triton has no such dtype.
    """
    if dtype is torch.bool:
        return "tl.int1"
    if dtype.is_complex or dtype.is_floating_point or dtype in _INTEGERS:
        name = str(dtype).removeprefix("torch.")
        if not dtype.is_complex:
            return f"tl.{name}"
    raise LoweringError(f"there are no kernels for {dtype}")


_INTEGERS = {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}


def number_text(number: bool | int | float, dtype: torch.dtype) -> str:
    """Return a constant as Triton text."""
    if isinstance(number, float):
        if math.isnan(number):
            return 'float("nan")'
        if math.isinf(number):
            return 'float("inf")' if number > 0 else 'float("-inf")'
        return repr(number)
    if dtype is torch.bool:
        return str(bool(number))
    return str(number)


def identity_of(kind: str, dtype: torch.dtype) -> bool | int | float:
    """Return what a reduction of numbers of `dtype` starts with."""
    start = IDENTITIES[kind]
    if dtype.is_floating_point:
        return float(start)
    if dtype is torch.bool:
        return bool(start > 0)
    if math.isinf(start):
        return torch.iinfo(dtype).min if start < 0 else torch.iinfo(dtype).max
    return int(start)
