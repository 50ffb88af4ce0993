"""Rules of the axes analysis: reductions, norms and scans."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.ir.analyses.axes_registry import rule
from graphwright.ir.analyses.axes_rules import pointwise
from graphwright.ir.analyses.axes_state import Label, Mixes, State, Value, has, is_tensor, normalise_dim


def _axes_of(a: dict[str, Any], rank: int) -> list[int]:
    d = a.get("dim")
    if d is None or d == []:
        return list(range(rank))
    return sorted({normalise_dim(i, rank) for i in ([d] if isinstance(d, int) else d)})


@rule(
    "mean", "sum", "amax", "amin", "any", "all", "argmax", "argmin", "max", "min", "logsumexp", "prod", "var", "std",
    "var_mean", "std_mean", "norm", "linalg_vector_norm", "median", "nansum", "aminmax",
)  # fmt: skip
def _reduce(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    if is_tensor(a.get("other")):
        return pointwise(state, node, a)
    dims = state.dims(a["self"])
    where = _axes_of(a, len(dims))
    # Sums and maxima over keys are part of a softmax that is written out; whether they stay there is checked at the end.
    state.demand_free(dims, where, "reduce", "reduces", allowed=(Label.KEY,))
    keep = a.get("keepdim", False)
    result = tuple(() if d in where else dim for d, dim in enumerate(dims) if keep or d not in where)
    value = node.meta["val"]
    return result if isinstance(value, torch.Tensor) else [result] * len(value)


@rule("softmax", "log_softmax", "safe_softmax", "_safe_softmax")
def _softmax(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = state.dims(a["self"])
    state.demand_free(dims, [a["dim"]], "reduce", "softmax", allowed=(Label.KEY,))
    return dims


@rule(
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "_fused_rms_norm",
    "graphwright.rms_norm",
    "graphwright.layer_norm",
    sized=True,
)
def _norm(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = state.dims(node.all_input_nodes[0])
    over = len(a["normalized_shape"]) if "normalized_shape" in a else 1
    state.demand_free(dims, range(-over, 0), "reduce", "normalises")
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return dims
    statistics = dims[:-over] + ((),) * over
    return [dims] + [statistics] * (len(value) - 1)


@rule("topk", "kthvalue", "mode")
def _topk(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims, d = state.dims(a["self"]), a.get("dim", -1)
    state.demand_free(dims, [d], "reduce", "takes the largest")
    d = normalise_dim(d, len(dims))
    return [(*dims[:d], *(part[d : d + 1] if len(part) == len(dims) else ()), *dims[d + 1 :]) for part in state.parts(node)]


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "diff")
def _scan(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims, d = list(state.dims(a["self"])), a["dim"]
    state.demand_free(tuple(dims), [d], "scan", f"{node.target}", allowed=(Label.AGGREGATE,))
    if not isinstance(node.meta["val"], torch.Tensor):
        return [tuple(dims)] * len(node.meta["val"])
    if not has([dims[d]], Label.AGGREGATE):
        dims[d] = state.dim(state.shape(node)[d])
    return tuple(dims)


@rule("flip", "roll", "pad", sized=True)
def _move(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims, shape = list(state.dims(a["self"])), state.shape(node)
    if "pad" in a:
        pairs = [a["pad"][i : i + 2] for i in range(0, len(a["pad"]), 2)]
        where = [len(dims) - 1 - i for i, pair in enumerate(pairs) if any(state.size(n) != 0 for n in pair)]
    else:
        where = [normalise_dim(d, len(dims)) for d in a["dims"]] or list(range(len(dims)))
    state.demand_free(tuple(dims), where, "move", f"{node.target} moves tokens")
    for d in where:
        dims[d] = state.dim(shape[d])
    return tuple(dims)


@rule("tril", "triu")
def _triangle(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = state.dims(a["self"])
    if has(dims[-2:], Label.TOKEN) and not has(dims[-2:], Label.KEY) and a["self"] in state.main:
        raise Mixes("position", "keeps features by the token's position")
    return dims


@rule("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm")
def _batch_norm(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    if a.get("training", False):
        raise Mixes("reduce", "batch normalisation in training takes statistics of the batch")
    dims = state.dims(a["input"])
    value = node.meta["val"]
    return dims if isinstance(value, torch.Tensor) else [dims, *state.parts(node)[1:]]


@rule("group_norm", "instance_norm")
def _group_norm(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = state.dims(a["input"])
    state.demand_free(dims, range(1, len(dims)), "reduce", "normalises groups")
    return dims
