"""Between padded tensors [batch, tokens, ...] and packed ones, in which all tokens are of one batch: [1, packed, ...]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses.axes import Axes, Label, labels
from graphwright.ir.analyses.axes_state import has
from graphwright.ir.packing import Part
from graphwright.ir.program import Program

from .region import NotPackable

aten = torch.ops.aten


class Moves:
    """Inserts what packs and unpacks tensors of one program.

    Args:
        program: where nodes are inserted, at its insertion point.
        axes: of the graph before anything was inserted.
        part: gives the input that has a part of the packing.
    """

    def __init__(self, program: Program, axes: Axes, part: Callable[[Part], fx.Node]) -> None:
        self._program = program
        self._factors = axes.factors
        self._part = part

    def is_padded(self, node: fx.Node) -> bool:
        """Return whether a tensor has an axis over sequences or tokens."""
        return has(self._factors.get(node, ()), Label.BATCH, Label.TOKEN)

    def packed_shape(self, node: fx.Node) -> list[Any]:
        """Return the sizes of a tensor once it is packed: numbers, and -1 where it has the tokens."""
        shape = []
        for dim in self._factors[node]:
            rest = math.prod(int(factor.size) for factor in dim if factor.label is None)
            shape.append(-1 if has([dim], Label.TOKEN) else rest)
        return shape

    def pack(self, node: fx.Node, user: fx.Node) -> fx.Node:
        """Insert the packed form of a padded tensor.

        Args:
            node: with a batch axis, a token axis, or both.
            user: what reads it.

        Raises:
            NotPackable: it is laid out in a way that is not known; what cannot be packed then is `user`.
        """
        batch, token = self._dim(node, Label.BATCH, user), self._dim(node, Label.TOKEN, user)
        if batch is not None and token is not None and batch != token:
            moved = self._front(node, [batch, token])
            rest = list(moved.meta["val"].shape[2:])
            flat = self._call(aten.reshape.default, node, moved, [-1, *rest])
            taken = self._take(flat, "rows", node)
            return self._back(taken, [batch, token], node)
        if token is not None:
            taken = self._take(self._front(node, [token]), "positions" if batch is None else "rows", node)
            return self._back(self._call(aten.squeeze.dim, node, taken, 0), [token], node)
        assert batch is not None
        place = self._token_dim(node, user)
        taken = self._call(aten.squeeze.dim, node, self._take(self._front(node, [batch]), "sequences", node), 0)
        return self._call(aten.transpose.int, node, self._back(taken, [batch], node), batch, place)

    def unpack(self, packed: fx.Node, node: fx.Node) -> fx.Node:
        """Insert the padded form of a packed tensor: 0 where the mask is 0.

        Args:
            packed: the packed form of `node`.
            node: a padded tensor.

        Raises:
            NotPackable: it is laid out in a way that is not known.
        """
        batch, token = self._dim(node, Label.BATCH, node), self._dim(node, Label.TOKEN, node)
        assert batch is not None
        assert token is not None
        if batch == token:
            places = self._call(aten.reshape.default, node, self._part("places"), [-1])
            taken = self._program.call(dialect.take_rows, self._front(packed, [token]), places, like=node)
            return self._back(taken, [token], node)
        rows = self._call(aten.squeeze.dim, node, self._front(packed, [batch, token]), 0)
        taken = self._program.call(dialect.take_rows, rows, self._part("places"), like=node)
        return self._back(taken, [batch, token], node)

    def _dim(self, node: fx.Node, label: Label, user: fx.Node) -> int | None:
        found = [(d, dim) for d, dim in enumerate(self._factors[node]) if has([dim], label)]
        if not found:
            return None
        ((d, dim),) = found if len(found) == 1 else [(0, ())]
        if labels(dim) not in ((label,), (Label.BATCH, Label.TOKEN)) or len(dim) != len(labels(dim)):
            raise NotPackable(
                user.name, f"the {label.value} axis of %{node.name} is in one dimension with another, or there twice"
            )
        return d

    def _token_dim(self, node: fx.Node, user: fx.Node) -> int:
        """Return the dimension of a tensor without tokens that meets the tokens of what reads it."""
        dims = self._factors.get(user, ())
        tokens = [d for d, dim in enumerate(dims) if labels(dim) == (Label.TOKEN,)]
        place = tokens[0] - (len(dims) - node.meta["val"].dim()) if len(tokens) == 1 else -1
        if place < 0 or node.meta["val"].shape[place] != 1:
            raise NotPackable(user.name, f"it reads %{node.name}, which has other features where this has tokens")
        return place

    def _take(self, node: fx.Node, part: Part, like: fx.Node) -> fx.Node:
        return self._program.call(dialect.take_rows, node, self._part(part), like=like)

    def _front(self, node: fx.Node, dims: list[int]) -> fx.Node:
        order = [*dims, *(d for d in range(node.meta["val"].dim()) if d not in dims)]
        return self._permute(node, order)

    def _back(self, node: fx.Node, dims: list[int], like: fx.Node) -> fx.Node:
        order = [*dims, *(d for d in range(node.meta["val"].dim()) if d not in dims)]
        return self._permute(node, [order.index(d) for d in range(len(order))])

    def _permute(self, node: fx.Node, order: list[int]) -> fx.Node:
        if order == sorted(order):
            return node
        return self._program.call(aten.permute.default, node, order)

    def _call(self, target: Any, like: fx.Node, *args: Any) -> fx.Node:
        return self._program.call(target, *args, like=like)
