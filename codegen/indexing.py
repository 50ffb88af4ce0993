"""Arithmetic on indices and sizes: sympy expressions, kept in a form in which what cancels does cancel.

A remainder is written as a - b * (a // b), so that an index that was taken apart and put together again is the same
expression as before. All indices and sizes are integers and not negative.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, PythonMod

from graphwright.ir.errors import LoweringError

Index: TypeAlias = Any
"""A sympy expression, which has no types."""


class Quotient(sympy.Function):
    """a // b of integers that are not negative, where it could not be simplified."""

    nargs = (2,)
    is_integer = True
    is_nonnegative = True


class Ranges:
    """Upper bounds of index variables, and the quotients that follow from them.

    Args:
        sizes: variable -> its size; the variable is at least 0 and less than that.
    """

    def __init__(self, sizes: Mapping[sympy.Symbol, Any]) -> None:
        self.sizes = dict(sizes)

    def below(self, value: Index, bound: Index) -> bool:
        """Whether `value` is certainly less than `bound`."""
        largest = value
        if value.has(Quotient):
            # Each quotient is replaced by the largest that it can be.
            for quotient in sorted(value.atoms(Quotient), key=str):
                numerator, denominator = quotient.args
                if not denominator.is_Integer or not self._monotone(value, quotient):
                    return False
                most = self.largest(numerator)
                if most is None or not most.is_Integer:
                    return False
                largest = largest.xreplace({quotient: sympy.Integer(int(most) // int(denominator))})
        most = self.largest(largest)
        return most is not None and is_positive(sympy.expand(bound - most))

    def largest(self, value: Index) -> Index | None:
        """Return the largest that a polynomial can be; None if it is not known."""
        if value.has(Quotient):
            return None
        variables = [v for v in value.free_symbols if v in self.sizes]
        if not variables:
            return value
        for variable in variables:
            coefficient = sympy.expand(value).coeff(variable)
            if not all(term.is_nonnegative for term in sympy.Add.make_args(sympy.expand(coefficient))):
                return None
        return sympy.expand(value.xreplace({v: self.sizes[v] - 1 for v in variables}))

    def _monotone(self, value: Index, quotient: Index) -> bool:
        return bool(sympy.expand(value).coeff(quotient).is_nonnegative)

    def divide(self, value: Any, divisor: Any) -> Index:
        """Return value // divisor."""
        value, divisor = sympy.expand(sympy.sympify(value)), sympy.sympify(divisor)
        if divisor == 1:
            return value
        # Factor by factor, numbers first: (384 * m + c) // (384 * n) is then seen to be m // n.
        coefficient, rest = divisor.as_coeff_Mul()
        if coefficient != 1 and rest != 1:
            return self.divide(self.divide(value, coefficient), rest)
        if value.is_Integer and divisor.is_Integer:
            return sympy.Integer(int(value) // int(divisor))
        if divisor.is_Integer and value.func is Quotient and value.args[1].is_Integer:
            return self.divide(value.args[0], value.args[1] * divisor)
        whole, rest = sympy.Integer(0), sympy.Integer(0)
        for term in sympy.Add.make_args(value):
            quotient = _exact(term, divisor)
            if quotient is None:
                rest += term
            else:
                whole += quotient
        if whole != 0 and not _never_negative(rest):
            # What is left after the multiples could be negative, and a kernel's division rounds towards 0.
            whole, rest = sympy.Integer(0), value
        if rest == 0 or self.below(rest, divisor):
            return sympy.expand(whole)
        if rest.func is Quotient and rest.args[1].is_Integer and divisor.is_Integer:
            return sympy.expand(whole + self.divide(rest.args[0], rest.args[1] * divisor))
        coarser = self._coarser(rest, divisor)
        return sympy.expand(whole + (Quotient(rest, divisor) if coarser is None else coarser))

    def _coarser(self, value: Index, divisor: Index) -> Index | None:
        """Return value // divisor where all but a part too small to matter is in steps that divide the divisor.

        (64 * row + col) // 256 is row // 4 if col is less than 64.
        """
        if not divisor.is_Integer:
            return None
        terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(value)]
        for step in sorted({math.gcd(int(number), int(divisor)) for number, _ in terms if number.is_Integer}, reverse=True):
            if step == 1:
                break
            small = [number * rest for number, rest in terms if number % step]
            if _never_negative(sympy.Add(*small)) and self.below(sympy.Add(*small), sympy.Integer(step)):
                large = sympy.Add(*(number / step * rest for number, rest in terms if not number % step))
                return self.divide(large, divisor / step)
        return None

    def remainder(self, value: Any, divisor: Any) -> Index:
        """Return value mod divisor."""
        return sympy.expand(value - divisor * self.divide(value, divisor))


@lru_cache(maxsize=4096)
def _exact(term: Index, divisor: Index) -> Index | None:
    """Return the quotient of a product by a divisor that it is a multiple of, None if it is not seen to be one."""
    number, rest = (term / divisor).as_coeff_Mul()
    if not number.is_Integer or any(factor.is_Pow and not factor.exp.is_positive for factor in sympy.Mul.make_args(rest)):
        return None
    return number * rest


def _never_negative(value: Index) -> bool:
    """Whether all terms of an expression are positive."""
    return all(not term.as_coeff_Mul()[0].is_negative for term in sympy.Add.make_args(value))


def is_positive(value: Index) -> bool:
    """Whether a polynomial of sizes, each at least 1, is certainly at least 1."""
    symbols = sorted(value.free_symbols, key=str)
    shifted = sympy.expand(value.xreplace({s: s + 1 for s in symbols})) if symbols else value
    terms = sympy.Add.make_args(shifted)
    if any(term.as_coeff_Mul()[0].is_negative for term in terms):
        return False
    constant = shifted.as_coeff_Add()[0]
    return bool(constant >= 1)


def product(sizes: Iterable[Any]) -> Index:
    """Return the product of sizes."""
    result = sympy.Integer(1)
    for size in sizes:
        result *= size
    return sympy.expand(result)


def contiguous_strides(shape: Sequence[Any]) -> tuple[Index, ...]:
    """Return the strides of a tensor whose elements lie in order without gaps."""
    strides: list[Index] = []
    step: Index = sympy.Integer(1)
    for size in reversed(shape):
        strides.append(step)
        step = sympy.expand(step * size)
    return tuple(reversed(strides))


def flat(index: Sequence[Any], shape: Sequence[Any]) -> Index:
    """Return the position of an element among all, in order."""
    return sympy.expand(sum((i * s for i, s in zip(index, contiguous_strides(shape), strict=True)), sympy.Integer(0)))


def unflatten(position: Index, shape: Sequence[Any], ranges: Ranges) -> tuple[Index, ...]:
    """Return the index of the element at a position among all."""
    index: list[Index] = []
    if any(size == 0 for size in shape):
        # There is no element.
        return tuple(sympy.Integer(0) for _ in shape)
    strides = contiguous_strides(shape)
    for k, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        if size == 1:
            index.append(sympy.Integer(0))
            continue
        quotient = ranges.divide(position, stride)
        # The first dimension needs no remainder: the position is within the tensor.
        outermost = all(other == 1 for other in shape[:k])
        index.append(quotient if outermost else ranges.remainder(quotient, size))
    return tuple(index)


_BINARY: dict[Any, str] = {FloorDiv: "//", CleanDiv: "//", Quotient: "//", Mod: "%", PythonMod: "%"}


@lru_cache(maxsize=4096)
def text(value: Any) -> str:
    """Return an expression as Python text, with integer arithmetic only.

    Raises:
        LoweringError: it holds something else.
    """
    value = sympy.sympify(value)
    if value.is_Integer or value.is_Symbol:
        return str(value)
    if value.is_Add:
        parts: list[str] = []
        # Positive terms first: the text then starts with no sign.
        for term in sorted(value.args, key=lambda t: (bool(t.as_coeff_Mul()[0] < 0), t.is_number, str(t))):
            coefficient = term.as_coeff_Mul()[0]
            part = text(-term if coefficient < 0 else term)
            parts.append(f" - {part}" if coefficient < 0 else f" + {part}" if parts else part)
        joined = "".join(parts)
        return joined if not joined.startswith(" - ") else f"-{joined[3:]}"
    if value.is_Mul:
        coefficient, rest = value.as_coeff_Mul()
        if not coefficient.is_Integer:
            # Halves and the like come from sizes that are known to divide.
            numerator, denominator = sympy.fraction(value)
            return f"({text(numerator)}) // {text(denominator)}"
        factors = list(sympy.Mul.make_args(rest))
        numbers = [] if coefficient == 1 else [str(coefficient)]
        return " * ".join([*sorted(_factor(f) for f in factors), *numbers])
    if value.is_Pow and value.exp.is_Integer and value.exp > 0:
        return " * ".join([_factor(value.base)] * int(value.exp))
    if value.func in _BINARY:
        left, right = value.args
        return f"{_factor(left)} {_BINARY[value.func]} {_factor(right)}"
    if value.func in (Max, Min, sympy.Max, sympy.Min):
        name = "max" if value.func in (Max, sympy.Max) else "min"
        return f"{name}({', '.join(text(a) for a in value.args)})"
    raise LoweringError(f"the size {value} cannot be computed when the model runs")


def _factor(value: Any) -> str:
    written = text(value)
    return written if value.is_Symbol or (value.is_Integer and value >= 0) or value.func in (Max, Min) else f"({written})"


def size_text(value: Any) -> int | str:
    """Return a size as a schedule has it: a number or a text."""
    value = sympy.sympify(value)
    return int(value) if value.is_Integer else text(value)
