"""Errors that show the graph around a node, and the line of the user's model that it came from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from .program import Program

CONTEXT_NODES = 3


def user_line(node: fx.Node) -> str:
    """Return the line of the user's model that a node came from, as "file:line: text"; "" if it is not known."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    file, line, text = frames[-1]
    return f"{file}:{line}: {text.strip()}"


def around(graph: fx.Graph, node: fx.Node) -> str:
    """Return the text of the nodes around `node`, which is marked."""
    nodes = list(graph.nodes)
    at = nodes.index(node)
    lines = []
    for other in nodes[max(0, at - CONTEXT_NODES) : at + CONTEXT_NODES + 1]:
        value = other.meta.get("val")
        shape = f"  # {tuple(value.shape)} {value.dtype}" if hasattr(value, "shape") else ""
        lines.append(f"{'-->' if other is node else '   '} {other.format_node()}{shape}")
    return "\n".join(lines)


def at_node(error: Any, program: Program, node: fx.Node) -> Any:
    """Return `error` with the user's line and the graph around `node` added as notes."""
    line = user_line(node)
    if line:
        error.add_note(f"from {line}")
    if node in set(program.graph.nodes):
        error.add_note(around(program.graph, node))
    return error
