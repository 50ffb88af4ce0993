"""Write an index expression as Triton code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.index import Expr, Facts
from graphwright.ir.errors import LoweringError

INDEX_FACTS = ix.NO_FACTS.known("b", ix.ZERO, None).known("h", ix.ZERO, None)
INDEX_FACTS = INDEX_FACTS.known("q", ix.ZERO, None).known("k", ix.ZERO, None)
"""Indices are never negative."""

_FUNCTIONS = {"log": "tl.log", "exp": "tl.exp", "sqrt": "tl.sqrt", "abs": "tl.abs", "min": "tl.minimum", "max": "tl.maximum"}
_CASTS = {"float": "tl.float32", "trunc": "tl.int32"}
_SYMBOLS = {"add": "+", "mul": "*", "div": "/", "lt": "<", "le": "<=", "eq": "=="}


@dataclass(frozen=True)
class LoadCode:
    """How a kernel reads a tensor.

    Args:
        pointer: Triton text of the pointer to the first element: "p_in0".
        strides: Triton text of each dimension's stride, in elements; "0" for a broadcast dimension.
    """

    pointer: str
    strides: tuple[str, ...]


def triton_code(
    e: Expr,
    variables: Mapping[str, str],
    loads: Mapping[str, LoadCode],
    *,
    in_range: Mapping[str, str] | None = None,
    facts: Facts = INDEX_FACTS,
) -> str:
    """Return `e` as the text of a Triton expression.

    Args:
        e: the expression. A constant comes out as a Python constant.
        variables: variable name -> Triton text: {"b": "i_b", "q": "o_q", "s72": "query_length"}. Texts that are not
            names, numbers or subscripts are put in brackets.
        loads: name of a tensor -> how it is read. Bool tensors are read through pointers to int1 (torch.bool).
        in_range: variable name -> Triton text of a bool of the variable's shape, for variables that can be beyond
            their range, such as the last block's; what they would read is not read.
        facts: what is known of the variables; what is never negative is divided more cheaply.

    Returns:
        Text of an int1, integer or float32 expression, in brackets where it is more than one operand.

    Raises:
        LoweringError: the expression has a sum, which has no form for one element (`for_kernels` of `analyse_mask`
            leaves none), or a variable or tensor without text.
    """
    return _Writer(variables, loads, in_range or {}, facts).text(e, ())


class _Writer:
    def __init__(
        self, variables: Mapping[str, str], loads: Mapping[str, LoadCode], in_range: Mapping[str, str], facts: Facts
    ) -> None:
        self.variables, self.loads, self.in_range, self.facts = variables, loads, in_range, facts

    def text(self, e: Expr, guards: tuple[Expr, ...]) -> str:
        """Write `e`, of which only what is used where all the guards hold matters."""
        match e.kind:
            case "const":
                return _number(e.value)
            case "var":
                return self.variable(str(e.value))
            case "linear" | "ge0" | "eq0" | "not":
                return self.comparison(e, guards)
            case "product":
                return f"({' * '.join(self.text(o, guards) for o in e.operands)})"
            case "floordiv":
                return self.floor_division(e, guards)
            case "and":
                return f"({' & '.join(self.text(o, guards) for o in e.operands)})"
            case "int":
                return f"tl.where({self.text(e.operands[0], guards)}, 1, 0)"
            case "where":
                condition, a, b = e.operands
                texts = (
                    self.text(condition, guards),
                    self.text(a, (*guards, condition)),
                    self.text(b, (*guards, ix.not_(condition))),
                )
                return f"tl.where({', '.join(texts)})"
            case "load":
                return self.load(e, guards)
            case "call":
                return self.call(e, guards)
        raise LoweringError(
            f"Triton code: {e} has no form for one element. Read the tensor that the graph computes it in instead: "
            "analyse the mask with for_kernels=True"
        )

    def variable(self, name: str) -> str:
        if name not in self.variables:
            raise LoweringError(f"Triton code: no text for the variable {name!r}; given: {', '.join(sorted(self.variables))}")
        text = self.variables[name]
        return text if text.isidentifier() or text.isdigit() or _is_subscript(text) else f"({text})"

    def linear(self, terms: list[tuple[Expr, int]], constant: int, guards: tuple[Expr, ...]) -> str:
        """Write a sum of positive multiples."""
        texts = [f"{c} * {self.text(a, guards)}" if c != 1 else self.text(a, guards) for a, c in terms]
        return " + ".join([*texts, *([str(constant)] if constant or not texts else [])])

    def comparison(self, e: Expr, guards: tuple[Expr, ...]) -> str:
        inner = e.operands[0]
        if e.kind == "not" and inner.kind == "and":
            return f"({' | '.join(self.text(ix.not_(o), guards) for o in inner.operands)})"
        if e.kind == "not" and inner.kind != "eq0":
            return f"({self.text(inner, guards)} == 0)"
        constant, terms = ix.parts(e if e.kind == "linear" else inner.operands[0] if e.kind == "not" else inner)
        # What is subtracted stands on the other side: no operand is negated.
        left = self.linear([(a, c) for a, c in terms.items() if c > 0], max(constant, 0), guards)
        right = self.linear([(a, -c) for a, c in terms.items() if c < 0], max(-constant, 0), guards)
        if e.kind == "linear":
            return (
                f"({left})"
                if right == "0"
                else f"({left} - ({right}))"
                if "+" in right or "*" in right
                else f"({left} - {right})"
            )
        return f"({left} {'>=' if e.kind == 'ge0' else '==' if e.kind == 'eq0' else '!='} {right})"

    def floor_division(self, e: Expr, guards: tuple[Expr, ...]) -> str:
        inner = self.text(e.operands[0], guards)
        low = ix.lower(e.operands[0], self.facts)
        if low is not None and low >= 0:
            return f"({inner} // {e.value})"
        # Triton rounds towards 0.
        return f"({inner} // {e.value} - tl.where({inner} % {e.value} < 0, 1, 0))"

    def load(self, e: Expr, guards: tuple[Expr, ...]) -> str:
        name = str(e.value)
        if name not in self.loads:
            raise LoweringError(f"Triton code: no text for the tensor {name!r}; given: {', '.join(sorted(self.loads))}")
        code = self.loads[name]
        if len(code.strides) != len(e.operands):
            raise LoweringError(f"Triton code: {e} has {len(e.operands)} indices, but {len(code.strides)} strides were given")
        place = code.pointer
        for index, stride in zip(e.operands, code.strides, strict=True):
            text = self.text(index, guards)
            if text != "0" and stride != "0":
                place += f" + {text}" if stride == "1" else f" + {text} * {stride}"
        conditions = [f"({self.in_range[v]})" for v in sorted(e.free) if v in self.in_range]
        # A mask may not have more dimensions than the pointers it is for.
        conditions += [self.text(g, ()) for g in guards if g.free and g.free <= e.free and not ix.loads_of(g)]
        mask = f", mask={' & '.join(conditions)}, other=0" if conditions else ""
        loaded = f"tl.load({place}{mask})"
        return f"tl.cast({loaded}, tl.float32)" if e.type == "float" else loaded

    def call(self, e: Expr, guards: tuple[Expr, ...]) -> str:
        name = str(e.value)
        operands = [self.text(o, guards) for o in e.operands]
        if name in _SYMBOLS:
            return f"({operands[0]} {_SYMBOLS[name]} {operands[1]})"
        if name in _CASTS:
            return f"tl.cast({operands[0]}, {_CASTS[name]})"
        if name in ("float16", "bfloat16"):
            return f"tl.cast(tl.cast({operands[0]}, tl.{'float16' if name == 'float16' else 'bfloat16'}), tl.float32)"
        keep_nan = ", propagate_nan=tl.PropagateNan.ALL" if e.type == "float" and name in ("min", "max") else ""
        return f"{_FUNCTIONS[name]}({', '.join(operands)}{keep_nan})"


def _number(value: Any) -> str:
    return (
        f'float("{value}")'
        if (isinstance(value, float) and value in (float("inf"), float("-inf"))) or value != value
        else repr(value)
    )


def _is_subscript(text: str) -> bool:
    head, bracket, tail = text.partition("[")
    return bool(bracket) and head.isidentifier() and tail.count("]") == 1 and tail.endswith("]")
