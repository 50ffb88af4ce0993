"""Index expressions as nodes of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphwright.ir.analyses.index import Expr
from graphwright.ir.program import Program

aten = torch.ops.aten

_CALLS: dict[str, Any] = {
    "add": aten.add.Tensor,
    "mul": aten.mul.Tensor,
    "div": aten.div.Tensor,
    "min": aten.minimum.default,
    "max": aten.maximum.default,
    "lt": aten.lt.Tensor,
    "le": aten.le.Tensor,
    "eq": aten.eq.Tensor,
    "log": aten.log.default,
    "exp": aten.exp.default,
    "sqrt": aten.sqrt.default,
    "abs": aten.abs.default,
}
_CASTS = {
    "float": (torch.float32,),
    "trunc": (torch.int64,),
    "float16": (torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
}


class Emitter:
    """Writes expressions into a program, at its insertion point; equal parts once.

    Args:
        program: where nodes are inserted.
        variables: int64 tensors by the name of the variable that they have the values of; all broadcast together.
        loads: what the expressions read, by name.
        like: the node whose place in the user's model the new ones take over.
    """

    def __init__(self, program: Program, variables: Mapping[str, fx.Node], loads: Mapping[str, fx.Node], like: fx.Node) -> None:
        self._program, self._variables, self._loads, self._like = program, variables, loads, like
        self._known: dict[Expr, fx.Node | bool | int | float] = {}

    def tensor(self, e: Expr, dtype: torch.dtype) -> fx.Node:
        """Return a node with an expression's values, in a dtype."""
        value = self._value(e)
        if not isinstance(value, fx.Node):
            anchor = next(iter(self._variables.values()))
            return self._call(aten.full_like.default, anchor, value, dtype=dtype)
        cast: fx.Node = self._cast(value, dtype)
        return cast

    def _value(self, e: Expr) -> fx.Node | bool | int | float:
        if e not in self._known:
            self._known[e] = self._step(e)
        return self._known[e]

    def _step(self, e: Expr) -> Any:
        value: Any = e.value
        if e.kind == "const":
            return value
        if e.kind == "var":
            return self._variables[value]
        if e.kind == "linear":
            total: Any = value[0]
            for coefficient, operand in zip(value[1:], e.operands, strict=True):
                term = self._value(operand)
                term = term if coefficient == 1 else self._call(aten.mul.Tensor, term, coefficient)
                total = term if total == 0 else self._call(aten.add.Tensor, term, total)
            return total
        if e.kind == "load":
            return self._load(e)
        operands = [self._value(o) for o in e.operands]
        match e.kind:
            case "product":
                total = operands[0]
                for factor in operands[1:]:
                    total = self._call(aten.mul.Tensor, total, factor)
                return total
            case "floordiv":
                return self._call(aten.div.Tensor_mode, operands[0], value, rounding_mode="floor")
            case "ge0":
                return self._call(aten.ge.Scalar, operands[0], 0)
            case "eq0":
                return self._call(aten.eq.Scalar, operands[0], 0)
            case "not":
                return self._call(aten.logical_not.default, operands[0])
            case "and":
                total = operands[0]
                for condition in operands[1:]:
                    total = self._call(aten.logical_and.default, total, condition)
                return total
            case "int":
                return self._cast(operands[0], torch.int64)
            case "where":
                return self._call(aten.where.self, operands[0], *(self._as_tensor(o, e) for o in operands[1:]))
        if value in _CASTS:
            result = operands[0]
            for dtype in _CASTS[value]:
                result = self._cast(result, dtype)
            return result
        if value in ("add", "mul", "div") and not isinstance(operands[0], fx.Node):
            operands[0] = self._as_tensor(operands[0], e)
        elif value not in ("add", "mul", "div"):
            operands = [self._as_tensor(o, e.operands[0]) for o in operands]
        return self._call(_CALLS[value], *operands)

    def _load(self, e: Expr) -> fx.Node:
        source = self._loads[str(e.value)]
        return self._call(aten.index.Tensor, source, [self._as_tensor(self._value(o), o) for o in e.operands])

    def _as_tensor(self, value: Any, e: Expr) -> fx.Node:
        """Return a number as a tensor."""
        if isinstance(value, fx.Node):
            return value
        dtype = {"bool": torch.bool, "int": torch.int64, "float": torch.float32}[e.type]
        device = next(iter(self._variables.values())).meta["val"].device
        return self._call(aten.full.default, [], value, dtype=dtype, device=device)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, fx.Node) or value.meta["val"].dtype == dtype:
            return value
        return self._call(torch.ops.prims.convert_element_type.default, value, dtype)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self._program.call(target, *args, like=self._like, **kwargs)
