"""Capturing: from a PyTorch model and a sample call to a program."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from graphwright.ir.errors import CaptureError
from graphwright.ir.program import Dimension, Program, dimension_symbol
from graphwright.ir.signature import Range, Signature, TensorSpec

from .checking import Checker, apply_ranges
from .exporting import Exported, evaluation, export, quiet, without_cache
from .functional import make_functional
from .normal_form import normalise
from .plain_graph import import_graph
from .sampling import Call, Dynamic, Names, add_constant, bind, dimension_names, resized, sizes_of, widened


def capture(model: torch.nn.Module, *args: Any, dynamic: Dynamic = None, check: bool = True, **kwargs: Any) -> Program:
    """Capture a model as an executable graph, in evaluation mode.

    Args:
        model: any module; it is left as it was.
        args: arguments of a sample call, as the model takes them. Tensors become inputs; everything else is fixed.
        dynamic: which sizes may differ from call to call: names by the path of a tensor argument and the number of the
            dimension, such as `{"input_ids": {0: "batch", 1: "tokens"}}`; what one name stands for must be equal. They replace
            the default names of the tensors they name. None: dimension 0 of every tensor is "batch", dimension 1 of integer
            tensors and of float tensors of rank 3 is "tokens". False: no size may differ.
        check: compare the program with the model at other sizes than the sample's. It finds sizes that the model's code fixed
            without saying so; a second or less for small models.
        kwargs: named arguments of the sample call.

    Returns:
        The program. `program.notes` says what a user should know, such as a size that turned out to be fixed.

    Raises:
        CaptureError: the model cannot be captured, or a size that `dynamic` names is fixed by the model's code.
        InputError: the arguments do not fit the model's forward.
        OptionError: `dynamic` does not fit the arguments.
    """
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(
            f"capture takes a torch.nn.Module, and got {type(model).__name__}. What to do: pass an instance of a module; a "
            "function becomes one as the forward of a class derived from it."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} holds no Python code any more. What to do: pass the module it was made from."
        )
    call, sample = bind(model, args, kwargs)
    names = dimension_names(call, sample, dynamic)
    asked = set(dynamic) if isinstance(dynamic, Mapping) else set()
    with evaluation(model) as was_training, _cache_choice(model, kwargs) as no_cache:
        notes = ["captured in evaluation mode: the model is in training mode"] if was_training else []
        if no_cache:
            call = add_constant(call, "use_cache", False)
            if getattr(model, "generation_config", None) is not None:
                notes.append("captured with use_cache=False: no cache is returned")
        program = _checked(model, call, sample, names, asked) if check else _once(model, call, sample, names, asked)[0]
    program.notes[:0] = notes
    return program


def _once(
    model: torch.nn.Module, call: Call, sample: list[torch.Tensor], names: Names, asked: set[str]
) -> tuple[Program, list[torch.Tensor], list[str]]:
    """Return the program, the sample it was captured with, and what torch assumed of sizes."""
    tensors = resized(sample, names, widened(sizes_of(sample, names)))
    exported = export(model, call, tensors, names, asked)
    return to_program(exported, call, tensors, names), tensors, exported.guards


def _checked(model: torch.nn.Module, call: Call, sample: list[torch.Tensor], names: Names, asked: set[str]) -> Program:
    """Capture until the program agrees with the model wherever it says that it does.

    A size that the model's code took for special is tried with a longer sample once, and is fixed at the sample's if that does
    not help.
    """
    tried: set[str] = set()
    notes: list[str] = []
    own = sample
    while True:
        program, tensors, guards = _once(model, call, sample, names, asked)
        program.notes += notes
        if not program.dimensions:
            return program
        findings = Checker(program, model, call, tensors, guards).examine(tried)
        if not findings.longer and not findings.fixed:
            outside = _outside(sizes_of(own, names), findings.ranges)
            if outside and sample is not own:
                sample = own
                continue
            findings.fixed = {name: why for name, why in outside.items() if not asked.intersection(_paths(call, names, name))}
        if not findings.longer and not findings.fixed:
            apply_ranges(program, findings.ranges)
            return program
        if findings.longer:
            tried.update(findings.longer)
            sample = resized(sample, names, {**widened(sizes_of(sample, names)), **findings.longer})
            continue
        for name, why in findings.fixed.items():
            paths = _paths(call, names, name)
            if asked.intersection(paths):
                raise CaptureError(
                    f"{type(model).__name__}: {name!r} of {', '.join(paths)} cannot vary: {why}. What to do: pass `dynamic=` "
                    "without it, or change the code that depends on the size."
                )
            notes.append(f"{', '.join(paths)}: {name} is fixed at the sample's: {why}")
        # A longer sample was for sizes that might have varied.
        sample = own
        names = tuple({dim: n for dim, n in dims.items() if n not in findings.fixed} for dims in names)


def _paths(call: Call, names: Names, name: str) -> list[str]:
    """Return the tensors that have a dimension of this name."""
    return [path for path, dims in zip(call.names, names, strict=True) if name in dims.values()]


def _outside(sizes: Mapping[str, int], ranges: Mapping[str, Range]) -> dict[str, str]:
    """Return the dimensions whose size in the user's sample is not among those that the program is right for, and why."""
    return {
        name: f"the model's code takes {sizes[name]} another way than other sizes"
        for name, found in ranges.items()
        if 0 < sizes[name] < found.low or (found.high is not None and sizes[name] > found.high)
    }


def _cache_choice(model: torch.nn.Module, kwargs: dict[str, Any]) -> contextlib.AbstractContextManager[bool]:
    return contextlib.nullcontext(False) if "use_cache" in kwargs else without_cache(model)


def to_program(exported: Exported, call: Call, tensors: list[torch.Tensor], names: Names) -> Program:
    """Return the program of what torch.export made.

    Args:
        exported: the graph.
        call: how the model is called.
        tensors: the sample.
        names: the names of the sizes that were to vary; those that turned out to be fixed get a note.
    """
    functional, overwritten = make_functional(exported.program, call.names)
    graph, weights = import_graph(functional, call.names, overwritten)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    notes = list(exported.notes)
    named, dimensions = name_sizes(placeholders, names, call, exported.program.range_constraints, notes)
    program = Program(graph, weights, None, dimensions, named, [], notes)  # type: ignore[arg-type]
    specs = tuple(
        TensorSpec(path, tensor.dtype, str(tensor.device), tuple(_size_text(program, n) for n in node.meta["val"].shape))
        for path, tensor, node in zip(call.names, tensors, placeholders, strict=True)
    )
    ranges = {name: Range(dimension.low, dimension.high) for name, dimension in dimensions.items()}
    program.signature = Signature(call.parameters, call.arguments, specs, ranges, exported.results)
    with quiet():
        normalise(program)
    graph.lint()
    return program


def _size_text(program: Program, size: Any) -> int | str:
    found = program.size(size)
    return found if isinstance(found, int) else str(found)


def name_sizes(
    placeholders: list[fx.Node], names: Names, call: Call, ranges: Any, notes: list[str]
) -> tuple[dict[sympy.Symbol, sympy.Expr], dict[str, Dimension]]:
    """Return the name of each symbol of the graph's inputs, and the dimensions.

    Symbols of one name are made equal in the shape environment too, so that sizes derived from either are the same.
    """
    first: dict[str, Any] = {}
    fixed: dict[str, None] = {}
    for node, dims, path in zip(placeholders, names, call.names, strict=True):
        for dim, name in dims.items():
            size = node.meta["val"].shape[dim]
            if name in first and isinstance(size, torch.SymInt) and isinstance(first[name], torch.SymInt):
                _unify(first[name], size)
            if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
                fixed[f"{path}: dimension {dim} ({name}) is fixed at {size} by the model's code"] = None
            first.setdefault(name, size)
    notes += fixed
    named: dict[sympy.Symbol, sympy.Expr] = {}
    dimensions: dict[str, Dimension] = {}
    for name, size in first.items():
        if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
            continue
        expression = size.node.expr
        if not expression.is_Symbol or expression in named:
            notes.append(f"{name} is {str(expression.xreplace(named))!r}: the model's code makes it so")
            continue
        named[expression] = dimension_symbol(name)
        allowed = ranges.get(expression)
        high = int(allowed.upper) if allowed is not None and allowed.upper.is_Integer else None
        dimensions[name] = Dimension(name, 0, high)
    return named, dimensions


def _unify(first: torch.SymInt, second: torch.SymInt) -> None:
    environment = first.node.shape_env
    frozen, environment.frozen = environment.frozen, False
    try:
        # Evaluating the comparison records the equality.
        bool(first == second)
    finally:
        environment.frozen = frozen
