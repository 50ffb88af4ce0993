"""Evaluate index expressions with plain torch: what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphwright.ir.analyses.index_core import Expr
from graphwright.ir.errors import GraphwrightError

_UNARY: dict[str, Any] = {
    "log": torch.log,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "float": lambda x: x.to(torch.float32),
    "trunc": lambda x: x.to(torch.int64),
    "float16": lambda x: x.to(torch.float16).to(torch.float32),
    "bfloat16": lambda x: x.to(torch.bfloat16).to(torch.float32),
}
_BINARY: dict[str, Any] = {
    "add": torch.add,
    "mul": torch.mul,
    "div": torch.div,
    "min": torch.minimum,
    "max": torch.maximum,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
}

# Untyped in torch.
_broadcast: Any = torch.broadcast_tensors
_broadcast_shapes: Any = torch.broadcast_shapes


class IndexEvaluationError(GraphwrightError):
    """An index expression cannot be evaluated with what was given."""


def evaluate(
    e: Expr,
    variables: Mapping[str, Tensor] | None = None,
    loads: Mapping[str, Tensor] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Tensor:
    """Return the value of `e` for every combination of the variables' values.

    Args:
        e: the expression.
        variables: name -> integer tensor; all broadcast together.
        loads: name -> the tensor that is read. An index out of range reads the nearest element: a well-formed
            expression does not use what it reads there.
        sizes: name -> value, for the variables that are sizes.

    Returns:
        A tensor of the broadcast shape of the variables that occur: bool, int64 or float32 (float64 where a float64
        tensor is read).

    Raises:
        IndexEvaluationError: a variable or a tensor is missing.
    """
    given = {name: torch.tensor(value) for name, value in (sizes or {}).items()}
    given.update({name: value.to(torch.int64) for name, value in (variables or {}).items()})
    tensors = loads or {}
    device = next((t.device for t in [*(variables or {}).values(), *tensors.values()]), torch.device("cpu"))
    return _Evaluation({name: value.to(device) for name, value in given.items()}, tensors, device).value(e)


class _Evaluation:
    def __init__(self, variables: Mapping[str, Tensor], loads: Mapping[str, Tensor], device: torch.device) -> None:
        self.variables, self.loads, self.device = variables, loads, device
        self.memo: dict[Expr, Tensor] = {}

    def value(self, e: Expr) -> Tensor:
        found = self.memo.get(e)
        if found is None:
            found = self.memo[e] = self.step(e)
        return found

    def step(self, e: Expr) -> Tensor:
        match e.kind:
            case "const":
                kind = {"bool": torch.bool, "int": torch.int64, "float": torch.float32}[e.type]
                return torch.tensor(e.value, dtype=kind, device=self.device)
            case "var":
                return self.known(self.variables, str(e.value), "variable")
            case "sum":
                return self.prefix_sum(e)
            case "load":
                return self.read(e)
        operands = [self.value(o) for o in e.operands]
        match e.kind:
            case "linear":
                assert isinstance(e.value, tuple)
                result = torch.tensor(e.value[0], device=self.device)
                for coefficient, operand in zip(e.value[1:], operands, strict=True):
                    result = result + coefficient * operand
                return result
            case "product":
                result = operands[0]
                for operand in operands[1:]:
                    result = result * operand
                return result
            case "floordiv":
                assert isinstance(e.value, int)
                return torch.div(operands[0], e.value, rounding_mode="floor")
            case "ge0":
                return operands[0] >= 0
            case "eq0":
                return operands[0] == 0
            case "not":
                return ~operands[0]
            case "and":
                result = operands[0]
                for operand in operands[1:]:
                    result = result & operand
                return result
            case "int":
                return operands[0].to(torch.int64)
            case "where":
                condition, a, b = operands
                return torch.where(condition, a, b)
        function = _UNARY if len(operands) == 1 else _BINARY
        found: Tensor = function[str(e.value)](*operands)
        return found

    def known(self, table: Mapping[str, Tensor], name: str, what: str) -> Tensor:
        if name not in table:
            given = ", ".join(sorted(table)) or "none"
            raise IndexEvaluationError(f"evaluate: the expression needs the {what} {name!r}; given: {given}")
        return table[name]

    def read(self, e: Expr) -> Tensor:
        source = self.known(self.loads, str(e.value), "tensor")
        if source.dim() != len(e.operands):
            raise IndexEvaluationError(f"evaluate: {e} reads a tensor of {source.dim()} dimensions, {tuple(source.shape)}")
        limits = zip(e.operands, source.shape, strict=True)
        indices = [self.value(index).clamp(0, max(size - 1, 0)) for index, size in limits]
        found = source[tuple(_broadcast(*indices))] if indices else source
        wanted = {"bool": torch.bool, "int": torch.int64}.get(e.type)
        if wanted is None:
            wanted = torch.float64 if source.dtype == torch.float64 else torch.float32
        return found.to(wanted)

    def prefix_sum(self, e: Expr) -> Tensor:
        upto = self.value(e.operands[0])
        length = max(int(upto.max()) + 1 if upto.numel() else 0, 1)
        inner = {name: value.unsqueeze(-1) for name, value in self.variables.items()}
        inner[str(e.value)] = torch.arange(length, device=self.device)
        body = _Evaluation(inner, self.loads, self.device).value(e.operands[1])
        totals = body.expand(_broadcast_shapes(body.shape, (length,))).cumsum(-1)
        shape = _broadcast_shapes(totals.shape[:-1], upto.shape)
        last = upto.expand(shape).unsqueeze(-1)
        found = totals.expand(*shape, length).gather(-1, last.clamp(min=0)).squeeze(-1)
        return torch.where(upto.expand(shape) < 0, 0, found)
