"""The attentions of a decoder: that each is causal, and what hides keys from a query at any position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.axes import Axes, Label
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.analyses.index import Expr
from graphwright.ir.analyses.index_functions import IndexFunctionError
from graphwright.ir.analyses.index_logic import substitute
from graphwright.ir.analyses.masks import HIDDEN, is_causal_at
from graphwright.ir.ops.attention import SIZES, operand_name, operand_type
from graphwright.ir.program import Program, calls

from .positions import Positions
from .refusing import NotCausal

FACTS = ix.NO_FACTS.known("b", ix.ZERO, None).known("h", ix.ZERO, None).known("q", ix.ZERO, None).known("k", ix.ZERO, None)


@dataclass(frozen=True)
class Site:
    """An attention that can read its keys and values from a cache.

    Args:
        node: the attention.
        predicate: text over b, h, q, k, the positions counted from the first token; "" for all keys up to the query's own.
        bias: likewise; "" for none.
        operands: what the texts read; nothing of it depends on the call.
    """

    node: fx.Node
    predicate: str
    bias: str
    operands: tuple[fx.Node, ...]


def find_sites(program: Program, axes: Axes, positions: Positions) -> list[Site]:
    """Return the attentions of a program in order.

    Raises:
        NotCausal: one of them is not causal, depends on the number of tokens, or is not over the tokens of the model.
    """
    return [_site(axes, positions, node) for node in calls(program.graph, dialect.attention)]


def _site(axes: Axes, positions: Positions, node: fx.Node) -> Site:
    given = arguments(node)
    for name in "qkv":
        found = [tuple(f.label for f in dim if f.label is not None) for dim in axes.factors.get(given[name], ())]
        if found != [(Label.BATCH,), (), (Label.TOKEN,), ()]:
            raise NotCausal(node, f"{name} of the attention is not [batch, heads, tokens, features] of the model's tokens")
    types = {operand_name(at): operand_type(o.meta["val"].dtype) for at, o in enumerate(given["operands"])}
    read = _Reads(positions, given["operands"])
    predicate = ix.parse(given["predicate"], types, FACTS) if given["predicate"] else ix.TRUE
    bias = ix.parse(given["bias"], types, FACTS) if given["bias"] else None
    predicate = substitute(predicate, {}, FACTS, read)
    if bias is not None:
        predicate, bias = _without_hidden(predicate, substitute(bias, {}, FACTS, read))
    for e in (predicate, *([] if bias is None else [bias])):
        if e.free & set(SIZES[2:]):
            raise NotCausal(node, f"what a query sees depends on the number of tokens: {e}")
        if ix.contains(e, "sum"):
            raise NotCausal(node, f"what a query sees is a sum over tokens: {e}")
    if not is_causal_at(predicate, ix.ZERO, FACTS):
        raise NotCausal(node, f"the attention is not causal: {predicate}")
    for operand in read.kept:
        if operand in axes.main or any(axes.roles.get(operand, ())):
            raise NotCausal(node, f"its mask or bias reads %{operand.name}, which differs from token to token")
    return Site(node, "" if predicate is ix.TRUE else str(predicate), "" if bias is None else str(bias), tuple(read.kept))


class _Reads:
    """What stands for a load of an operand: an expression where it has one, else a load of what has to be kept."""

    def __init__(self, positions: Positions, operands: list[fx.Node]) -> None:
        self._positions, self._operands = positions, operands
        self.kept: list[fx.Node] = []

    def __call__(self, e: Expr, indices: tuple[Expr, ...]) -> Expr:
        node = self._operands[int(str(e.value).removeprefix("in"))]
        try:
            value = self._positions.resolve(node, indices)
        except IndexFunctionError:
            return self._keep(node, indices, e)
        reads = self._positions.loads(value)
        if not reads:
            return value
        if all(read.op == "get_attr" for read in reads.values()):
            return substitute(value, {}, FACTS, lambda load, at: self._keep(reads[str(load.value)], at, load))
        return self._keep(node, indices, e)

    def _keep(self, node: fx.Node, indices: tuple[Expr, ...], e: Expr) -> Expr:
        if node not in self.kept:
            self.kept.append(node)
        return ix.load(operand_name(self.kept.index(node)), indices, e.type)


def _without_hidden(predicate: Expr, bias: Expr) -> tuple[Expr, Expr | None]:
    """Return the predicate and the bias with keys hidden by the predicate instead of by a large negative number.

    It is the same wherever a query sees its own key, which no number hides then.
    """
    while bias.kind == "where":
        condition, value, other = bias.operands
        if _hides(value):
            condition, value, other = ix.not_(condition), other, value
        own = substitute(condition, {"k": ix.var("q")}, FACTS)
        if not _hides(other) or own is not ix.TRUE:
            break
        predicate, bias = ix.and_(predicate, condition, facts=FACTS), value
    return predicate, None if bias.kind == "const" and bias.value == 0 else bias


def _hides(e: Any) -> bool:
    return bool(e.kind == "const" and e.value <= max(HIDDEN, torch.finfo(torch.float16).min))
