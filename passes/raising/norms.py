"""Recognition of RMS and layer norms that are written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.ops.definition import computed_in
from graphwright.ir.program import Program, calls
from graphwright.passes.base import Context, Decision, Fidelity, Refusal
from graphwright.passes.cleanup.redundant_casts import CAST
from graphwright.passes.local import LocalPass, Places

from .matching import (
    ADD,
    DIV,
    MUL,
    SUB,
    dtype_of,
    either_order,
    is_call,
    only_user,
    reduces_last,
    with_number,
    without_casts,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Normalised:
    """x divided by a root of its mean square, and what followed.

    Args:
        x: what is normalised, in its own dtype or cast to the one it is computed in.
        eps: what is added to the mean square.
        end: the node whose value this is.
        centred: the value that the mean was taken from, for a layer norm; x is the difference.
        weight: the factor; None for none.
        offset: added to the factor.
        bias: added at the end; None for none.
        cast: whether the value was cast to x's own dtype before the factor; None for no cast yet.
    """

    x: fx.Node
    eps: float
    end: fx.Node
    centred: fx.Node | None = None
    weight: fx.Node | None = None
    offset: float = 0.0
    bias: fx.Node | None = None
    cast: bool | None = None


@dataclass(frozen=True, kw_only=True)
class RaiseNorms(LocalPass):
    """Turn norms that are written out, and `aten.rms_norm`, into one operation.

    Before: `%s = mean(pow(%x, 2), [-1], True); %n = mul(%x, rsqrt(add(%s, eps))); %y = mul(weights["w"], %n)`

    After: `%y = graphwright.rms_norm(%x, weights["w"], eps)`

    Applies when: values are divided by the root of their mean square over the last dimension: as rsqrt, as a power of -0.5,
        or as a division by a square root.
    Applies when: a factor per feature follows, as it stands (Llama), with 1 added (Gemma), before or after a cast.
    Applies when: the mean was subtracted first: a layer norm, with weight and bias.

    Declines when: the mean square is taken over another dimension than the last one.
    Declines when: the mean square is used for something else than the norm.

    Fidelity: sums and roots may be rounded elsewhere.
    """

    name = "raise-norms"
    fidelity = Fidelity.CLOSE

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the norms, each at the node that has its value."""
        for node in calls(program.graph):
            if is_call(node, aten.rms_norm.default):
                yield _fused(node)
                continue
            found = _normalised(program, node)
            if isinstance(found, Refusal):
                yield found
            elif found is not None:
                yield _decision(_followed(program, found))

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Return a call of the norm."""
        x = places[detail["x"]]
        weight = places[detail["weight"]] if detail.get("weight") else None
        if detail["kind"] == "layer_norm":
            bias = places[detail["bias"]] if detail.get("bias") else None
            size = x.meta["val"].shape[-1]
            return program.call(aten.layer_norm.default, x, [int(size)], weight, bias, detail["eps"], like=node)
        arguments: list[Any] = [x, weight, detail["eps"]]
        if detail["offset"]:
            arguments.append(detail["offset"])
        keywords = {} if detail["cast_before_weight"] else {"cast_before_weight": False}
        return program.call(dialect.rms_norm, *arguments, like=node, **keywords)


def _fused(node: fx.Node) -> Decision | Refusal:
    x, shape = node.args[:2]
    weight = node.args[2] if len(node.args) > 2 else node.kwargs.get("weight")
    eps = node.args[3] if len(node.args) > 3 else node.kwargs.get("eps")
    if len(shape) != 1:  # type: ignore[arg-type]
        return Refusal(node.name, "it normalises over more than the last dimension")
    assert isinstance(x, fx.Node)
    if weight is not None and not isinstance(weight, fx.Node):
        return Refusal(node.name, "its weight is not a tensor")
    # PyTorch takes the precision of the dtype that it computes in.
    eps = torch.finfo(computed_in(dtype_of(x))).eps if eps is None else eps
    return _decision(Normalised(x, float(eps), node, weight=weight, cast=False if weight is not None else None))  # type: ignore[arg-type]


def _normalised(program: Program, node: fx.Node) -> Normalised | Refusal | None:
    """Match `x * rsqrt(mean(x^2) + eps)` at the product, in its spellings."""
    if is_call(node, *MUL):
        pairs = list(either_order(node))
        for value, factor in pairs:
            root = _inverse_root(factor)
            if root is not None and isinstance(value, fx.Node):
                return _of(program, node, value, root)
    elif is_call(node, *DIV) and is_call(node.args[1], aten.sqrt.default):
        divisor: Any = node.args[1]
        value, radicand = node.args[0], divisor.args[0]
        if isinstance(value, fx.Node) and isinstance(radicand, fx.Node):
            return _of(program, node, value, radicand)
    return None


def _inverse_root(node: Any) -> fx.Node | None:
    """Return s of 1 / sqrt(s)."""
    node = without_casts(node)
    inner: Any = None
    if is_call(node, aten.rsqrt.default) or (is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == -0.5):
        inner = node.args[0]
    elif is_call(node, aten.reciprocal.default) and is_call(node.args[0], aten.sqrt.default):
        inner = node.args[0].args[0]
    elif is_call(node, *DIV) and node.args[0] == 1 and is_call(node.args[1], aten.sqrt.default):
        inner = node.args[1].args[0]
    return inner if isinstance(inner, fx.Node) else None


def _of(program: Program, node: fx.Node, value: fx.Node, root: fx.Node) -> Normalised | Refusal | None:
    added = with_number(program, root, *ADD)
    if added is None:
        return None
    mean, eps = added
    x, centred = None, None
    if is_call(mean, aten.mean.dim):
        x = _squared(mean.args[0])
    elif is_call(mean, aten.var.correction, aten.var.dim):
        x = _centred_of(value, mean)
        centred = x
    if x is None:
        return None
    if not reduces_last(mean):
        return Refusal(node.name, f"%{mean.name} does not go over the last dimension alone")
    if without_casts(value) is not without_casts(x) and centred is None:
        return None
    if len(mean.users) > 1 or len(root.users) > 1:
        return Refusal(node.name, f"%{mean.name} is used for something else too")
    if centred is None:
        difference = without_casts(x)
        if is_call(difference, *SUB) and not difference.kwargs and is_call(difference.args[1], aten.mean.dim):
            mean_of, subtracted = difference.args[0], difference.args[1]
            if subtracted.args[0] is mean_of and reduces_last(subtracted):
                centred = mean_of
    if centred is not None and not isinstance(centred.meta["val"].shape[-1], int):
        return Refusal(node.name, "the number of features differs from call to call")
    if dtype_of(x) != computed_in(dtype_of(x)):
        return Refusal(node.name, f"it is computed in {dtype_of(x)}, not in {computed_in(dtype_of(x))}")
    return Normalised(x, eps, node, centred=centred)


def _squared(node: Any) -> fx.Node | None:
    """Return x of x^2, as it was squared."""
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == 2:
        x: Any = node.args[0]
        return x if isinstance(x, fx.Node) else None
    if is_call(node, aten.square.default) or (is_call(node, *MUL) and node.args[0] is node.args[1]):
        x = node.args[0]
        return x if isinstance(x, fx.Node) else None
    return None


def _centred_of(value: fx.Node, variance: fx.Node) -> fx.Node | None:
    """Return x where `value` is x - mean(x) and `variance` is the biased variance of x."""
    biased = (
        variance.kwargs.get("correction", 1) == 0
        if variance.target is aten.var.correction
        else len(variance.args) > 2 and variance.args[2] is False
    )
    x = variance.args[0]
    if not biased or not is_call(value, *SUB) or value.args[0] is not x or not is_call(value.args[1], aten.mean.dim):
        return None
    mean: Any = value.args[1]
    return x if isinstance(x, fx.Node) and mean.args[0] is x and reduces_last(mean) else None


def _followed(program: Program, found: Normalised) -> Normalised:
    """Take in the casts, the factor and the bias that follow, as far as they are used for nothing else."""
    origin = without_casts(found.x)
    while True:
        user = only_user(found.end)
        if user is None:
            return found
        if is_call(user, CAST):
            if dtype_of(found.end) == dtype_of(user):
                found = replace(found, end=user)
                continue
            if found.centred is not None or found.cast is not None or dtype_of(user) != dtype_of(origin):
                return found
            found = replace(found, end=user, cast=found.weight is None)
            continue
        if is_call(user, *MUL) and found.weight is None:
            factor = next((b for a, b in either_order(user) if a is found.end), None)
            weight = _factor(program, factor, found)
            if weight is None:
                return found
            found = replace(found, end=user, weight=weight[0], offset=weight[1])
            continue
        if is_call(user, *ADD) and found.centred is not None and found.bias is None:
            bias: Any = next((b for a, b in either_order(user) if a is found.end), None)
            if not _is_per_feature(bias, found.end) or dtype_of(bias) != dtype_of(found.end):
                return found
            found = replace(found, end=user, bias=bias)
            continue
        return found


def _factor(program: Program, node: Any, found: Normalised) -> tuple[fx.Node, float] | None:
    """Return the weight of a factor `w` or `w + offset`, with the offset."""
    if not isinstance(node, fx.Node):
        return None
    plain = without_casts(node)
    added = with_number(program, plain, *ADD)
    weight, offset = (without_casts(added[0]), added[1]) if added is not None else (plain, 0.0)
    if not _is_per_feature(weight, found.end):
        return None
    if found.centred is not None and (offset or dtype_of(weight) != dtype_of(found.end)):
        return None
    # The factor's own dtype decides the result's where the cast came first.
    if found.cast and dtype_of(node) != dtype_of(weight):
        return None
    return weight, offset


def _is_per_feature(node: Any, like: fx.Node) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    shape = node.meta["val"].shape
    return len(shape) == 1 and isinstance(shape[0], int) and shape[0] == like.meta["val"].shape[-1]


def _decision(found: Normalised) -> Decision:
    # With the value cast back, the norm starts from the value as it was before it was cast.
    start: Any = without_casts(found.x) if found.cast is not None else found.x
    while is_call(start, CAST) and dtype_of(start.args[0]) == dtype_of(start):
        start = start.args[0]
    weight = found.weight.name if found.weight is not None else None
    if found.centred is not None:
        bias = found.bias.name if found.bias is not None else None
        detail = {"kind": "layer_norm", "x": found.centred.name, "weight": weight, "bias": bias, "eps": found.eps}
        return Decision(found.end.name, "layer_norm", "mean subtracted, divided by the standard deviation", detail)
    detail = {
        "kind": "rms_norm",
        "x": start.name,
        "weight": weight,
        "eps": found.eps,
        "offset": found.offset,
        "cast_before_weight": found.cast is not False,
    }
    return Decision(found.end.name, "rms_norm", "divided by the root of the mean square", detail)
