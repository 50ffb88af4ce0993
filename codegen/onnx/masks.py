"""Index expressions as tensor operations that ONNX has: how masks and biases of attention are written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphwright.ir.analyses import index as ix
from graphwright.ir.errors import ExportError

INDICES = ("b", "h", "q", "k")
"""The variables of an attention's expressions, in the order of the scores' dimensions [B, H, S, T]."""

LOWEST = -1e30
"""The least number that is written for a finite one.

Models hide keys by adding float32's least number, and a row of these alone is a row of equal scores. onnxruntime takes that
number for minus infinity, which hides the row; this one is as far below every score.
"""

_FUNCTIONS: Mapping[str, Any] = {
    "log": torch.log,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "float": lambda x: x.to(torch.float32),
    "trunc": lambda x: x.to(torch.int64),
    "float16": lambda x: x.to(torch.float16).to(torch.float32),
    "bfloat16": lambda x: x.to(torch.bfloat16).to(torch.float32),
    "add": torch.add,
    "mul": torch.mul,
    "div": torch.div,
    "min": torch.minimum,
    "max": torch.maximum,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
}
_DTYPES = {"bool": torch.bool, "int": torch.int64, "float": torch.float32}


class ExpressionWriter:
    """Writes expressions over b, h, q and k.

    Args:
        sizes: the sizes of the scores by their names in expressions.
        shape: the scores' sizes [B, H, S, T]; symbolic where they vary.
        loads: the tensors that expressions read, by name.
        device: where the tensors are.
    """

    def __init__(
        self, sizes: Mapping[str, Any], shape: tuple[Any, ...], loads: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        self.sizes, self.shape, self.loads, self.device = sizes, shape, loads, device
        self._made: dict[ix.Expr, torch.Tensor] = {}

    def write(self, e: ix.Expr) -> torch.Tensor:
        """Return the expression's values, broadcastable to [B, H, S, T]: bool, int64 or floating point.

        Raises:
            ExportError: the expression has a form that cannot be written out.
        """
        found = self._made.get(e)
        if found is None:
            found = self._made[e] = self._write(e)
        return found

    def _write(self, e: ix.Expr) -> torch.Tensor:
        match e.kind:
            case "const":
                value: Any = e.value
                if e.type == "float" and -torch.inf < value < LOWEST:
                    value = LOWEST
                return torch.full((1, 1, 1, 1), value, dtype=_DTYPES[e.type], device=self.device)
            case "var":
                return self._variable(str(e.value))
            case "linear":
                return self._sum(*ix.parts(e))
            case "ge0" | "eq0":
                return self._comparison(e)
            case "load":
                return self._read(e)
            case "sum":
                return self._prefix_sum(e)
        operands = [self.write(operand) for operand in e.operands]
        divisor: Any = e.value  # Of a floor division.
        match e.kind:
            case "product" | "and":
                result = operands[0]
                for operand in operands[1:]:
                    result = result * operand if e.kind == "product" else result & operand
                return result
            case "floordiv":
                return torch.div(operands[0], divisor, rounding_mode="floor")
            case "not":
                return ~operands[0]
            case "int":
                return operands[0].to(torch.int64)
            case "where":
                return torch.where(operands[0], operands[1], operands[2])
        if e.kind != "call" or e.value not in _FUNCTIONS:
            raise ExportError(f"the index expression {e} has no form in ONNX")
        result = _FUNCTIONS[str(e.value)](*operands)
        return result  # type: ignore[no-any-return]

    def _variable(self, name: str) -> torch.Tensor:
        if name in INDICES:
            at = INDICES.index(name)
            shape = [-1 if dim == at else 1 for dim in range(4)]
            return torch.arange(self.shape[at], device=self.device).reshape(shape)
        if name not in self.sizes:
            raise ExportError(f"an index expression reads {name!r}; it may read {', '.join((*INDICES, *self.sizes))}")
        return torch.full((1, 1, 1, 1), self.sizes[name], dtype=torch.int64, device=self.device)

    def _sum(self, constant: int, terms: Mapping[ix.Expr, int]) -> torch.Tensor:
        """Return the constant plus the terms, as few operations as it takes."""
        result: Any = None
        for atom, coefficient in terms.items():
            term = self.write(atom)
            if result is None:
                result = term if coefficient == 1 else term * coefficient
            elif abs(coefficient) == 1:
                result = result + term if coefficient == 1 else result - term
            else:
                result = result + term * coefficient
        if result is None:
            return self.write(ix.const(constant))
        return result + constant if constant else result  # type: ignore[no-any-return]

    def _comparison(self, e: ix.Expr) -> torch.Tensor:
        """Compare what is added with what is subtracted: the difference of queries and keys need not be made."""
        constant, terms = ix.parts(e.operands[0])
        positive = {atom: c for atom, c in terms.items() if c > 0}
        negative = {atom: -c for atom, c in terms.items() if c < 0}
        left = self._sum(max(constant, 0), positive)
        right = self._sum(max(-constant, 0), negative)
        return left >= right if e.kind == "ge0" else left == right

    def _read(self, e: ix.Expr) -> torch.Tensor:
        source = self.read_as(e)
        names = [str(index.value) if index.kind == "var" else "" for index in e.operands]
        kept = [name for name in names if name]
        plain = all(index.kind == "const" or name in INDICES for index, name in zip(e.operands, names, strict=True))
        if not plain or len(set(kept)) != len(kept):
            return self._gather(source, e)
        for dim in reversed(range(len(names))):
            if not names[dim]:
                source = source.select(dim, ix.parts(e.operands[dim])[0])
        for dim, name in enumerate(kept):
            size = self.shape[INDICES.index(name)]
            if not statically_known_true(source.shape[dim] == size):
                # A table may have more rows than are asked for.
                source = source.narrow(dim, 0, size)
        order = sorted(range(len(kept)), key=lambda dim: INDICES.index(kept[dim]))
        source = source.permute(order)
        for dim, name in enumerate(INDICES):
            if name not in kept:
                source = source.unsqueeze(dim)
        return source

    def read_as(self, e: ix.Expr) -> torch.Tensor:
        """Return the tensor that an expression reads, in the dtype that it reads it as."""
        return self.loads[str(e.value)].to(_DTYPES[e.type])

    def _gather(self, source: torch.Tensor, e: ix.Expr) -> torch.Tensor:
        indices = []
        for index, size in zip(e.operands, source.shape, strict=True):
            # What an index out of range reads is not used, but ONNX refuses to read it.
            indices.append(self.write(index).clamp(0, size - 1))
        return source[tuple(indices)]

    def _prefix_sum(self, e: ix.Expr) -> torch.Tensor:
        upto, body = e.operands
        name = str(upto.value)
        if upto.kind != "var" or name not in INDICES or name in body.free:
            raise ExportError(f"the index expression {e} sums up to something else than an index, which has no form in ONNX")
        at = INDICES.index(name)
        values = self.write(ix.substitute(body, {str(e.value): upto}))
        if body.type == "bool":
            values = values.to(torch.int64)
        return values.expand([self.shape[at] if dim == at else -1 for dim in range(4)]).cumsum(at)
