"""Taking in-place operations out of an exported graph."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.export import ExportedProgram

from graphwright.ir.diagnostics import user_line
from graphwright.ir.errors import CaptureError

from .exporting import quiet
from .plain_graph import PREFIX, place_of


def make_functional(program: ExportedProgram) -> ExportedProgram:
    """Return an exported program without in-place operations.

    Raises:
        CaptureError: a call of the model changes a buffer, a parameter or an argument.
    """
    if not any(is_mutating(node) for node in nodes_of(program.graph_module)):
        return program
    with quiet():
        functional = program.run_decompositions({})
    changed = {
        **functional.graph_signature.buffers_to_mutate,
        **functional.graph_signature.user_inputs_to_mutate,
    }
    if changed:
        where = {name.removeprefix(PREFIX): user_line(_at(functional, node)) for node, name in changed.items()}
        lines = "\n".join(f"  {name}" + (f" at {line}" if line else "") for name, line in where.items())
        raise CaptureError(
            f"a call of the model changes what outlives it, which a graph of values cannot:\n{lines}\n"
            "What to do: return the new value instead, or compute it anew in each call."
        )
    return functional


def _at(program: ExportedProgram, name: str) -> fx.Node:
    node = next(node for node in program.graph.nodes if node.name == name)
    node.meta.update(place_of(node))
    return node


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
