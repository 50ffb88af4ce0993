"""Where the axes analysis starts: which dimensions of which inputs, or of which inner nodes, are batch and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphwright.ir.analyses.axes_products import ATTENTION, FUSED_ATTENTION
from graphwright.ir.analyses.axes_registry import CONTENT_FREE, POINTWISE, RULES, arguments, op_name
from graphwright.ir.analyses.axes_state import Dims, Factor, Label, Mixes, State, has, is_tensor

_SAME_ELEMENTS = ("view", "to", "contiguous", "alias", "clone", "unsqueeze", "squeeze", "slice", "detach", "type_as")
_LIFTED = ("p_", "b_", "c_")
"""How torch.export begins the names of parameters, buffers and constants that it makes placeholders."""


@dataclass(frozen=True)
class Seeds:
    """The labelled dimensions of inputs.

    Args:
        batch: batch dimension by input.
        tokens: token dimension by input that holds tokens.
        index: token dimension by input that only says where tokens are.
    """

    batch: dict[fx.Node, int]
    tokens: dict[fx.Node, int]
    index: dict[fx.Node, int]


def is_constant(node: fx.Node, graph: fx.Graph) -> bool:
    """Return whether a node is a weight, a buffer or another constant of the model.

    Placeholders are told from inputs by their names where `torch.export` gave them, and by having no symbolic size.
    """
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    return str(node.target).startswith(_LIFTED) and not _symbols(node)


def _symbols(node: fx.Node) -> list[sympy.Expr | None]:
    """Return per dimension its size if that is a symbol, else None."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return []
    shape: list[Any] = list(value.shape)
    found = [n.node.expr if isinstance(n, torch.SymInt) else None for n in shape]
    return found if any(expression is not None for expression in found) else []


def guess_seeds(
    graph: fx.Graph,
    *,
    batch: Mapping[fx.Node, int] | None = None,
    tokens: Mapping[fx.Node, int] | None = None,
    index: Mapping[fx.Node, int] | None = None,
) -> Seeds:
    """Return the seeds that were given, and a guess at those that were not (None).

    Of the inputs with a symbolic dimension 1, those hold tokens that are looked up in an embedding as they are, or that are
    floating with three dimensions. Where they differ in length, as the two inputs of an encoder and a decoder do, those are
    taken whose length the graph's first output has.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder" and _symbols(n)]
    if tokens is None:
        candidates = {n: s[1] for n in inputs if len(s := _symbols(n)) > 1 and s[1] is not None}
        direct = {n: s for n, s in candidates.items() if _holds_tokens(n)} or candidates
        lengths = list(dict.fromkeys(direct.values()))
        outputs = [n for n in graph.output_node().all_input_nodes if is_tensor(n)]
        seen = _symbols(outputs[0]) if outputs else []
        length = next((s for s in lengths if s in seen), lengths[0] if lengths else None)
        tokens = {n: 1 for n, s in direct.items() if s == length}
    if index is None:
        lengths = [_symbols(n)[d] for n, d in tokens.items() if _symbols(n)]
        index = {n: s.index(lengths[0]) for n in inputs if n not in tokens and lengths and lengths[0] in (s := _symbols(n))}
    if batch is None:
        batch = {n: 0 for n in inputs if _symbols(n)[0] is not None and {**tokens, **index}.get(n) != 0}
    return Seeds(dict(batch), dict(tokens), dict(index))


def _holds_tokens(node: fx.Node) -> bool:
    value = node.meta["val"]
    if value.dtype.is_floating_point:
        return bool(value.dim() == 3)
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.op != "call_function" or user in seen:
                continue
            seen.add(user)
            if op_name(user) == "embedding" and user.args[1] in seen:
                return True
            if op_name(user) in _SAME_ELEMENTS:
                pending.append(user)
    return False


def token_origins(graph: fx.Graph, state: State) -> dict[fx.Node, int]:
    """Return the nodes where the token axis of the attention operations starts, each with the dimension.

    The query axis of each attention is followed back through the operations that keep it - by asking each operation's rule
    which dimension of which operand it would come from - up to one that makes it: an input, a join with class tokens, a
    flattening of the grid of patches.
    """
    origins: dict[fx.Node, int] = {}
    live = _live(graph)
    followed: set[tuple[fx.Node, int]] = set()
    length: sympy.Expr | None = None
    for node in graph.nodes:
        start = _query_axis(node)
        if start is None:
            continue
        current, d = start
        if length is None:
            length = state.shape(current)[d]
        if state.shape(current)[d] != length:
            continue
        while (current, d) not in followed:
            followed.add((current, d))
            step = _step_back(current, d, state, live)
            if step is None:
                # Behind the first attention the stream only adds to what is there; a new origin there is a sign of an
                # operation that cannot be followed, not of new tokens.
                if not origins:
                    origins[current] = d
                break
            current, d = step
    return origins


def _query_axis(node: fx.Node) -> tuple[fx.Node, int] | None:
    if node.op != "call_function":
        return None
    if op_name(node) in (*ATTENTION, *FUSED_ATTENTION):
        query = next(iter(arguments(node).values()))
        return query, query.meta["val"].dim() - 2
    if op_name(node) == "softmax" and node.meta["val"].dim() > 2 and arguments(node)["dim"] in (-1, node.meta["val"].dim() - 1):
        current = node
        while len(users := [n for n in current.users if n.meta.get("val") is not None]) == 1:
            (user,) = users
            if op_name(user) in ("matmul", "bmm") and user.args[0] is current:
                return node, node.meta["val"].dim() - 2
            if op_name(user) not in POINTWISE | {"view", "expand", "slice"}:
                return None
            current = user
    return None


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on what is in an input."""
    live: set[fx.Node] = set()
    for node in graph.nodes:
        is_input = node.op == "placeholder" and not is_constant(node, graph)
        reads = node.op == "call_function" and op_name(node) not in CONTENT_FREE
        if is_input or (reads and any(n in live for n in node.all_input_nodes)):
            live.add(node)
    return live


def _step_back(node: fx.Node, d: int, state: State, live: set[fx.Node]) -> tuple[fx.Node, int] | None:
    """Return the operand and its dimension that a dimension of a node comes from, or None if the node makes it."""
    function = RULES.get(op_name(node)) if node.op == "call_function" else None
    if function is None:
        return None
    size = state.shape(node)[d]
    for operand in node.all_input_nodes:
        if operand not in live:
            continue
        if op_name(node) == "getitem":
            return _behind_getitem(node, operand, d, state)
        if not is_tensor(operand):
            continue
        for j, n in enumerate(state.shape(operand)):
            if n == size and n != 1:
                trial = _trial(node, {operand: j}, state)
                if trial is not None and has([trial[0][d]], Label.TOKEN):
                    return operand, j
    return None


def _behind_getitem(node: fx.Node, split: fx.Node, d: int, state: State) -> tuple[fx.Node, int] | None:
    for operand in split.all_input_nodes:
        for j, n in enumerate(state.shape(operand) if is_tensor(operand) else []):
            trial = _trial(split, {operand: j}, state) if n == state.shape(node)[d] else None
            position = node.args[1]
            if trial is not None and isinstance(position, int) and has([trial[position][d]], Label.TOKEN):
                return operand, j
    return None


def _trial(node: fx.Node, labelled: dict[fx.Node, int], state: State) -> list[Dims] | None:
    """Return what a node's rule makes of operands of which one dimension each is labelled; None if it mixes them."""
    trial = State({}, state.same, None)
    for operand in node.all_input_nodes:
        if is_tensor(operand):
            dims = list(trial.dims(operand))
            if operand in labelled:
                d = labelled[operand]
                dims[d] = (Factor(Label.TOKEN, trial.shape(operand)[d]),)
            trial.values[operand] = tuple(dims)
    try:
        result = RULES[op_name(node)](trial, node, arguments(node))
    except Mixes:
        return None
    return result if isinstance(result, list) else [result]
