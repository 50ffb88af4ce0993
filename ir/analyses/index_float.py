"""Floating-point parts of index expressions: what additive masks and position biases are made of.

Values are what float32 arithmetic gives. An integer stays an integer inside `float(...)`, so that masks and positions
computed in floating point simplify as integers do; the rounding to a narrower type is a function of its own.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch

from graphwright.ir.analyses.index_core import (
    NO_FACTS,
    Expr,
    Facts,
    absolute,
    add,
    call,
    const,
    maximum,
    minimum,
    multiply,
    parts,
    subtract,
)
from graphwright.ir.analyses.index_logic import MAX_LIFTED, eq0, ge0, not_, to_int, ways, where

EXACT = 1 << 24
"""Integers up to this size are exact in float32."""

_ROUNDED = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


def as_integer(e: Expr) -> Expr | None:
    """Return the integer expression that a float expression equals, None where it is not known to be one."""
    if e.type == "int":
        return e
    if e.kind == "call" and e.value == "float":
        return e.operands[0]
    if e.kind == "const" and isinstance(e.value, float) and abs(e.value) <= EXACT and e.value == int(e.value):
        return const(int(e.value))
    return None


def to_float(e: Expr) -> Expr:
    """Return a bool or an integer as a float; a float as it is."""
    if e.type == "float":
        return e
    e = to_int(e)
    constant, terms = parts(e)
    if not terms:
        return const(_float32(constant))
    if len(terms) == 1:
        ((atom, coefficient),) = terms.items()
        if atom.kind == "int":
            return where(atom.operands[0], const(float(constant + coefficient)), const(float(constant)))
    if e.kind == "where":
        return where(e.operands[0], to_float(e.operands[1]), to_float(e.operands[2]))
    return call("float", "float", e)


def to_bool(e: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return e != 0."""
    return e if e.type == "bool" else compare("ne", e, const(0) if e.type == "int" else const(0.0), facts)


def truncate(e: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return a float rounded towards 0 to an integer."""
    if e.type != "float":
        return to_int(e)

    def leaf(x: Expr) -> Expr:
        exact = as_integer(x)
        if exact is None and x.kind == "const" and isinstance(x.value, float) and abs(x.value) < 2.0**62:
            exact = const(int(x.value))
        return call("trunc", "int", x) if exact is None else exact

    return lift(leaf, e, facts=facts)


def lift(function: Callable[..., Expr], *operands: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return function(*operands), applied inside the choices among the operands while these are few."""
    if math.prod(ways(o) for o in operands) <= MAX_LIFTED:
        for i, operand in enumerate(operands):
            if operand.kind == "where":
                condition, a, b = operand.operands
                # The other operands know on which side of the same condition they are.
                sides = [
                    [o.operands[side] if o.kind == "where" and o.operands[0] is condition else o for o in operands]
                    for side in (1, 2)
                ]
                sides[0][i], sides[1][i] = a, b
                return where(
                    condition,
                    lift(function, *sides[0], facts=facts),
                    lift(function, *sides[1], facts=facts),
                    facts=facts,
                )
    return function(*operands)


def _fold(name: str, a: float, b: float) -> float:
    x, y = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    operation: Any = {"min": torch.minimum, "max": torch.maximum}.get(name) or getattr(torch, name)
    return float(operation(x, y).item())


def binary(name: str, a: Expr, b: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return a float32 operation of two values of any type.

    Args:
        name: add, sub, mul, div, min or max.
        a: the first operand; bools and integers are taken as floats.
        b: the second operand.
        facts: what is known of the variables.
    """
    if name == "sub":
        return binary("add", a, binary("mul", const(-1.0), b, facts), facts)
    return lift(lambda x, y: _binary(name, x, y, facts), to_float(a), to_float(b), facts=facts)


def _binary(name: str, a: Expr, b: Expr, facts: Facts) -> Expr:
    if a.kind == b.kind == "const":
        return const(_fold(name, float(a.value), float(b.value)))  # type: ignore[arg-type]
    exact_a, exact_b = as_integer(a), as_integer(b)
    if exact_a is not None and exact_b is not None and name != "div":
        match name:
            case "add":
                return to_float(add(exact_a, exact_b))
            case "mul":
                return to_float(multiply(exact_a, exact_b))
        return to_float((minimum if name == "min" else maximum)(exact_a, exact_b, facts))
    if name != "div":
        # Commutative: the constant first, then by name.
        a, b = sorted((a, b), key=lambda e: (e.kind != "const", e.text))
        if name == "mul" and _is_const(a):
            return b
        if name == "mul" and b.kind == "call" and b.value == "mul" and _is_const(a, -1) and _is_const(b.operands[0], -1):
            return b.operands[1]
        if name == "add" and _is_const(a, 0):
            return b
    elif _is_const(b):
        return a
    return call(name, "float", a, b)


def _is_const(e: Expr, value: int = 1) -> bool:
    """Return whether `e` is the constant `value`."""
    return e.kind == "const" and e.value == value


def unary(name: str, a: Expr) -> Expr:
    """Return log, exp or sqrt of a value of any type, in float32."""

    def leaf(x: Expr) -> Expr:
        if x.kind == "const":
            return const(float(getattr(torch, name)(torch.tensor(x.value, dtype=torch.float32)).item()))
        return call(name, "float", x)

    return lift(leaf, to_float(a))


def float_absolute(a: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return |a| of a float."""

    def leaf(x: Expr) -> Expr:
        exact = as_integer(x)
        if exact is not None:
            return to_float(absolute(exact, facts))
        return const(abs(float(x.value))) if x.kind == "const" else call("abs", "float", x)  # type: ignore[arg-type]

    return lift(leaf, a, facts=facts)


def round_to(name: str, a: Expr) -> Expr:
    """Return a float rounded to "float16" or "bfloat16"."""

    def leaf(x: Expr) -> Expr:
        if x.kind == "const":
            return const(float(torch.tensor(x.value, dtype=torch.float32).to(_ROUNDED[name]).item()))
        return x if x.kind == "call" and x.value == name else call(name, "float", x)

    return lift(leaf, to_float(a))


# ---- comparisons


def compare(name: str, a: Expr, b: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return a comparison of two values of any types.

    Args:
        name: lt, le, gt, ge, eq or ne.
        a: left operand.
        b: right operand.
        facts: what is known of the variables.
    """
    if name in ("gt", "ge"):
        return compare("lt" if name == "gt" else "le", b, a, facts)
    if name == "ne":
        return not_(compare("eq", a, b, facts), facts)
    if "float" in (a.type, b.type):
        return lift(lambda x, y: _compare_floats(name, x, y, facts), to_float(a), to_float(b), facts=facts)
    return _compare_integers(name, to_int(a), to_int(b), facts)


def _compare_integers(name: str, a: Expr, b: Expr, facts: Facts) -> Expr:
    difference = subtract(b, a)
    if name == "eq":
        return eq0(difference, facts)
    return ge0(difference if name == "le" else subtract(difference, const(1)), facts)


def _compare_floats(name: str, a: Expr, b: Expr, facts: Facts) -> Expr:
    if a.kind == b.kind == "const":
        x, y = float(a.value), float(b.value)  # type: ignore[arg-type]
        return const(x < y if name == "lt" else x <= y if name == "le" else x == y)
    exact_a, exact_b = as_integer(a), as_integer(b)
    if exact_a is not None and exact_b is not None:
        return _compare_integers(name, exact_a, exact_b, facts)
    if name != "eq":
        # Between an integer and a fraction, < and <= are the same comparison with the integer next to it.
        if exact_a is not None and _is_fraction(b):
            return ge0(subtract(const(math.floor(float(b.value))), exact_a), facts)  # type: ignore[arg-type]
        if exact_b is not None and _is_fraction(a):
            return ge0(subtract(exact_b, const(math.ceil(float(a.value)))), facts)  # type: ignore[arg-type]
    elif a.text > b.text:
        a, b = b, a
    return call(name, "bool", a, b)


def _is_fraction(e: Expr) -> bool:
    return e.kind == "const" and isinstance(e.value, float) and math.isfinite(e.value) and abs(e.value) < EXACT


# ---- rebuilding


def rebuild_call(e: Expr, operands: tuple[Expr, ...], facts: Facts = NO_FACTS) -> Expr:
    """Return the call `e` of other operands, simplified."""
    name = str(e.value)
    if len(operands) == 2:
        a, b = operands
        if name in ("lt", "le", "eq"):
            return compare(name, a, b, facts)
        if e.type == "int":
            return (minimum if name == "min" else maximum)(a, b, facts)
        return binary(name, a, b, facts)
    (a,) = operands
    match name:
        case "abs":
            return absolute(a, facts) if e.type == "int" else float_absolute(a, facts)
        case "float":
            return to_float(a)
        case "trunc":
            return truncate(a, facts)
    return round_to(name, a) if name in _ROUNDED else unary(name, a)
