"""Recognition of rotary position embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.program import Program, calls
from graphwright.passes.base import Context, Decision, Fidelity, Refusal
from graphwright.passes.local import LocalPass, Places

from .matching import ADD, MUL, NEG, either_order, is_call, only_user

aten = torch.ops.aten

END = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class RaiseRotary(LocalPass):
    """Turn rotary embeddings that are written out into one operation.

    Before: `%r = cat([neg(slice(%x, -1, 4)), slice(%x, -1, 0, 4)], -1); %y = add(mul(%x, %cos), mul(%r, %sin))`

    After: `%y = graphwright.rotary(%x, %cos, %sin)`

    Applies when: the features' halves are exchanged and one of them negated (Llama), or even and odd features (Cohere).
    Applies when: only the first features are rotated and the others concatenated behind them (GPT-NeoX, Phi).

    Declines when: the tables do not have one number per rotated feature.
    """

    name = "raise-rotary"
    fidelity = Fidelity.EXACT

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the rotations, each at its last node."""
        for node in calls(program.graph, *ADD):
            found = _rotation(node)
            if found is None:
                continue
            x, cos, sin, interleaved = found
            size = x.meta["val"].shape[-1]
            if any(table.meta["val"].dim() == 0 or table.meta["val"].shape[-1] != size for table in (cos, sin)):
                yield Refusal(node.name, f"the tables do not have {size} features each")
                continue
            end, rotated = _partial(program, node, x)
            detail = {
                "x": x.name if rotated is None else x.args[0].name,  # type: ignore[union-attr]
                "cos": cos.name,
                "sin": sin.name,
                "interleaved": interleaved,
                "rotated": rotated,
            }
            which = "even and odd features" if interleaved else "halves"
            yield Decision(end.name, "rotary", f"{which} of %{x.name} turn into each other", detail)

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Return a call of the rotation."""
        keywords: dict[str, Any] = {}
        if detail["interleaved"]:
            keywords["interleaved"] = True
        if detail["rotated"] is not None:
            keywords["rotated"] = detail["rotated"]
        x, cos, sin = (places[detail[name]] for name in ("x", "cos", "sin"))
        return program.call(dialect.rotary, x, cos, sin, like=node, **keywords)


def _rotation(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, bool] | None:
    """Return x, cos, sin and whether pairs are interleaved, of x * cos + partner(x) * sin."""
    for straight, crossed in either_order(node):
        if not (is_call(straight, *MUL) and is_call(crossed, *MUL)):
            continue
        for partner, sin in either_order(crossed):
            for x, interleaved in ((_halves(partner), False), (_pairs(partner), True)):
                if x is None or not isinstance(sin, fx.Node):
                    continue
                for value, cos in either_order(straight):
                    if value is x and isinstance(cos, fx.Node):
                        return x, cos, sin, interleaved
    return None


def _halves(node: Any) -> fx.Node | None:
    """Return x of cat([-x[h:], x[:h]])."""
    if not is_call(node, aten.cat.default) or not _is_last(node, node.args[1] if len(node.args) > 1 else 0):
        return None
    parts = node.args[0]
    if len(parts) != 2 or not is_call(parts[0], *NEG):
        return None
    upper, lower = _slice(parts[0].args[0]), _slice(parts[1])
    if upper is None or lower is None or upper[0] is not lower[0]:
        return None
    size = upper[0].meta["val"].shape[-1]
    fits = isinstance(size, int) and upper[1:] == (size // 2, size, 1) and lower[1:] == (0, size // 2, 1) and size % 2 == 0
    return upper[0] if fits else None


def _pairs(node: Any) -> fx.Node | None:
    """Return x of stack([-x[1::2], x[::2]], -1) with its last two dimensions made one."""
    if not is_call(node, aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        return None
    stacked = node.args[0]
    if is_call(stacked, aten.stack.default):
        if len(stacked.args) < 2 or not _is_last(stacked, stacked.args[1]):
            return None
        parts = stacked.args[0]
    elif is_call(stacked, aten.cat.default) and len(stacked.args) > 1 and _is_last(stacked, stacked.args[1]):
        if not all(is_call(part, aten.unsqueeze.default) and _is_last(part, part.args[1]) for part in stacked.args[0]):
            return None
        parts = [part.args[0] for part in stacked.args[0]]
    else:
        return None
    if len(parts) != 2 or not is_call(parts[0], *NEG):
        return None
    odd, even = _slice(parts[0].args[0]), _slice(parts[1])
    if odd is None or even is None or odd[0] is not even[0]:
        return None
    x = odd[0]
    size = x.meta["val"].shape[-1]
    fits = isinstance(size, int) and size % 2 == 0 and odd[1:] == (1, size, 2) and even[1:] == (0, size, 2)
    return x if fits and node.meta["val"].shape == x.meta["val"].shape else None


def _slice(node: Any) -> tuple[fx.Node, int, int, int] | None:
    """Return source, start, end and step of a slice of the last dimension at numbers."""
    if not is_call(node, aten.slice.Tensor):
        return None
    source, dim, start, end, step = [*node.args, *(None, 0, None, None, 1)[len(node.args) :]]
    size = source.meta["val"].shape[-1]
    if not _is_last(source, dim) or not isinstance(size, int):
        return None
    low, high = (0 if start is None else start), (size if end is None else end)
    if not all(isinstance(n, int) for n in (low, high, step)):
        return None
    low, high = (n + size if n < 0 else min(n, size) for n in (low, high))
    return source, low, high, step


def _is_last(node: fx.Node, dim: Any) -> bool:
    rank = node.meta["val"].dim()
    return isinstance(dim, int) and dim % rank == rank - 1


def _partial(program: Program, node: fx.Node, x: fx.Node) -> tuple[fx.Node, int | None]:
    """Return the concatenation with the features that are not rotated and how many are; else the node itself and None."""
    user = only_user(node)
    start = _slice(x)
    if user is None or start is None or start[1] != 0 or start[3] != 1 or not is_call(user, aten.cat.default):
        return node, None
    parts = user.args[0]
    if len(parts) != 2 or parts[0] is not node or not _is_last(user, user.args[1] if len(user.args) > 1 else 0):  # type: ignore[arg-type, index]
        return node, None
    rest = _slice(parts[1])  # type: ignore[index]
    size = start[0].meta["val"].shape[-1]
    if rest is None or rest[0] is not start[0] or rest[1:] != (start[2], size, 1):
        return node, None
    # The tables may not add dimensions that the other features lack.
    return (user, start[2]) if program.shape(user) == program.shape(start[0]) else (node, None)
