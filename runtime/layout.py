"""Buffers with known sizes: where each lies for one set of dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.ir.errors import ArtifactError, GraphwrightError

from .memory import MemoryPlanner, lifetimes
from .schedule import KernelStep, MatmulStep, Schedule, Size, Symbolic, View
from .sizes import compile_sizes

LARGEST = 2**62
"""Bytes; what is beyond this is an error in the schedule, or in the call."""


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype called `name`, such as "float32".

    Raises:
        ArtifactError: there is none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"there is no dtype {name!r}")
    return found


@dataclass(frozen=True, slots=True)
class Placed:
    """A buffer, or a view of one, of known sizes.

    Args:
        buffer: name of the buffer.
        dtype: of its elements.
        shape: sizes of the dimensions.
        strides: in elements.
        offset: of its first element in the buffer, in elements.
    """

    buffer: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def end(self) -> int:
        """Elements from the buffer's first to behind the view's last."""
        if 0 in self.shape:
            return self.offset
        return self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1

    @property
    def nbytes(self) -> int:
        """Bytes from the buffer's first element to behind the view's last."""
        return self.end * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where everything lies for one set of dimensions.

    Args:
        sizes: value of each size text.
        buffers: the buffers by name.
        offsets: of the temporary ones in the arena, in bytes.
        arena_bytes: size of the arena.
    """

    sizes: Mapping[Size, int]
    buffers: Mapping[str, Placed]
    offsets: Mapping[str, int]
    arena_bytes: int

    def size(self, size: Size) -> int:
        """Return the value of a size."""
        return self.sizes[size] if isinstance(size, str) else size

    def view(self, view: View) -> Placed:
        """Return a view with known sizes.

        Raises:
            GraphwrightError: it reaches out of its buffer.
        """
        buffer = self.buffers[view.buffer]
        shape, strides = self.all(view.shape), self.all(view.strides)
        placed = Placed(view.buffer, buffer.dtype, shape, strides, self.size(view.offset))
        if placed.offset < 0 or (0 not in shape and (min((*shape, *strides, 0)) < 0 or placed.end > buffer.end)):
            raise GraphwrightError(
                f"a view of shape {list(shape)}, strides {list(strides)} and offset {placed.offset} reaches out of "
                f"buffer {view.buffer} of shape {list(buffer.shape)}"
            )
        return placed

    def all(self, sizes: Sequence[Size]) -> tuple[int, ...]:
        """Return the values of several sizes."""
        return tuple([self.sizes[size] if isinstance(size, str) else size for size in sizes])


class LayoutMaker:
    """Works out the layouts of one schedule.

    Args:
        schedule: a schedule that `check_schedule` let through.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._buffers = tuple(schedule.buffers.values())
        self._dtypes = {buffer.name: dtype_of(buffer.dtype) for buffer in self._buffers}
        self._evaluate = compile_sizes(sizes_in(schedule), tuple(schedule.dimensions))
        self._temporaries = tuple(lifetimes(schedule))
        self._planner = MemoryPlanner(lifetimes(schedule))

    def layout(self, dimensions: Mapping[str, int]) -> Layout:
        """Return the layout for given dimensions.

        Raises:
            GraphwrightError: a size is negative, too large, or divides by 0.
        """
        try:
            sizes = self._evaluate(dimensions)
        except ZeroDivisionError as error:
            raise GraphwrightError(f"a size of the program divides by 0 where {dict(dimensions)}") from error
        bare = Layout(sizes, {}, {}, 0)
        buffers = {
            buffer.name: Placed(buffer.name, self._dtypes[buffer.name], bare.all(buffer.shape), bare.all(buffer.strides))
            for buffer in self._buffers
        }
        for placed in buffers.values():
            if min((*placed.shape, *placed.strides, 0)) < 0 or placed.nbytes > LARGEST:
                raise GraphwrightError(
                    f"buffer {placed.buffer} cannot have shape {list(placed.shape)} and strides {list(placed.strides)}, which "
                    f"it would where {dict(dimensions)}"
                )
        offsets, total = self._planner.place({name: buffers[name].nbytes for name in self._temporaries})
        return Layout(sizes, buffers, offsets, total)


def sizes_in(schedule: Schedule) -> Iterator[Size]:
    """Yield every size in a schedule, some more than once."""
    for buffer in schedule.buffers.values():
        yield from (*buffer.shape, *buffer.strides)
    yield from _sizes(schedule.outputs)
    for step in schedule.steps:
        if isinstance(step, KernelStep):
            yield from step.grid
            for argument in step.arguments:
                if isinstance(argument, View):
                    yield from _sizes(argument)
                elif not isinstance(argument, float):
                    yield argument
        elif isinstance(step, MatmulStep):
            yield from _sizes((step.x, step.out))
        else:
            yield from _sizes((step.arguments, step.keywords))


def _sizes(value: Any) -> Iterator[Size]:
    if isinstance(value, View):
        yield from (*value.shape, *value.strides, value.offset)
    elif isinstance(value, Symbolic):
        yield value.size
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _sizes(entry)
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _sizes(entry)
