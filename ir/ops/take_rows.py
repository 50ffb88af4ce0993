"""`graphwright::take_rows`: rows of a tensor by number, and zeros for numbers that are none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .definition import define, expect

if TYPE_CHECKING:
    from torch import fx

    from graphwright.ir.program import Program

SCHEMA = "take_rows(Tensor x, Tensor index) -> Tensor"


def take_rows_reference(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the rows of x that index names; zeros where it is negative.

    With the numbers of the tokens that are there it packs a padded batch, with the places of these among the packed rows it
    makes the padded batch again.

    Args:
        x: [N, ...], any dtype.
        index: int64 of any shape, less than N.

    Returns:
        [*index.shape, ...] in x's dtype.
    """
    result = x.new_zeros((*index.shape, *x.shape[1:]))
    result[index >= 0] = x[index[index >= 0]]
    return result


def _fake(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    expect(x.dim() >= 1, "x must have rows, and is a single number")
    expect(index.dtype == torch.int64, f"the index must be int64, and is {index.dtype}")
    return x.new_empty((*index.shape, *x.shape[1:]))


def _flops(program: Program, node: fx.Node) -> int:
    return 0


take_rows = define(SCHEMA, take_rows_reference, _fake, _flops)
