"""Lowering of lookups by indices that are known when the kernel is written, such as positions."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from graphwright.codegen.indexing import Index
from graphwright.codegen.values import Value
from graphwright.ir.errors import LoweringError

from .registry import GENERATORS, LOOKUPS, POINTWISE, REDUCTIONS, VIEWS, Reader, arguments, register

aten = torch.ops.aten


def is_known(node: Any) -> bool:
    """Whether a node's value follows from its index alone, so that no kernel has to load it."""
    stack, seen = [node], set()
    while stack:
        found = stack.pop()
        if not isinstance(found, fx.Node) or found in seen:
            continue
        seen.add(found)
        if not isinstance(found.meta.get("val"), torch.Tensor) or found.target in GENERATORS:
            continue
        if found.op != "call_function" or found.target in REDUCTIONS:
            return False
        if not any(found.target in table for table in (VIEWS, POINTWISE, LOOKUPS)):
            return False
        stack.extend(found.all_input_nodes)
    return True


def indices_of(node: fx.Node) -> Any:
    """Return the tensor that tells a lookup where to look."""
    given = arguments(node)
    return given["indices"] if "indices" in given else given["index"]


def _row(reader: Reader, node: fx.Node, value: Value, size: Any) -> Index:
    """Return an index as an expression that is certainly within a dimension."""
    if value.kind not in ("index", "constant"):
        raise LoweringError(f"{node.name}: the index is not an expression of the element's own index")
    expression = sympy.sympify(value.payload)
    most = reader.largest(expression)
    if most is None or not reader.below(most, size):
        raise LoweringError(f"{node.name}: the index may be past the end of the table")
    return expression


@register(LOOKUPS, aten.embedding.default)
def _embedding(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given = arguments(node)
    row = reader.value(given["indices"], index[:-1])
    return reader.value(given["weight"], (_row(reader, node, row, reader.shape(given["weight"])[0]), index[-1]))


@register(LOOKUPS, aten.gather.default)
def _gather(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given = arguments(node)
    source, dim = given["self"], given["dim"] % max(1, len(index))
    at = _row(reader, node, reader.value(given["index"], index), reader.shape(source)[dim])
    return reader.value(source, (*index[:dim], at, *index[dim + 1 :]))


@register(LOOKUPS, aten.index_select.default)
def _index_select(reader: Reader, node: fx.Node, index: tuple[Index, ...]) -> Value:
    given = arguments(node)
    source, dim = given["self"], given["dim"] % max(1, len(index))
    at = _row(reader, node, reader.value(given["index"], (index[dim],)), reader.shape(source)[dim])
    return reader.value(source, (*index[:dim], at, *index[dim + 1 :]))
