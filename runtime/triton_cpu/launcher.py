"""Triton's launcher: what `kernel[grid](...)` calls once the kernel is compiled."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any

from .arguments import Parameter, Reader, extent, flatten_arguments, is_flat, parameters_of
from .faults import Extent, FaultRecord, fault_error
from .generated import Site
from .launch_code import UPSTREAM_POSITIONS, launch_code
from .worker import CONTEXT_HEADER

_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32)

Launch = Callable[..., None]


def make_launcher(source: Any, metadata: Any) -> Launch:
    """Return the launch function of a compiled kernel.

    Args:
        source: Triton's source object: the kernel's signature and the names of its parameters.
        metadata: what compilation recorded.

    Returns:
        A function of the grid's three sizes, a stream (ignored), the kernel's address, packed and launch metadata, the two
        hooks, and the kernel's arguments.
    """
    signature = tuple(source.signature.values())
    function = getattr(source, "fn", None)
    names = tuple(getattr(function, "arg_names", None) or (str(key) for key in source.signature))
    parameters = parameters_of(metadata.name, names, signature, metadata.arguments)
    sites = tuple(Site(**site) if isinstance(site, dict) else Site(*site) for site in metadata.sites)
    reader = Reader(metadata.name, parameters, sites)
    launch: Launch
    if metadata.checked:
        launch = CheckedLauncher(reader, extents_known=not metadata.makes_pointers)
    else:
        launch = launch_code().upstream([parameter.kind for parameter in parameters], reader)
    if is_flat(signature):
        return launch

    def flattening(*call: Any) -> None:
        launch(*call[:UPSTREAM_POSITIONS], *flatten_arguments(signature, call[UPSTREAM_POSITIONS:]))

    return flattening


class CheckedLauncher:
    """A launcher that tells the kernel which memory it may touch.

    Args:
        reader: reads the kernel's arguments.
        extents_known: as in `run_checked`.
    """

    def __init__(self, reader: Reader, *, extents_known: bool) -> None:
        self._reader = reader
        self._extents_known = extents_known

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: object,
        function: int,
        packed_metadata: object,
        launch_metadata: Any,
        enter_hook: Callable[[Any], object] | None,
        exit_hook: Callable[[Any], object] | None,
        *arguments: Any,
    ) -> None:
        """Launch the kernel at the address `function`."""
        if enter_hook is not None:
            enter_hook(launch_metadata)
        run_checked(self._reader, function, (x, y, z), arguments, extents_known=self._extents_known)
        if exit_hook is not None:
            exit_hook(launch_metadata)


def run_checked(reader: Reader, entry: int, grid: Sequence[int], arguments: Sequence[Any], *, extents_known: bool) -> None:
    """Run a kernel that was compiled for checking.

    A raw address has no known extent: a launch that passes one for a pointer is not checked.

    Args:
        reader: reads the kernel's arguments.
        entry: address of the kernel's entry point.
        grid: number of programs in each direction.
        arguments: one per parameter of the reader.
        extents_known: whether the kernel uses no memory but that of its arguments; it does when it makes pointers from
            integers, and is then not checked.

    Raises:
        KernelFault: a device_assert failed, or an access lies outside the tensors among the arguments.
    """
    parameters = reader.parameters
    if len(arguments) != len(parameters):
        raise TypeError(f"{reader.kernel}: takes {len(parameters)} arguments, got {len(arguments)}")
    total = grid[0] * grid[1] * grid[2]
    if min(grid) < 0 or max(grid) > 2**31 - 1 or total >= 1 << 63:
        raise ValueError(f"{reader.kernel}: the grid {tuple(grid)} is out of range")
    if total == 0:
        return
    bits = [reader(k, value) for k, value in enumerate(arguments)]
    slots = [b for b, parameter in zip(bits, parameters, strict=True) if parameter.element != "skip"]
    extents = _extents(parameters, arguments) if extents_known else None
    record = FaultRecord()
    ranges = (ctypes.c_int64 * (2 * len(extents or ())))(*(x for e in extents or () for x in (e.begin, e.end)))
    if extents is not None:
        record.range_count = len(extents)
        record.ranges = ctypes.addressof(ranges) or None
    header = CONTEXT_HEADER.pack(0, total, 0, *grid, 0, ctypes.addressof(record))
    context = ctypes.create_string_buffer(header + struct.pack(f"<{len(slots)}Q", *slots))
    _ENTRY(entry)(ctypes.addressof(context), launch_code().thread_count())
    if record.state:
        raise fault_error(record, reader.kernel, reader.sites, extents or ())


def _extents(parameters: Sequence[Parameter], arguments: Sequence[Any]) -> list[Extent] | None:
    """Return the memory of each tensor argument; None when a pointer of unknown extent is among them."""
    found = []
    for parameter, value in zip(parameters, arguments, strict=True):
        if parameter.element != "ptr" or value is None:
            continue
        memory = extent(parameter.name, value)
        if memory is None:
            return None
        found.append(memory)
    return found
