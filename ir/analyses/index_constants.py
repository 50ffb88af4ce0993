"""See a constant tensor as a function of its indices where it is a simple one: positions, a causal table, one value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphwright.ir.analyses.index_core import Expr, add, const, subtract, var
from graphwright.ir.analyses.index_float import to_float
from graphwright.ir.analyses.index_logic import ge0, substitute, where

Function = Callable[[tuple[Expr, ...]], Expr]


def describe(tensor: Tensor) -> Function | None:
    """Return the index function of a tensor's elements where it is a simple one, else None.

    Simple are:

    - one value everywhere;
    - whole numbers that grow evenly along each dimension, such as positions;
    - two values divided by a diagonal of the last two dimensions, such as a causal table.

    Args:
        tensor: any shape; bool, integer or float of 16 bits or more.
    """
    if tensor.numel() == 0 or tensor.is_complex() or tensor.is_quantized:
        return None
    tensor = tensor.detach()
    first = tensor.reshape(-1)[0]
    if bool((tensor == first).all()):
        return lambda indices: _constant(first)
    return _diagonal(tensor) or _even(tensor)


def _constant(value: Tensor) -> Expr:
    number = value.item()
    assert isinstance(number, bool | int | float)
    return const(float(value.to(torch.float32).item()) if isinstance(number, float) else number)


def _even(tensor: Tensor) -> Function | None:
    if tensor.dtype == torch.bool:
        return None
    # A whole number above this has neighbours that float32 cannot tell from it.
    values = tensor.to(torch.float64)
    if not bool((values == values.round()).all()) or float(values.abs().max()) > 1 << 24:
        return None
    origin = values[(0,) * values.dim()]
    expected, steps = origin, []
    for dim, size in enumerate(values.shape):
        place = [0] * values.dim()
        place[dim] = min(1, size - 1)
        step = values[tuple(place)] - origin
        steps.append(int(step))
        shape = [1] * values.dim()
        shape[dim] = size
        expected = expected + step * torch.arange(size, dtype=torch.float64, device=values.device).view(shape)
    if not bool((values == expected).all()):
        return None

    def function(indices: tuple[Expr, ...]) -> Expr:
        result = const(int(origin))
        for step, index in zip(steps, indices, strict=True):
            result = add(result, index, step)
        return to_float(result) if tensor.is_floating_point() else result

    return function


def _diagonal(tensor: Tensor) -> Function | None:
    if tensor.dim() < 2:
        return None
    table = tensor[(0,) * (tensor.dim() - 2)]
    if not bool((tensor == table).all()):
        return None
    rows, columns = table.shape
    below, above = table[rows - 1, 0], table[0, columns - 1]
    # The values change where column - row passes the first offset that has the upper one.
    difference = torch.arange(columns, device=table.device)[None, :] - torch.arange(rows, device=table.device)[:, None]
    is_above = table == above
    if not bool(is_above.any()) or bool((below == above).all()):
        return None
    offset = int(difference[is_above].min())
    if not bool((table == torch.where(difference >= offset, above, below)).all()):
        return None
    a, b = _constant(above), _constant(below)
    row, column = var("row"), var("column")
    form = where(ge0(add(subtract(column, row), const(-offset))), a, b)
    return lambda indices: substitute(form, {"row": indices[-2], "column": indices[-1]})
