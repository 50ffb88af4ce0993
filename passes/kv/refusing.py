"""Why a program has no cached form."""

from __future__ import annotations

from torch import fx

from graphwright.ir.diagnostics import user_line


class NotCausal(Exception):
    """A program cannot be run token by token; a reason to refuse, caught by the pass.

    Args:
        node: where.
        reason: a sentence for people; the node's operation and the line of the user's model are added.
    """

    def __init__(self, node: fx.Node, reason: str) -> None:
        line = user_line(node)
        super().__init__(f"{node.name}: {reason}{f', from {line}' if line else ''}")
        self.where = node.name
