"""Attention over listed keys, as cached-decode sees it: dense, with what its lists are made by beside it."""

from __future__ import annotations

from typing import Any

from graphwright.ir import dialect
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.program import Program, calls

Lists = dict[str, dict[str, Any]]
"""Name of an attention -> the options of its `graphwright::block_index`."""


def without_lists(program: Program) -> Lists:
    """Let attention over listed keys see all keys, and return what its lists are made by.

    Nodes keep their names. Which tokens mix, and where, is the same with and without lists.

    Args:
        program: it is changed.
    """
    found: Lists = {}
    for node in list(calls(program.graph, dialect.sparse_attention)):
        given = arguments(node)
        found[node.name] = dict(given["blocks"].args[0].kwargs)
        node.target = dialect.attention
        node.args = tuple(given[name] for name in ("q", "k", "v", "operands", "sink"))
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "minimum_tokens"}
    program.drop_unused()
    return found
