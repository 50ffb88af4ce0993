"""What a kernel computes per element: values that are built by asking for them, equal ones being the same object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from .indexing import Index, Ranges

COLUMN = sympy.Symbol("col", integer=True, nonnegative=True)
"""The index within a row. A kernel works on rows; what does not depend on the column is computed once per row."""


class Value:
    """A number per row, or per row and column.

    Args:
        kind: "constant", "index", "less", "load", "op" or "reduce".
        dtype: of the number as the kernel holds it: half-precision floats are held as float32.
        args: the values it is computed from.
        payload: for a constant the number; for an index the expression; for "less" two expressions; for a load the buffer and
            the offset in it; for an op its name; for a reduction its kind.
        varies: whether it differs from column to column.
    """

    __slots__ = ("args", "dtype", "kind", "number", "payload", "varies")

    def __init__(self, kind: str, dtype: torch.dtype, args: tuple[Value, ...], payload: Any, varies: bool, number: int) -> None:
        self.kind = kind
        self.dtype = dtype
        self.args = args
        self.payload = payload
        self.varies = varies
        self.number = number

    def __repr__(self) -> str:
        return f"{self.kind}({self.payload}{''.join(f', {a!r}' for a in self.args)})"


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a kernel computes with numbers of `dtype`."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _wrapped(number: Any, dtype: torch.dtype) -> int:
    """Return a number as an integer of a dtype, which as many bits as fit stand for."""
    limits = torch.iinfo(dtype)
    return (int(number) - limits.min) % (limits.max - limits.min + 1) + limits.min


class Values:
    """Makes the values of one kernel.

    Args:
        ranges: of the index variables that the values depend on.
    """

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges
        self._made: dict[Any, Value] = {}

    def __len__(self) -> int:
        return len(self._made)

    def constant(self, number: Any, dtype: torch.dtype) -> Value:
        """Return a constant."""
        dtype = held_dtype(dtype)
        number = bool(number) if dtype is torch.bool else float(number) if dtype.is_floating_point else _wrapped(number, dtype)
        return self._make("constant", dtype, (), number, False, repr(number))

    def index(self, expression: Any) -> Value:
        """Return an index as a number."""
        expression = sympy.expand(sympy.sympify(expression))
        if expression.is_Integer:
            return self.constant(int(expression), torch.int64)
        return self._make("index", torch.int64, (), expression, self.depends(expression))

    def less(self, left: Any, right: Any) -> Value:
        """Return whether one index is less than another."""
        left, right = sympy.expand(sympy.sympify(left)), sympy.expand(sympy.sympify(right))
        if self.ranges.below(left, right):
            return self.constant(True, torch.bool)
        if not (left - right).free_symbols:
            return self.constant(bool(left < right), torch.bool)
        return self._make("less", torch.bool, (), (left, right), self.depends(left - right))

    def load(self, buffer: str, offset: Index, dtype: torch.dtype, conditions: Sequence[Value] = ()) -> Value:
        """Return an element of a buffer; it is read only where all conditions hold, and 0 elsewhere."""
        varies = self.depends(offset) or any(c.varies for c in conditions)
        return self._make("load", held_dtype(dtype), tuple(conditions), (buffer, offset, dtype), varies)

    def op(self, name: str, dtype: torch.dtype, *args: Value) -> Value:
        """Return an operation on values."""
        simple = self._simplify(name, args)
        if simple is not None:
            return simple
        return self._make("op", held_dtype(dtype), args, name, any(a.varies for a in args))

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """Return a value as another dtype, which it is rounded to if that is narrower."""
        if value.dtype is dtype:
            return value
        if value.kind == "constant" and dtype not in (torch.float16, torch.bfloat16):
            return self.constant(value.payload, dtype)
        if dtype is torch.bool:
            return self.op("ne", torch.bool, value, self.constant(0, value.dtype))
        return self._make("op", held_dtype(dtype), (value,), f"cast:{dtype}", value.varies)

    def reduce(self, kind: str, body: Value, size: Index) -> Value:
        """Return the sum, maximum, ... of `body` over the columns, of which there are `size`."""
        if not body.varies and kind in ("max", "min", "any", "all"):
            return body
        return self._make("reduce", body.dtype, (body,), (kind, size), False)

    def depends(self, expression: Index) -> bool:
        """Whether an expression differs from column to column."""
        return COLUMN in expression.free_symbols

    def _simplify(self, name: str, args: tuple[Value, ...]) -> Value | None:
        if name == "where" and args[0].kind == "constant":
            return args[1] if args[0].payload else args[2]
        if name == "where" and args[1] is args[2]:
            return args[1]
        if name in ("and", "or") and args[0].dtype is torch.bool:
            absorbing = name == "or"
            for one, other in (args, args[::-1]):
                if one.kind == "constant":
                    return one if bool(one.payload) == absorbing else other
            if args[0] is args[1]:
                return args[0]
        if name == "not" and args[0].dtype is torch.bool and args[0].kind == "constant":
            return self.constant(not args[0].payload, torch.bool)
        return None

    def _make(
        self, kind: str, dtype: torch.dtype, args: tuple[Value, ...], payload: Any, varies: bool, key: Any = None
    ) -> Value:
        identity = (kind, dtype, tuple(a.number for a in args), payload if key is None else key)
        made = self._made.get(identity)
        if made is None:
            made = self._made[identity] = Value(kind, dtype, args, payload, varies, len(self._made))
        return made


def ordered(roots: Sequence[Value]) -> list[Value]:
    """Return all values that `roots` are computed from, operands first."""
    seen: dict[Value, None] = {}
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        value, ready = stack.pop()
        if value in seen:
            continue
        if ready:
            seen[value] = None
            continue
        stack.append((value, True))
        stack.extend((a, False) for a in reversed(value.args) if a not in seen)
    return list(seen)
