"""Attention to near keys and the first ones alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.analyses.index_text import parse
from graphwright.ir.analyses.masks import is_causal_at
from graphwright.ir.errors import OptionError, PlanError
from graphwright.ir.ops.attention import operand_name, operand_type
from graphwright.ir.program import Program, calls
from graphwright.passes.base import Context, Decision, Fidelity, Refusal
from graphwright.passes.local import LocalPass, Places

from .layers import not_chosen, why_no_attention

COUNTED_AT = (1024, 4096, 16384)
"""Lengths at which a plan says how many pairs of a query and a key are left."""

Q, K = ix.var("q"), ix.var("k")
FACTS = ix.NO_FACTS
for _name in "bhqk":
    FACTS = FACTS.known(_name, ix.ZERO, None)


@dataclass(frozen=True, kw_only=True)
class WindowAttention(LocalPass):
    """Let queries see near keys, and the first ones, and no others.

    Before: `%a = graphwright.attention(%q, %k, %v, [], predicate="q - k >= 0")`

    After: `%a = graphwright.attention(%q, %k, %v, [], predicate="q - k >= 0 & (-k + 3 >= 0 | k - q + 255 >= 0)")`, for a window
        of 256 and 4 sinks; `k // 64 - q // 64 = 0` for blocks of 64 tokens

    Applies when: an attention is of a sequence to itself, causal or not. A causal one gets a window backwards, any other one to
        both sides, where the first tokens see all others, as others see them. What its predicate hides stays hidden.
    Applies when: the program has caches already: the predicate is of positions.

    Declines when: neither a window nor a block is given.
    Declines when: queries and keys are of different sequences, or differ in number.
    Declines when: an attention hides all that already, or the number of tokens is fixed and all see each other.
    Declines when: the attention is not among `layers`.

    Fidelity: lossy. Up to `break_even_tokens` - 1 tokens, which the decision says, nothing changes.

    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023, arXiv 2309.17453 (sinks and a window;
        the A-shape of Jiang et al., MInference 1.0, 2024, arXiv 2407.02490); Beltagy et al., Longformer: The Long-Document
        Transformer, 2020, arXiv 2004.05150 (encoders). Differs from the papers in: positions stay as they are, and caches keep
        all tokens.

    Cost: attention falls from the square of the length to the length times window + sinks, or block * (2 * neighbours + 1).
        Kernels walk the visible keys alone.

    Args:
        window: keys that a query sees on its left, its own included, and as many to the right where it is not causal; at
            least 1. None for no window.
        sinks: first tokens that every query sees, at least 0.
        block: tokens of a block; queries see the keys of their own block; at least 1. None for no blocks.
        neighbours: blocks before (and after, where it is not causal) the own one that are seen too, at least 0.
        layers: the attentions to rewrite, counted from 0 in the graph's order; None for all.

    Raises:
        OptionError: an option is out of its range, or window and block, or block and sinks, are both given.
    """

    name = "window-attention"
    fidelity = Fidelity.LOSSY
    source = "StreamingLLM, arXiv 2309.17453; Longformer, arXiv 2004.05150"

    window: int | None = None
    sinks: int = 0
    block: int | None = None
    neighbours: int = 0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        problem = _problem(self.window, self.sinks, self.block, self.neighbours)
        if problem:
            raise OptionError(f"{self.name}: {problem}")

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the attentions that are to see less."""
        attentions = [node for node in calls(program.graph) if node.target in (dialect.attention, dialect.kv_attention)]
        if self.window is None and self.block is None:
            yield Refusal("", "nothing is asked for: give a window, or a block")
            return
        if not attentions:
            yield Refusal("", why_no_attention(program))
        for number, node in enumerate(attentions):
            reason = not_chosen(self.name, number, len(attentions), self.layers) or self._reason(program, node)
            if reason:
                yield Refusal(node.name, reason)
                continue
            causal = _is_causal(node)
            same = self.same_until(causal)
            detail = {
                "window": self.window,
                "sinks": self.sinks,
                "block": self.block,
                "neighbours": self.neighbours,
                "break_even_tokens": same + 1,
                "pairs_ratio": {str(n): round(self.pairs_ratio(n, causal), 4) for n in COUNTED_AT},
            }
            yield Decision(node.name, f"see {self._what()}", f"nothing changes up to {same} tokens", detail)

    def same_until(self, causal: bool) -> int:
        """Return the most tokens that all see each other, as far as causality lets them."""
        return self.block * (self.neighbours + 1) if self.block is not None else (self.window or 0) + self.sinks

    def pairs_ratio(self, tokens: int, causal: bool) -> float:
        """Return the ratio of the pairs of a query and a key that are left, to those that were there without other limits."""
        q = torch.arange(tokens)
        if self.block is not None:
            low = (q // self.block - self.neighbours) * self.block
            high = low + (2 * self.neighbours + 1) * self.block
            exempt = torch.zeros_like(q)
        else:
            low, high = q - (self.window or 0) + 1, q + (self.window or 0)
            high = torch.where(q < self.sinks, tokens, high)
            exempt = low.clamp(0, self.sinks)
        last = q + 1 if causal else torch.tensor(tokens)
        seen = torch.minimum(high, last) - low.clamp(min=0) + exempt
        return float(seen.sum()) / float(last.expand(tokens).sum())

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Insert the attention with the narrower predicate."""
        wanted = {name: detail[name] for name in ("window", "sinks", "block", "neighbours")}
        problem = _problem(**wanted)
        if problem:
            raise PlanError(f"{self.name}: the decision about %{node.name}: {problem}")
        if node.target not in (dialect.attention, dialect.kv_attention):
            raise PlanError(f"{self.name}: %{node.name} is {node.target}, and no attention: plan again")
        predicate = _narrowed(node, **wanted)
        return program.call(node.target, *node.args, like=node, **{**node.kwargs, "predicate": str(predicate)})

    def _what(self) -> str:
        if self.block is not None:
            near = f" and {self.neighbours} on each side" if self.neighbours else ""
            return f"the own block of {self.block} tokens{near}"
        return f"{self.window} near keys" + (f" and the first {self.sinks}" if self.sinks else "")

    def _reason(self, program: Program, node: fx.Node) -> str | None:
        """Return why an attention stays as it is; None if it does not."""
        queries, keys = (program.shape(node.args[at])[2] for at in (0, 1))  # type: ignore[arg-type]
        if node.target is dialect.attention and queries != keys:
            return f"there are {queries} queries and {keys} keys: they are not of one sequence"
        causal = _is_causal(node)
        if node.target is dialect.attention and isinstance(queries, int) and queries <= self.same_until(causal):
            return f"its {queries} tokens all see each other with this window too"
        if _narrowed(node, self.window, self.sinks, self.block, self.neighbours) is _predicate(node):
            return "it sees no more than that already"
        return None


def _problem(window: int | None, sinks: int, block: int | None, neighbours: int) -> str:
    """Return what is wrong with options; "" if nothing is."""
    for what, value, least in (("window", window, 1), ("sinks", sinks, 0), ("block", block, 1), ("neighbours", neighbours, 0)):
        if value is not None and value < least:
            return f"{what} must be at least {least}, got {value}"
    if window is not None and block is not None:
        return f"window={window} and block={block} each say what is near: give one of them"
    if block is None and neighbours:
        return f"neighbours={neighbours} are of a block: give block"
    if window is None and sinks:
        return f"sinks={sinks} are seen beside a window: give window"
    return ""


def _predicate(node: fx.Node) -> ix.Expr:
    given = arguments(node)
    text = given["predicate"]
    types = {operand_name(at): operand_type(o.meta["val"].dtype) for at, o in enumerate(given["operands"])}
    return parse(text, types, FACTS) if text else ix.TRUE


def _is_causal(node: fx.Node) -> bool:
    return node.target is dialect.kv_attention or is_causal_at(_predicate(node), ix.ZERO, FACTS)


def _narrowed(node: fx.Node, window: int | None, sinks: int, block: int | None, neighbours: int) -> ix.Expr:
    """Return the predicate of an attention that sees near keys only."""
    behind, causal = ix.subtract(Q, K), _is_causal(node)
    limits = []
    if block is not None:
        chunks = ix.subtract(ix.floor_divide(Q, block), ix.floor_divide(K, block))
        sides = [ix.negate(chunks)] if causal else [chunks, ix.negate(chunks)]
        limits = [ix.ge0(ix.add(side, ix.const(neighbours)), FACTS) for side in sides]
        if not neighbours:
            limits = [ix.eq0(chunks, FACTS)]
    elif window is not None:
        for first, distance in ((K, behind), (Q, ix.negate(behind)))[: 1 if causal else 2]:
            near = ix.ge0(ix.subtract(ix.const(window - 1), distance), FACTS)
            limits.append(ix.or_(near, ix.ge0(ix.subtract(ix.const(sinks - 1), first), FACTS), facts=FACTS))
    return ix.and_(_predicate(node), *limits, facts=FACTS)
