"""Taking in-place operations out of an exported graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from graphwright.ir.diagnostics import user_line
from graphwright.ir.errors import CaptureError

from .exporting import PREFIX, place_of, quiet

Overwritten = dict[fx.Node, list[fx.Node]]
"""In-place operation -> the earlier nodes whose value is from then on that of its functional twin."""


def make_functional(program: ExportedProgram, names: Sequence[str]) -> tuple[ExportedProgram, Overwritten]:
    """Return an exported program whose in-place operations, if any are left, only overwrite whole values.

    Those can be replaced by their functional twins one by one; where a view of a value is changed, torch decomposes the
    whole graph, which takes about as long as exporting it.

    Args:
        program: what torch.export made.
        names: the path of each user tensor, in flat order.

    Raises:
        CaptureError: a call of the model changes a buffer, a parameter or an argument.
    """
    if not any(is_mutating(node) for node in nodes_of(program.graph_module)):
        return program, {}
    overwritten = _overwritten(program)
    if overwritten is not None:
        return program, overwritten
    with quiet():
        functional = program.run_decompositions({})
    changed = {
        **functional.graph_signature.buffers_to_mutate,
        **functional.graph_signature.user_inputs_to_mutate,
    }
    if changed:
        paths = dict(zip(functional.graph_signature.user_inputs, names, strict=True))
        where = {paths.get(name, name.removeprefix(PREFIX)): _line(functional, node) for node, name in changed.items()}
        lines = "\n".join(f"  {name}" + (f" at {line}" if line else "") for name, line in where.items())
        raise CaptureError(
            f"a call of the model changes what outlives it, which a graph of values cannot:\n{lines}\n"
            "What to do: return the new value instead, or compute it anew in each call."
        )
    return functional, {}


def _line(program: ExportedProgram, name: str) -> str:
    node = next(node for node in program.graph.nodes if node.name == name)
    node.meta.update(place_of(node))
    return user_line(node)


def nodes_of(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Yield the nodes of a module's graph, and those of the regions in it."""
    for node in module.graph.nodes:
        yield node
        if node.op == "get_attr":
            inner = getattr(module, str(node.target), None)
            if isinstance(inner, fx.GraphModule):
                yield from nodes_of(inner)


def is_mutating(node: fx.Node) -> bool:
    """Return whether a node changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def functional_twin(target: Any) -> Any:
    """Return the operation that returns what an in-place one writes into its first argument; None if there is none."""
    schema = target._schema
    writes = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    if writes != [0] or len(schema.returns) != 1:
        return None
    name = target._opname
    base = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")
    twin = getattr(getattr(getattr(torch.ops, target.namespace), base, None), target._overloadname, None)
    if twin is None or twin is target or len(twin._schema.arguments) != len(schema.arguments):
        return None
    return twin


def _overwritten(program: ExportedProgram) -> Overwritten | None:
    """Return what each in-place operation overwrites; None if one changes only part of a value, or more than values."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    sharing: dict[int, list[fx.Node]] = defaultdict(list)
    for node in order:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            sharing[_storage(value)].append(node)
    found: Overwritten = {}
    regions = [node for node in nodes_of(program.graph_module) if node not in order]
    if any(is_mutating(node) for node in regions):
        return None
    for node in order:
        if not is_mutating(node):
            continue
        changed = node.args[0]
        if functional_twin(node.target) is None or not isinstance(changed, fx.Node):
            return None
        earlier = [other for other in sharing[_storage(changed.meta["val"])] if order[other] < order[node]]
        if any(other.op != "call_function" for other in earlier):
            return None
        for other in earlier:
            if _geometry(other) != _geometry(changed) and any(order[user] > order[node] for user in other.users):
                return None
        found[node] = earlier
    return found


def _storage(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _geometry(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    keys = [value.storage_offset(), *value.shape, *value.stride()]
    return (value.dtype, *(n.node.expr if isinstance(n, torch.SymInt) else n for n in keys))
