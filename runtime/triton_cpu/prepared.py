"""Launching a kernel many times at little cost.

`kernel[grid](...)` binds and inspects its arguments at every launch, which takes many times longer than a small kernel. Here
that is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .arguments import Parameter, PreparedReader, flatten_arguments, is_flat, parameters_of

if TYPE_CHECKING:
    from .chain import Link
    from .loaded import LoadedKernel

Grid = Sequence[int] | Callable[[dict[str, Any]], Sequence[int]]


class Launch:
    """A kernel bound to a grid and arguments. Calling it runs the kernel and returns when it has run.

    `launch()` uses the arguments it was prepared with, `launch(*tensors)` other tensors in place of all tensors among them,
    and `launch(*arguments)` other arguments altogether, in the order in which `prepare` was given them. Other arguments must
    agree with the first ones in what the kernel was compiled for: dtypes, alignment, and the values of arguments that Triton
    turned into constants. Launches of one object may overlap in several threads.

    Attributes:
        compiled: Triton's compiled kernel.
        grid: number of programs in each direction.
        function: does what calling the object does, in less time.
    """

    __slots__ = ("_values", "_variant", "compiled", "function", "grid")

    def __init__(self, variant: _Variant, grid: tuple[int, int, int], values: tuple[Any, ...]) -> None:
        self.compiled = variant.compiled
        self.grid = grid
        self.function = variant.bind(grid, values)
        self._values = values
        self._variant = variant

    def __call__(self, *arguments: Any) -> None:
        """Run the kernel.

        Raises:
            TypeError, ValueError: the arguments are not what the kernel was compiled for.
            KernelFault: a device_assert failed, or a checked access.
        """
        self.function(*arguments)

    def rebind(self, grid: Sequence[int], arguments: Sequence[Any]) -> Launch:
        """Return a launch of the same compiled kernel on another grid, with other arguments.

        This takes far less time than `prepare`, which compiles, or asks Triton for what it compiled before.

        Args:
            grid: number of programs in up to three directions.
            arguments: in the order in which `prepare` was given them, all of them. The address of a tensor's first element
                may stand for it; then the caller keeps the tensor alive, and nothing checks its dtype.

        Raises:
            TypeError, ValueError: the arguments are not what the kernel was compiled for: dtypes, alignment, or the values
                that Triton turned into constants.
        """
        reader = self._variant.reader
        if len(arguments) != reader.replaceable:
            raise TypeError(f"{reader.kernel}: rebinding takes {reader.replaceable} arguments, got {len(arguments)}")
        values = (*arguments, *self._variant.kept)
        for k, value in enumerate(values):
            reader(k, value)
        return Launch(self._variant, _grid(grid), values)

    def link(self) -> tuple[Link, tuple[int | None, ...]] | None:
        """Return the launch as a link of a chain, and where in the link's context each argument stands.

        An argument that the kernel was specialised for stands nowhere: None. A launch that has to be checked, or that runs
        nothing, is no link: None instead of both.
        """
        from .chain import Link, launch_context
        from .launch_code import FAULT, KINDS
        from .worker import CONTEXT_HEADER

        variant, programs = self._variant, self.grid[0] * self.grid[1] * self.grid[2]
        if variant.compiled.metadata.checked or programs == 0:
            return None
        bits: list[int] = []
        places: list[int | None] = []
        for k, (value, kind) in enumerate(zip(self._values, variant.kinds, strict=True)):
            if kind == KINDS["skip"]:
                places.append(None)
                continue
            places.append(CONTEXT_HEADER.size + 8 * len(bits))
            bits.append(variant.reader(k, value))

        def fault(record: int) -> None:
            variant.reader(FAULT, record)

        return Link(variant.loaded.entry, launch_context(self.grid, bits), programs, fault), tuple(places)

    def __repr__(self) -> str:
        return f"Launch({self.compiled.name}, grid={self.grid})"


@dataclass(frozen=True, slots=True, eq=False)
class _Variant:
    """A compiled kernel and how its arguments are read.

    Args:
        compiled: Triton's compiled kernel.
        reader: reads and checks the arguments.
        loaded: the loaded machine code.
        kinds: how compiled code is to read each argument.
        dtypes: for each argument the dtype that a tensor must have.
        kept: the arguments behind those that a call may replace.
    """

    compiled: Any
    reader: PreparedReader
    loaded: LoadedKernel
    kinds: tuple[int, ...]
    dtypes: tuple[Any, ...]
    kept: tuple[Any, ...]

    def bind(self, grid: tuple[int, int, int], values: tuple[Any, ...]) -> Callable[..., None]:
        """Return the function that launches the kernel; the arguments have been read once, and fit."""
        from .launch_code import launch_code
        from .launcher import run_checked

        reader, entry = self.reader, self.loaded.entry
        if not self.compiled.metadata.checked:
            return launch_code().prepared(entry, grid, self.kinds, reader.replaceable, values, self.dtypes, reader)
        extents_known = not self.compiled.metadata.makes_pointers

        def run(*arguments: Any) -> None:
            run_checked(reader, entry, grid, reader.merge(values, arguments), extents_known=extents_known)

        return run


def prepare(kernel: Any, grid: Grid, *args: Any, **kwargs: Any) -> Launch:
    """Compile a kernel for the CPU and bind it to a grid and arguments.

    The kernel runs on the CPU whatever device Triton is using otherwise. Triton's launch hooks and the kernel's pre-run hooks
    are not called.

    Args:
        kernel: a function decorated with `triton.jit`, also with `triton.heuristics` or `triton.autotune` on top. Tuning
            launches the kernel, and needs the CPU driver to be Triton's active one.
        grid: number of programs in up to three directions, or a function of the kernel's arguments by name.
        args: the kernel's arguments, without constants that are given by name.
        kwargs: the kernel's other arguments, and options of the compilation such as `debug=True`.

    Raises:
        TypeError: `kernel` is something else.
        UnsupportedError: the kernel uses something that is not lowered for the CPU.
    """
    from triton.runtime.jit import JITFunction

    function, named = _resolve(kernel, args, kwargs, grid)
    if not isinstance(function, JITFunction):
        raise TypeError(f"prepare: expected a function decorated with triton.jit, got {type(function).__name__}")
    compiled, bound = _compile(function, args, named)
    return _bind(compiled, _grid(grid(bound) if callable(grid) else grid), bound, len(args))


def _grid(sizes: Sequence[int]) -> tuple[int, int, int]:
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"prepare: the grid must have 1 to 3 directions, got {tuple(sizes)}")
    x, y, z = (*(int(n) for n in sizes), 1, 1)[:3]
    if min(x, y, z) < 0 or max(x, y, z) > 2**31 - 1:
        raise ValueError(f"prepare: each direction of the grid must have 0 to {2**31 - 1} programs, got {tuple(sizes)}")
    return x, y, z


def native_assembly(compiled: Any) -> str:
    """Return the assembly of a kernel that Triton compiled for the CPU (the value of `kernel[grid](...)`)."""
    from . import isa, jit

    return jit.assembly(compiled.asm["llir"], isa.detect(compiled.metadata.isa))


def _resolve(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Grid) -> tuple[Any, dict[str, Any]]:
    """Return the jit function under decorators, and the named arguments with what the decorators choose."""
    from triton.runtime.autotuner import Autotuner, Heuristics

    named = dict(kwargs)
    while isinstance(kernel, Autotuner | Heuristics):
        if isinstance(kernel, Heuristics):
            for name, choose in kernel.values.items():
                named[name] = choose({**dict(zip(kernel.arg_names, args, strict=False)), **named})
        else:
            if len(kernel.configs) > 1:
                kernel[grid](*args, **named)
            config = kernel.best_config if len(kernel.configs) > 1 else kernel.configs[0]
            if config.pre_hook is not None or kernel.user_defined_pre_hook or kernel.user_defined_post_hook:
                raise ValueError(
                    "prepare: a kernel tuned with hooks cannot be launched without them; launch it with kernel[grid]"
                )
            named.update(config.all_kwargs())
        kernel = kernel.fn
    return kernel, named


def _compile(function: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the compiled kernel, and all its arguments by name."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import create_function_from_signature

    from . import isa
    from .compiler import TARGET, CPUBackend

    # Triton's own launch path would compile for whatever driver is active.
    target = GPUTarget(TARGET, isa.host_isa().name, 1)
    backend = CPUBackend(target)
    named = {**named, "debug": named.get("debug", function.debug) or knobs.runtime.debug}
    named["instrumentation_mode"] = knobs.compilation.instrumentation_mode
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = binder(*args, **named)
    options, signature, constants, attributes = function._pack_args(backend, named, bound, specialization, options)
    source = triton.compiler.ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__), dict(bound)


def _bind(compiled: Any, grid: tuple[int, int, int], bound: dict[str, Any], given: int) -> Launch:
    from .generated import Site
    from .loaded import load_kernel

    source, metadata = compiled.src, compiled.metadata
    signature = tuple(source.signature.values())
    values = tuple(flatten_arguments(signature, tuple(bound.values())))
    parameters = _specialized(parameters_of(metadata.name, tuple(bound), signature, metadata.arguments), source, values)
    # Opened tuples are no longer at the positions of the call.
    replaceable = given if is_flat(signature) else 0
    reader = PreparedReader(metadata.name, parameters, tuple(Site(**site) for site in metadata.sites), replaceable)
    for k, value in enumerate(values):
        reader(k, value)
    kinds = tuple(parameter.kind for parameter in parameters)
    dtypes = tuple(parameter.dtype for parameter in parameters)
    variant = _Variant(compiled, reader, load_kernel(compiled.kernel), kinds, dtypes, values[replaceable:])
    return Launch(variant, grid, values)


def _specialized(parameters: Sequence[Parameter], source: Any, values: Sequence[Any]) -> tuple[Parameter, ...]:
    """Return the parameters with what the kernel was compiled for."""
    aligned = {path[0] for path, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes}
    flat = len(parameters) == len(source.signature)
    return tuple(
        replace(
            parameter,
            dtype=getattr(value, "dtype", None) if parameter.element == "ptr" else None,
            aligned=flat and k in aligned,
            fixed=parameter.element == "skip",
            value=value,
        )
        for k, (parameter, value) in enumerate(zip(parameters, values, strict=True))
    )
