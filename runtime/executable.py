"""A compiled model that can be called."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.signature import Signature

from .bound import BoundCall, in_place, lies_as
from .chained import ChainedRun, alone
from .layout import Layout, LayoutMaker, Placed
from .memory import ALIGNMENT
from .plan import Plan, Planner, step_error
from .profiling import Profile, ProfileRow, Stopwatch
from .schedule import Schedule
from .validate import check_schedule, check_signature
from .weights import WeightStore

__all__ = ["Executable", "Memory", "Profile", "ProfileRow"]

MOST_PLANS = 32
"""Sets of sizes whose plans are kept."""

Key = tuple[object, ...]


@dataclass(frozen=True)
class Memory:
    """Memory that a compiled model holds between calls.

    Args:
        arena_bytes: for temporary buffers, enough for the largest call so far.
        weight_bytes: for weights.
    """

    arena_bytes: int
    weight_bytes: int


class Executable:
    """A compiled model. Calling it computes what the model computes, without gradients.

    What a call needs is worked out once for each set of sizes, and kept for the last 32 sets. Calls from several threads run
    one after the other.

    Results are new tensors, but for one that is an argument itself: as in PyTorch, that tensor is returned. A result that is
    a weight is returned as a copy. Arguments may have any strides.

    Args:
        schedule: what to run.
        weights: by name. They are not referred to afterwards where they are kept in another form.
        signature: how the model is called.
        typical: dimensions that calls usually have, by name; weights are laid out for these.
        shared: an executable of the same model, whose weights are used in the form that it has them in.

    Raises:
        ArtifactError: the schedule is not whole, or does not fit the weights or the signature.
    """

    def __init__(
        self,
        schedule: Schedule,
        weights: Mapping[str, torch.Tensor],
        signature: Signature,
        *,
        typical: Mapping[str, int] | None = None,
        shared: Executable | None = None,
    ) -> None:
        check_schedule(schedule, weights)
        check_signature(schedule, signature)
        self.schedule = schedule
        self.signature = signature
        self._states = frozenset(name for name, buffer in schedule.buffers.items() if buffer.kind == "state")
        self._lock = threading.Lock()
        with torch.inference_mode(False), torch.no_grad():
            self._weights: WeightStore = WeightStore(schedule, weights, typical, None if shared is None else shared._weights)
            self._planner = Planner(schedule, self._weights)
        self._layouts = LayoutMaker(schedule)
        self._plans: OrderedDict[Key, Plan] = OrderedDict()
        self._arena = self._new_arena(0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Args:
            args: as the model takes them.
            kwargs: likewise.

        Returns:
            What the model returns.

        Raises:
            InputError: the arguments are not what the model was compiled for.
            GraphwrightError: a step failed; the message names it.
        """
        with self._lock, torch.no_grad():
            given = self._given(args, kwargs)
            plan = self._plan(given)
            results = self._run(plan, given, plan.chained)
        return self.signature.unflatten(results)

    def bind(self, *args: Any, **kwargs: Any) -> BoundCall:
        """Return a call that can be run again and again on the same tensors, which are read and written where they lie.

        Args:
            args: as the model takes them.
            kwargs: likewise.

        Raises:
            InputError: the arguments are not what the model was compiled for, or do not lie as the program has them.
        """
        given = self._given(args, kwargs)
        self.signature.check(given[: len(self.signature.tensors)])
        layout = self._layouts.layout(self._dimensions(given))
        self._check_inputs(given, layout)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return BoundCall(self._planner, layout, given, self._new_arena(layout.arena_bytes), self.signature)

    def profile(self, *args: Any, repeat: int = 10, **kwargs: Any) -> Profile:
        """Return how long each step takes, and the call beyond its steps.

        Args:
            args: as the model takes them.
            repeat: number of calls, at least 1.
            kwargs: likewise.

        Raises:
            InputError: the arguments are not what the model was compiled for.
        """
        if repeat < 1:
            raise InputError(f"profile: repeat must be at least 1, got {repeat}")
        self(*args, **kwargs)
        stopwatch = Stopwatch(self._synchronize)
        for _ in range(repeat):
            stopwatch.start()
            with self._lock, torch.no_grad():
                given = self._given(args, kwargs)
                plan = self._plan(given)
                results = self._run(
                    plan, given, [alone(*pair) for pair in zip(plan.steps, stopwatch.timed(plan.runs), strict=True)]
                )
            self.signature.unflatten(results)
            stopwatch.stop()
        return stopwatch.profile(plan.steps)

    @property
    def memory(self) -> Memory:
        """Memory that is held between calls."""
        return Memory(self._arena.numel(), self._weights.nbytes)

    def shared_weights(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return those of the weights passed whose memory is read in calls, by name."""
        return self._weights.shared(weights)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights by name; those kept in another form are unpacked into new tensors."""
        return self._weights.originals()

    # -- a call

    def _given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the tensors of a call, and what is derived of them."""
        given = self.signature.collect(args, kwargs)
        return given if self.signature.packing is None else [*given, *self.signature.derive(given)]

    def _run(self, plan: Plan, given: Sequence[torch.Tensor], runs: Sequence[ChainedRun]) -> list[Any]:
        current = None
        try:
            self._fill(plan, given)
            for current in runs:
                current.run()
            return [result(given) for result in plan.results]
        except Exception as error:
            if current is None:
                raise
            raise step_error(current.running(), error) from error
        finally:
            self._clear(plan)

    def _fill(self, plan: Plan, given: Sequence[torch.Tensor]) -> None:
        """Put a call's tensors where the steps look for them."""
        frame, device = plan.frame, self._arena.device
        for tensor, placed in zip(given, plan.inputs, strict=True):
            frame.tensors.append(in_place(tensor, placed) if placed.buffer in self._states else _readable(tensor, placed))
        for placed in plan.outputs:
            frame.tensors.append(torch.empty_strided(placed.shape, placed.strides, dtype=placed.dtype, device=device))
        frame.pointers.extend([tensor.data_ptr() for tensor in frame.tensors])

    def _clear(self, plan: Plan) -> None:
        plan.frame.tensors.clear()
        plan.frame.pointers.clear()

    def _synchronize(self) -> None:
        if self._arena.is_cuda:
            torch.cuda.synchronize()

    # -- plans

    def _plan(self, given: Sequence[torch.Tensor]) -> Plan:
        key = tuple([part for tensor in given for part in (tensor.shape, tensor.dtype, tensor.device)])
        plan = self._plans.get(key)
        if plan is not None:
            self._plans.move_to_end(key)
            return plan
        self.signature.check(given[: len(self.signature.tensors)])
        layout = self._layouts.layout(self._dimensions(given))
        self._check_inputs(given, layout)
        with torch.inference_mode(False), torch.no_grad():
            if layout.arena_bytes > self._arena.numel():
                # Plans hold addresses in the arena that goes.
                self._plans.clear()
                self._arena = self._new_arena(layout.arena_bytes)
            plan = self._planner.plan(layout, self._arena)
        self._plans[key] = plan
        if len(self._plans) > MOST_PLANS:
            self._plans.popitem(last=False)
        return plan

    def _new_arena(self, size: int) -> torch.Tensor:
        with torch.inference_mode(False):
            room = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=self.schedule.device)
        start = -room.data_ptr() % ALIGNMENT
        return room[start : start + size]

    def _dimensions(self, given: Sequence[torch.Tensor]) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, tensor in zip(self.schedule.inputs, given, strict=True):
            shape = self.schedule.buffers[name].shape
            if len(shape) != tensor.dim():
                raise InputError(f"{name}: expected {len(shape)} dimensions, got shape {list(tensor.shape)}")
            for size, number in zip(shape, tensor.shape, strict=True):
                if isinstance(size, str) and size in self.schedule.dimensions:
                    found.setdefault(size, number)
        for name, (low, high) in self.schedule.dimensions.items():
            if found[name] < low or (high is not None and found[name] > high):
                raise InputError(f"{name} must be {low} to {'any' if high is None else high}, got {found[name]}")
        return found

    def _check_inputs(self, given: Sequence[torch.Tensor], layout: Layout) -> None:
        for name, tensor in zip(self.schedule.inputs, given, strict=True):
            placed = layout.buffers[name]
            if tuple(tensor.shape) != placed.shape or tensor.dtype != placed.dtype or tensor.device != self._arena.device:
                raise InputError(
                    f"{name}: expected {placed.dtype} of shape {list(placed.shape)} on {self._arena.device}, "
                    f"got {tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
                )


def _readable(tensor: torch.Tensor, placed: Placed) -> torch.Tensor:
    """Return a tensor with the strides and alignment that steps expect: itself where it has them."""
    try:
        if lies_as(tensor, placed):
            return tensor
        return torch.empty_strided(placed.shape, placed.strides, dtype=placed.dtype, device=tensor.device).copy_(tensor)
    except RuntimeError as error:
        raise InputError(
            f"{placed.buffer}: expected a tensor with memory of its own, and found a {type(tensor).__name__} of layout "
            f"{tensor.layout}: {error}. What to do: pass a dense tensor, and call outside of vmap and of tracing."
        ) from error
