"""Steps for operations that are not loops: products with weights, attention, and calls of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import sympy
import torch
from torch import fx

from graphwright.ir.errors import LoweringError
from graphwright.ir.program import Program
from graphwright.runtime.schedule import CallStep, MatmulStep, Symbolic, View

from .indexing import contiguous_strides, product, size_text
from .loops import Stored

aten = torch.ops.aten

WRITES_INTO = {aten.bmm.default, aten.mm.default, aten.matmul.default, aten.index_select.default}
"""Operations whose `out=` form computes straight into the buffer."""


def view_of(stored: Stored, shape: tuple[Any, ...]) -> View:
    """Return a stored value as a schedule has it."""
    return View(
        stored.buffer,
        tuple(size_text(n) for n in shape),
        tuple(size_text(s) for s in stored.strides),
        size_text(stored.offset),
    )


def matrix_of(stored: Stored, shape: tuple[Any, ...]) -> View | None:
    """Return a stored value as rows of its last dimension; None if they do not lie evenly, or have gaps within."""
    strides = stored.strides
    if shape[-1] != 1 and strides[-1] != 1:
        return None
    outer = [(n, s) for n, s in zip(shape[:-1], strides[:-1], strict=True) if n != 1]
    for (_, step), (count, inner) in pairwise(outer):
        if sympy.expand(step - count * inner) != 0:
            return None
    row = outer[-1][1] if outer else shape[-1]
    return View(
        stored.buffer,
        (size_text(product(shape[:-1])), size_text(shape[-1])),
        (size_text(row), 1),
        size_text(stored.offset),
    )


def accepts(node: fx.Node, arg: fx.Node, stored: Stored, shape: tuple[Any, ...]) -> bool:
    """Whether an operation can read an argument where it lies; else it is copied first."""
    if node.target is aten.linear.default and arg is node.args[0]:
        return matrix_of(stored, shape) is not None
    if node.target is aten.embedding.default:
        return all(a == b for a, b in zip(stored.strides, contiguous_strides(shape), strict=True))
    return True


def count_results(node: fx.Node) -> int:
    """Return how many tensors an operation returns."""
    value = node.meta["val"]
    return 1 if isinstance(value, torch.Tensor) else len(value)


def buffer_shape(node: fx.Node, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the shape in which an operation's result is best allocated."""
    if node.target is aten.embedding.default:
        return (product(shape[:-1]), shape[-1])
    return shape


Place = Callable[[fx.Node], Stored]


def step_of(program: Program, node: fx.Node, place: Place, outs: Mapping[int, Stored], provenance: str) -> Any:
    """Return the step of an operation.

    Args:
        program: the program.
        node: the call.
        place: tells where a tensor lies.
        outs: number of a result -> where it goes; results that nothing uses are missing.
        provenance: of the step.
    """
    if node.target is aten.linear.default and (len(node.args) < 3 or node.args[2] is None):
        return _linear(program, node, place, outs[0], provenance)
    if node.target is aten.embedding.default:
        return _embedding(program, node, place, outs[0], provenance)
    return _call(program, node, place, outs, provenance)


def _linear(program: Program, node: fx.Node, place: Place, out: Stored, provenance: str) -> Any:
    x, weight = node.args[0], node.args[1]
    if weight.op != "get_attr":  # type: ignore[union-attr]
        return _call(program, node, place, {0: out}, provenance)
    rows = matrix_of(place(x), program.shape(x))  # type: ignore[arg-type]
    written = matrix_of(out, program.shape(node))
    if rows is None or written is None:
        raise LoweringError(f"{node.name}: the operand of a product does not lie in rows")
    return MatmulStep(node.name, rows, place(weight).buffer, written, provenance=provenance)  # type: ignore[arg-type]


def _embedding(program: Program, node: fx.Node, place: Place, out: Stored, provenance: str) -> CallStep:
    weight, ids = node.args[0], node.args[1]
    count = size_text(product(program.shape(ids)))  # type: ignore[arg-type]
    flat_ids = View(place(ids).buffer, (count,), (1,), size_text(place(ids).offset))  # type: ignore[arg-type]
    table = view_of(place(weight), program.shape(weight))  # type: ignore[arg-type]
    arguments = (table, 0, flat_ids)
    return CallStep(node.name, "aten::index_select.default", arguments, {}, (out.buffer,), True, provenance)


def _call(program: Program, node: fx.Node, place: Place, outs: Mapping[int, Stored], provenance: str) -> CallStep:
    def argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            if isinstance(value.meta["val"], torch.Tensor):
                return view_of(place(value), program.shape(value))
            return _number(program, value)
        if isinstance(value, list | tuple):
            return [argument(v) for v in value]
        if isinstance(value, torch.device):
            return str(value)
        return value

    target: Any = node.target
    results = tuple(outs[k].buffer if k in outs else "" for k in range(count_results(node)))
    return CallStep(
        node.name,
        f"{target.namespace}::{target._schema.name.partition('::')[2]}.{target._overloadname}",
        tuple(argument(a) for a in node.args),
        {name: argument(a) for name, a in node.kwargs.items()},
        results,
        target in WRITES_INTO,
        provenance,
    )


def _number(program: Program, node: fx.Node) -> Any:
    value = node.meta["val"]
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, torch.SymInt):
        size = size_text(program.size(value))
        return size if isinstance(size, int) else Symbolic(size)
    raise LoweringError(f"{node.name}: the number {value} is only known when the model runs")
