"""Recognition of attention: calls of PyTorch's function, and the written-out product, softmax, product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses.masks import MaskError
from graphwright.ir.program import Program, calls
from graphwright.passes.base import Context, Decision, Fidelity, Refusal
from graphwright.passes.local import LocalPass, Places

from .attention_parts import Masks, UnknownSize, shared_heads
from .attention_written import Mask, Written, written_attention
from .matching import dtype_of

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)


@dataclass(frozen=True, kw_only=True)
class RaiseAttention(LocalPass):
    """Turn attention into one operation, its mask into an expression of batch, head, query and key.

    Before: `%s = scaled_dot_product_attention(%q, %k, %v, %mask)`

    After: `%s = graphwright.attention(%q, %k, %v, [], predicate="q - k >= 0", scale=0.125)`

    Applies when: PyTorch's function is called on [batch, heads, tokens, features].
    Applies when: a product of queries and keys is scaled, capped, biased and masked, goes through a softmax over the keys and
        is multiplied by the values, on [batch, heads, tokens, features] or [batch, tokens, features].
    Applies when: keys and values were repeated for the query heads: the operation reads them unrepeated.
    Applies when: a column of scores per head joins the softmax and is cut off after it (attention sinks).

    Declines when: dropout is active.
    Declines when: the attention weights are used elsewhere, as with `output_attentions`.
    Declines when: the mask depends on a size that is none of the attention's own.

    Fidelity: scores are computed in float32. A query whose keys are all hidden by minus infinities gives 0, not NaN; a sequence
        whose keys are all hidden by large negative numbers gives 0, not the average of its values.

    Args:
        blind: what a query gets that sees no key because of large negative numbers, not of minus infinity: "average", as the
            model has it, of all values; "zero", which lets kernels skip hidden blocks of such masks.
    """

    name = "raise-attention"
    fidelity = Fidelity.CLOSE

    blind: Literal["average", "zero"] = "average"

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the attentions, each at the node that has its result."""
        masks = Masks(program)
        for node in calls(program.graph, SDPA, *SOFTMAX):
            found = _called(node) if node.target is SDPA else written_attention(program, node)
            if isinstance(found, str):
                yield Refusal(node.name, found)
            elif found is not None:
                yield _decide(program, masks, found, self.blind)

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Return a call of the attention."""
        q, k, v = (places[detail[name]] for name in ("q", "k", "v"))
        flat = detail.get("rank", 4) == 3
        if detail.get("k_transposed"):
            order = [0, 2, 1] if flat else [0, 1, 3, 2]
            k = program.call(aten.permute.default, k, order, like=node)
        if flat:
            q, k, v = (program.call(aten.unsqueeze.default, value, 1, like=node) for value in (q, k, v))
        operands = [places[name] for name in detail["operands"]]
        sink = places[detail["sink"]] if detail.get("sink") else None
        keywords = {name: detail[name] for name in ("predicate", "bias", "softcap") if detail.get(name)}
        new = program.call(dialect.attention, q, k, v, operands, sink, like=node, **keywords, scale=detail["scale"])
        if flat:
            new = program.call(aten.squeeze.dim, new, 1, like=node)
        return new


def _called(node: fx.Node) -> Written | str:
    """Return what a call of PyTorch's function computes, or why it is left alone."""
    names = [argument.name for argument in SDPA._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v = given["query"], given["key"], given["value"]
    if given.get("dropout_p"):
        return "dropout is active"
    if any(x.meta["val"].dim() != 4 for x in (q, k, v)):
        return "queries, keys and values are not all [batch, heads, tokens, features]"
    size = q.meta["val"].shape[-1]
    scale = given.get("scale")
    if scale is None:
        if not isinstance(size, int):
            return "the number of features differs from call to call"
        scale = size**-0.5
    mask = given.get("attn_mask")
    return Written(
        end=node,
        q=q,
        k=k,
        v=v,
        scale=float(scale),
        masks=() if mask is None else (Mask(mask),),
        is_causal=bool(given.get("is_causal", False)),
        grouped=bool(given.get("enable_gqa", False)),
    )


def _decide(program: Program, masks: Masks, found: Written, blind: str) -> Decision | Refusal:
    q, k, v = found.q, found.k, found.v
    transposed = found.k_transposed
    if not dtype_of(q) == dtype_of(k) == dtype_of(v) == dtype_of(found.end):
        return Refusal(found.end.name, "queries, keys, values and result differ in dtype")
    queries, keys = q.meta["val"].shape, k.meta["val"].shape
    rank = len(queries)
    if program.shape(q)[: rank - 2 - found.grouped] != program.shape(k)[: rank - 2 - found.grouped]:
        return Refusal(found.end.name, "queries and keys differ in batch or heads")
    scores = (queries[0], queries[1] if rank == 4 else 1, queries[-2], keys[-1 if transposed else -2])
    try:
        texts = masks.texts(found.masks, scores, is_causal=found.is_causal, rank=rank)
        if blind == "average":
            masks.average_blind(texts, scores)
    except (MaskError, UnknownSize) as error:
        return Refusal(found.end.name, str(error))
    if rank == 4 and not found.grouped:
        (base, by), (values, of) = shared_heads(program, k), shared_heads(program, v)
        if by == of and not transposed:
            k, v = base, values
    detail = {
        "q": q.name,
        "k": k.name,
        "v": v.name,
        "k_transposed": transposed,
        "operands": [node.name for node in texts.operands],
        "sink": found.sink.name if found.sink is not None else None,
        "predicate": texts.predicate,
        "bias": texts.bias,
        "scale": found.scale,
        "softcap": found.softcap,
        "rank": rank,
    }
    why = "scaled dot-product attention"
    if not texts.exact and texts.predicate:
        why += "; if a query sees no key, its result is 0"
    return Decision(found.end.name, "attention", why, detail)
