"""Where a piece of generated code comes from: the nodes of the graph, and the lines of the user's model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from torch import fx

from graphwright.ir.diagnostics import user_line


def provenance_of(nodes: Sequence[fx.Node]) -> str:
    """Return the names of nodes and the lines of the user's model that they came from, as one line of text."""
    lines = []
    for node in nodes:
        file, _, rest = user_line(node).partition(":")
        where = f" ({'/'.join(PurePath(file).parts[-2:])}:{rest.partition(':')[0]})" if file else ""
        lines.append(f"{node.name}{where}")
    return ", ".join(lines)
