"""How an operation that is computed by kernels of its own, and not in fused loops, becomes steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import fx

from graphwright.ir.program import Program
from graphwright.runtime.schedule import Step

from .indexing import contiguous_strides
from .loops import Stored
from .sources import KernelSources

Place: TypeAlias = Callable[[fx.Node], Stored]
"""Tells where a tensor lies."""


def always(node: fx.Node) -> bool:
    """Return that a node can be made."""
    return True


@dataclass(frozen=True, kw_only=True)
class StepMaker:
    """What makes the steps of an operation.

    Args:
        make: returns the steps of a call in order; none if another call's steps do it too. It is given the program, the call,
            where tensors lie, what takes the kernels' sources, and the device type.
        accepts: whether the steps can read an argument where it lies, given its shape; else it is copied first.
        strides: of a result, given its shape.
        applies: whether this makes a call; else it is a call of PyTorch.
        in_place: number of a result -> the argument whose memory it takes over; of a result that is one tensor the number is 0.
            The argument must be a state, and nothing may read it afterwards.
    """

    make: Callable[[Program, fx.Node, Place, KernelSources, str], Sequence[Step]]
    accepts: Callable[[fx.Node, fx.Node, Stored, tuple[Any, ...]], bool]
    strides: Callable[[tuple[Any, ...]], tuple[Any, ...]] = contiguous_strides
    applies: Callable[[fx.Node], bool] = always
    in_place: Mapping[int, str] = field(default_factory=dict)
