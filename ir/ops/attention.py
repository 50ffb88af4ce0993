"""`graphwright::attention`: scaled dot-product attention with its mask and bias as index expressions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch

from graphwright.ir.analyses.index_core import Type
from graphwright.ir.analyses.index_eval import evaluate
from graphwright.ir.analyses.index_text import parse

from .definition import computed_in, define, expect

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

SCHEMA = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] operands, Tensor? sink, *, str predicate='', str bias='', "
    "float scale, float softcap=0.0) -> Tensor"
)


SIZES = ("batch_size", "heads", "query_length", "key_length")
"""Names of the scores' sizes [B, H, S, T] in the expressions."""


def operand_name(number: int) -> str:
    """Return the name by which expressions read an operand."""
    return f"in{number}"


def operand_type(dtype: torch.dtype) -> Type:
    """Return the type that an operand's elements have in expressions."""
    return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: list[torch.Tensor],
    sink: torch.Tensor | None,
    *,
    predicate: str = "",
    bias: str = "",
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Return softmax(cap(scale * q k^T) + bias, over the visible keys) v.

    The scores and the softmax are computed in float32 (float64 for float64).

    Args:
        q: [B, H, S, D], floating point.
        k: [B, Hk, T, D], H a multiple of Hk: query head h reads key head h // (H / Hk).
        v: [B, Hk, T, Dv].
        operands: what the expressions read: `in0`, `in1`, ...
        sink: [H], a score per head that joins the softmax's denominator and nothing else; None for none.
        predicate: an index expression over b, h, q, k and the sizes named in `SIZES`, true where key k is visible to query
            q; "" for every key.
        bias: an index expression, added to the scaled and capped score; "" for none.
        scale: factor of the scores.
        softcap: scores are bent to softcap * tanh(score / softcap); 0 for not.

    Returns:
        [B, H, S, Dv] in q's dtype. A query that sees no key gives 0.
    """
    wide = computed_in(q.dtype)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias:
        scores = scores + _evaluate(bias, scores, operands).to(wide)
    if predicate:
        scores = scores.masked_fill(~_evaluate(predicate, scores, operands).to(torch.bool), -torch.inf)
    if sink is not None:
        column = sink.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    # The softmax of a row of -inf is NaN; such a query sees nothing.
    weights = torch.softmax(scores, -1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    if sink is not None:
        weights = weights[..., :-1]
    return (weights @ v.to(wide)).to(q.dtype)


def _evaluate(text: str, scores: torch.Tensor, operands: list[torch.Tensor]) -> torch.Tensor:
    """Return the expression's values, broadcast to the scores [B, H, S, T]."""
    variables = {
        name: torch.arange(size, device=scores.device).reshape([-1 if i == at else 1 for i in range(4)])
        for at, (name, size) in enumerate(zip("bhqk", scores.shape, strict=True))
    }
    sizes = dict(zip(SIZES, scores.shape, strict=True))
    loads = {operand_name(at): operand for at, operand in enumerate(operands)}
    expression = parse(text, {name: operand_type(operand.dtype) for name, operand in loads.items()})
    return evaluate(expression, variables, loads, sizes).to(scores.device).expand(scores.shape)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: list[torch.Tensor],
    sink: torch.Tensor | None,
    *,
    predicate: str = "",
    bias: str = "",
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        expect(tensor.dim() == 4, f"{name} must be [batch, heads, tokens, features], got {tensor.dim()} sizes")
        expect(tensor.dtype == q.dtype, f"{name} is {tensor.dtype}, q is {q.dtype}")
        expect(tensor.shape[0] == q.shape[0], f"{name} has batch {tensor.shape[0]}, q has {q.shape[0]}")
    expect(k.shape[3] == q.shape[3], f"k has {k.shape[3]} features, q has {q.shape[3]}")
    expect(q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads")
    for at in (1, 2):
        expect(k.shape[at] == v.shape[at], f"k is {tuple(k.shape)} and v {tuple(v.shape)}")
    if sink is not None:
        expect(sink.dim() == 1, f"the sink must be [heads], got {tuple(sink.shape)}")
        expect(sink.shape[0] == q.shape[1], f"the sink has {sink.shape[0]} heads, q {q.shape[1]}")
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    batch, heads, queries, features = program.shape(node.args[0])  # type: ignore[arg-type]
    keys, values = program.shape(node.args[2])[2:]  # type: ignore[arg-type]
    return batch * heads * queries * keys * (2 * features + 2 * values + 8)


attention = define(SCHEMA, attention_reference, _fake, _flops)
