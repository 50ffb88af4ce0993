"""Attention to a few keys that all queries look at, and a few distances that all look back."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.analyses.index_text import parse
from graphwright.ir.analyses.masks import recognise
from graphwright.ir.analyses.spans import Spans, spans_of
from graphwright.ir.errors import OptionError, PlanError
from graphwright.ir.ops.attention import operand_name, operand_type
from graphwright.ir.ops.block_index import FORCED
from graphwright.ir.ops.sparse_attention import expected_blocks
from graphwright.ir.program import Program, calls
from graphwright.passes.base import Context, Decision, Fidelity, Refusal
from graphwright.passes.local import LocalPass, Places

from .layers import not_chosen, why_no_attention
from .searching import HeadAttention, observed, search
from .tile_cost import break_even, dense_tiles

DEFAULT_VERTICAL, DEFAULT_SLASH = 1000, 6096
"""What is taken where nothing is said, as the authors' code does."""

LARGEST_DIM = 256
"""Features of heads that there are kernels for."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FACTS = ix.NO_FACTS
for _name in "bhqk":
    _FACTS = _FACTS.known(_name, ix.ZERO, None)


@dataclass(frozen=True, kw_only=True)
class VerticalSlash(LocalPass):
    """Let a prompt's queries see the keys and the distances that the last queries attend to most, and no others.

    Before: `%a = graphwright.attention(%q, %k, %v, [], predicate="q - k >= 0")`

    After: `%i = graphwright.block_index(%q, %k, vertical=[...], slash=[...], fixed=[...], minimum_tokens=n); %b = %i[0];
        %c = %i[1]; %a = graphwright.sparse_attention(%q, %k, %v, %b, %c, [], predicate="q - k >= 0", minimum_tokens=n)`

    Applies when: an attention is causal, every query sees all keys before it, and the sizes of its heads are fixed.
    Applies when: the program is then derived for decoding: prompts in empty caches are sparse, all else is dense.

    Declines when: an attention is not causal, has a bias or a sink, or hides keys otherwise, such as padding or by a window.
    Declines when: queries and keys differ in number, or there are no kernels for the dtype or the size of the heads.
    Declines when: the number of tokens is fixed and less than the minimum.
    Declines when: the program has caches already.
    Declines when: the attention is not among `layers`.

    Fidelity: lossy. Below `minimum_tokens`, and for a single token, nothing changes. Which keys are seen depends on the last
        64 tokens of a call, so that a token's result depends on later ones.

    Source: Jiang et al., MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention, 2024,
        arXiv 2407.02490. Differs from the paper in: patterns are searched at an equal number of tiles, measured; the A-shape
        is one of them and block-sparse is none; what covers diagonals is laid out from the queries backwards, so that no block
        lies behind them; a short call is dense.

    Cost: attention falls from the square of the length to the length times columns and blocks, plus the estimate.

    Args:
        vertical: columns (keys) that all queries see, at least 30, the first 30 among them; 1000 unless `density` is given.
        slash: diagonals (distances) at which all queries see keys, at least 30, the nearest 30 among them; 6096 unless
            `density` is given.
        density: instead, choose columns and diagonals of each head on the sample calls, to take this ratio of the tiles that
            dense attention takes there, in (0, 1]; heads may also get first and nearest keys.
        minimum_tokens: calls of fewer tokens are dense, at least 2; None for the break-even of the cost in tiles.
        layers: the attentions to rewrite, counted from 0 in the graph's order; None for all.

    Raises:
        OptionError: an option is out of its range, or density and one of the others are both given.
    """

    name = "vertical-slash"
    fidelity = Fidelity.LOSSY
    source = "MInference 1.0, arXiv 2407.02490"

    vertical: int | None = None
    slash: int | None = None
    density: float | None = None
    minimum_tokens: int | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for what, value, least in (
            ("vertical", self.vertical, FORCED),
            ("slash", self.slash, FORCED),
            ("minimum_tokens", self.minimum_tokens, 2),
        ):
            if value is not None and value < least:
                raise OptionError(f"{self.name}: {what} must be at least {least}, got {value}")
        if self.density is not None and not 0 < self.density <= 1:
            raise OptionError(f"{self.name}: density must be in (0, 1], got {self.density}")
        if self.density is not None and (self.vertical is not None or self.slash is not None):
            raise OptionError(f"{self.name}: density={self.density} is there to choose vertical and slash: give it alone")

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the attentions that are to see less.

        Raises:
            PassError: patterns are to be searched, and there are no sample calls, or they do not fit the model.
        """
        if program.states:
            yield Refusal("", f"the program has caches already: put {self.name} before cached-decode")
            return
        attentions = list(calls(program.graph, dialect.attention))
        if not attentions:
            yield Refusal("", why_no_attention(program))
        reasons = [
            not_chosen(self.name, number, len(attentions), self.layers) or _reason(program, node)
            for number, node in enumerate(attentions)
        ]
        fitting = [node for node, reason in zip(attentions, reasons, strict=True) if not reason]
        known: Sequence[Sequence[Sequence[HeadAttention]] | None] = [None] * len(fitting)
        if fitting and self.density is not None:
            known = observed(program, fitting, context.calibration, self.name)
        seen = dict(zip(fitting, known, strict=True))
        for node, reason in zip(attentions, reasons, strict=True):
            if reason:
                yield Refusal(node.name, reason)
                continue
            detail = self._detail(int(program.shape(node)[1]), seen[node])
            tokens, least = program.shape(node)[2], detail["minimum_tokens"]
            if isinstance(tokens, int) and tokens < least:
                yield Refusal(node.name, f"its {tokens} tokens are fewer than {least}, below which dense attention costs less")
                continue
            why = f"dense below {least} tokens"
            if "recall" in detail:
                mean = sum(detail["recall"]) / len(detail["recall"])
                why += f"; keeps {mean:.3f} of the attention of the samples in {detail['density']:.3f} of the tiles"
                why += f", {self.density} being asked for"
            yield Decision(node.name, "see columns and diagonals", why, detail)

    def _detail(self, heads: int, attention: Sequence[Sequence[HeadAttention]] | None) -> dict[str, Any]:
        """Return the patterns of an attention's heads, and what is known of them."""
        if attention is None or self.density is None:
            vertical, slash = self.vertical or DEFAULT_VERTICAL, self.slash or DEFAULT_SLASH
            least = self.minimum_tokens or break_even(expected_blocks(slash), vertical)
            lists = {"vertical": [vertical] * heads, "slash": [slash] * heads, "fixed": [False] * heads}
            return {**lists, "minimum_tokens": least}
        found = [search(head, self.density) for head in attention]
        lengths = [sequence.tokens for sequence in attention[0]]
        slash = max(pattern.slash for pattern, _, _ in found)
        # The lists of samples that are not much longer than they are cut short, and tell little of longer calls.
        counted = sum(result.blocks for _, result, _ in found) / heads
        blocks = counted if slash <= max(lengths) / 2 else expected_blocks(slash)
        columns = sum(pattern.vertical for pattern, _, _ in found) / heads
        return {
            **{name: [getattr(pattern, name) for pattern, _, _ in found] for name in ("vertical", "slash", "fixed")},
            "density": sum(result.tiles for _, result, _ in found) / heads / sum(map(dense_tiles, lengths)),
            "recall": [result.recall for _, result, _ in found],
            "recall_of_a_shape": [shape.recall for _, _, shape in found],
            "minimum_tokens": self.minimum_tokens or break_even(blocks, columns),
        }

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Insert the lists, and the attention over them."""
        lists = {name: list(detail[name]) for name in ("vertical", "slash", "fixed")}
        minimum = detail["minimum_tokens"]
        if node.target is not dialect.attention:
            raise PlanError(f"{self.name}: %{node.name} is {node.target}, and no attention: plan again")
        reason = _reason(program, node) or _problem(int(program.shape(node)[1]), lists, minimum)
        if reason:
            raise PlanError(f"{self.name}: the decision about %{node.name}: {reason}")
        given = arguments(node)
        options = {"scale": given["scale"], "minimum_tokens": minimum, **_capped(given)}
        index = program.call(dialect.block_index, given["q"], given["k"], like=node, **lists, **options)
        blocks, columns = (program.call(operator.getitem, index, at, like=node) for at in range(2))
        tensors = (given["q"], given["k"], given["v"], blocks, columns, given["operands"], given["sink"])
        return program.call(dialect.sparse_attention, *tensors, like=node, predicate=given["predicate"], **options)


def _capped(given: dict[str, Any]) -> dict[str, float]:
    return {"softcap": given["softcap"]} if given["softcap"] else {}


def _problem(heads: int, lists: dict[str, list[Any]], minimum: int) -> str:
    """Return what is wrong with a decision's numbers; "" if nothing is."""
    for name, values in lists.items():
        if len(values) != heads:
            return f"{name} has {len(values)} values, and there are {heads} heads"
        if name != "fixed" and min(values) < 0:
            return f"{name} must be at least 0, got {min(values)}"
    return "" if minimum >= 2 else f"minimum_tokens must be at least 2, got {minimum}"


def _reason(program: Program, node: fx.Node) -> str | None:
    """Return why an attention stays as it is; None if it does not."""
    given = arguments(node)
    q, k, v = (program.shape(given[name]) for name in "qkv")
    if q[2] != k[2]:
        return f"there are {q[2]} queries and {k[2]} keys: they are not of one sequence"
    if given["bias"]:
        return f"its scores have a bias, {given['bias']}, and the estimate knows of none"
    if given["sink"] is not None:
        return "a sink takes a share of its attention, and the estimate knows of none"
    types = {operand_name(at): operand_type(o.meta["val"].dtype) for at, o in enumerate(given["operands"])}
    predicate = parse(given["predicate"], types, _FACTS) if given["predicate"] else ix.TRUE
    spans = spans_of(recognise(predicate, None, (), True, _FACTS))
    if not spans.causal:
        return f"it is not causal: a query sees where {predicate}"
    if spans != Spans(ix.TRUE, causal=True):
        return f"a query sees not all keys before it, but where {predicate}"
    dtype = given["q"].meta["val"].dtype
    if dtype not in _DTYPES or not all(isinstance(n, int) for n in (q[1], k[1], q[3], v[3])) or max(q[3], v[3]) > LARGEST_DIM:
        return (
            f"there are no kernels for {q[1]} heads of {q[3]} and {v[3]} {dtype}: up to {LARGEST_DIM} features of 16 or 32 bits"
        )
    return None
