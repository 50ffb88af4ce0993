"""Checking that a schedule is whole: everything it refers to is there, and of the right kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from graphwright.ir.errors import ArtifactError, unknown
from graphwright.ir.signature import Signature

from .calls import find_operation
from .kernel_source import check_source
from .layout import dtype_of, sizes_in
from .memory import buffers_of, views_in
from .schedule import Buffer, KernelStep, MatmulStep, Schedule, Size, Step
from .sizes import compile_sizes

KINDS = ("input", "state", "weight", "temporary", "output")
GIVEN = ("input", "state")
LARGEST_DIMENSION = 2**48


def check_schedule(schedule: Schedule, weights: Iterable[str]) -> None:
    """Check a schedule without running anything of it.

    Args:
        schedule: from anywhere.
        weights: names of the weights there are.

    Raises:
        ArtifactError: it is not whole; the message names the step or the buffer.
    """
    _check_dimensions(schedule.dimensions)
    for name, buffer in schedule.buffers.items():
        _check_buffer(name, buffer, frozenset(weights))
    for name in schedule.inputs:
        if _buffer(schedule, name, "inputs").kind not in GIVEN:
            raise ArtifactError(f"inputs: buffer {name!r} is no input")
    unlisted = {n for n, b in schedule.buffers.items() if b.kind in GIVEN} ^ set(schedule.inputs)
    if unlisted or len(set(schedule.inputs)) != len(schedule.inputs):
        raise ArtifactError(f"inputs: each input buffer must be listed once; this one is not: {min(unlisted, default='')}")
    # A grid or a size is evaluated before anything else is known to be right, so all texts are looked at first.
    compile_sizes(sizes_in(schedule), tuple(schedule.dimensions))
    given = {size for name in schedule.inputs for size in schedule.buffers[name].shape}
    for dimension in schedule.dimensions:
        if dimension not in given:
            raise ArtifactError(f"no input has the dimension {dimension!r} as a size, so that it cannot be known")
    for name, source in schedule.kernels.items():
        try:
            check_source(source)
        except ArtifactError as error:
            raise ArtifactError(f"kernel {name}: {error}") from error
    for step in schedule.steps:
        _check_step(schedule, step)
    for view in views_in(schedule.outputs):
        _check_view(schedule, view, "outputs")


def check_signature(schedule: Schedule, signature: Signature) -> None:
    """Check that a schedule takes the tensors of a call, and then what its signature works out of these.

    Args:
        schedule: one that `check_schedule` let through.
        signature: of the calls.

    Raises:
        ArtifactError: it takes others.
    """
    packing, given = signature.packing, len(signature.tensors)
    parts = () if packing is None else packing.parts
    if len(schedule.inputs) != given + len(parts):
        raise ArtifactError(f"{len(schedule.inputs)} inputs, and {given} tensors in a call with {len(parts)} made of them")
    if packing is None:
        return
    mask = schedule.buffers[schedule.inputs[packing.mask]]
    for name, part in zip(schedule.inputs[given:], parts, strict=True):
        buffer, shape = schedule.buffers[name], packing.shape(part, mask.shape)
        dtype = "int32" if part == "starts" else "int64"
        if (buffer.dtype, buffer.shape) != (dtype, shape) or packing.dimension not in schedule.dimensions:
            raise ArtifactError(
                f"input {name!r} is {buffer.dtype} {buffer.shape}, and {dtype} {shape} is made of the mask for it"
            )


def _check_dimensions(dimensions: Mapping[str, tuple[int, int | None]]) -> None:
    for name, (low, high) in dimensions.items():
        if not 0 <= low <= (LARGEST_DIMENSION if high is None else high) <= LARGEST_DIMENSION:
            raise ArtifactError(f"dimension {name}: {low} to {high} is no range")


def _check_buffer(name: str, buffer: Buffer, weights: frozenset[str]) -> None:
    if buffer.name != name or buffer.kind not in KINDS:
        raise ArtifactError(f"buffer {name}: it is called {buffer.name!r}, of kind {buffer.kind!r}; known: {', '.join(KINDS)}")
    dtype_of(buffer.dtype)
    _check_rank(buffer.shape, buffer.strides, f"buffer {name}")
    if buffer.kind == "weight":
        if buffer.source not in weights:
            raise ArtifactError(f"buffer {name}: {unknown('weight', buffer.source, weights)}")
        if not all(isinstance(size, int) for size in (*buffer.shape, *buffer.strides)):
            raise ArtifactError(f"buffer {name}: the sizes of a weight must be numbers, got {buffer.shape}")


def _check_rank(shape: tuple[Size, ...], strides: tuple[Size, ...], where: str) -> None:
    if len(shape) != len(strides):
        raise ArtifactError(f"{where}: {len(shape)} sizes and {len(strides)} strides")
    for size in (*shape, *strides):
        if isinstance(size, bool) or not isinstance(size, int | str) or (isinstance(size, int) and size < 0):
            raise ArtifactError(f"{where}: {size!r} cannot be a size or a stride")


def _buffer(schedule: Schedule, name: str, where: str) -> Buffer:
    if name not in schedule.buffers:
        raise ArtifactError(f"{where}: {unknown('buffer', name, schedule.buffers)}")
    return schedule.buffers[name]


def _check_view(schedule: Schedule, view: Any, where: str) -> None:
    _buffer(schedule, view.buffer, where)
    _check_rank(view.shape, view.strides, f"{where}: view of {view.buffer}")
    if isinstance(view.offset, int) and view.offset < 0:
        raise ArtifactError(f"{where}: view of {view.buffer}: the offset is {view.offset}")


def _check_step(schedule: Schedule, step: Step) -> None:
    where = f"step {step.name!r}"
    for name in buffers_of(step):
        _buffer(schedule, name, where)
    for name in _written(step):
        if schedule.buffers[name].kind not in ("state", "temporary", "output"):
            raise ArtifactError(f"{where}: it writes buffer {name!r}, which is of kind {schedule.buffers[name].kind!r}")
    if isinstance(step, KernelStep):
        if step.kernel not in schedule.kernels:
            raise ArtifactError(f"{where}: {unknown('kernel', step.kernel, schedule.kernels)}")
        if not 1 <= len(step.grid) <= 3:
            raise ArtifactError(f"{where}: the grid must have 1 to 3 directions, got {step.grid}")
        for view in views_in(step.arguments):
            _check_view(schedule, view, where)
    elif isinstance(step, MatmulStep):
        for view in (step.x, step.out):
            _check_view(schedule, view, where)
        weight = schedule.buffers[step.weight]
        if weight.kind != "weight" or not len(weight.shape) == len(step.x.shape) == len(step.out.shape) == 2:
            raise ArtifactError(f"{where}: x, weight and out must be matrices, and buffer {step.weight!r} a weight")
    else:
        for view in views_in((step.arguments, step.keywords)):
            _check_view(schedule, view, where)
        if step.into and (len(step.outs) != 1 or not step.outs[0]):
            raise ArtifactError(f"{where}: an operation can write into one buffer, got {step.outs}")
        try:
            find_operation(step.operation, into=step.into)
        except ArtifactError as error:
            raise ArtifactError(f"{where}: {error}") from error


def _written(step: Step) -> Iterable[str]:
    if isinstance(step, KernelStep):
        return step.writes
    if isinstance(step, MatmulStep):
        return (step.out.buffer,)
    return tuple(name for name in step.outs if name)
