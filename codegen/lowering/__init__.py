"""Lowering: each operation as a function from output indices to a value."""

from __future__ import annotations

from . import dialect, pointwise, reductions, views
from .registry import GENERATORS, POINTWISE, REDUCED_DIMS, REDUCTIONS, VIEWS, Reader, arguments, lowering_of

__all__ = [
    "GENERATORS",
    "POINTWISE",
    "REDUCED_DIMS",
    "REDUCTIONS",
    "VIEWS",
    "Reader",
    "arguments",
    "dialect",
    "lowering_of",
    "pointwise",
    "reductions",
    "views",
]
