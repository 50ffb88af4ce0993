"""Programs as text: one line for a node, the same text for equal programs, whatever their nodes are called."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .program import Program

DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}

NAMESPACES_LEFT_OUT = ("aten", "prims")
"""Operations of these are printed by their bare name."""


def print_program(program: Program, *, locations: bool = True) -> str:
    """Return the text of a program: a header, then one line for a node.

    Nodes are numbered anew per operation, so that the text does not depend on their names. Nodes that compute sizes are not
    listed: sizes are printed where they are used, in the program's dimensions.

    Args:
        program: what to print.
        locations: end each line with the line and module of the user's model that the node came from.
    """
    names = _names(program)
    lines = [*_header(program, names), ""]
    for node in program.graph.nodes:
        if node.op == "call_function" and not _is_size(node):
            line, where = _line(program, node, names), location(node) if locations else ""
            lines.append(f"{line}  # {where}" if where else line)
    lines.append(_line(program, program.output, names))
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class NodeText:
    """A node as text.

    Args:
        line: as `print_program` prints it.
        key: the same without the numbers of the node and its operands: what it computes, whatever else there is.
    """

    line: str
    key: str


def node_texts(program: Program) -> dict[fx.Node, NodeText]:
    """Return the text of each node in order: inputs, calls - those that compute sizes left out - and the output."""
    names = _names(program)
    bare = {node: name if node.op == "placeholder" else "" for node, name in names.items()}
    wanted = [node for node in program.graph.nodes if node.op != "get_attr" and not _is_size(node)]
    return {node: NodeText(_line(program, node, names), _line(program, node, bare)) for node in wanted}


def _line(program: Program, node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.op == "placeholder":
        return f"input %{names[node]}: {_type(program, node.meta.get('val'))}"
    if node.op == "output":
        return f"return {', '.join(_argument(program, result, names) for result in program.results)}"
    return f"%{names[node]}: {_type(program, node.meta.get('val'))} = {_call(program, node, names)}"


def location(node: fx.Node) -> str:
    """Return where in the user's model a node came from, such as "bert/modeling_bert.py:123 encoder.layer.0"; "" if unknown."""
    parts = []
    frames = re.findall(r'File "([^"]+)", line (\d+), in ', node.meta.get("stack_trace") or "")
    if frames:
        file, line = frames[-1]
        parts.append(f"{'/'.join(file.replace(chr(92), '/').split('/')[-2:])}:{line}")
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    if modules and modules[-1][0]:
        parts.append(str(modules[-1][0]).removeprefix("L['self']."))
    return " ".join(parts)


def short_type(dtype: torch.dtype) -> str:
    """Return a dtype's short name, such as "f32"."""
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def operation_name(target: Any) -> str:
    """Return the name by which a node's operation is printed, such as "linear" or "softmax.int"."""
    if not isinstance(target, torch._ops.OpOverload):
        return str(getattr(target, "__name__", target))
    namespace, _, name = target._schema.name.partition("::")
    overload = target._overloadname
    # Overloads that differ only in what is a tensor and what a number can be told by the arguments.
    suffix = "" if overload in ("default", "Tensor", "Scalar", "Tensor_Scalar") else f".{overload}"
    return f"{name}{suffix}" if namespace in NAMESPACES_LEFT_OUT else f"{namespace}.{name}{suffix}"


def _names(program: Program) -> dict[fx.Node, str]:
    names: dict[fx.Node, str] = {}
    inputs: set[str] = set()
    counts: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            # Arguments keep the user's names, which are part of the program.
            base = str(node.target)
            name, count = base, 1
            while name in inputs:
                name, count = f"{base}_{count}", count + 1
            inputs.add(name)
            names[node] = name
    for node in program.graph.nodes:
        if node.op == "call_function" and not _is_size(node):
            base = re.sub(r"\W", "_", operation_name(node.target).partition(".")[0] or "call")
            if operation_name(node.target).startswith("graphwright."):
                base = operation_name(node.target).split(".")[1]
            while True:
                counts[base] = counts.get(base, 0) + 1
                if f"{base}_{counts[base]}" not in inputs:
                    break
            names[node] = f"{base}_{counts[base]}"
    return names


def _header(program: Program, names: dict[fx.Node, str]) -> Iterator[str]:
    for node in program.inputs:
        yield _line(program, node, names)
    for name in sorted(program.dimensions):
        dimension = program.dimensions[name]
        high = "" if dimension.high is None else str(dimension.high)
        yield f"dimension {name}: {dimension.low}..{high}"
    total = sum(weight.numel() * weight.element_size() for weight in program.weights.values())
    yield f"{len(program.weights)} weights, {total} bytes"


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), int | torch.SymInt)


def _type(program: Program, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{short_type(value.dtype)}[{', '.join(str(program.size(n)) for n in value.shape)}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(_type(program, item) for item in value)})"
    if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
        return "size"
    return type(value).__name__


def _call(program: Program, node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.target is operator.getitem:
        return f"{_argument(program, node.args[0], names)}[{node.args[1]}]"
    arguments = [_argument(program, argument, names) for argument in node.args]
    while arguments and arguments[-1] == "None":
        arguments.pop()
    # What is at its default, and where the tensor lies, says nothing.
    for name, value in node.kwargs.items():
        if value is not None and name not in ("device", "pin_memory", "layout") and value != _default(node.target, name):
            arguments.append(f"{name}={_argument(program, value, names)}")
    return f"{operation_name(node.target)}({', '.join(arguments)})"


def _default(target: Any, name: str) -> Any:
    schema = getattr(target, "_schema", None)
    for argument in schema.arguments if schema else ():
        if argument.name == name and argument.has_default_value():
            return argument.default_value
    return None


def _argument(program: Program, value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        if value.op == "get_attr":
            return f'weights["{value.target}"]'
        return str(program.size(value)) if _is_size(value) else f"%{names[value]}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(program, item, names) for item in value)}]"
    if isinstance(value, torch.dtype):
        return short_type(value)
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, int) and value >= 2**63 - 1:
        return "end"
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return str(value)
