"""Which nodes of a graph depend on what is in which."""

from __future__ import annotations

from torch import fx

from graphwright.ir.analyses.axes_registry import CONTENT_FREE, op_name


class Reach:
    """The nodes whose contents each node of a graph depends on, as bit sets: N nodes take N² / 4 bytes at most.

    Operations that read nothing but a shape depend on no contents.

    Args:
        graph: must not change while this is in use.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self._sources: list[int] = []
        self._users: list[int] = [0] * len(self.nodes)
        for i, node in enumerate(self.nodes):
            bits = 1 << i
            for source in () if self._is_free(node) else node.all_input_nodes:
                bits |= self._sources[self.order[source]]
            self._sources.append(bits)
        for i in reversed(range(len(self.nodes))):
            bits = 1 << i
            for user in self.nodes[i].users:
                bits |= 0 if self._is_free(user) else self._users[self.order[user]]
            self._users[i] = bits

    @staticmethod
    def _is_free(node: fx.Node) -> bool:
        return node.op == "call_function" and op_name(node) in CONTENT_FREE

    def leads(self, start: fx.Node, end: fx.Node) -> bool:
        """Return whether a node depends on another, or is the same."""
        return bool(self._sources[self.order[end]] >> self.order[start] & 1)

    def between(self, start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes that depend on `start` and that `end` depends on, `end` included and `start` not, in order.

        Empty if `end` does not depend on `start`.
        """
        bits = self._users[self.order[start]] & self._sources[self.order[end]] & ~(1 << self.order[start])
        found = []
        while bits:
            lowest = bits & -bits
            found.append(self.nodes[lowest.bit_length() - 1])
            bits ^= lowest
        return tuple(found)
