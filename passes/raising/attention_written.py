"""Attention that is written out: a product, what is done to the scores, a softmax, another product."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphwright.ir.printer import operation_name
from graphwright.ir.program import Program
from graphwright.passes.cleanup.redundant_casts import CAST

from .matching import ADD, DIV, MUL, SUB, is_call, number, only_user, with_number, without_casts

aten = torch.ops.aten

PRODUCT = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)

RESHAPE = (aten.reshape.default, aten.view.default)

HIDDEN = -1e30
"""What this or less is filled in hides a key."""

LONGEST = 16
"""How many steps from the softmax back to the product are looked at."""


@dataclass(frozen=True)
class Mask:
    """Something added to the scores, or that hides some.

    Args:
        node: its tensor.
        rank: the dimensions of the scores that it broadcasts to: 4, or 3 where batch and heads are one.
        hides: whether it is true where keys are hidden, not where they are visible.
        exact: whether what is hidden is so by minus infinity; else it gets a large negative score.
    """

    node: fx.Node
    rank: int = 4
    hides: bool = False
    exact: bool = True


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
        masks: what is added to the scores and what hides some of them.
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
    masks: tuple[Mask, ...] = ()
    sink: fx.Node | None = None
    is_causal: bool = False
    grouped: bool = False
    k_transposed: bool = False


def written_attention(program: Program, softmax: fx.Node) -> Written | str | None:
    """Return the attention around a softmax; a reason if it is one that cannot be taken; None if it is something else."""
    source: Any = softmax.args[0]
    rank = source.meta["val"].dim()
    if rank not in (3, 4) or int(softmax.args[1]) % rank != rank - 1 or not _leads_to_product(source):  # type: ignore[arg-type]
        return None
    scores = _Scores(program, softmax)
    reason = scores.walk()
    if reason is not None:
        return reason
    end = _product_with_values(program, softmax, scores.sink is not None)
    if isinstance(end, str):
        return end
    values = end.args[1]
    assert isinstance(values, fx.Node)
    found = replace(scores.found(), end=end, v=without_casts(values))
    if found.q.meta["val"].dim() == 4:
        return _with_keys(found)
    unflattened = _unflattened(program, _with_keys(found))
    if unflattened is not None:
        return unflattened
    if any(mask.rank == 4 for mask in found.masks) or found.sink is not None:
        return "batch and heads are one dimension in the products, but not in the masks"
    return _with_keys(found)


class _Scores:
    """The walk from the softmax's input back to the product of queries and keys."""

    def __init__(self, program: Program, softmax: fx.Node) -> None:
        self.program = program
        self.node = softmax
        self.scale = 1.0
        self.softcap = 0.0
        self.masks: list[Mask] = []
        self.sink: fx.Node | None = None
        self.floored = False
        """Whether minus infinity is made a large negative number later."""

    def walk(self) -> str | None:
        """Go to the product; return why that is not possible, None if it was."""
        inner: Any = self.node.args[0]
        for _ in range(LONGEST):
            others = [user for user in inner.users if user is not self.node]
            if any(not _is_largest(user, inner) for user in others):
                return "the scores are used elsewhere"
            self.node = inner
            if is_call(self.node, *PRODUCT):
                return self._product()
            inner = self._step(self.node)
            if inner is None:
                return f"%{self.node.name}, {operation_name(self.node.target)} of scores, is not understood"
        return "too much is done to the scores"

    def found(self) -> Written:
        """Return the attention so far: queries, keys and what is done to the scores."""
        at = 1 if is_call(self.node, aten.baddbmm.default) else 0
        q, by = self._unscaled(self.node.args[at])
        k, of = self._unscaled(self.node.args[at + 1])
        self.scale *= by * of
        masks = tuple(reversed(self.masks))
        return Written(self.node, q, k, k, self.scale, self.softcap, masks, self.sink, k_transposed=True)

    def _unscaled(self, node: Any) -> tuple[fx.Node, float]:
        """Return queries or keys and the number that they are multiplied by."""
        node, factor = without_casts(node), 1.0
        if (scaled := with_number(self.program, node, *MUL)) is not None:
            inner, factor = scaled
        elif is_call(node, *DIV) and (divisor := number(self.program, node.args[1])):
            inner, factor = node.args[0], 1.0 / divisor
        else:
            return node, factor
        return (without_casts(inner), factor) if inner.meta["val"].dtype == node.meta["val"].dtype else (node, 1.0)

    def _product(self) -> str | None:
        if is_call(self.node, aten.baddbmm.default):
            added, beta, alpha = self.node.args[0], self.node.kwargs.get("beta", 1), self.node.kwargs.get("alpha", 1)
            if self.scale != 1.0 or self.softcap or (beta != 1 and beta != 0):
                return "scores are scaled after something was added to them"
            if beta == 1:
                assert isinstance(added, fx.Node)
                self.masks.append(Mask(added, 3, exact=not self.floored))
            self.scale = float(alpha)  # type: ignore[arg-type]
        operands = [node for node in self.node.all_input_nodes if node.meta["val"].dim() in (3, 4)]
        return None if len(operands) >= 2 else "queries or keys have another number of dimensions"

    def _step(self, node: fx.Node) -> fx.Node | None:
        """Return the scores before what `node` does to them, which is noted; None if it is not understood."""
        inner: Any = None
        rank = node.meta["val"].dim()
        if is_call(node, CAST):
            inner = node.args[0]
        elif is_call(node, *RESHAPE):
            inner = node.args[0] if _keeps_scores(self.program, node) else None
        elif is_call(node, *SUB) and not node.kwargs and _is_largest(node.args[1], node.args[0]):
            # A softmax does not change when all its scores do.
            inner = node.args[0]
        elif is_call(node, aten.cat.default) and self.sink is None and not self.masks:
            inner, self.sink = _with_sink(node)
        elif (found := with_number(self.program, node, *MUL)) is not None:
            inner = self._scaled(*found)
        elif is_call(node, *DIV) and (divisor := number(self.program, node.args[1])):
            inner = node.args[0]
            self.scale /= divisor
        elif is_call(node, aten.tanh.default) and self.softcap and self.scale == 1.0:
            # The cap's own division comes next; the operation divides again.
            inner, self.scale = node.args[0], self.softcap
        elif self.scale != 1.0 or self.softcap:
            # What is added is not scaled and capped with the scores.
            return None
        elif is_call(node, *ADD) and not node.kwargs:
            inner, mask = _core_and_mask(node)
            if mask is not None:
                self.masks.append(Mask(mask, rank, exact=not self.floored))
        elif is_call(node, aten.where.self, aten.where.ScalarOther) and self._hides(node.args[2]):
            inner = node.args[1]
            self._hide(node.args[0], rank, node.args[2])
        elif is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor) and self._hides(node.args[2]):
            inner = node.args[0]
            self._hide(node.args[1], rank, node.args[2], hides=True)
        elif is_call(node, aten.maximum.default, aten.max.other) and self._hides(node.args[1]):
            inner, self.floored = node.args[0], True
        return inner if isinstance(inner, fx.Node) else None

    def _hides(self, value: Any) -> bool:
        filled = number(self.program, value)
        return filled is not None and filled <= HIDDEN

    def _hide(self, mask: Any, rank: int, value: Any, hides: bool = False) -> None:
        exact = number(self.program, value) == float("-inf") and not self.floored
        self.masks.append(Mask(mask, rank, hides, exact))

    def _scaled(self, inner: fx.Node, factor: float) -> fx.Node | None:
        if not is_call(inner, aten.tanh.default):
            self.scale *= factor
        elif self.softcap or self.scale != 1.0:
            return None
        else:
            self.softcap = factor
        return inner


def _product_with_values(program: Program, softmax: fx.Node, has_sink: bool) -> fx.Node | str:
    """Return the product of the attention weights with the values, or why there is none."""
    weights = softmax
    while True:
        user = only_user(weights)
        if user is None:
            return "the attention weights are used elsewhere"
        if is_call(user, CAST) or (is_call(user, *RESHAPE) and _keeps_scores(program, user)):
            weights = user
        elif is_call(user, aten.slice.Tensor) and has_sink and _cuts_column(program, user):
            weights, has_sink = user, False
        elif is_call(user, aten.matmul.default, aten.bmm.default) and user.args[0] is weights and not has_sink:
            return user
        else:
            return f"the attention weights go to %{user.name}, {operation_name(user.target)}, before they meet the values"


def _with_keys(found: Written) -> Written:
    """Return the attention with its keys as they lay before tokens and features were exchanged, where only that was done."""
    order = [0, 2, 1] if found.k.meta["val"].dim() == 3 else [0, 1, 3, 2]
    if found.k_transposed and is_call(found.k, aten.permute.default) and list(found.k.args[1]) == order:  # type: ignore[arg-type]
        source = without_casts(found.k.args[0])
        return replace(found, k=source, k_transposed=False)
    return found


def _unflattened(program: Program, found: Written) -> Written | None:
    """Return the attention with batch and heads apart, where they were made one dimension for the products."""
    values = []
    for node in (found.q, found.k, found.v):
        source: Any = node.args[0] if is_call(node, *RESHAPE) else None
        if not isinstance(source, fx.Node) or source.meta["val"].dim() != 4 or not _keeps_scores(program, node):
            return None
        values.append(without_casts(source))
    end = only_user(found.end)
    if found.k_transposed or not is_call(end, *RESHAPE):
        return None
    assert end is not None
    expected = (*program.shape(values[0])[:3], program.shape(values[2])[3])
    if program.shape(end) != expected:
        return None
    return replace(found, end=end, q=values[0], k=values[1], v=values[2])


def _keeps_scores(program: Program, node: fx.Node) -> bool:
    """Return whether a reshape only makes batch and heads one dimension, or two of it."""
    source: Any = node.args[0]
    mine, other = program.shape(node), program.shape(source)
    if sorted((len(mine), len(other))) != [3, 4] or mine[-2:] != other[-2:]:
        return False
    flat, split = (mine, other) if len(mine) == 3 else (other, mine)
    return bool(flat[0] == split[0] * split[1])


def _is_largest(node: Any, scores: Any) -> bool:
    """Return whether a node is the largest of the scores, or leads to it alone."""
    if is_call(node, aten.amax.default, aten.max.dim):
        return node.args[0] is scores
    return is_call(node, operator.getitem) and _is_largest(node.args[0], scores) and node.args[1] == 0


def _core_and_mask(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the operand of a sum that comes from a product of queries and keys, and the other."""
    for core, mask in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        same = isinstance(core, fx.Node) and core.meta["val"].dim() == node.meta["val"].dim()
        if same and isinstance(core, fx.Node) and isinstance(mask, fx.Node) and _leads_to_product(core):
            return core, mask
    return None, None


def _leads_to_product(node: Any) -> bool:
    """Return whether a value looks like scores: a product of two tensors is at its root."""
    steps: tuple[Any, ...] = (
        CAST,
        *MUL,
        *DIV,
        *ADD,
        *SUB,
        *RESHAPE,
        aten.tanh.default,
        aten.where.self,
        aten.where.ScalarOther,
    )
    steps = (*steps, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.maximum.default, aten.max.other, aten.cat.default)
    for _ in range(LONGEST):
        if is_call(node, *PRODUCT):
            return True
        if not is_call(node, *steps):
            return False
        if is_call(node, *ADD):
            inputs = [n for n in node.args if isinstance(n, fx.Node)]
            return any(_leads_to_product(n) for n in inputs if n.meta["val"].dim() == node.meta["val"].dim())
        if is_call(node, aten.cat.default):
            node = node.args[0][0]
        elif is_call(node, *MUL) and not isinstance(node.args[0], fx.Node):
            node = node.args[1]
        else:
            node = node.args[1 if is_call(node, aten.where.self, aten.where.ScalarOther) else 0]
    return False


def _with_sink(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """Return scores and the values [H] of a column that is put behind them."""
    parts: Any = node.args[0]
    if node.meta["val"].dim() != 4 or len(parts) != 2 or len(node.args) < 2 or int(node.args[1]) % 4 != 3:  # type: ignore[arg-type]
        return None, None
    scores, column = parts
    while is_call(column, aten.expand.default, CAST):
        column = column.args[0]
    if not is_call(column, *RESHAPE):
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
