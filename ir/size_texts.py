"""Sizes as texts that can be kept in files: from an expression to its text, and from the text to numbers and expressions."""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import sympy

from .errors import OptionError
from .program import Size, dimension_symbol

_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)


def _quotient(a: Any, b: Any) -> Any:
    return a // b


def _remainder(a: Any, b: Any) -> Any:
    return a % b


_NUMBERS: dict[str, Callable[..., Any]] = {
    "Max": max,
    "Min": min,
    "floor": math.floor,
    "ceiling": math.ceil,
    **dict.fromkeys(("FloorDiv", "CleanDiv", "IntTrueDiv"), _quotient),
    **dict.fromkeys(("Mod", "PythonMod"), _remainder),
    "CeilDiv": lambda a, b: -(-a // b),
}
_SYMBOLS: dict[str, Callable[..., Any]] = {
    **_NUMBERS,
    "Max": sympy.Max,
    "Min": sympy.Min,
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
}


def text_of_size(size: Size) -> str:
    """Return the text of a size, such as "2*batch*tokens**2"."""
    return str(size)


def names_in(text: str) -> frozenset[str]:
    """Return the names of the dimensions that a text depends on.

    Raises:
        OptionError: the text is no size.
    """
    return _compiled(text)[1]


def number_of(text: str, sizes: Mapping[str, int]) -> int:
    """Return what a size is, rounded down.

    Args:
        text: as `text_of_size` writes it.
        sizes: size by the dimension's name.

    Raises:
        OptionError: the text is no size, or a dimension that it depends on is not among the sizes.
    """
    code, names = _compiled(text)
    missing = sorted(names - sizes.keys())
    if missing:
        raise OptionError(f"the size {text!r} depends on {', '.join(missing)}: say how large with --size {missing[0]}=N")
    # Fractions, so that the halves and quarters of an expression are exact.
    values = {name: Fraction(sizes[name]) for name in names}
    return int(eval(code, {"__builtins__": {}, **_NUMBERS}, values))


def expression_of(text: str) -> Size:
    """Return a size as an expression of the dimensions' symbols.

    Raises:
        OptionError: the text is no size.
    """
    code, names = _compiled(text)
    found = eval(code, {"__builtins__": {}, **_SYMBOLS}, {name: dimension_symbol(name) for name in names})
    return found if isinstance(found, sympy.Expr) else int(found)


@functools.lru_cache(4096)
def _compiled(text: str) -> tuple[Any, frozenset[str]]:
    try:
        tree = ast.parse(text, "<size>", "eval")
        names = frozenset(_names(tree.body))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise OptionError(f"{text!r} is no size: {error}") from error
    # Nothing but arithmetic of names is in the tree.
    return compile(tree, "<size>", "eval"), names


def _names(node: ast.expr) -> set[str]:
    match node:
        case ast.Constant(value=int() | float()):
            return set()
        case ast.Name(id=name):
            return {name}
        case ast.BinOp(left=left, op=operation, right=right) if isinstance(operation, _OPERATORS):
            if isinstance(operation, ast.Pow) and not (isinstance(right, ast.Constant) and right.value in range(1, 9)):
                raise ValueError(f"the exponent in {ast.unparse(node)!r} is no number from 1 to 8")
            return _names(left) | _names(right)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _names(operand)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _NUMBERS:
            return {found for argument in arguments for found in _names(argument)}
    raise ValueError(f"found {ast.unparse(node)!r}, which is no arithmetic of dimensions")
