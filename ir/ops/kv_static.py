"""`graphwright::kv_static_attention`: attention over keys and values in codes whose scales never change.

It is what ONNX's runtimes know of caches in few bits: one scale for each channel of each head, found beforehand, and all tokens
in codes, a call's own included. Programs that Graphwright runs itself use `kv_quantized_attention`, which loses far less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch

from graphwright.ir.analyses.index_eval import evaluate
from graphwright.ir.analyses.index_text import parse

from .attention import SIZES, operand_name, operand_type
from .definition import define, expect

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

SCHEMA = (
    "kv_static_attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, Tensor k_scale, Tensor v_scale, "
    "Tensor[] operands, *, int bits, str predicate='', str bias='', float scale, float softcap=0.0) "
    "-> (Tensor, Tensor, Tensor)"
)

STATIC_BITS = (8, 4)
"""Bits of a code: a signed byte, or two codes with 8 added in a byte, the lower half first."""

LOWEST = -1e30
"""What is added to the score of a key that is hidden: a query without keys sees all of them alike."""


def encode(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes of x, the nearest multiples of the scales.

    Args:
        x: [B, H, T, D].
        scale: [H * D], above 0.
        bits: one of `STATIC_BITS`; with 4, D is even.

    Returns:
        int8 [B, H, T, D], or uint8 [B, H, T, D / 2]. What is beyond the least and the greatest code becomes these.
    """
    most = 2 ** (bits - 1)
    codes: torch.Tensor = torch.round(x / scale.reshape(x.shape[1], 1, -1)).clamp(-most, most - 1)
    if bits == 8:
        return codes.to(torch.int8)
    halves: torch.Tensor = (codes + most).to(torch.uint8)
    return halves[..., 0::2] | (halves[..., 1::2] << 4)


def decode(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the values of codes, [B, H, T, D] in the scales' dtype; see `encode`."""
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).to(torch.int8) - 8
    return codes.to(scale.dtype) * scale.reshape(codes.shape[1], 1, -1)


def kv_static_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor,
    past_v: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    operands: list[torch.Tensor],
    *,
    bits: int,
    predicate: str = "",
    bias: str = "",
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the attention's result, and the codes of all keys and values.

    Args:
        q: [B, H, S, D], float32.
        k: [B, Hk, S, D], H a multiple of Hk; of the same tokens, which come after those of the past.
        v: [B, Hk, S, D].
        past_k: codes of the keys before, int8 [B, Hk, P, D], or uint8 [B, Hk, P, D / 2] for 4 bits.
        past_v: likewise.
        k_scale: [Hk * D]: a key's channel is its code times the scale.
        v_scale: likewise.
        operands: what the expressions read: `in0`, `in1`, ...
        bits: 8 or 4.
        predicate: an index expression over b, h, q and k, true where a key is visible; q counts the call's tokens, k all keys
            from the first. No query sees a key after its own, whatever it says. A query that it leaves none sees all keys
            up to its own, alike.
        bias: an index expression that is added to the scaled and capped score; "" for none.
        scale: factor of the scores.
        softcap: scores are bent to softcap * tanh(score / softcap); 0 for not.

    Returns:
        [B, H, S, D]; codes [B, Hk, P + S, ...] of keys and of values.
    """
    present_k, present_v = (
        torch.cat((past, encode(new, size, bits)), 2) for past, new, size in ((past_k, k, k_scale), (past_v, v, v_scale))
    )
    group = q.shape[1] // k.shape[1]
    keys, values = (
        decode(codes, size, bits).repeat_interleave(group, 1) for codes, size in ((present_k, k_scale), (present_v, v_scale))
    )
    scores = q @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    variables = {
        name: torch.arange(size, device=q.device).reshape([-1 if i == at else 1 for i in range(4)])
        for at, (name, size) in enumerate(zip("bhqk", scores.shape, strict=True))
    }
    sizes = dict(zip(SIZES, scores.shape, strict=True))
    loads = {operand_name(at): operand for at, operand in enumerate(operands)}
    types = {name: operand_type(operand.dtype) for name, operand in loads.items()}
    if bias:
        scores = scores + evaluate(parse(bias, types), variables, loads, sizes).to(scores.dtype)
    if predicate:
        seen = evaluate(parse(predicate, types), variables, loads, sizes).to(torch.bool)
        scores = torch.where(seen, scores, LOWEST)
    later = variables["k"] > variables["q"] + past_k.shape[2]
    weights = torch.softmax(scores.masked_fill(later, -torch.inf), -1)
    return weights @ values, present_k, present_v


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor,
    past_v: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    operands: list[torch.Tensor],
    *,
    bits: int,
    predicate: str = "",
    bias: str = "",
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    expect(bits in STATIC_BITS, f"bits must be {' or '.join(map(str, STATIC_BITS))}, got {bits}")
    expect(q.dim() == 4 and k.dim() == 4, "q, k and v must be [batch, heads, tokens, features]")
    expect(q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads")
    packed = torch.int8 if bits == 8 else torch.uint8
    presents = []
    for name, new, past, size in (("k", k, past_k, k_scale), ("v", v, past_v, v_scale)):
        expect(new.dtype == torch.float32 == q.dtype, f"q and {name} must be float32, got {q.dtype} and {new.dtype}")
        expect(past.dtype == packed, f"past_{name} must be {packed} for {bits} bits, got {past.dtype}")
        expect(past.shape[3] * 8 == new.shape[3] * bits, f"past_{name} has {past.shape[3]} bytes for {new.shape[3]} codes")
        expect(tuple(size.shape) == (new.shape[1] * new.shape[3],), f"{name}_scale is {tuple(size.shape)}")
        presents.append(past.new_empty((*past.shape[:2], past.shape[2] + new.shape[2], past.shape[3])))
    return q.new_empty((*q.shape[:3], v.shape[3])), presents[0], presents[1]


def _flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    batch, heads, queries, features = program.shape(node.args[0])  # type: ignore[arg-type]
    past = program.shape(node.args[3])[2]  # type: ignore[arg-type]
    return batch * heads * queries * (past + queries) * (4 * features + 8)


kv_static_attention = define(SCHEMA, kv_static_attention_reference, _fake, _flops)
