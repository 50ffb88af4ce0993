"""Calls bound to memory: what one call of a program with given sizes does, step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphwright.ir.errors import GraphwrightError

from .calls import copy_result, filled, find_operation
from .chained import BoundStep, ChainedRun, chained
from .kernels import KernelCache, Pointer
from .layout import Layout, Placed
from .memory import views_in
from .schedule import CallStep, KernelStep, MatmulStep, Schedule, Step, Symbolic, View
from .weights import WeightStore

Run = Callable[[], object]
Result = Callable[[Sequence[torch.Tensor]], Any]
"""From the tensors as the caller passed them to one of the call's results."""


@dataclass(slots=True)
class Frame:
    """What differs from call to call: the tensors that it brings, then those that it makes, and their addresses."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    pointers: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a call with given sizes does.

    Args:
        inputs: the buffers of the call's tensors.
        outputs: the buffers that a call makes.
        steps: those that are not skipped.
        runs: what runs each step.
        chained: what runs all steps, in as few calls as can be.
        results: make the call's results.
        frame: where `runs` and `results` look for the call's tensors.
    """

    inputs: tuple[Placed, ...]
    outputs: tuple[Placed, ...]
    steps: tuple[Step, ...]
    runs: tuple[Run, ...]
    chained: tuple[ChainedRun, ...]
    results: tuple[Result, ...]
    frame: Frame


class Planner:
    """Makes plans of one schedule.

    Args:
        schedule: a schedule that `check_schedule` let through.
        weights: its weights.
    """

    def __init__(self, schedule: Schedule, weights: WeightStore) -> None:
        self.schedule = schedule
        self.weights = weights
        self.kernels = KernelCache(schedule.kernels, schedule.device)
        self.operations = [
            find_operation(step.operation, into=step.into) if isinstance(step, CallStep) else None for step in schedule.steps
        ]
        self.made = tuple(name for name, buffer in schedule.buffers.items() if buffer.kind == "output")
        self.slots = {name: k for k, name in enumerate((*schedule.inputs, *self.made))}

    def plan(self, layout: Layout, arena: torch.Tensor, fixed: Mapping[str, torch.Tensor] | None = None) -> Plan:
        """Return a plan.

        Args:
            layout: where buffers lie.
            arena: uint8, at least as long as the layout says, aligned as `memory.ALIGNMENT` says.
            fixed: tensors that are the same in every call, by the buffers that they are: all inputs and outputs, or none.

        Raises:
            GraphwrightError: a step cannot be bound to its memory; the message names it.
        """
        binder = _Binder(self, layout, arena, fixed or {})
        bound: list[BoundStep] = []
        for step, operation in zip(self.schedule.steps, self.operations, strict=True):
            try:
                made = binder.bind(step, operation)
            except Exception as error:
                raise step_error(step, error) from error
            if made is not None:
                bound.append(made)
        results = tuple(binder.result(value) for value in self.schedule.outputs)
        inputs = tuple(layout.buffers[name] for name in self.schedule.inputs)
        outputs = tuple(layout.buffers[name] for name in self.made)
        steps, runs = tuple(entry.step for entry in bound), tuple(entry.run for entry in bound)
        return Plan(inputs, outputs, steps, runs, chained(bound, binder.frame.pointers), results, binder.frame)


def step_error(step: Step, error: Exception) -> GraphwrightError:
    """Return the error for a step that failed: its name, what it computes, and why."""
    what = f"\nIt computes {step.provenance}" if step.provenance else ""
    return GraphwrightError(f"step {step.name!r} failed: {type(error).__name__}: {error}{what}")


class _Binder:
    def __init__(self, planner: Planner, layout: Layout, arena: torch.Tensor, fixed: Mapping[str, torch.Tensor]) -> None:
        self._planner = planner
        self._fixed = fixed
        self._layout = layout
        self._arena = arena
        self._base = arena.data_ptr()
        self._slots = {} if fixed else planner.slots
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self.frame = Frame()

    def bind(self, step: Step, operation: Any) -> BoundStep | None:
        """Return a step bound to its memory, None if nothing has to run."""
        if isinstance(step, KernelStep):
            return self._kernel(step)
        if isinstance(step, MatmulStep):
            return self._matmul(step)
        return BoundStep(step, self._call(step, operation))

    def result(self, value: Any) -> Result:
        """Return what makes one of the call's results."""
        if isinstance(value, Symbolic):
            number = self._layout.size(value.size)
            return lambda given: number
        if not isinstance(value, View):
            return lambda given: value
        placed, frame = self._layout.view(value), self.frame
        buffer = self._layout.buffers[value.buffer]
        whole = placed == buffer
        slot = self._slots.get(value.buffer, -1)
        if value.buffer in self._fixed:
            same = self._tensor(placed)
            return lambda given: same
        if slot < 0:
            fixed = self._tensor(placed)
            return lambda given: fixed.clone(memory_format=torch.contiguous_format)
        if not whole:
            return lambda given: self._current(placed)
        if slot < len(self._planner.schedule.inputs):
            return lambda given: given[slot]
        return lambda given: frame.tensors[slot]

    # -- memory

    def _tensor(self, placed: Placed) -> torch.Tensor:
        """Return a view of memory that stays where it is; for what moves, of other memory like it."""
        name = placed.buffer
        if name in self._fixed:
            tensor = self._fixed[name]
            return tensor.as_strided(placed.shape, placed.strides, tensor.storage_offset() + placed.offset)
        if name in self._slots:
            buffer = self._layout.buffers[name]
            like = torch.empty_strided(buffer.shape, buffer.strides, dtype=buffer.dtype, device=self._arena.device)
            return like.as_strided(placed.shape, placed.strides, placed.offset)
        offset = self._layout.offsets.get(name)
        if offset is None:
            weight = self._planner.weights.tensor(name)
            return weight.as_strided(placed.shape, placed.strides, weight.storage_offset() + placed.offset)
        typed = self._typed.get(placed.dtype)
        if typed is None:
            size = placed.dtype.itemsize
            typed = self._typed[placed.dtype] = self._arena[: self._arena.numel() // size * size].view(placed.dtype)
        first = typed.storage_offset() + offset // placed.dtype.itemsize
        return typed.as_strided(placed.shape, placed.strides, first + placed.offset)

    def _address(self, placed: Placed) -> int:
        """Return the address of the first element; for what moves, relative to a well aligned start."""
        shift = placed.offset * placed.dtype.itemsize
        if placed.buffer in self._fixed:
            return shift + self._fixed[placed.buffer].data_ptr()
        if placed.buffer in self._slots:
            return shift
        offset = self._layout.offsets.get(placed.buffer)
        return shift + (self._planner.weights.tensor(placed.buffer).data_ptr() if offset is None else self._base + offset)

    # -- steps

    def _kernel(self, step: KernelStep) -> BoundStep | None:
        layout = self._layout
        grid = layout.all(step.grid)
        arguments: list[Any] = []
        moving: dict[int, tuple[int, int]] = {}
        for k, argument in enumerate(step.arguments):
            if isinstance(argument, View):
                placed = layout.view(argument)
                arguments.append(Pointer(placed.dtype, self._address(placed)))
                if placed.buffer in self._slots:
                    moving[k] = (self._slots[placed.buffer], arguments[-1].address)
            else:
                arguments.append(argument if isinstance(argument, float) else layout.size(argument))
        if 0 in grid:
            return None
        launch = self._planner.kernels.launch(step.kernel, grid, arguments, step.constants)
        found = launch.native.link() if launch.native is not None else None
        link, offsets = found if found is not None else (None, ())
        if not moving:
            return BoundStep(step, launch.run, link)
        values, places = launch.values, launch.places
        moves = [(places[k], slot, shift) for k, (slot, shift) in moving.items()]
        pointers, function = self.frame.pointers, launch.run

        def run() -> None:
            for place, slot, shift in moves:
                values[place] = pointers[slot] + shift
            function(*values)

        context = tuple((offsets[place] or 0, slot, shift) for place, slot, shift in moves) if link is not None else ()
        return BoundStep(step, run, link, context)

    def _matmul(self, step: MatmulStep) -> BoundStep | None:
        x, out = self._layout.view(step.x), self._layout.view(step.out)
        weight = self._planner.weights.prepared(step.weight)
        if 0 in out.shape:
            return None
        slots = [self._slots.get(placed.buffer, -1) for placed in (x, out)]
        if max(slots) >= 0 and self._arena.is_cuda:
            # Memory like that of the call's tensors costs nothing on a CPU before it is written to.
            return BoundStep(step, lambda: weight.bind(self._current(x), self._current(out), accumulate=step.accumulate).run())
        product = weight.bind(self._tensor(x), self._tensor(out), accumulate=step.accumulate)
        link, *offsets = product.native.link() if product.native is not None else (None, 0, 0)
        if max(slots) < 0:
            return BoundStep(step, product.run, link)
        (x_slot, out_slot), (x_shift, out_shift) = slots, (self._address(x), self._address(out))
        pointers, rebind = self.frame.pointers, product.with_pointers

        def run() -> None:
            rebind(
                x_shift if x_slot < 0 else pointers[x_slot] + x_shift,
                out_shift if out_slot < 0 else pointers[out_slot] + out_shift,
            )

        placed = zip(offsets, slots, (x_shift, out_shift), strict=True)
        return BoundStep(step, run, link, tuple(move for move in placed if move[1] >= 0))

    def _call(self, step: CallStep, operation: Any) -> Run:
        layout = self._layout
        args: list[Any] = filled(step.arguments, self._argument, layout.size)
        kwargs: dict[str, Any] = filled(step.keywords, self._argument, layout.size)
        outs: list[Any] = [self._memory(layout.buffers[name]) if name else None for name in step.outs]
        call: Callable[..., object] = _call_into if step.into else _call_and_copy
        used = {*step.outs, *(view.buffer for view in views_in((step.arguments, step.keywords)))}
        if used.isdisjoint(self._slots):
            return functools.partial(call, operation, args, kwargs, outs)
        return lambda: call(operation, self._now(args), self._now(kwargs), self._now(outs))

    def _argument(self, view: View) -> torch.Tensor | Placed:
        return self._memory(self._layout.view(view))

    def _memory(self, placed: Placed) -> torch.Tensor | Placed:
        """Return a view of memory that stays where it is; what moves is looked up in each call."""
        return placed if placed.buffer in self._slots else self._tensor(placed)

    def _now(self, value: Any) -> Any:
        """Return a value with the present call's tensors in it."""
        if isinstance(value, Placed):
            return self._current(value)
        if isinstance(value, list):
            return [self._now(entry) for entry in value]
        if isinstance(value, dict):
            return {key: self._now(entry) for key, entry in value.items()}
        return value

    def _current(self, placed: Placed) -> torch.Tensor:
        """Return a view of memory as it is in the present call."""
        slot = self._slots.get(placed.buffer, -1)
        if slot < 0:
            return self._tensor(placed)
        tensor = self.frame.tensors[slot]
        return tensor.as_strided(placed.shape, placed.strides, tensor.storage_offset() + placed.offset)


def _call_and_copy(operation: Any, args: list[Any], kwargs: dict[str, Any], outs: list[torch.Tensor | None]) -> None:
    copy_result(operation(*args, **kwargs), outs)


def _call_into(operation: Any, args: list[Any], kwargs: dict[str, Any], outs: list[torch.Tensor]) -> None:
    (out,) = outs
    shape, address = out.shape, out.data_ptr()
    operation(*args, **kwargs, out=out)
    # PyTorch makes a result of another shape fit, somewhere else or over the neighbours.
    if out.shape != shape or out.data_ptr() != address:
        raise GraphwrightError(f"it returned shape {list(out.shape)}, and {list(shape)} was planned")
