"""Calls of a program bound to the tensors that they read and write, to be run many times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.signature import Signature

from .layout import Layout, Placed
from .plan import Planner, step_error
from .weights import ALIGNED


class BoundCall:
    """A call that reads the same tensors and writes the same results each time; `Executable.bind` makes it.

    A run costs what its steps cost: nothing is checked, allocated or looked up. It has temporary memory of its own, so that it
    stays valid whatever else the program is called with.

    Args:
        planner: of the program.
        layout: for the sizes of the tensors.
        given: the tensors, in flat order.
        arena: temporary memory.
        signature: how the model is called.

    Attributes:
        results: what the model returns, made anew in the same memory by every run.

    Raises:
        InputError: a tensor does not lie as the program has it.
    """

    def __init__(
        self, planner: Planner, layout: Layout, given: Sequence[torch.Tensor], arena: torch.Tensor, signature: Signature
    ) -> None:
        fixed: dict[str, torch.Tensor] = {}
        for name, tensor in zip(planner.schedule.inputs, given, strict=True):
            fixed[name] = in_place(tensor, layout.buffers[name])
        for name in planner.made:
            placed = layout.buffers[name]
            fixed[name] = torch.empty_strided(placed.shape, placed.strides, dtype=placed.dtype, device=arena.device)
        self._plan = planner.plan(layout, arena, fixed)
        # The steps hold addresses, not tensors.
        self._kept = (fixed, arena)
        self.results: Any = signature.unflatten([result(given) for result in self._plan.results])

    def run(self) -> None:
        """Run the steps.

        Raises:
            GraphwrightError: a step failed; the message names it.
        """
        current = None
        try:
            for current in self._plan.chained:
                current.run()
        except Exception as error:
            if current is None:
                raise
            raise step_error(current.running(), error) from error


def lies_as(tensor: torch.Tensor, placed: Placed) -> bool:
    """Return whether a tensor has the strides and the alignment that steps expect."""
    return tensor.stride() == placed.strides and tensor.data_ptr() % ALIGNED == 0


def in_place(tensor: torch.Tensor, placed: Placed) -> torch.Tensor:
    """Return a tensor that steps read and write where it lies.

    Raises:
        InputError: it has other strides, or is not aligned.
    """
    if lies_as(tensor, placed):
        return tensor
    raise InputError(
        f"{placed.buffer}: it is used in place, so it must lie as the program has it: strides {list(placed.strides)}, aligned "
        f"to {ALIGNED} bytes; found strides {list(tensor.stride())}. Make it contiguous."
    )
