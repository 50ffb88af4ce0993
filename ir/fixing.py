"""Giving a dimension of a program one size."""

from __future__ import annotations

import dataclasses
import re

import sympy

from .errors import OptionError, unknown
from .program import Program, dimension_symbol


def fix_dimension(program: Program, name: str, size: int) -> Program:
    """Return the program for one size of a dimension; the given one is not changed.

    Nodes stay as they are: what the program says of sizes changes.

    Args:
        program: a program with this dimension.
        name: of the dimension.
        size: within its range.

    Raises:
        OptionError: there is no such dimension, or it cannot have this size.
    """
    if name not in program.dimensions:
        raise OptionError(f"fix_dimension: {unknown('dimension', name, program.dimensions)}")
    dimension = program.dimensions[name]
    if size < dimension.low or (dimension.high is not None and size > dimension.high):
        limit = "any" if dimension.high is None else dimension.high
        raise OptionError(f"fix_dimension: {name} must be {dimension.low} to {limit}, got {size}")
    result = program.copy()
    symbol = dimension_symbol(name)
    result.named = {key: sympy.sympify(value).xreplace({symbol: sympy.Integer(size)}) for key, value in result.named.items()}
    del result.dimensions[name]
    signature = program.signature
    tensors = [dataclasses.replace(spec, shape=tuple(_fixed(n, name, size) for n in spec.shape)) for spec in signature.tensors]
    result.signature = dataclasses.replace(
        signature,
        tensors=tuple(tensors),
        dimensions={key: value for key, value in signature.dimensions.items() if key != name},
    )
    return result


def _fixed(formula: int | str, name: str, size: int) -> int | str:
    if isinstance(formula, int):
        return formula
    written = re.sub(rf"\b{re.escape(name)}\b", str(size), formula)
    return int(written) if written.isdigit() else written
