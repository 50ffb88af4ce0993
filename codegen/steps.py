"""How an operation that is computed by kernels of its own, and not in fused loops, becomes steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from graphwright.ir.program import Program
from graphwright.runtime.schedule import Step, View

from .indexing import contiguous_strides, size_text
from .loops import Stored
from .sources import KernelSources

Place: TypeAlias = Callable[[fx.Node], Stored]
"""Tells where a tensor lies."""


def always(node: fx.Node) -> bool:
    """Return that a node can be made."""
    return True


def no_scratch(program: Program, node: fx.Node) -> Mapping[str, tuple[torch.dtype, tuple[Any, ...]]]:
    """Return that a call needs no memory but its results'."""
    return {}


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
        scratch: the dtype and the shape of each buffer that the steps use among themselves, by what `scratch_view` calls it.
    """

    make: Callable[[Program, fx.Node, Place, KernelSources, str], Sequence[Step]]
    accepts: Callable[[fx.Node, fx.Node, Stored, tuple[Any, ...]], bool]
    strides: Callable[[tuple[Any, ...]], tuple[Any, ...]] = contiguous_strides
    applies: Callable[[fx.Node], bool] = always
    in_place: Mapping[int, str] = field(default_factory=dict)
    scratch: Callable[[Program, fx.Node], Mapping[str, tuple[torch.dtype, tuple[Any, ...]]]] = no_scratch


def scratch_view(node: fx.Node, name: str, shape: tuple[Any, ...]) -> View:
    """Return a buffer that a node's steps use among themselves, its elements in order.

    Args:
        node: the call.
        name: what its maker's `scratch` calls it.
        shape: its sizes, as there.
    """
    return View(
        scratch_buffer(node, name),
        tuple(size_text(size) for size in shape),
        tuple(size_text(stride) for stride in contiguous_strides(shape)),
    )


def scratch_buffer(node: fx.Node, name: str) -> str:
    """Return the name of a buffer that a node's steps use among themselves."""
    return f"{node.name}.{name}"
