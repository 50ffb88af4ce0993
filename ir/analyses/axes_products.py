"""Rules of the axes analysis: products, attention (one operation or written out), convolutions and pooling."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import fx

from graphwright.ir.analyses.axes_registry import rule
from graphwright.ir.analyses.axes_state import (
    Dim,
    Dims,
    Factor,
    Label,
    Mixes,
    Region,
    State,
    Value,
    has,
    is_tensor,
    labels,
)

ATTENTION = ("scaled_dot_product_attention", "graphwright.attention", "graphwright.sparse_attention")
FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


@rule(*ATTENTION, *FUSED_ATTENTION)
def _attention(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    query, key, value = (state.dims(n) for n in list(a.values())[:3])
    for name, dims in (("queries", query), ("keys", key)):
        state.demand_free(dims, [-1], "reduce", f"the product of {name} contracts")
    state.demand_free(value, [-1], "reduce", "attention has features")
    outside = state.broadcast([(None, query[:-2]), (None, key[:-2]), (None, value[:-2])], len(query) - 2)
    seen = [label for dims in (key, value) for label in labels(dims[-2])]
    if seen:
        if labels(query[-2]) != (Label.TOKEN,) or set(seen) != {Label.TOKEN}:
            raise Mixes("reduce", "queries that are not tokens attend to tokens or to a batch")
        state.attention.append(node)
    shape = node.meta["val"]
    out = shape if isinstance(shape, torch.Tensor) else shape[0]
    # With grouped queries the head dimension of the queries is the wider one.
    heads = tuple(q or o for q, o in zip(query[:-2], outside, strict=True))
    result = (*heads, query[-2], state.dim(state.size(out.shape[-1])))
    if isinstance(shape, torch.Tensor):
        return result
    return [result, *state.parts(node)[1:]]


def _contract(
    state: State, node: fx.Node, operands: list[tuple[fx.Node, Dims]], inputs: list[str], output: str
) -> tuple[Dim, ...]:
    """Apply Einstein summation to dimensions, opening or closing an attention that is written out."""
    found: dict[str, list[tuple[int, Dim]]] = {}
    for i, ((_, dims), letters) in enumerate(zip(operands, inputs, strict=True)):
        for letter, dim in zip(letters, dims, strict=True):
            found.setdefault(letter, []).append((i, dim))
    closes = False
    for letter, uses in found.items():
        if letter in output:
            continue
        seen = {labels(dim): i for i, dim in uses if labels(dim)}
        if set(seen) == {(Label.KEY,), (Label.TOKEN,)}:
            closes = True
        elif seen:
            names = "/".join(label.value for key in seen for label in key)
            raise Mixes("reduce", f"the product contracts the {names} axis")
    result = [state.broadcast([(None, (dim,)) for _, dim in found[letter]], 1)[0] for letter in output]
    tokens = [i for i, dim in enumerate(result) if has([dim], Label.TOKEN)]
    if len(tokens) > 2 or (len(tokens) == 2 and (closes or has(result, Label.KEY))):
        raise Mixes("pairs", "the product pairs tokens with more than one other")
    if len(tokens) == 2:
        region = Region([node])
        state.regions.append(region)
        state.region_of[node] = region
        result[tokens[1]] = tuple(Factor(Label.KEY if f.label is Label.TOKEN else f.label, f.size) for f in result[tokens[1]])
    if closes:
        for source, dims in operands:
            if has(dims, Label.KEY) and source in state.region_of:
                state.region_of[source].closing.append(node)
        state.attention.append(node)
    return tuple(result)


def _product(state: State, node: fx.Node, first: fx.Node, second: fx.Node) -> Dims:
    """Return the dimensions of `first @ second` with the broadcasting of matmul."""
    a, b = state.dims(first), state.dims(second)
    batch = string.ascii_lowercase[: max(len(a), len(b), 2) - 2]
    left = batch[len(batch) - max(len(a) - 2, 0) :] + ("MK" if len(a) > 1 else "K")
    right = batch[len(batch) - max(len(b) - 2, 0) :] + ("KN" if len(b) > 1 else "K")
    output = batch + ("M" if len(a) > 1 else "") + ("N" if len(b) > 1 else "")
    return _contract(state, node, [(first, a), (second, b)], [left, right], output)


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    first, second = list(a.values())[:2]
    return _product(state, node, first, second)


@rule("addmm", "baddbmm", "addbmm", "addmv")
def _addmm(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    added, first, second = list(a.values())[:3]
    result = _product(state, node, first, second)
    return state.broadcast([(added, state.dims(added)), (None, result)], len(result))


@rule("linear", "graphwright.linear")
def _linear(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    x, weight = list(a.values())[:2]
    dims, w = state.dims(x), state.dims(weight)
    outer = string.ascii_lowercase[: len(dims) - 1]
    return _contract(state, node, [(x, dims), (weight, w)], [outer + "K", "NK"], outer + "N")


@rule("einsum")
def _einsum(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    operands = [(t, state.dims(t)) for t in a["tensors"]]
    left, _, right = a["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    spare = [c for c in string.ascii_letters if c not in left][::-1]
    named = [len(term.replace("...", "")) for term in terms]
    widest = max(len(dims) - n if "..." in term else 0 for (_, dims), term, n in zip(operands, terms, named, strict=True))
    ellipsis = "".join(spare[:widest])
    if not _:
        once = sorted(c for c in set(left) if left.count(c) == 1 and c.isalpha())
        right = ("..." if widest else "") + "".join(once)
    filled = [
        term.replace("...", ellipsis[widest - (len(dims) - n) :] if len(dims) > n else "")
        for (_, dims), term, n in zip(operands, terms, named, strict=True)
    ]
    return _contract(state, node, operands, filled, right.replace("...", ellipsis))


@rule("conv1d", "conv2d", "conv3d", "convolution")
def _convolution(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims, kernel = state.dims(a["input"]), a["weight"].meta["val"].shape
    state.demand_free(dims, [1], "reduce", "a convolution contracts")
    steps = a.get("stride", [1])
    where = [d for d in range(2, len(dims)) if kernel[d] != 1 or list(steps)[(d - 2) % len(steps)] != 1]
    state.demand_free(dims, where, "window", "a convolution")
    shape = state.shape(node)
    return tuple(dim if d == 0 or (d > 1 and d not in where) else state.dim(shape[d]) for d, dim in enumerate(dims))


@rule(
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "_adaptive_avg_pool2d", "max_pool2d_with_indices", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d",
    sized=True,
)  # fmt: skip
def _pool(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = state.dims(a["self"] if "self" in a else a["input"])
    spatial = 1 if "1d" in str(node.target) else 2
    state.demand_free(dims, range(-spatial, 0), "window", "pooling or resampling")
    parts = [dims[:-spatial] + part[-spatial:] for part in state.parts(node)]
    return parts[0] if is_tensor(node) else parts
