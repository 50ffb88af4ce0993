"""Rules of the axes analysis: reading and writing by indices, and the sorting of rows by experts."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from graphwright.ir.analyses.axes_registry import op_name, rule
from graphwright.ir.analyses.axes_state import (
    Dim,
    Dims,
    Factor,
    Label,
    Mixes,
    State,
    Value,
    has,
    is_tensor,
    labels,
    normalise_dim,
)


@rule("embedding")
def _embedding(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    state.demand_free(state.dims(a["weight"]), [0, 1], "gather", "looks up in activations")
    return (*state.dims(a["indices"]), state.dim(state.shape(node)[-1]))


@rule("one_hot")
def _one_hot(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    return (*state.dims(a["self"]), state.dim(state.shape(node)[-1]))


@rule("gather", "take_along_dim")
def _gather(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims, index = state.dims(a["self"]), a["index"] if "index" in a else a["indices"]
    if a["dim"] is None:
        raise Mixes("gather", "gathers from all dimensions")
    state.demand_free(dims, [a["dim"]], "gather", "gathers")
    d = normalise_dim(a["dim"], len(dims))
    chosen = state.dims(index)
    return state.broadcast([(None, (*dims[:d], (), *dims[d + 1 :])), (None, chosen)], len(chosen))


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = state.dims(a["self"])
    d = normalise_dim(a["dim"], len(dims))
    operands: list[tuple[fx.Node | None, Dims]] = [(None, dims)]
    for name in ("index", "src"):
        other: Any = a.get(name)
        if is_tensor(other):
            there = state.dims(other)
            state.demand_free(there, [d], "gather", "scatters")
            operands.append((None, (*there[:d], (), *there[d + 1 :])))
    state.demand_free(dims, [d], "gather", "scatters")
    return state.broadcast(operands, len(dims))


@rule("index_select")
def _index_select(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = state.dims(a["self"])
    d = normalise_dim(a["dim"], len(dims))
    state.demand_free(dims, [d], "gather", "gathers")
    return (*dims[:d], *state.dims(a["index"]), *dims[d + 1 :])


@rule("view_as_complex")
def _as_complex(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = state.dims(a["self"])
    state.demand_free(dims, [-1], "reduce", "pairs numbers")
    return dims[:-1]


@rule("view_as_real")
def _as_real(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    return (*state.dims(a["self"]), state.dim(sympy.Integer(2)))


@rule("sort", "argsort")
def _sort(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims = state.dims(a["self"])
    d = normalise_dim(a.get("dim", -1), len(dims))
    if labels(dims[d]):
        if len(dims) != 1 or has(dims, Label.KEY, Label.AGGREGATE, Label.ROWS):
            raise Mixes("sort", "sorts tokens")
        # The rows of a batch, put in the order of their experts: an index into them is a permutation.
        state.permutations[node] = dims[d]
        dims = ((Factor(Label.ROWS, state.shape(a["self"])[0]),),)
    return dims if isinstance(node.meta["val"], torch.Tensor) else [dims, dims]


@rule("histc", "bincount")
def _count(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    if has(state.dims(a["self"]), *Label):
        return tuple((Factor(Label.AGGREGATE, size),) for size in state.shape(node))
    return state.by_shape(node)


@rule("transformers.grouped_mm_fallback", "_grouped_mm", "transformers.grouped_mm")
def _grouped_mm(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    x, _, offsets = list(a.values())[:3]
    rows = state.dims(x)
    if len(rows) != 2 or labels(rows[0]) != (Label.ROWS,) or not is_tensor(offsets):
        raise Mixes("sort", "a grouped product over rows that no sort put in order")
    state.demand_free(rows, [1], "reduce", "the product contracts")
    return (rows[0], state.dim(state.shape(node)[-1]))


def _permutation_behind(state: State, index: fx.Node) -> Dim | None:
    """Return the rows that an index permutes: of a sort, or of a sort divided by how many copies there are of each."""
    if index in state.permutations:
        return state.permutations[index]
    if index.op == "call_function" and op_name(index) in ("floor_divide", "div"):
        source, copies = index.args[0], index.args[1]
        rows = state.permutations.get(source) if isinstance(source, fx.Node) else None
        floors = op_name(index) == "floor_divide" or index.kwargs.get("rounding_mode") == "floor"
        if rows and floors and isinstance(copies, int) and rows[-1] == Factor(None, sympy.Integer(copies)):
            return rows[:-1]
    return None


@rule("index", "_unsafe_index")
def _index(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    dims, indices = state.dims(a["self"]), list(a["indices"])
    indices += [None] * (len(dims) - len(indices))
    used = [d for d, index in enumerate(indices) if index is not None]
    if any(indices[d].meta["val"].dtype == torch.bool for d in used):
        raise Mixes("gather", "takes elements by a mask")
    chosen = state.broadcast([(None, state.dims(indices[d])) for d in used], max(indices[d].meta["val"].dim() for d in used))
    looked_up = [dim for d in used if labels(dim := dims[d])]
    if looked_up:
        if len(used) != 1:
            raise Mixes("gather", f"gathers from {len(looked_up)} labelled axes by indices")
        index, rows = indices[used[0]], dims[used[0]]
        if index in state.inverses and labels(rows) == (Label.ROWS,):
            chosen = (state.inverses[index],)
        elif _permutation_behind(state, index) != rows:
            raise Mixes("gather", "gathers tokens by an index")
    first, last = used[0], used[-1]
    if used != list(range(first, last + 1)):
        return (*chosen, *(dim for d, dim in enumerate(dims) if d not in used))
    return (*dims[:first], *chosen, *dims[last + 1 :])


@rule("index_put")
def _index_put(state: State, node: fx.Node, a: dict[str, Any]) -> Value:
    indices, values = a["indices"], a["values"]
    counts = isinstance(values, fx.Node) and "arange" in str(values.target) and len(values.args) == 1
    if len(indices) == 1 and indices[0] in state.permutations and counts:
        state.inverses[node] = state.permutations[indices[0]]
        return (state.permutations[indices[0]],)
    raise Mixes("gather", "writes at places that an index gives")
