"""Compiled kernels by what they were compiled for, and launches of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.ir.errors import ArtifactError, unknown

from .kernel_source import kernel_functions

COMPILE_OPTIONS = frozenset({"num_warps", "num_stages", "debug"})
"""What may stand among a step's constants without being a parameter of the kernel. With `debug`, what it asserts is checked."""

Run = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel bound to a grid and arguments.

    Args:
        run: runs the kernel with the arguments that it was bound to, or with others: all of them, as in `values`.
        values: the arguments in the kernel's order, constants included, addresses as numbers.
        places: where in `values` each argument stands that is not a constant.
        native: the launch as `runtime.triton_cpu` has it, None on other devices.
    """

    run: Run
    values: list[Any]
    places: tuple[int, ...]
    native: Any = None


@dataclass(frozen=True, slots=True)
class Pointer:
    """The address of a tensor's first element.

    It looks like a tensor to Triton, without being one for each of the many places in an arena.
    """

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        """Return the address."""
        return self.address


Argument = Pointer | int | float


class Kernel:
    """A Triton function, and what was compiled of it for one device.

    Args:
        function: decorated with `triton.jit`.
        device: "cpu" or "cuda".
    """

    def __init__(self, function: Any, device: str) -> None:
        from triton.runtime.jit import create_function_from_signature

        self.name: str = function.__name__
        self._function = function
        self._device = device
        self._binder = create_function_from_signature(function.signature, function.params, _backend(device))
        self._places = tuple(param.name if param.is_constexpr else None for param in function.params)
        self._free = tuple(k for k, name in enumerate(self._places) if name is None)
        self._variants: dict[Any, Any] = {}

    def launch(self, grid: Sequence[int], arguments: Sequence[Argument], constants: Mapping[str, int]) -> Launch:
        """Return a launch bound to a grid and arguments.

        The kernel is compiled unless it has been for arguments like these: of the same dtypes, with the same ones divisible
        by 16 and equal to 1, and with the same constants.

        Args:
            grid: number of programs in up to three directions.
            arguments: those that are not constants, in the kernel's order.
            constants: compile-time constants, and options of the compilation, by name.

        Raises:
            ArtifactError: the arguments or constants are not those of the kernel.
        """
        full = self._arranged(arguments, constants)
        options = {name: constants[name] for name in COMPILE_OPTIONS & constants.keys()}
        specialization = self._binder(*full)[1]
        key = (tuple(specialization), *(full[k] for k, name in enumerate(self._places) if name), *sorted(options.items()))
        variant = self._variants.get(key)
        if variant is None:
            compile_variant = _CPUVariant if self._device == "cpu" else _GPUVariant
            variant = self._variants.setdefault(key, compile_variant(self._function, grid, full, options))
        plain = [value.address if isinstance(value, Pointer) else value for value in full]
        bound = variant.bind(grid, plain)
        if self._device == "cpu":
            return Launch(bound.function, plain, self._free, bound)
        return Launch(bound, plain, self._free)

    def _arranged(self, arguments: Sequence[Argument], constants: Mapping[str, int]) -> list[Any]:
        wanted = {name for name in self._places if name}
        given = constants.keys() - (COMPILE_OPTIONS - wanted)
        if given != wanted:
            raise ArtifactError(
                f"kernel {self.name} takes the constants {', '.join(sorted(wanted)) or 'none'}, "
                f"got {', '.join(sorted(given)) or 'none'}"
            )
        count = len(self._places) - len(wanted)
        if len(arguments) != count:
            raise ArtifactError(f"kernel {self.name} takes {count} arguments besides constants, got {len(arguments)}")
        rest = iter(arguments)
        return [constants[name] if name else next(rest) for name in self._places]


class _CPUVariant:
    def __init__(self, function: Any, grid: Sequence[int], full: Sequence[Any], options: Mapping[str, int]) -> None:
        from .triton_cpu.prepared import prepare

        self._first = prepare(function, grid, *full, **options)

    def bind(self, grid: Sequence[int], values: Sequence[Any]) -> Any:
        return self._first.rebind(grid, values)


class _GPUVariant:
    def __init__(self, function: Any, grid: Sequence[int], full: Sequence[Any], options: Mapping[str, int]) -> None:
        self._compiled = function.run(*full, grid=tuple(grid), warmup=True, **options)

    def bind(self, grid: Sequence[int], values: Sequence[Any]) -> Run:
        from triton.runtime import driver

        compiled, active = self._compiled, driver.active
        run = compiled.run  # loads the kernel, so that `function` below is known
        x, y, z = (*grid, 1, 1)[:3]

        def launch(*arguments: Any) -> None:
            stream = active.get_current_stream(active.get_current_device())
            run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *(arguments or values))

        return launch


def _backend(device: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime import driver

    if device != "cpu":
        return make_backend(driver.active.get_current_target())
    from .triton_cpu import isa
    from .triton_cpu.compiler import TARGET, CPUBackend

    return CPUBackend(GPUTarget(TARGET, isa.host_isa().name, 1))


_kernels: dict[tuple[str, str, str], Kernel] = {}


class KernelCache:
    """The kernels of a schedule by name. Kernels with the same source are one, also across schedules.

    Args:
        sources: name -> source text of the module that defines the kernel: the module's function of that name, or else
            its last one.
        device: "cpu" or "cuda".

    Raises:
        ArtifactError: a source holds something else than kernels.
    """

    def __init__(self, sources: Mapping[str, str], device: str) -> None:
        self._kernels = {name: _kernel(name, source, device) for name, source in sources.items()}

    def launch(self, kernel: str, grid: Sequence[int], arguments: Sequence[Argument], constants: Mapping[str, int]) -> Launch:
        """Return a launch of the kernel called `kernel`, see `Kernel.launch`."""
        found = self._kernels.get(kernel)
        if found is None:
            raise ArtifactError(unknown("kernel", kernel, self._kernels))
        return found.launch(grid, arguments, constants)


def _kernel(name: str, source: str, device: str) -> Kernel:
    functions = kernel_functions(source)
    function = functions.get(name) or list(functions.values())[-1]
    key = (source, function.__name__, device)
    found = _kernels.get(key)
    return found if found is not None else _kernels.setdefault(key, Kernel(function, device))
