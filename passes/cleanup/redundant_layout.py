"""Removal of reshapes, permutations, slices and concatenations that undo or repeat each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.program import Program, Size, calls
from graphwright.passes.base import Context, Decision, Fidelity, Refusal
from graphwright.passes.local import LocalPass, Places

aten = torch.ops.aten

RESHAPE, PERMUTE, EXPAND = aten.reshape.default, aten.permute.default, aten.expand.default
SLICE, CAT, LINEAR = aten.slice.Tensor, aten.cat.default, aten.linear.default

RESHAPES = (RESHAPE, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
"""Operations that keep the values in their row-major order."""

END = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class RedundantLayout(LocalPass):
    """Shorten chains of operations that only rearrange values.

    Before: `%a = permute(%x, [0, 2, 1]); %b = permute(%a, [0, 2, 1])`

    After: `%x`

    Applies when: a chain of reshapes ends in the shape that it started from, or reshapes a reshape.
    Applies when: a linear layer reads rows made one dimension, and its result's rows are parted again.
    Applies when: a permutation of a permutation, or one that keeps every dimension in its place.
    Applies when: an expansion of an expansion, or one to the shape that is there.
    Applies when: a slice takes everything, or slices a slice of the same dimension at numbers.
    Applies when: a concatenation has empty parts, one part, or puts together again the slices that one value was cut into.

    Declines when: sizes cannot be shown to be equal.
    """

    name = "redundant-layout"
    fidelity = Fidelity.EXACT

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield what can start from an earlier value."""
        for node in calls(program.graph, *RESHAPES, PERMUTE, EXPAND, SLICE, CAT):
            if node.target in RESHAPES:
                found = _reshape(program, node)
            elif node.target is PERMUTE:
                found = _permute(node)
            elif node.target is EXPAND:
                found = _expand(program, node)
            elif node.target is SLICE:
                found = _slice(program, node)
            else:
                found = _cat(program, node)
            if found is not None:
                yield found

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Return the earlier value, or one call on it."""
        if "parts" in detail:
            parts = [places[name] for name in detail["parts"]]
            return program.call(CAT, parts, detail["dim"], like=node)
        if "linear" in detail:
            linear = places[detail["linear"]]
            return program.call(LINEAR, places[detail["x"]], *linear.args[1:], like=linear, **linear.kwargs)
        source = places[detail["source"]]
        kind = detail.get("call")
        if kind is None:
            return source
        if kind == "permute":
            return program.call(PERMUTE, source, list(detail["order"]), like=node)
        if kind == "slice":
            return program.call(SLICE, source, detail["dim"], detail["start"], detail["end"], like=node)
        # The sizes are the node's own, some of them nodes.
        return program.call(node.target, source, *node.args[1:], like=node)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _use(node: fx.Node, source: fx.Node, why: str, **detail: Any) -> Decision:
    what = f"{detail['call']} %{source.name}" if "call" in detail else f"use %{source.name}"
    return Decision(node.name, what, why, {"source": source.name, **detail})


def _reshape(program: Program, node: fx.Node) -> Decision | None:
    shape = program.shape(node)
    source, same = _source(node), None
    while True:
        if program.shape(source) == shape:
            same = source
        if source.target not in RESHAPES:
            break
        source = _source(source)
    if same is not None:
        return _use(node, same, "it has this shape already")
    if (inner := _unflattened_linear(program, node)) is not None:
        return Decision(
            node.name,
            "linear",
            "rows were made one dimension and parted again",
            {"linear": inner.name, "x": _source(_source(inner)).name},
        )
    # A reshape to sizes of its own may start anywhere in the chain; -1 and "this dimension" may not.
    if source is not _source(node) and node.target is RESHAPE and not any(_is_inferred(n) for n in node.args[1]):  # type: ignore[union-attr]
        return _use(node, source, "a reshape of a reshape", call="reshape")
    return None


def _unflattened_linear(program: Program, node: fx.Node) -> fx.Node | None:
    """Return the linear layer of reshape(linear(reshape(x))), where it could read x as it is."""
    linear = _source(node)
    if linear.target is not LINEAR or len(linear.users) != 1 or _source(linear).target not in RESHAPES:
        return None
    x = _source(_source(linear))
    mine, before = program.shape(node), program.shape(x)
    return linear if mine[:-1] == before[:-1] and before[-1:] == program.shape(_source(linear))[-1:] else None


def _is_inferred(size: Any) -> bool:
    return isinstance(size, int) and size < 0


def _permute(node: fx.Node) -> Decision | None:
    order = _order(node)
    source = _source(node)
    while source.target is PERMUTE:
        inner = _order(source)
        order = [inner[i] for i in order]
        source = _source(source)
    if order == sorted(order):
        return _use(node, source, "every dimension is in its place")
    if source is not _source(node):
        return _use(node, source, "a permutation of a permutation", call="permute", order=order)
    return None


def _order(node: fx.Node) -> list[int]:
    rank = node.meta["val"].dim()
    return [int(i) % rank for i in node.args[1]]  # type: ignore[union-attr, arg-type]


def _expand(program: Program, node: fx.Node) -> Decision | None:
    source = _source(node)
    if program.shape(source) == program.shape(node):
        return _use(node, source, "it has this shape already")
    if source.target is not EXPAND:
        return None
    while source.target is EXPAND:
        source = _source(source)
    # -1 stands for the size of the operation's own input.
    if any(_is_inferred(n) for n in node.args[1]):  # type: ignore[union-attr]
        return None
    return _use(node, source, "an expansion of an expansion", call="expand")


def _bounds(program: Program, node: fx.Node) -> tuple[int, Size, Size] | None:
    """Return dimension, start and end of a slice with step 1; None where they are not known."""
    arguments: list[Any] = [*node.args, *([0, None, None, 1][len(node.args) - 1 :])]
    dim, start, end, step = arguments[1:5]
    value = node.meta["val"]
    dim = int(dim) % value.dim()
    size = program.shape(_source(node))[dim]
    if step != 1:
        return None
    low: Size = 0 if start is None else program.size(start)
    high: Size = size if end is None or end == END else program.size(end)
    low = _from_end(low, size)
    high = _from_end(high, size)
    if isinstance(size, int) and isinstance(high, int):
        high = min(high, size)
    return dim, low, high


def _from_end(at: Size, size: Size) -> Size:
    """Return an index with negative numbers counted from the end."""
    if not isinstance(at, int) or at >= 0:
        return at
    return max(size + at, 0) if isinstance(size, int) else size + at


def _slice(program: Program, node: fx.Node) -> Decision | None:
    source = _source(node)
    bounds = _bounds(program, node)
    if bounds is None:
        return None
    dim, low, high = bounds
    if program.shape(source) == program.shape(node):
        return _use(node, source, "it takes everything")
    if source.target is not SLICE or not (isinstance(low, int) and isinstance(high, int)) or low > high:
        return None
    inner = _bounds(program, source)
    if inner is None or inner[0] != dim or not (isinstance(inner[1], int) and isinstance(inner[2], int)):
        return None
    start, end = inner[1] + low, min(inner[1] + high, inner[2])
    return _use(node, _source(source), "a slice of a slice", call="slice", dim=dim, start=start, end=end)


def _cat(program: Program, node: fx.Node) -> Decision | None:
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim = int(given) % node.meta["val"].dim()
    dtype = node.meta["val"].dtype
    kept = [part for part in parts if program.shape(part) != (0,) and program.shape(part)[dim] != 0]
    # An empty part takes part in type promotion.
    if len(kept) == 1 and kept[0].meta["val"].dtype == dtype:
        return _use(node, kept[0], "the other parts are empty" if len(parts) > 1 else "there is one part")
    if (whole := _whole(program, kept, dim)) is not None and program.shape(whole) == program.shape(node):
        return _use(node, whole, "the parts are what it was cut into")
    if 1 < len(kept) < len(parts) and all(part.meta["val"].dtype == dtype for part in kept):
        return Decision(
            node.name, "leave out empty parts", "they add nothing", {"parts": [part.name for part in kept], "dim": dim}
        )
    return None


def _whole(program: Program, parts: list[fx.Node], dim: int) -> fx.Node | None:
    """Return the value whose consecutive slices from its start to its end the parts are, if there is one."""
    if not parts or any(part.target is not SLICE for part in parts) or len({_source(part) for part in parts}) != 1:
        return None
    whole = _source(parts[0])
    at: Size = 0
    for part in parts:
        bounds = _bounds(program, part)
        if bounds is None or bounds[0] != dim or bounds[1] != at:
            return None
        at = bounds[2]
    return whole if at == program.shape(whole)[dim] else None
