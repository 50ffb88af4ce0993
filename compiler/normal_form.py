"""The normal form of captured graphs: fewer kinds of operations, and none that change nothing.

Values are all that counts: what lays memory out anew is dropped.

- Casts are `prims.convert_element_type(x, dtype)`; to the same dtype they are gone.
- `dropout` that is off, `clone`, `contiguous`, `detach`, `alias` are gone.
- Changes of shape are `aten.reshape` with explicit sizes, `aten.permute`, `aten.unsqueeze`, `aten.squeeze.dims`,
  `aten.expand`; parts are `aten.slice` and `aten.select`. Dimensions count from the front.
- Sums, differences, products and quotients with a number are the Tensor overload with a Python number; `1 - x` is
  `aten.sub.Tensor(1, x)`. The Tensor overloads of other operations take no numbers.
- `x @ w + b` on two-dimensional operands is `aten.linear`.
- Every size is one node, derived from `aten.sym_size.int` of the placeholders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir.program import Program

from .normal_sizes import Sizes, shape_key

aten = torch.ops.aten

Rule = Callable[["Rewriter", fx.Node], fx.Node | None]
"""Returns what stands for the node from now on, None to leave it."""

RULES: dict[Any, Rule] = {}


NO_EFFECT = (("pin_memory", False), ("pin_memory", None), ("layout", torch.strided), ("layout", None), ("dtype", None))
"""Named arguments that say what holds anyway."""


class Rewriter:
    """Inserts nodes before the one that is looked at; they take over its value and its place in the model."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sizes = Sizes(program)

    def call(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call that has the value of `node`."""
        made = self.program.graph.create_node("call_function", target, args, kwargs, name=target._opname)
        made.meta = dict(node.meta)
        return made


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for calls of `targets`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def normalise(program: Program) -> None:
    """Bring the graph of a program to its normal form, in place."""
    from . import normal_views  # noqa: F401 - registers its rules

    rewriter = Rewriter(program)
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            if node.op == "output":
                rewriter.sizes.settle(node)
            continue
        rewriter.sizes.settle(node)
        node.kwargs = {name: value for name, value in node.kwargs.items() if (name, value) not in NO_EFFECT}
        if rewriter.sizes.visit(node):
            continue
        apply = RULES.get(node.target)
        if apply is None:
            continue
        with program.graph.inserting_before(node):
            new = apply(rewriter, node)
        if new is not None:
            node.replace_all_uses_with(new)
    program.drop_unused()


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call, passed by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


@rule(aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.lift_fresh.default)
@rule(aten.lift_fresh_copy.default, aten.positive.default, aten.resolve_conj.default, aten.resolve_neg.default)
def _identity(rewriter: Rewriter, node: fx.Node) -> Any:
    return node.args[0]


@rule(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default)
def _dropout(rewriter: Rewriter, node: fx.Node) -> Any:
    return None if argument(node, 2, "train") and argument(node, 1, "p") else node.args[0]


@rule(aten.to.device, aten.to.dtype, aten.to.other, aten.to.dtype_layout, aten.to.prim_Device, aten.to.prim_dtype)
@rule(aten._to_copy.default, aten.type_as.default, aten.to.prim_other)
def _cast(rewriter: Rewriter, node: fx.Node) -> Any:
    given, value = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if given.device != value.device:
        return None
    if given.dtype == value.dtype:
        return node.args[0]
    return rewriter.call(node, torch.ops.prims.convert_element_type.default, node.args[0], value.dtype)


SAME: dict[Any, Any] = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__and__.Scalar: aten.bitwise_and.Scalar,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.__xor__.Scalar: aten.bitwise_xor.Scalar,
    aten.__lshift__.Scalar: aten.bitwise_left_shift.Tensor_Scalar,
    aten.__rshift__.Scalar: aten.bitwise_right_shift.Tensor_Scalar,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.true_divide.Scalar: aten.div.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.div.Scalar_mode: aten.div.Tensor_mode,
}
"""Other names and overloads of the same arithmetic."""


@rule(*SAME, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
def _arithmetic(rewriter: Rewriter, node: fx.Node) -> Any:
    given: Any = node.target
    target = SAME.get(given, given)
    first, second = node.args[:2]
    unchanged = 1 if target in (aten.mul.Tensor, aten.div.Tensor) else 0 if _is_integral(node) else None
    if (
        unchanged is not None
        and type(second) in (int, float)
        and second == unchanged
        and target in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
        and isinstance(first, fx.Node)
        and first.meta["val"].dtype == node.meta["val"].dtype
    ):
        return first
    return rewriter.call(node, target, *node.args, **node.kwargs) if target is not node.target else None


def _is_integral(node: fx.Node) -> bool:
    dtype = node.meta["val"].dtype
    return not dtype.is_floating_point and not dtype.is_complex


@rule(aten.rsub.Scalar, aten.rsub.Tensor)
def _reversed_difference(rewriter: Rewriter, node: fx.Node) -> Any:
    alpha = argument(node, 2, "alpha", 1)
    kwargs = {} if alpha == 1 else {"alpha": alpha}
    return rewriter.call(node, aten.sub.Tensor, node.args[1], node.args[0], **kwargs)


@rule(aten.addmm.default)
def _affine(rewriter: Rewriter, node: fx.Node) -> Any:
    bias, x, weight = node.args
    if any(node.kwargs.get(name, 1) != 1 for name in ("beta", "alpha")) or bias.meta["val"].dim() != 1:  # type: ignore[union-attr]
        return None
    return rewriter.call(node, aten.linear.default, x, _transposed(rewriter, weight), bias)


@rule(aten.mm.default)
def _product_with_weight(rewriter: Rewriter, node: fx.Node) -> Any:
    x, weight = node.args
    if not _is_weight(weight):
        return None
    return rewriter.call(node, aten.linear.default, x, _transposed(rewriter, weight))


def _is_weight(node: Any) -> bool:
    return node.op == "get_attr" or (node.target is aten.permute.default and _is_weight(node.args[0]))


def _transposed(rewriter: Rewriter, weight: Any) -> fx.Node:
    if weight.target is aten.permute.default and list(weight.args[1]) == [1, 0]:
        return weight.args[0]  # type: ignore[no-any-return]
    made = rewriter.program.graph.call_function(aten.permute.default, (weight, [1, 0]))
    made.meta = {**weight.meta, "val": weight.meta["val"].transpose(0, 1)}
    return made


@rule(aten.copy.default)
def _copy(rewriter: Rewriter, node: fx.Node) -> Any:
    source: Any = node.args[1]
    value, given = node.meta["val"], source.meta["val"]
    if given.dtype != value.dtype:
        source = rewriter.call(source, torch.ops.prims.convert_element_type.default, source, value.dtype)
        source.meta["val"] = given.to(value.dtype)
    if shape_key(source) == shape_key(node):
        return source
    sizes = rewriter.sizes.shape(node)
    return None if sizes is None else rewriter.call(node, aten.expand.default, source, sizes)


@rule(aten.fill.Scalar, aten.zero.default)
def _fill(rewriter: Rewriter, node: fx.Node) -> Any:
    value = node.args[1] if len(node.args) > 1 else 0
    return rewriter.call(node, aten.full_like.default, node.args[0], value)
