"""What a program costs: floating point operations and bytes moved, per node, as expressions of its dimensions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphwright.ir.dialect import attention, kv_attention
from graphwright.ir.ops.attention import operand_name, operand_type
from graphwright.ir.ops.definition import find_operation
from graphwright.ir.program import Program, Size, calls
from graphwright.ir.target import Target

from .visible import visible_pairs

aten = torch.ops.aten

Formula = Callable[[Program, fx.Node], "Size"]

FUNCTION_FLOPS = 8
"""A rough count for one exponential, logarithm, root or the like."""


@dataclass(frozen=True)
class Cost:
    """What a node or a program costs: numbers, or expressions of the program's dimensions.

    Args:
        flops: floating point operations.
        moved_bytes: bytes read and written, each operand and each result once.
    """

    flops: Size = 0
    moved_bytes: Size = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.moved_bytes + other.moved_bytes)

    def at(self, sizes: Mapping[str, int]) -> Cost:
        """Return the cost with numbers for the dimensions.

        Args:
            sizes: size by the dimension's name.
        """
        return Cost(*(_number(value, sizes) for value in (self.flops, self.moved_bytes)))

    def time_us(self, target: Target) -> float:
        """Return the least time it takes on a target, in microseconds; the cost must be of numbers."""
        return target.time_us(float(self.flops), float(self.moved_bytes))


def cost_of_program(program: Program) -> Cost:
    """Return the sum over all nodes, each run by itself: fusion moves fewer bytes."""
    return sum((cost_of_node(program, node) for node in calls(program.graph)), Cost())


def cost_of_node(program: Program, node: fx.Node) -> Cost:
    """Return what one call costs. What only looks at memory in another way costs nothing."""
    if node.target in VIEWS or not isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
        return Cost()
    flops = flops_of_node(program, node)
    moved: Size = bytes_of_value(program, node.meta["val"])
    for source in node.all_input_nodes:
        moved = moved + _read_bytes(program, node, source)
    return Cost(sympy.expand(flops) if isinstance(flops, sympy.Expr) else flops, moved)


def flops_of_node(program: Program, node: fx.Node) -> Size:
    """Return the floating point operations of one call that gives tensors."""
    formula = _FORMULAS.get(node.target)
    if formula is None and (operation := find_operation(node.target)) is not None:
        formula = operation.flops
    return formula(program, node) if formula is not None else _pointwise(program, node)


def bytes_of_value(program: Program, value: Any) -> Size:
    """Return the bytes of a tensor, or of several together."""
    if isinstance(value, list | tuple):
        return sum((bytes_of_value(program, item) for item in value), 0)
    if not isinstance(value, torch.Tensor):
        return 0
    return _product(program.size(n) for n in value.shape) * value.element_size()


def _read_bytes(program: Program, node: fx.Node, source: fx.Node) -> Size:
    if node.target is aten.embedding.default and source is node.args[0]:
        # Only the rows that are asked for are read.
        return bytes_of_value(program, node.meta["val"])
    return bytes_of_value(program, source.meta.get("val"))


def _number(value: Size, sizes: Mapping[str, int]) -> Size:
    if not isinstance(value, sympy.Expr):
        return value
    return int(value.subs({symbol: sizes[symbol.name] for symbol in value.free_symbols}))


def _product(sizes: Any) -> Size:
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def _elements(program: Program, node: Any) -> Size:
    value = node.meta["val"]
    if isinstance(value, list | tuple):
        return sum((_product(program.size(n) for n in item.shape) for item in value if isinstance(item, torch.Tensor)), 0)
    return _product(program.shape(node))


def _linear(program: Program, node: fx.Node) -> Size:
    bias = len(node.args) > 2 and node.args[2] is not None
    return _elements(program, node) * (2 * program.shape(node.args[1])[-1] + int(bias))  # type: ignore[arg-type]


def _matmul(program: Program, node: fx.Node) -> Size:
    return _elements(program, node) * 2 * program.shape(node.args[0])[-1]  # type: ignore[arg-type]


def _baddbmm(program: Program, node: fx.Node) -> Size:
    return _elements(program, node) * (2 * program.shape(node.args[1])[-1] + 1)  # type: ignore[arg-type]


def _convolution(program: Program, node: fx.Node) -> Size:
    return _elements(program, node) * 2 * _product(program.shape(node.args[1])[1:])  # type: ignore[arg-type]


def _sdpa(program: Program, node: fx.Node) -> Size:
    batch, heads, queries, features = program.shape(node.args[0])[-4:]  # type: ignore[arg-type]
    keys, values = program.shape(node.args[2])[-2:]  # type: ignore[arg-type]
    is_causal = node.kwargs.get("is_causal", node.args[5] if len(node.args) > 5 else False)
    pairs = visible_pairs("q - k >= 0" if is_causal else "", {}, queries, keys)
    return batch * heads * pairs * (2 * features + 2 * values + FUNCTION_FLOPS)


def _attention(program: Program, node: fx.Node) -> Size:
    batch, heads, queries, features = program.shape(node.args[0])  # type: ignore[arg-type]
    keys, values = program.shape(node.args[2])[-2:]  # type: ignore[arg-type]
    operands: Any = node.args[3]
    types = {operand_name(at): operand_type(operand.meta["val"].dtype) for at, operand in enumerate(operands)}
    pairs = visible_pairs(str(node.kwargs.get("predicate", "")), types, queries, keys)
    return batch * heads * pairs * (2 * features + 2 * values + FUNCTION_FLOPS)


def _kv_attention(program: Program, node: fx.Node) -> Size:
    batch, heads, queries, features = program.shape(node.args[0])  # type: ignore[arg-type]
    keys, values = program.shape(node.args[2])[-2:]  # type: ignore[arg-type]
    pairs = visible_pairs(_kv_predicate(node), {}, queries, keys)
    return batch * heads * pairs * (2 * features + 2 * values + FUNCTION_FLOPS)


def _kv_predicate(node: fx.Node) -> str:
    # No query sees a slot after its own, whatever the predicate says.
    return str(node.kwargs.get("predicate", "")) or "q - k >= 0"


def cache_ratio(program: Program, node: fx.Node) -> Size:
    """Return the ratio of what a call reads of its caches to all of them: below 1 where it sees a window alone."""
    if node.target is not kv_attention:
        return 1
    queries = program.shape(node.args[0])[2]  # type: ignore[arg-type]
    keys = program.shape(node.args[2])[2]  # type: ignore[arg-type]
    reach = visible_pairs(_kv_predicate(node), {}, 1, keys)
    return 1 if reach == keys else sympy.Min(reach + queries - 1, keys) / keys


def _reduction(program: Program, node: fx.Node) -> Size:
    return _elements(program, node.args[0])


def _per_element(flops: int) -> Formula:
    return lambda program, node: _elements(program, node) * flops


def _pointwise(program: Program, node: fx.Node) -> Size:
    value = node.meta["val"]
    first = value[0] if isinstance(value, list | tuple) and value else value
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        return 0
    return _elements(program, node)


VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        operator.getitem,
    }
)
"""What only looks at memory in another way."""

PRODUCTS: dict[Any, Formula] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.baddbmm.default: _baddbmm,
    aten.convolution.default: _convolution,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv2d.padding: _convolution,
}
"""Products of matrices, and convolutions."""

_FORMULAS: dict[Any, Formula] = {
    **PRODUCTS,
    aten.scaled_dot_product_attention.default: _sdpa,
    attention: _attention,
    kv_attention: _kv_attention,
    aten.softmax.int: _per_element(FUNCTION_FLOPS + 3),
    aten.layer_norm.default: _per_element(8),
    aten.rms_norm.default: _per_element(4),
    aten.embedding.default: _per_element(0),
    aten.cat.default: _per_element(0),
    aten.mean.dim: _reduction,
    aten.sum.dim_IntList: _reduction,
    aten.amax.default: _reduction,
    aten.cumsum.default: _reduction,
    **dict.fromkeys(
        (
            aten.exp.default,
            aten.log.default,
            aten.tanh.default,
            aten.erf.default,
            aten.sigmoid.default,
            aten.silu.default,
            aten.gelu.default,
            aten.sin.default,
            aten.cos.default,
            aten.rsqrt.default,
            aten.sqrt.default,
        ),
        _per_element(FUNCTION_FLOPS),
    ),
}
