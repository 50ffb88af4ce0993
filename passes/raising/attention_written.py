"""Attention that is written out: a product, what is done to the scores, a softmax, another product."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from graphwright.ir.program import Program
from graphwright.passes.cleanup.redundant_casts import CAST

from .matching import ADD, DIV, MUL, SUB, is_call, number, only_user, with_number, without_casts

aten = torch.ops.aten

PRODUCT = (aten.matmul.default, aten.bmm.default)

HIDDEN = -1e30
"""What this or less is filled in hides a key."""


@dataclass(frozen=True)
class Written:
    """An attention as a model writes it.

    Args:
        end: the node with the result.
        q: [B, H, S, D] or [B, S, D].
        k: [B, H, T, D] or [B, T, D]; features and tokens exchanged if `k_transposed`.
        v: [B, H, T, Dv] or [B, T, Dv].
        scale: factor of the scores.
        softcap: bound of the scores; 0 for none.
        masks: each with whether it is true where keys are hidden.
        sink: [H], scores that join the softmax.
        is_causal: whether keys after the query are hidden as well.
        grouped: whether keys and values have fewer heads, as they are.
        k_transposed: how k lies.
    """

    end: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float = 1.0
    softcap: float = 0.0
    masks: list[tuple[fx.Node, bool]] = field(default_factory=list)
    sink: fx.Node | None = None
    is_causal: bool = False
    grouped: bool = False
    k_transposed: bool = False

    def keys_untransposed(self) -> fx.Node:
        """Return the keys before tokens and features were exchanged, where only that was done; else `k`."""
        if is_call(self.k, aten.permute.default) and list(self.k.args[1]) == [0, 1, 3, 2]:  # type: ignore[arg-type]
            source: Any = self.k.args[0]
            return source  # type: ignore[no-any-return]
        return self.k


def written_attention(program: Program, softmax: fx.Node) -> Written | str | None:
    """Return the attention around a softmax; a reason if it is one that cannot be taken; None if it is something else."""
    source: Any = softmax.args[0]
    rank = source.meta["val"].dim()
    if rank not in (3, 4) or int(softmax.args[1]) % rank != rank - 1:  # type: ignore[arg-type]
        return None
    scores = _scores(program, source, rank)
    if scores is None or isinstance(scores, str):
        return scores
    weights, has_sink = softmax, scores.sink is not None
    while True:
        user = only_user(weights)
        if user is None:
            return "the attention weights are used elsewhere"
        if is_call(user, CAST):
            weights = user
        elif is_call(user, aten.slice.Tensor) and has_sink and _cuts_column(program, user):
            weights, has_sink = user, False
        elif is_call(user, *PRODUCT) and user.args[0] is weights and not has_sink:
            break
        else:
            return f"the attention weights go to {user.target} before they meet the values"
    values = user.args[1]
    assert isinstance(values, fx.Node)
    end = user
    q, k, values = (without_casts(x) for x in (scores.q, scores.k, values))
    return replace(scores, end=end, q=q, k=k, v=values)


def _scores(program: Program, node: fx.Node, rank: int) -> Written | str | None:
    """Walk from the softmax's input to the product of queries and keys."""
    masks: list[tuple[fx.Node, bool]] = []
    sink: fx.Node | None = None
    scale, softcap = 1.0, 0.0
    while not is_call(node, *PRODUCT):
        inner: Any = None
        if is_call(node, CAST):
            inner = node.args[0]
        elif is_call(node, *SUB) and not node.kwargs and is_call(node.args[1], aten.amax.default, aten.max.dim):
            # A softmax does not change when all its scores do.
            inner = node.args[0] if node.args[1].args[0] is node.args[0] else None  # type: ignore[union-attr]
        elif is_call(node, aten.cat.default) and sink is None and not masks:
            inner, sink = _with_sink(node, rank)
        elif (found := with_number(program, node, *MUL)) is not None:
            if masks and scale != 1.0:
                return None
            inner, factor = found
            capped = _capped(program, inner, factor)
            if capped is not None:
                if softcap or scale != 1.0:
                    return None
                inner, softcap = capped, factor
            else:
                scale *= factor
        elif is_call(node, *DIV) and (divisor := number(program, node.args[1])):
            inner = node.args[0]
            scale /= divisor
        elif is_call(node, *ADD) and not node.kwargs and len(node.args) == 2:
            if scale != 1.0 or softcap:
                return None
            inner, mask = _core_and_mask(program, node)
            if isinstance(mask, fx.Node):
                masks.append((mask, False))
        elif is_call(node, aten.where.self) and (filled := number(program, node.args[2])) is not None and filled <= HIDDEN:
            inner = node.args[1]
            masks.append((node.args[0], False))  # type: ignore[arg-type]
        elif is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            filled = number(program, node.args[2])
            if filled is not None and filled <= HIDDEN:
                inner = node.args[0]
                masks.append((node.args[1], True))  # type: ignore[arg-type]
        elif is_call(node, aten.maximum.default) and (bound := number(program, node.args[1])) is not None and bound <= HIDDEN:
            inner = node.args[0]
        if not isinstance(inner, fx.Node) or inner.meta["val"].dim() != rank:
            return None
        if len(inner.users) > 1 and not is_call(node, *SUB):
            return "the scores are used elsewhere"
        node = inner
    q, k = node.args[:2]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    if q.meta["val"].dim() != rank or k.meta["val"].dim() != rank:
        return None
    q, factor = _scaled(program, q)
    return Written(node, q, k, k, scale * factor, softcap, masks[::-1], sink, k_transposed=True)


def _scaled(program: Program, q: fx.Node) -> tuple[fx.Node, float]:
    found = with_number(program, q, *MUL)
    if found is not None and found[0].meta["val"].dtype == q.meta["val"].dtype:
        return found
    return q, 1.0


def _capped(program: Program, node: fx.Node, cap: float) -> fx.Node | None:
    """Return x of tanh(x / cap)."""
    if not is_call(node, aten.tanh.default):
        return None
    inner: Any = node.args[0]
    if is_call(inner, *DIV) and number(program, inner.args[1]) == cap:
        return inner.args[0]  # type: ignore[no-any-return]
    found = with_number(program, inner, *MUL)
    return found[0] if found is not None and abs(found[1] * cap - 1) < 1e-6 else None


def _core_and_mask(program: Program, node: fx.Node) -> tuple[fx.Node | None, Any]:
    """Return the operand of a sum that comes from a product of queries and keys, and the other."""
    for core, mask in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if isinstance(core, fx.Node) and isinstance(mask, fx.Node) and _leads_to_product(core):
            return core, mask
    return None, None


def _leads_to_product(node: fx.Node) -> bool:
    for _ in range(12):
        if is_call(node, *PRODUCT):
            return True
        if not is_call(node, CAST, *MUL, *DIV, *ADD, aten.tanh.default, aten.where.self, aten.masked_fill.Scalar):
            return False
        candidates = [arg for arg in node.args if isinstance(arg, fx.Node) and arg.meta["val"].dim() == node.meta["val"].dim()]
        at = 1 if is_call(node, aten.where.self) else 0
        if len(candidates) <= at:
            return False
        node = candidates[at]
    return False


def _with_sink(node: fx.Node, rank: int) -> tuple[fx.Node | None, fx.Node | None]:
    """Return scores and the values [H] of a column that is put behind them."""
    parts = node.args[0]
    if rank != 4 or len(parts) != 2 or len(node.args) < 2 or int(node.args[1]) % 4 != 3:  # type: ignore[arg-type]
        return None, None
    scores, column = parts  # type: ignore[misc]
    while is_call(column, aten.expand.default, CAST):
        column = column.args[0]
    if not is_call(column, aten.reshape.default, aten.view.default):
        return None, None
    sink = column.args[0]
    heads = node.meta["val"].shape[1]
    fits = tuple(column.meta["val"].shape) == (1, heads, 1, 1) and tuple(sink.meta["val"].shape) == (heads,)
    return (scores, sink) if fits else (None, None)


def _cuts_column(program: Program, node: fx.Node) -> bool:
    """Return whether a slice leaves out the last column alone."""
    source: Any = node.args[0]
    mine, whole = program.shape(node), program.shape(source)
    begins = len(node.args) > 2 and node.args[2] in (0, None)
    return begins and mine[:-1] == whole[:-1] and whole[-1] - mine[-1] == 1
