"""Replacement of one operation by several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .structure import relink
from .ttir import Function, Op, Type, Value


class Replacement:
    """The operations that take the place of `op`, in order; the last ones give its results."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.ops: list[Op] = []
        self._names = 0

    def append(self, name: str, operands: list[Value], results: list[Value], attrs: dict[str, Any]) -> Op:
        """Add an operation with results that are given."""
        self.ops.append(Op(name, operands, attrs, results, line=self.op.line))
        return self.ops[-1]

    def value(self, type_: Type) -> Value:
        """A new value."""
        self._names += 1
        return Value(f"{self.op.results[0].name}.{self._names}", type_)

    def add(self, name: str, type_: Type, operands: list[Value], **attrs: Any) -> Value:
        """Add an operation with one result."""
        return self.append(name, operands, [self.value(type_)], attrs).result

    def lanewise(self, name: str, element: str, *operands: Value) -> Value:
        """Add an operation whose result has the shape of its operands."""
        return self.add(name, Type(operands[0].shape, element), list(operands))

    def moved(self, name: str, shape: tuple[int, ...], *operands: Value, **attrs: Any) -> Value:
        """Add an operation that only moves elements."""
        return self.add(name, operands[0].type.with_shape(shape), list(operands), **attrs)

    def constant(self, like: Value, element: str, value: int | float) -> Value:
        """Add a constant tensor of the shape of another."""
        return self.add("arith.constant", Type(like.shape, element), [], value=value)


def replace_all(function: Function, name: str, write: Callable[[Replacement], bool]) -> None:
    """Replace operations of one name.

    Args:
        function: changed in place.
        name: the operations.
        write: fills the replacement of one; returns whether there is one.
    """
    changed = False
    for op in list(function.walk()):
        if op.name != name or op.block is None:
            continue
        replacement = Replacement(op)
        if write(replacement):
            at = op.block.ops.index(op)
            op.block.ops[at : at + 1] = replacement.ops
            changed = True
    if changed:
        relink(function)
