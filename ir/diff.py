"""What differs between two programs, by structure: names and numbers of nodes are no difference.

A node's key is what it computes - operation, type, arguments that are no nodes - without where it stands. Two programs are
aligned along the longest common subsequence of their nodes' keys, where a key also holds those of the nodes around: so equal
layers are not taken for each other. A node that was aligned is *changed* if it reads other nodes
than before - not where what it reads was replaced, which is a difference by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from torch import fx

from .printer import location, node_texts
from .program import Program

Change = Literal["same", "removed", "added", "changed"]

ROUNDS = 2
"""How far around a node its neighbours tell it from others of the same key, in edges."""


@dataclass(frozen=True)
class Difference:
    """A node of either program, in the order of the result.

    Args:
        change: "same" for what is in both; "removed", "added"; "changed" for what computes the same of other operands.
        before: the node's text in the first program; "" where it is not in it.
        after: likewise in the second.
        where: the line and module of the user's model that it came from; "" if unknown.
        old: the node's name in the first program; "".
        new: likewise in the second.
    """

    change: Change
    before: str
    after: str
    where: str
    old: str = ""
    new: str = ""


def diff_programs(before: Program, after: Program) -> list[Difference]:
    """Return the nodes of both programs in order, each with whether it stayed; results and inputs are nodes too.

    All are "same" if and only if the programs are equal but for the names of their nodes.
    """
    one, two = _Side(before), _Side(after)
    matched = dict(_matched(one, two))
    # A node's operands are the same where they are aligned with the other's operands.
    back = {new: old for old, new in matched.items()}
    found: list[Difference] = []
    replaced: dict[fx.Node, fx.Node] = {}
    position = 0

    def is_replaced(old: fx.Node, new: fx.Node) -> bool:
        """Return whether an added node takes the place of a removed one, for all who read it."""
        return old not in matched and new not in back and replaced.setdefault(old, new) is new

    added: list[Difference] = []
    for new in two.nodes:
        old = back.get(new)
        if old is None:
            added.append(_difference("added", None, new, one, two))
            continue
        at = one.places[old]
        found += [_difference("removed", node, None, one, two) for node in one.nodes[position:at] if node not in matched]
        found += added
        position, added = at, []
        pairs = zip(one.operands(old), two.operands(new), strict=True)
        same = [matched.get(a) is b or is_replaced(a, b) for a, b in pairs]
        found.append(_difference("same" if all(same) else "changed", old, new, one, two))
    found += [_difference("removed", node, None, one, two) for node in one.nodes[position:] if node not in matched]
    found += added
    return found


def unified(differences: list[Difference], context: int = 2) -> str:
    """Return the text of differences: "-" removed, "+" added, a changed node as both, with some lines around; "" for none.

    Args:
        differences: as `diff_programs` returns them.
        context: how many of the same nodes to show before and after each change, at least 0.
    """
    changed = [k for k, found in enumerate(differences) if found.change != "same"]
    shown = sorted({k for at in changed for k in range(max(0, at - context), min(len(differences), at + context + 1))})
    lines: list[str] = []
    for previous, k in zip([-1, *shown], shown, strict=False):
        if k != previous + 1:
            lines.append(f"@@ {k - previous - 1} nodes that are the same @@")
        found = differences[k]
        if found.change == "same":
            lines.append(_line("  ", found.after, found.where))
        if found.change in ("removed", "changed"):
            lines.append(_line("- ", found.before, found.where))
        if found.change in ("added", "changed"):
            lines.append(_line("+ ", found.after, found.where))
    if shown and shown[-1] != len(differences) - 1:
        lines.append(f"@@ {len(differences) - 1 - shown[-1]} nodes that are the same @@")
    return "\n".join(lines)


def _line(sign: str, text: str, where: str) -> str:
    return f"{sign}{text}  # {where}" if where else f"{sign}{text}"


class _Side:
    """A program's nodes, in order, and what each is told by."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.texts = node_texts(program)
        self.nodes = list(self.texts)
        self.places = {node: at for at, node in enumerate(self.nodes)}
        self.keys = self._keys()

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that a node reads, without weights and sizes, which are part of its key."""
        found: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), found.append)
        return [source for source in found if source in self.places]

    def _keys(self) -> dict[fx.Node, list[str]]:
        """Return for each node its own key, and the keys with more and more of what is around it."""
        rounds = [{node: text.key for node, text in self.texts.items()}]
        for _ in range(ROUNDS):
            last = rounds[-1]
            rounds.append({node: self._wider(node, last) for node in self.nodes})
        return {node: [keys[node] for keys in rounds] for node in self.nodes}

    def _wider(self, node: fx.Node, keys: Mapping[fx.Node, str]) -> str:
        users = sorted(keys[user] for user in node.users if user in keys)
        around = [keys[node], *(keys[source] for source in self.operands(node)), "users", *users]
        return hashlib.blake2b("\n".join(around).encode(), digest_size=16).hexdigest()


def _matched(one: _Side, two: _Side) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield pairs of nodes that are aligned: by their wide surroundings first, then in the gaps by ever less of them."""
    gaps = [(0, len(one.nodes), 0, len(two.nodes))]
    for width in reversed(range(ROUNDS + 1)):
        left: list[tuple[int, int, int, int]] = []
        for low, high, first, last in gaps:
            a = [one.keys[node][width] for node in one.nodes[low:high]]
            b = [two.keys[node][width] for node in two.nodes[first:last]]
            start_a, start_b = 0, 0
            for block in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks():
                left.append((low + start_a, low + block.a, first + start_b, first + block.b))
                for k in range(block.size):
                    yield one.nodes[low + block.a + k], two.nodes[first + block.b + k]
                start_a, start_b = block.a + block.size, block.b + block.size
        gaps = [gap for gap in left if gap[0] < gap[1] and gap[2] < gap[3]]


def _difference(change: Change, old: fx.Node | None, new: fx.Node | None, one: _Side, two: _Side) -> Difference:
    node = new if new is not None else old
    assert node is not None
    return Difference(
        change,
        one.texts[old].line if old is not None else "",
        two.texts[new].line if new is not None else "",
        location(node),
        old.name if old is not None else "",
        new.name if new is not None else "",
    )
