"""What attention is made of, however a model writes it: the heads that keys share, and masks as index expressions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.index_text import parse
from graphwright.ir.analyses.masks import MaskForm, analyse_mask
from graphwright.ir.ops.attention import SIZES, operand_name, operand_type
from graphwright.ir.program import Program

from .attention_written import Mask
from .matching import is_call

aten = torch.ops.aten

LARGEST_TABLE = 2**24
"""Elements of the largest weight that is looked at as a mask."""


HIDDEN_SCORE = torch.finfo(torch.float32).min
"""A score beside which every other vanishes."""


@dataclass
class MaskTexts:
    """Masks of one attention as texts.

    Args:
        predicate: which keys are visible; "" for all.
        bias: what is added to the scores; "" for nothing.
        operands: the nodes that the texts read, in0, in1, ...
        exact: whether what is hidden is hidden altogether; else a query that sees nothing sees everything alike.
    """

    predicate: str = ""
    bias: str = ""
    operands: list[fx.Node] = field(default_factory=list)
    exact: bool = True


class Masks:
    """Turns mask nodes of a program into texts; those shared by several attentions once."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: dict[Any, MaskForm] = {}
        self._constants = {
            node: program.weights[str(node.target)]
            for node in program.graph.nodes
            if node.op == "get_attr" and program.weights[str(node.target)].numel() <= LARGEST_TABLE
        }

    def texts(self, masks: tuple[Mask, ...], scores: tuple[Any, ...], *, is_causal: bool = False, rank: int = 4) -> MaskTexts:
        """Return the conjunction of masks.

        Args:
            masks: what is added to the scores and what hides some of them.
            scores: the sizes B, H, S, T.
            is_causal: keys after the query are hidden as well.
            rank: dimensions of the scores.

        Raises:
            MaskError: a mask has no form.
        """
        result = MaskTexts()
        for mask in masks or (None,):
            own = rank if mask is None else mask.rank
            form = self._form(mask.node if mask is not None else None, scores, is_causal, own)
            names = {operand_name(at): self._operand(result, load) for at, load in enumerate(form.loads)}
            predicate = ix.not_(form.predicate) if mask is not None and mask.hides else form.predicate
            apart = own < rank
            result.exact = result.exact and form.exact and (mask is None or mask.exact)
            if predicate is not ix.TRUE:
                text = self._text(predicate, names, scores, apart)
                result.predicate = self._join(result, "&", result.predicate, text)
            if form.bias is not None:
                result.bias = self._join(result, "+", result.bias, self._text(form.bias, names, scores, apart))
        return result

    def _form(self, node: fx.Node | None, scores: tuple[Any, ...], is_causal: bool, rank: int) -> MaskForm:
        queries, keys = scores[2:]
        key = (node, str(queries), str(keys), is_causal, rank)
        if key not in self._known:
            self._known[key] = analyse_mask(
                node,
                query_length=queries,
                key_length=keys,
                is_causal=is_causal,
                query_rank=rank,
                constants=self._constants,
                for_kernels=True,
            )
        return self._known[key]

    def _operand(self, result: MaskTexts, node: fx.Node) -> str:
        if node not in result.operands:
            result.operands.append(node)
        return operand_name(result.operands.index(node))

    def _text(self, expression: ix.Expr, names: Mapping[str, str], scores: tuple[Any, ...], apart: bool) -> str:
        """Return an expression's text with its operands and sizes renamed to what the operation calls them.

        Args:
            expression: over b, h, q, k.
            names: what its operands are called.
            scores: the sizes B, H, S, T.
            apart: whether its b numbers batch and heads as one dimension, which the operation has apart.
        """
        if apart:
            heads = int(scores[1])
            facts = ix.NO_FACTS.known("b", ix.ZERO, None).known("h", ix.ZERO, ix.const(heads - 1))
            flat = ix.add(ix.multiply(ix.var("b"), ix.const(heads)), ix.var("h"))
            expression = ix.substitute(expression, {"b": flat}, facts)
        renamed = dict(names)
        for name in expression.free - set("bhqk"):
            renamed[name] = _size_name(name, scores)
        return re.sub(r"[A-Za-z_]\w*", lambda word: renamed.get(word[0], word[0]), str(expression))

    def average_blind(self, texts: MaskTexts, scores: tuple[Any, ...]) -> None:
        """Let a query that sees no key see all alike, as a large negative number in place of minus infinity makes it.

        Nothing is done where every query is known to see its own key, or where hidden keys are hidden from all queries.
        """
        if texts.exact or not texts.predicate:
            return
        types = {operand_name(at): operand_type(node.meta["val"].dtype) for at, node in enumerate(texts.operands)}
        predicate = parse(texts.predicate, types)
        if "q" not in predicate.free:
            return
        own = ix.substitute(predicate, {"k": ix.var("q")}, ix.NO_FACTS.known("q", ix.ZERO, None))
        if own is ix.TRUE and self._program.size(scores[2]) == self._program.size(scores[3]):
            return
        texts.bias = f"where({texts.predicate}, {texts.bias or '0.0'}, {HIDDEN_SCORE})"
        texts.bias, texts.predicate = str(parse(texts.bias, types)), ""

    def _join(self, result: MaskTexts, sign: str, first: str, second: str) -> str:
        types = {operand_name(at): operand_type(node.meta["val"].dtype) for at, node in enumerate(result.operands)}
        return str(parse(f"({first}) {sign} ({second})" if first else second, types))


def _size_name(name: str, scores: tuple[Any, ...]) -> str:
    for known, size in zip(SIZES, scores, strict=True):
        if isinstance(size, torch.SymInt) and str(size.node.expr) == name:
            return known
    raise UnknownSize(f"the mask depends on the size {name}, which is none of the attention's own")


class UnknownSize(Exception):
    """A mask depends on a size that attention does not have; a reason to refuse, caught by the pass."""


def shared_heads(program: Program, node: fx.Node) -> tuple[fx.Node, int]:
    """Return what a tensor [B, H, T, D] was repeated from, [B, H / n, T, D], and n; the node itself and 1 if it was not.

    Head h of the result reads head h // n.
    """
    shape = node.meta["val"].shape
    if is_call(node, aten.repeat_interleave.self_int) and len(node.args) > 2 and node.args[2] in (1, -3):
        base, repeats = node.args[:2]
        return (base, repeats) if isinstance(base, fx.Node) and isinstance(repeats, int) else (node, 1)
    if is_call(node, aten.expand.default):
        base = node.args[0]
        assert isinstance(base, fx.Node)
        mine = base.meta["val"].shape
        if (
            len(mine) == 4
            and mine[1] == 1
            and all(a == b for at, (a, b) in enumerate(zip(mine, shape, strict=True)) if at != 1)
        ):
            return base, int(shape[1])
        return node, 1
    if not is_call(node, aten.reshape.default, aten.view.default) or not is_call(node.args[0], aten.expand.default):
        return node, 1
    expand: Any = node.args[0]
    inner = expand.args[0]
    wide, narrow = program.shape(expand), program.shape(inner)
    repeated = len(wide) == 5 and len(narrow) == 5 and narrow[2] == 1 and wide[:2] + wide[3:] == narrow[:2] + narrow[3:]
    merged = program.shape(node)
    if not repeated or merged != (wide[0], wide[1] * wide[2], wide[3], wide[4]) or not isinstance(wide[2], int):
        return node, 1
    if is_call(inner, aten.unsqueeze.default) and int(inner.args[1]) % 5 == 2:
        return inner.args[0], wide[2]
    return node, 1
