"""`graphwright::attention` as ONNX's Attention, with its mask written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphwright.ir.analyses import index as ix
from graphwright.ir.ops.attention import SIZES, operand_name, operand_type

from .calls import onnx_call, onnx_call_of_several
from .masks import ExpressionWriter

Past: TypeAlias = tuple[torch.Tensor, torch.Tensor]

_CAUSAL = ix.parse("q - k >= 0")


class AttentionWriter:
    """Writes the attentions of one program; those that have the same mask share what is written of it."""

    def __init__(self) -> None:
        self._masks: dict[Any, torch.Tensor] = {}

    def write(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: list[torch.Tensor],
        sink: torch.Tensor | None,
        *,
        heads: tuple[int, int],
        sources: Sequence[Any],
        predicate: str = "",
        bias: str = "",
        scale: float,
        softcap: float = 0.0,
        past: Past | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return the attention's result, [B, S, H * Dv]; with `past`, all keys and values as well, [B, Hk, P + T, D].

        Heads lie side by side among the features, as projections leave them: onnxruntime runs this form fastest.

        Args:
            q: [B, S, H * D].
            k: [B, T, Hk * D].
            v: [B, T, Hk * Dv].
            operands: what the expressions read.
            sink: [H], or None.
            heads: H and Hk.
            sources: where each of the operands, and then the sink, comes from: what is alike in two attentions is shared.
            predicate: where keys are visible; see `graphwright.ir.ops.attention`.
            bias: what is added to the scores.
            scale: factor of the scores.
            softcap: what the scores are bent to, 0 for not.
            past: keys and values before those of k and v, [B, Hk, P, D]; expressions count keys from their first. There must be
                no sink.

        Raises:
            ExportError: the mask has no form in ONNX.
        """
        query_heads, key_heads = heads
        shape = (q.shape[0], query_heads, q.shape[1], k.shape[1] + (past[0].shape[2] if past is not None else 0))
        attributes: dict[str, Any] = {"scale": scale, "q_num_heads": query_heads, "kv_num_heads": key_heads}
        if softcap:
            attributes["softcap"] = softcap
        visible = ix.parse(predicate, _types(operands)) if predicate else ix.TRUE
        added = ix.parse(bias, _types(operands)) if bias else None
        inputs = [q, k, v]
        width = v.shape[2] // key_heads * query_heads
        # ONNX's own causality counts from the first query and key, as long as there are as many of both.
        if (
            visible is _CAUSAL
            and added is None
            and sink is None
            and past is None
            and statically_known_true(shape[2] == shape[3])
        ):
            attributes["is_causal"] = 1
        elif visible is not ix.TRUE or added is not None or sink is not None:
            names = ix.loads_of(visible) | (ix.loads_of(added) if added is not None else frozenset())
            read = tuple(source if operand_name(at) in names else None for at, source in enumerate(sources[:-1]))
            key = (visible, added, read, sources[-1], query_heads, *map(str, shape), q.dtype)
            if key not in self._masks:
                self._masks[key] = _mask(shape, operands, visible, added, sink, q)
            inputs = [q, *((_longer(k), _longer(v)) if sink is not None else (k, v)), self._masks[key]]
        result = (q.dtype, (shape[0], shape[2], width))
        if past is None:
            return (onnx_call("Attention", inputs, attributes, *result),)
        present = [(q.dtype, (*cache.shape[:2], shape[3], cache.shape[3])) for cache in past]
        mask = inputs[3] if len(inputs) > 3 else None
        return onnx_call_of_several("Attention", [q, k, v, mask, *past], attributes, [result, *present])


def _mask(
    shape: tuple[Any, ...],
    operands: list[torch.Tensor],
    visible: ix.Expr,
    bias: ix.Expr | None,
    sink: torch.Tensor | None,
    q: torch.Tensor,
) -> torch.Tensor:
    """Return the mask: bool, or numbers that are added to the scores.

    onnxruntime wants the last two dimensions in full; batch and heads may be 1.
    """
    loads = {operand_name(at): operand for at, operand in enumerate(operands)}
    writer = ExpressionWriter(dict(zip(SIZES, shape, strict=True)), shape, loads, q.device)
    mask = writer.write(visible)
    if bias is not None or sink is not None:
        added = q.new_zeros((1, 1, 1, 1)) if bias is None else writer.write(bias).to(q.dtype)
        mask = added if visible is ix.TRUE else torch.where(mask, added, -torch.inf)
    mask = mask.expand((*mask.shape[:2], *shape[2:]))
    if sink is None:
        return mask
    # A key of zeros has the score 0 before the mask, so that the mask's last column is the sink's score; its value is 0.
    mask = mask.expand(-1, shape[1], -1, -1)
    column = sink.to(q.dtype).reshape(1, -1, 1, 1).expand((*mask.shape[:3], 1))
    return torch.cat((mask, column), -1)


def _longer(x: torch.Tensor) -> torch.Tensor:
    """Return x [B, T, E] with a token of zeros behind."""
    return torch.cat((x, x.new_zeros((x.shape[0], 1, x.shape[2]))), 1)


def _types(operands: list[torch.Tensor]) -> dict[str, ix.Type]:
    return {operand_name(at): operand_type(operand.dtype) for at, operand in enumerate(operands)}
