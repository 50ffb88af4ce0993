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

from .matching import ADD, MUL, NEG, SUB, either_order, is_call, only_user

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class RaiseRotary(LocalPass):
    """Turn rotary embeddings that are written out into one operation.

    Before: `%r = cat([neg(slice(%x, -1, 4)), slice(%x, -1, 0, 4)], -1); %y = add(mul(%x, %cos), mul(%r, %sin))`

    After: `%y = graphwright.rotary(%x, %cos, %sin)`

    Applies when: the features' halves are exchanged and one of them negated (Llama), or even and odd features (Cohere).
    Applies when: the halves are computed apart and concatenated (GPT-OSS).
    Applies when: only the first features are rotated and the others concatenated behind them (GPT-NeoX, Phi).

    Declines when: the tables do not have one number per rotated feature.
    """

    name = "raise-rotary"
    fidelity = Fidelity.EXACT

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the rotations, each at its last node."""
        for node in calls(program.graph, *ADD, aten.cat.default):
            found = _rotation(node) if node.target in ADD else _apart(node)
            if found is None:
                continue
            size = found.end - found.start
            for table in (found.cos, found.sin):
                if table.meta["val"].dim() == 0 or table.meta["val"].shape[-1] != (size // 2 if found.halved else size):
                    yield Refusal(node.name, f"%{table.name} does not have one number for each of {size} features")
                    break
            else:
                yield _decision(program, node, found)

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Return a call of the rotation."""
        keywords: dict[str, Any] = {}
        if detail["interleaved"]:
            keywords["interleaved"] = True
        if detail["rotated"] is not None:
            keywords["rotated"] = detail["rotated"]
        x, cos, sin = (places[detail[name]] for name in ("x", "cos", "sin"))
        last = x.meta["val"].dim() - 1
        if detail["start"] != 0 or detail["end"] != x.meta["val"].shape[-1]:
            x = program.call(aten.slice.Tensor, x, last, detail["start"], detail["end"], like=node)
        if detail["halved"]:
            cos, sin = (program.call(aten.cat.default, [table, table], -1, like=node) for table in (cos, sin))
        return program.call(dialect.rotary, x, cos, sin, like=node, **keywords)


@dataclass(frozen=True)
class _Rotation:
    """A rotation of the features start to end of x; `halved` where the tables have one number for a pair."""

    x: fx.Node
    start: int
    end: int
    cos: fx.Node
    sin: fx.Node
    interleaved: bool = False
    halved: bool = False


def _decision(program: Program, node: fx.Node, found: _Rotation) -> Decision:
    last, rotated, end = node, None, found.end
    user = only_user(node)
    if user is not None and is_call(user, aten.cat.default) and _is_last(user, _cat_dim(user)):
        parts: Any = user.args[0]
        rest = _features(parts[1]) if len(parts) == 2 and parts[0] is node else None
        # The tables may not add dimensions that the other features lack.
        if (
            rest is not None
            and rest[0] is found.x
            and rest[1] == end
            and program.shape(user)[:-1] == program.shape(found.x)[:-1]
        ):
            last, rotated, end = user, found.end - found.start, rest[2]
    detail = {
        "x": found.x.name,
        "start": found.start,
        "end": end,
        "cos": found.cos.name,
        "sin": found.sin.name,
        "interleaved": found.interleaved,
        "rotated": rotated,
        "halved": found.halved,
    }
    which = "even and odd features" if found.interleaved else "halves"
    return Decision(last.name, "rotary", f"{which} of %{found.x.name} turn into each other", detail)


def _rotation(node: fx.Node) -> _Rotation | None:
    """Match x * cos + partner(x) * sin."""
    for straight, crossed in either_order(node):
        if not (is_call(straight, *MUL) and is_call(crossed, *MUL)):
            continue
        for partner, sin in either_order(crossed):
            for found, interleaved in ((_halves(partner), False), (_pairs(partner), True)):
                if found is None or not isinstance(sin, fx.Node):
                    continue
                for value, cos in either_order(straight):
                    if _features(value) == found and isinstance(cos, fx.Node):
                        return _Rotation(*found, cos, sin, interleaved)
    return None


def _apart(node: fx.Node) -> _Rotation | None:
    """Match cat([a * cos - b * sin, b * cos + a * sin]) of the halves a and b."""
    parts: Any = node.args[0]
    if len(parts) != 2 or not _is_last(node, _cat_dim(node)) or not (is_call(parts[0], *SUB) and is_call(parts[1], *ADD)):
        return None
    if parts[0].kwargs or parts[1].kwargs or not all(is_call(part, *MUL) for half in parts for part in half.args):
        return None
    minuend, subtrahend = parts[0].args
    for a, cos in either_order(minuend):
        for b, sin in either_order(subtrahend):
            lower, upper = _features(a), _features(b)
            if lower is None or upper is None or lower[0] is not upper[0] or lower[2] != upper[1]:
                continue
            if upper[2] - upper[1] != lower[2] - lower[1]:
                continue
            expected = {frozenset((b, cos)), frozenset((a, sin))}
            if {frozenset(product.args) for product in parts[1].args} == expected:
                return _Rotation(lower[0], lower[1], upper[2], cos, sin, halved=True)
    return None


def _halves(node: Any) -> tuple[fx.Node, int, int] | None:
    """Return the features x of cat([-x[h:], x[:h]])."""
    if not is_call(node, aten.cat.default) or not _is_last(node, _cat_dim(node)):
        return None
    parts = node.args[0]
    if len(parts) != 2 or not is_call(parts[0], *NEG):
        return None
    upper, lower = _features(parts[0].args[0]), _features(parts[1])
    if upper is None or lower is None or upper[0] is not lower[0] or lower[2] != upper[1]:
        return None
    return (lower[0], lower[1], upper[2]) if upper[2] - upper[1] == lower[2] - lower[1] else None


def _pairs(node: Any) -> tuple[fx.Node, int, int] | None:
    """Return the features x of stack([-x[1::2], x[::2]], -1) with its last two dimensions made one."""
    if not is_call(node, aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        return None
    stacked = node.args[0]
    parts: Any = None
    if is_call(stacked, aten.stack.default) and len(stacked.args) > 1 and _is_last(stacked, stacked.args[1]):
        parts = stacked.args[0]
    elif is_call(stacked, aten.cat.default) and _is_last(stacked, _cat_dim(stacked)):
        pieces = stacked.args[0]
        if all(is_call(piece, aten.unsqueeze.default) and _is_last(piece, piece.args[1]) for piece in pieces):
            parts = [piece.args[0] for piece in pieces]
    if parts is None or len(parts) != 2 or not is_call(parts[0], *NEG):
        return None
    odd, even = _slice(parts[0].args[0]), _slice(parts[1])
    if odd is None or even is None or odd[0] is not even[0] or odd[3] != 2 or even[3] != 2:
        return None
    x, start = even[0], even[1]
    # A slice with a step may end anywhere behind its last element.
    last = max(odd[2], even[2])
    size = 2 * int(parts[0].meta["val"].shape[-1])
    if odd[1] != start + 1 or start + size != last or node.meta["val"].shape[-1] != size:
        return None
    source = _features(x)
    return (source[0], source[1] + start, source[1] + last) if source is not None else None


def _features(node: Any) -> tuple[fx.Node, int, int] | None:
    """Return which consecutive features of which value a node is: source, start and end."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta["val"].shape[-1], int):
        return None
    source, low, high = node, 0, node.meta["val"].shape[-1]
    while (found := _slice(source)) is not None and found[3] == 1:
        source, low, high = found[0], found[1] + low, found[1] + high
    return source, low, high


def _slice(node: Any) -> tuple[fx.Node, int, int, int] | None:
    """Return source, start, end and step of a slice of the last dimension at numbers."""
    if not is_call(node, aten.slice.Tensor):
        return None
    arguments: Any = [*node.args, *(None, 0, None, None, 1)[len(node.args) :]]
    source, dim, start, end, step = arguments
    size = source.meta["val"].shape[-1]
    if not _is_last(source, dim) or not isinstance(size, int):
        return None
    low, high = (0 if start is None else start), (size if end is None else end)
    if not all(isinstance(n, int) for n in (low, high, step)):
        return None
    low, high = (n + size if n < 0 else min(n, size) for n in (low, high))
    return source, low, high, step


def _cat_dim(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)


def _is_last(node: fx.Node, dim: Any) -> bool:
    rank = node.meta["val"].dim()
    return isinstance(dim, int) and dim % rank == rank - 1
