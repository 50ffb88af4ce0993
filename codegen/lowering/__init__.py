"""Lowering: each operation as a function from output indices to a value."""

from __future__ import annotations

from . import dialect, division, pointwise, reductions, repeats, views
from .registry import GENERATORS, LOOKUPS, POINTWISE, REDUCED_DIMS, REDUCTIONS, VIEWS, Reader, arguments, lowering_of

__all__ = [
    "GENERATORS",
    "LOOKUPS",
    "POINTWISE",
    "REDUCED_DIMS",
    "REDUCTIONS",
    "VIEWS",
    "Reader",
    "arguments",
    "dialect",
    "division",
    "lookups",
    "lowering_of",
    "pointwise",
    "reductions",
    "repeats",
    "views",
]
