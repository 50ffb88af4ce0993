"""Rules of the axes analysis: elementwise operations, views, slices and joins."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from graphwright.ir.analyses.axes_registry import POINTWISE, rule
from graphwright.ir.analyses.axes_state import (
    Dim,
    Dims,
    Factor,
    Label,
    Mixes,
    State,
    Value,
    is_tensor,
    labels,
    normalise_dim,
)

_ELEMENTWISE = """
    abs add addcdiv addcmul alias atan atan2 bernoulli bitwise_and bitwise_left_shift bitwise_not bitwise_or
    bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clip clone complex contiguous copy cos cosh
    deg2rad detach device_put div divide dropout elu empty_like eq erf erfc exp exp2 expand_as expm1 fill floor
    floor_divide fmod frac full_like ge gelu greater greater_equal gt hardsigmoid hardswish hardtanh imag isfinite isinf
    isnan le leaky_relu lerp less less_equal lift_fresh_copy log log10 log1p log2 log_sigmoid logical_and logical_not
    logical_or logical_xor lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative not_equal
    ones_like polar pow real reciprocal relu relu6 remainder round rsqrt rsub selu sigmoid sign silu sin sinh softplus
    softsign sqrt square sub subtract tan tanh threshold to to_dtype true_divide trunc type_as where xlogy zeros_like
"""


@rule(*(_ELEMENTWISE.split()))
def pointwise(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    """Return the dimensions of an elementwise result."""
    operands: list[tuple[fx.Node | None, Dims]] = [(n, state.dims(n)) for n in node.all_input_nodes if is_tensor(n)]
    return state.broadcast(operands, len(state.shape(node)))


POINTWISE.update(_ELEMENTWISE.split())


@rule("graphwright.glu")
def _glu(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    return pointwise(state, node, a)


@rule("graphwright.rotary")
def _rotary(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    state.demand_free(state.dims(node.all_input_nodes[0]), [-1], "reduce", "rotary embedding")
    return pointwise(state, node, a)


@rule("getitem")
def _getitem(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    source, index = node.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(index, int)  # noqa: PT018 - a graph fact, not input
    value = state.values[source]
    if source in state.permutations and index == 1:
        state.permutations[node] = state.permutations[source]
    return value[index] if isinstance(value, list) else value[1:]


@rule("view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_dtype", sized=True)
def _view(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    return state.regroup(state.dims(a["self"]), state.shape(node))


@rule("transpose")
def _transpose(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = list(state.dims(a["self"]))
    i, j = a.get("dim0", a.get("axis0")), a.get("dim1", a.get("axis1"))
    assert i is not None and j is not None  # noqa: PT018
    dims[i], dims[j] = dims[j], dims[i]
    return tuple(dims)


@rule("t", "numpy_T", "mT")
def _reverse(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = state.dims(a["self"])
    return (*dims[:-2], *dims[-2:][::-1])


@rule("permute")
def _permute(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = state.dims(a["self"])
    return tuple(dims[d] for d in a["dims"])


@rule("movedim")
def _movedim(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = state.dims(a["self"])
    source, destination = ([v] if isinstance(v, int) else list(v) for v in (a["source"], a["destination"]))
    source, destination = ([normalise_dim(d, len(dims)) for d in v] for v in (source, destination))
    order = [d for d in range(len(dims)) if d not in source]
    for to, frm in sorted(zip(destination, source, strict=True)):
        order.insert(to, frm)
    return tuple(dims[d] for d in order)


@rule("expand", "broadcast_to", sized=True)
def _expand(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims, shape = state.dims(a["self"]), state.shape(node)
    padded = ((),) * (len(shape) - len(dims)) + dims
    return tuple(dim or state.dim(size) for dim, size in zip(padded, shape, strict=True))


@rule("repeat", sized=True)
def _repeat(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims, times = state.dims(a["self"]), [state.size(n) for n in a["repeats"]]
    padded = ((),) * (len(times) - len(dims)) + dims
    return tuple(state.dim(n) + dim for n, dim in zip(times, padded, strict=True))


@rule("repeat_interleave", sized=True)
def _repeat_interleave(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims, d = list(state.dims(a["self"])), a.get("dim")
    if d is None or (isinstance(a["repeats"], fx.Node) and is_tensor(a["repeats"])):
        raise Mixes("view", "repeat_interleave over all dimensions or by a tensor")
    dims[d] = dims[d] + state.dim(state.size(a["repeats"]))
    return tuple(dims)


def _is_full(state: State, a: dict[str, Any], size: sympy.Expr) -> bool:
    start, end, step = a.get("start"), a.get("end"), a.get("step", 1)
    if step != 1 or (start is not None and state.size(start) != 0):
        return False
    return end is None or (isinstance(end, int) and end >= 2**62) or state.size(end) == size


@rule("slice", "narrow", sized=True)
def _slice(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims, d, sizes = list(state.dims(a["self"])), a.get("dim", 0), state.shape(node)
    before = state.shape(a["self"])[d]
    if sizes[d] == before or _is_full(state, a, before):
        return tuple(dims)
    if labels(dims[d]) == (Label.KEY,) and not a.get("start") and sizes[d] == state.token_size:
        # The columns that were joined to the scores, such as sinks, leave them.
        dims[d] = (Factor(Label.KEY, sizes[d]),)
        return tuple(dims)
    state.demand_free(tuple(dims), [d], "select", "a slice")
    if state.holds_length(a.get("start")):
        raise Mixes("length", "a slice starts at a place that depends on the length")
    dims[d] = state.dim(sizes[d])
    return tuple(dims)


@rule("select", sized=True)
def _select(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = list(state.dims(a["self"]))
    d = normalise_dim(a["dim"], len(dims))
    state.demand_free(tuple(dims), [d], "select", "selects one element")
    return tuple(dims[:d] + dims[d + 1 :])


@rule("split", "chunk", "tensor_split", "unbind", sized=True)
def _split(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims, d = state.dims(a["self"]), a.get("dim", 0)
    state.demand_free(dims, [d], "select", "a split")
    d = normalise_dim(d, len(dims))
    parts = state.parts(node)
    unbound = len(parts[0]) < len(dims)
    return [(*dims[:d], *(() if unbound else part[d : d + 1]), *dims[d + 1 :]) for part in parts]


@rule("cat")
def _cat(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    tensors = [t for t in a["tensors"] if t.meta["val"].dim() > 1 or t.meta["val"].numel() != 0]
    every = [state.dims(t) for t in tensors]
    d, shape = normalise_dim(a.get("dim", 0), len(every[0])), state.shape(node)
    if labels(every[0][d]) == (Label.KEY,) and not any(labels(dims[d]) for dims in every[1:]):
        joined: Dim = (Factor(Label.KEY, shape[d]),)
    else:
        for dims in every:
            state.demand_free(dims, [d], "select", "concatenates")
        joined = state.dim(shape[d])
    rest = state.broadcast([(t, (*x[:d], (), *x[d + 1 :])) for t, x in zip(tensors, every, strict=True)], len(shape))
    return (*rest[:d], joined, *rest[d + 1 :])


@rule("stack")
def _stack(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    tensors = a["tensors"]
    rank = len(state.shape(node))
    d = normalise_dim(a.get("dim", 0), rank)
    rest = state.broadcast([(t, state.dims(t)) for t in tensors], rank - 1)
    return (*rest[:d], state.dim(sympy.Integer(len(tensors))), *rest[d:])


@rule("new_empty", "new_zeros", "new_ones", "new_full", "empty", "zeros", "ones", sized=True)
def _factory(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    return state.by_shape(node)
