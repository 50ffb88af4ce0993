"""`graphwright::attention` as ONNX's Attention, with its mask written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphwright.ir.analyses import index as ix
from graphwright.ir.ops.attention import SIZES, operand_name, operand_type
from graphwright.ir.ops.kv_static import LOWEST

from .calls import onnx_call, onnx_call_of_several
from .masks import ExpressionWriter
from .windows import Blocks, BlockWriter, Window

Past: TypeAlias = tuple[torch.Tensor, torch.Tensor]

_CAUSAL = ix.parse("q - k >= 0")


class AttentionWriter:
    """Writes the attentions of one program; those that have the same mask share what is written of it."""

    def __init__(self) -> None:
        self._masks: dict[Any, tuple[torch.Tensor, Blocks | None]] = {}

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
        window: Window | None = None,
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
            window: what queries see at most, where it is to be written in blocks.

        Raises:
            ExportError: the mask has no form in ONNX.
        """
        query_heads, key_heads = heads
        shape = (q.shape[0], query_heads, q.shape[1], k.shape[1] + (past[0].shape[2] if past is not None else 0))
        attributes: dict[str, Any] = {"scale": scale, "q_num_heads": query_heads, "kv_num_heads": key_heads}
        if softcap:
            attributes["softcap"] = softcap
        hiding = _Hiding(
            ix.parse(predicate, _types(operands)) if predicate else ix.TRUE,
            ix.parse(bias, _types(operands)) if bias else None,
            {operand_name(at): operand for at, operand in enumerate(operands)},
            sink,
        )
        mask, blocks = None, None
        # ONNX's own causality counts from the first query and key, as long as there are as many of both.
        if hiding.is_causal and past is None and window is None and statically_known_true(shape[2] == shape[3]):
            attributes["is_causal"] = 1
        elif not hiding.is_nothing:
            read = tuple(source if operand_name(at) in hiding.names else None for at, source in enumerate(sources[:-1]))
            key = (hiding.visible, hiding.bias, read, sources[-1], query_heads, *map(str, shape), q.dtype, window)
            if key not in self._masks:
                self._masks[key] = _mask(shape, hiding, q, window)
            mask, blocks = self._masks[key]
        width = v.shape[2] // key_heads * query_heads
        if blocks is not None:
            q, k, v = blocks.split(q, k, v)
        if sink is not None:
            k, v = _longer(k), _longer(v)
        result = (q.dtype, (*q.shape[:2], width))
        if past is not None:
            present = [(q.dtype, (*cache.shape[:2], shape[3], cache.shape[3])) for cache in past]
            return onnx_call_of_several("Attention", [q, k, v, mask, *past], attributes, [result, *present])
        inputs = [q, k, v] if mask is None else [q, k, v, mask]
        found = onnx_call("Attention", inputs, attributes, *result)
        return (found if blocks is None else blocks.join(found),)

    def write_static(
        self,
        tensors: Sequence[torch.Tensor],
        operands: list[torch.Tensor],
        *,
        heads: tuple[int, int],
        sources: Sequence[Any],
        bits: int,
        predicate: str = "",
        bias: str = "",
        scale: float,
        softcap: float = 0.0,
    ) -> tuple[torch.Tensor, ...]:
        """Return what `graphwright::kv_static_attention` does, as onnxruntime's GroupQueryAttention: [B, S, H * D], and codes.

        Args:
            tensors: q [B, S, H * D], k and v [B, S, Hk * D], past keys and values [B, Hk, P, ...], and their scales [Hk * D].
            operands: what the expressions read.
            heads: H and Hk.
            sources: where each of the operands comes from.
            bits: of a code.
            predicate: where keys are visible.
            bias: what is added to the scores.
            scale: factor of the scores.
            softcap: what the scores are bent to, 0 for not.
        """
        q, k, v, past_k, past_v, k_scale, v_scale = tensors
        batch, tokens = q.shape[:2]
        total = past_k.shape[2] + tokens
        shape = (batch, heads[0], tokens, total)
        hiding = _Hiding(
            ix.parse(predicate, _types(operands)) if predicate else ix.TRUE,
            ix.parse(bias, _types(operands)) if bias else None,
            {operand_name(at): operand for at, operand in enumerate(operands)},
            None,
        )
        read = tuple(source if operand_name(at) in hiding.names else None for at, source in enumerate(sources))
        key = ("added", hiding.visible, hiding.bias, read, heads[0], *map(str, shape))
        if key not in self._masks:
            writer = ExpressionWriter(dict(zip(SIZES, shape, strict=True)), shape, hiding.loads, q.device)
            added = q.new_zeros((1, 1, 1, 1)) if hiding.bias is None else writer.write(hiding.bias).to(q.dtype)
            mask = torch.where(writer.write(hiding.visible), added, LOWEST)
            self._masks[key] = mask.expand((*mask.shape[:2], *shape[2:])), None
        mask, _ = self._masks[key]
        lengths = torch.full((batch,), total - 1, dtype=torch.int32, device=q.device)
        length = torch.full((1,), total, dtype=torch.int32, device=q.device)
        attributes: dict[str, Any] = {
            "num_heads": heads[0],
            "kv_num_heads": heads[1],
            "scale": scale,
            "kv_cache_bit_width": bits,
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
        }
        if softcap:
            attributes["softcap"] = softcap
        inputs = [q, k, v, past_k, past_v, lengths, length, None, None, None, mask, None, k_scale, v_scale]
        present = (past_k.dtype, (*past_k.shape[:2], total, past_k.shape[3]))
        results = [(q.dtype, q.shape), present, present]
        return onnx_call_of_several("com.microsoft::GroupQueryAttention", inputs, attributes, results)


@dataclass(frozen=True, eq=False)
class _Hiding:
    """What hides keys and adds to scores.

    Args:
        visible: which keys are visible.
        bias: what is added, or None.
        loads: what the expressions read, by name.
        sink: [H], or None.
    """

    visible: ix.Expr
    bias: ix.Expr | None
    loads: Mapping[str, torch.Tensor]
    sink: torch.Tensor | None

    @property
    def is_causal(self) -> bool:
        """Whether it hides later keys, and does nothing else."""
        return self.visible is _CAUSAL and self.bias is None and self.sink is None

    @property
    def is_nothing(self) -> bool:
        """Whether it does nothing."""
        return self.visible is ix.TRUE and self.bias is None and self.sink is None

    @property
    def names(self) -> frozenset[str]:
        """The names of what the expressions read."""
        return ix.loads_of(self.visible) | (ix.loads_of(self.bias) if self.bias is not None else frozenset())

    def write(self, writer: ExpressionWriter, dtype: torch.dtype, there: torch.Tensor | None = None) -> torch.Tensor:
        """Return the mask without the sink: bool, or numbers that are added to the scores.

        Args:
            writer: of the expressions.
            dtype: of the numbers.
            there: where there are keys at all; None for everywhere.
        """
        mask = writer.write(self.visible) if there is None else writer.write(self.visible) & there
        if self.bias is None and self.sink is None:
            return mask
        zero = torch.zeros((1, 1, 1, 1), dtype=dtype, device=mask.device)
        added = zero if self.bias is None else writer.write(self.bias).to(dtype)
        return added if self.visible is ix.TRUE and there is None else torch.where(mask, added, -torch.inf)


def _mask(
    shape: tuple[Any, ...], hiding: _Hiding, q: torch.Tensor, window: Window | None
) -> tuple[torch.Tensor, Blocks | None]:
    """Return the mask, bool or numbers that are added to the scores, and the blocks that it is for, if there is a window.

    onnxruntime wants the last two dimensions in full; batch and heads may be 1.
    """
    blocks = None
    if window is not None:
        blocks = Blocks(q, window)
        there = blocks.there[:, None, None, :]
        mask = blocks.flatten(hiding.write(BlockWriter(blocks, shape, hiding.loads, q.device), q.dtype, there))
    else:
        writer = ExpressionWriter(dict(zip(SIZES, shape, strict=True)), shape, hiding.loads, q.device)
        mask = hiding.write(writer, q.dtype)
        mask = mask.expand((*mask.shape[:2], *shape[2:]))
    if hiding.sink is not None:
        # A key of zeros has the score 0 before the mask, so that the mask's last column is the sink's score; its value is 0.
        mask = mask.expand(-1, shape[1], -1, -1)
        column = hiding.sink.to(q.dtype).reshape(1, -1, 1, 1).expand((*mask.shape[:3], 1))
        mask = torch.cat((mask, column), -1)
    return mask, blocks


def _longer(x: torch.Tensor) -> torch.Tensor:
    """Return x [B, T, E] with a token of zeros behind."""
    return torch.cat((x, x.new_zeros((x.shape[0], 1, x.shape[2]))), 1)


def _types(operands: list[torch.Tensor]) -> dict[str, ix.Type]:
    return {operand_name(at): operand_type(operand.dtype) for at, operand in enumerate(operands)}
