"""From the text of a TTIR module to the LLVM IR of one program."""

from __future__ import annotations

from . import (
    arithmetic,
    atomics,
    casts,
    combine,
    control,
    dot,
    effects,
    floats,
    indexing,
    integers,
    memory,
    reduce,
    scan,
    shapes,
)
from .analysis import Plan
from .combine import expand_packed_maps
from .dot import plan_dots
from .dot_scaled import expand_scaled_dots
from .emit import LLVM_TYPES
from .errors import BackendError, UnsupportedError
from .generated import Generated
from .inline import inline_calls
from .isa import Isa
from .lowering import Lowering
from .options import CPUOptions
from .scalars import constant
from .simplify import drop_identities
from .ttir import Function, Type
from .ttir_parse import parse
from .values import Pointer, Uniform

_HANDLERS = (
    arithmetic, atomics, casts, combine, control, dot, effects, floats, indexing, integers, memory, reduce, scan, shapes,
)  # fmt: skip
"""Importing them fills the tables of `registry`."""

MASKED_STORE_SLOTS = 128
"""64-bit words at the start of scratch that take the stores of chunks that are masked off."""


def generate(ttir_text: str, isa: Isa, options: CPUOptions) -> Generated:
    """Lower a TTIR module to the LLVM IR of one program of its kernel.

    Args:
        ttir_text: the module, with or without locations.
        isa: the instruction set to generate for.
        options: what changes the code.

    Returns:
        Module text that defines `@program`, and what the launcher must know of it.

    Raises:
        UnsupportedError: the kernel uses something that is not lowered; names the operation and the source line.
        TtirSyntaxError: the text is of a form that is not known.
    """
    functions = parse(ttir_text)
    entries = [f.name for f in functions.values() if f.is_public]
    if len(entries) != 1:
        raise BackendError(f"a module must have one public function, found {len(entries)}: {', '.join(entries)}")
    function = inline_calls(functions, entries[0])
    _check_types(function)
    expand_scaled_dots(function)
    expand_packed_maps(function)
    drop_identities(function)
    plan = Plan(function)
    plan_dots(plan, function, isa)
    lowering = Lowering(isa=isa, plan=plan, options=options)
    lowering.scratch.take(lowering.e, MASKED_STORE_SLOTS, "i64")
    _bind_arguments(lowering, function)
    try:
        lowering.block(function.blocks[0])
    except UnsupportedError as error:
        if error.line or lowering.op is None or not lowering.op.line:
            raise
        raise UnsupportedError(error.what, lowering.op.line) from error
    return Generated(
        name=function.name,
        llvm_ir=_module_text(lowering, function),
        arguments=tuple(a.element for a in function.args),
        scratch_bytes=lowering.scratch.size_bytes,
        sites=tuple(lowering.sites),
    )


def _check_types(function: Function) -> None:
    for value in function.args:
        _check_type(value.type, "")
    for op in function.walk():
        for value in (*op.results, *(a for region in op.regions for block in region for a in block.args)):
            _check_type(value.type, op.line)


def _check_type(type_: Type, line: str) -> None:
    if type_.element not in LLVM_TYPES or (type_.is_pointer and type_.pointee not in LLVM_TYPES):
        raise UnsupportedError(f"the type {type_}", line)


def _bind_arguments(lowering: Lowering, function: Function) -> None:
    for value, attributes in zip(function.args, function.arg_attrs, strict=True):
        name = f"%arg{value.index}"
        if value.type.is_pointer:
            lowering.environment[value] = Pointer(name, constant(0, "i64"), str(value.type.pointee))
        else:
            divisor = int(attributes.get("tt.divisibility", 1))
            lowering.environment[value] = Uniform(name, value.element, divisor)


def _module_text(lowering: Lowering, function: Function) -> str:
    programs = [f"i32 %{name}{axis}" for name in ("pid", "np") for axis in range(3)]
    arguments = [f"{LLVM_TYPES[a.element]} %arg{a.index}" for a in function.args]
    parameters = ", ".join(["ptr noalias %scratch", "ptr %fault", *programs, *arguments])
    body = "\n".join(lowering.e.lines)
    head = "\n".join(lowering.e.declarations.values())
    return f"{head}\ndefine internal void @program({parameters}) #0 {{\nentry:\n{body}\n  ret void\n}}\n"
