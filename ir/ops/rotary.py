"""`graphwright::rotary`: rotary position embedding, with the cosines and sines given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch

from .definition import define, expect

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

SCHEMA = "rotary(Tensor x, Tensor cos, Tensor sin, *, bool interleaved=False, int? rotated=None) -> Tensor"


def rotary_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False, rotated: int | None = None
) -> torch.Tensor:
    """Return x with pairs of features rotated: x * cos + partner(x) * sin.

    Args:
        x: [..., D], floating point.
        cos: broadcasts with the first `rotated` features of x; its last dimension has size `rotated`.
        sin: likewise.
        interleaved: the partner of feature 2i is -(2i + 1), and of 2i + 1 is 2i; else features i and i + rotated / 2 are
            partners in the same way.
        rotated: how many of the features are rotated, even; the others stay. None for all.

    Returns:
        [..., D] in the dtype that x's and the cosines' promote to.
    """
    part = x if rotated is None else x[..., :rotated]
    if interleaved:
        partner = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        half = part.shape[-1] // 2
        partner = torch.cat((-part[..., half:], part[..., :half]), -1)
    turned = part * cos + partner * sin
    return turned if rotated is None else torch.cat((turned, x[..., rotated:]), -1)


def _fake(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False, rotated: int | None = None
) -> torch.Tensor:
    count = x.shape[-1] if rotated is None else rotated
    expect(count % 2 == 0, f"an even number of features can be rotated, got {count}")
    expect(count <= x.shape[-1], f"{count} features cannot be rotated of {x.shape[-1]}")
    for table in (cos, sin):
        expect(table.shape[-1] == count, f"the table has {table.shape[-1]} features, {count} are rotated")
    shape: torch.Size = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1], sin.shape[:-1])  # type: ignore[no-untyped-call]
    dtype = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), sin.dtype)
    return x.new_empty((*shape, x.shape[-1]), dtype=dtype)


def _flops(program: Program, node: fx.Node) -> int | sympy.Expr:
    shape = program.shape(node)
    rotated = node.kwargs.get("rotated")
    return 3 * sympy.prod(shape[:-1]) * (shape[-1] if rotated is None else rotated)


rotary = define(SCHEMA, rotary_reference, _fake, _flops)
