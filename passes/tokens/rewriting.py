"""Computing a program for fewer tokens from each merge on."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses.axes import Label, labels
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.analyses.axes_state import has
from graphwright.ir.analyses.reach import Reach
from graphwright.ir.errors import VerifyError
from graphwright.ir.program import Program
from graphwright.passes.packing.region import RESHAPING, why_not_local

from .counts import Kept
from .sites import NotMergeable, Site, Sites, position_of

aten = torch.ops.aten


Metric = Literal["keys", "tokens"]


@dataclass(frozen=True)
class Merge:
    """One merge.

    Args:
        site: where.
        kept: how many tokens are left.
        protect: so many of the first neither go nor take others in.
        metric: what tokens are compared by: the mean over the heads of the block's keys, or the tokens themselves.
    """

    site: Site
    kept: Kept
    protect: int
    metric: Metric


@dataclass(frozen=True)
class _Level:
    """The tokens after a merge.

    Args:
        kept: how many there are: a number or a node.
        sizes: [B, kept], how many tokens each stands for.
        destination: [B, T]: the row of every token of the start; None before the first merge.
    """

    kept: Any
    sizes: fx.Node
    destination: fx.Node | None


class Rewrite:
    """Merges tokens of one program, which is changed.

    Args:
        program: the program.
        sites: what was found in it.
        merges: in the graph's order.
    """

    def __init__(self, program: Program, sites: Sites, merges: Sequence[Merge]) -> None:
        self._program, self._axes, self._sites = program, sites.axes, sites
        self._merges = {merge.site.stream: merge for merge in merges}
        self._protected = min((merge.protect for merge in merges), default=0)
        self._attentions = [node for node in program.graph.nodes if node.target is dialect.attention]
        self._reach = Reach(program.graph)
        self._levels: list[_Level] = []
        self._merged: dict[fx.Node, tuple[fx.Node, int]] = {}
        """Node -> what stands for it, computed for the tokens of a level."""
        self._behind: dict[fx.Node, tuple[fx.Node, Site, int]] = {}
        """Stream of a site -> its merged tokens, where they are read, and their level."""
        self._full: dict[fx.Node, fx.Node] = {}
        self._keys: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        """Rewrite.

        Raises:
            NotMergeable: an operation between merges depends on where tokens are.
        """
        for node in list(self._program.graph.nodes):
            if any(self._level(operand, node) for operand in node.all_input_nodes):
                self._visit(node)
            if node in self._merges:
                with self._program.graph.inserting_before(node.next):
                    self._merge(self._merges[node])
        self._program.drop_unused()

    # -- what an operand is

    def _now(self, operand: fx.Node, user: fx.Node) -> tuple[fx.Node, int]:
        """Return what `user` reads for an operand, and the level of its tokens; 0 for all tokens, or for none at all."""
        if operand in self._behind:
            merged, site, level = self._behind[operand]
            if user in site.inside:
                return merged, level
        return self._merged.get(operand, (operand, 0))

    def _level(self, operand: fx.Node, user: fx.Node) -> int:
        return self._now(operand, user)[1]

    def _has_tokens(self, node: fx.Node) -> bool:
        """Return whether a tensor differs from token to token."""
        return has(self._axes.factors.get(node, ()), Label.TOKEN, Label.KEY) or node in self._axes.generators

    # -- nodes behind a merge

    def _visit(self, node: fx.Node) -> None:
        """Compute a node for fewer tokens, or give it all of them again."""
        with self._program.graph.inserting_before(node):
            reason = self._why_not(node)
            if reason is None:
                level = max(self._level(operand, node) for operand in node.all_input_nodes)
                try:
                    self._merged[node] = (self._copy(node, level), level)
                except VerifyError as error:
                    raise NotMergeable(node.name, f"it cannot be computed for fewer tokens: {error}") from error
                return
            place = position_of(self._axes, node)
            source: Any = node.args[0]
            if place is not None and place < self._protected:
                # The first tokens are where they were.
                node.replace_input_with(source, self._now(source, node)[0])
                return
            blocked = next((n for n in (*self._attentions, *self._merges) if self._reach.leads(node, n)), None)
            if blocked is not None:
                raise NotMergeable(node.name, f"{reason}, and %{blocked.name} depends on it")
            for operand in node.all_input_nodes:
                if self._level(operand, node):
                    node.replace_input_with(operand, self._unmerged(operand, node))

    def _why_not(self, node: fx.Node) -> str | None:
        """Return why a node cannot be computed for fewer tokens; None if it can."""
        if node.op == "output":
            return "it is a result"
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor | list | tuple):
            return "it is a number"
        if isinstance(value, torch.Tensor) and node not in self._axes.factors:
            return "its dimensions are not known"
        # What hides keys gives way to the sizes.
        read: Any = node.args[:3] if node.target is dialect.attention else node.all_input_nodes
        levels = {n: self._level(n, node) for n in read if self._level(n, node) or self._has_tokens(n)}
        least, most = min(levels, key=levels.__getitem__), max(levels, key=levels.__getitem__)
        if levels[least] != levels[most]:
            return f"it reads %{least.name}, which has other tokens than %{most.name}"
        if node.target is dialect.attention:
            return None
        if not self._axes.local(node):
            return str(self._axes.mixing.get(node) or self._axes.index_mixing[node])
        return why_not_local(node) or None

    def _copy(self, node: fx.Node, level: int) -> fx.Node:
        """Insert a node's form for the tokens of a level."""
        program = self._program
        if node.target is dialect.attention:
            return self._attention(node, level)
        if node.target in RESHAPING:
            source, shape = node.args[0], list(node.args[1])  # type: ignore[arg-type]
            for dim, factors in enumerate(self._axes.factors[node]):
                if has([factors], Label.TOKEN) and shape[dim] != -1:
                    shape[dim] = self._levels[level].kept if labels(factors) == (Label.TOKEN,) and len(factors) == 1 else -1
            return program.call(node.target, self._now(source, node)[0], shape, like=node)  # type: ignore[arg-type]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: self._now(operand, node)[0])
        return program.call(node.target, *args, like=node, **kwargs)

    def _attention(self, node: fx.Node, level: int) -> fx.Node:
        """Insert attention to merged tokens: each key counts for as many as it stands for, and padding for none."""
        given = arguments(node)
        q, k, v = (self._now(given[name], node)[0] for name in "qkv")
        self._keys[node] = k
        options = {"bias": "log(in0[b, k])", "scale": given["scale"], "softcap": given["softcap"]}
        return self._program.call(dialect.attention, q, k, v, [self._levels[level].sizes], None, like=node, **options)

    def _unmerged(self, operand: fx.Node, user: fx.Node) -> fx.Node:
        """Return a tensor for every token again; it is inserted if it is not there."""
        merged, level = self._now(operand, user)
        if merged not in self._full:
            call, factors = self._program.call, self._axes.factors[operand]
            dims = [
                next((d for d, dim in enumerate(factors) if labels(dim) == (label,)), -1)
                for label in (Label.BATCH, Label.TOKEN)
            ]
            if -1 in dims or sum(has([dim], Label.BATCH, Label.TOKEN) for dim in factors) != 2:
                raise NotMergeable(user.name, f"it reads %{operand.name}, in which tokens cannot be told from other rows")
            order = [*dims, *(d for d in range(len(factors)) if d not in dims)]
            plain = order == sorted(order)
            front = merged if plain else call(aten.permute.default, merged, order, like=operand)
            taken = call(dialect.unmerge, front, self._levels[level].destination, like=operand)
            back = [order.index(d) for d in range(len(order))]
            self._full[merged] = taken if plain else call(aten.permute.default, taken, back, like=operand)
        return self._full[merged]

    # -- merges

    def _merge(self, merge: Merge) -> None:
        """Insert a merge behind a site's stream."""
        program, site, node = self._program, merge.site, merge.site.stream
        stream, level = self._merged.get(node, (node, 0))
        if not self._levels:
            self._levels.append(self._start(node))
        before = self._levels[level]
        tokens = self._levels[0].kept
        count = merge.kept.of(tokens) if isinstance(tokens, int) else merge.kept.node(program, tokens)
        if merge.metric == "keys":
            compared = self._keys.get(site.attention, site.attention.args[1])
        else:
            compared = program.call(aten.unsqueeze.default, stream, 1, like=node)
        metric = program.call(dialect.merge_metric, compared, like=node)
        matched = program.call(dialect.merge_match, metric, before.sizes, merge.protect, like=node)
        score, partner = (program.call(operator.getitem, matched, k, like=node) for k in range(2))
        rank = program.call(dialect.merge_rank, score, like=node)
        destination = program.call(dialect.merge_plan, rank, partner, count, like=node)
        result = program.call(dialect.merge, stream, before.sizes, destination, count, like=node)
        merged, sizes = (program.call(operator.getitem, result, k, like=node) for k in range(2))
        if before.destination is not None:
            destination = program.call(dialect.unmerge, destination, before.destination, like=node)
        self._levels.append(_Level(count, sizes, destination))
        self._behind[node] = (merged, site, len(self._levels) - 1)

    def _start(self, stream: fx.Node) -> _Level:
        """Insert what is known of tokens before the first merge: how many there are, and which are padding."""
        program, mask = self._program, self._sites.mask
        tokens: Any = stream.meta["val"].shape[1]
        if not isinstance(tokens, int):
            tokens = program.call(aten.sym_size.int, stream, 1)
        if mask is None:
            batch: Any = stream.meta["val"].shape[0]
            if not isinstance(batch, int):
                batch = program.call(aten.sym_size.int, stream, 0)
            device = stream.meta["val"].device
            sizes = program.call(aten.full.default, [batch, tokens], 1.0, dtype=torch.float32, device=device)
        else:
            there = program.call(aten.ne.Scalar, mask, self._sites.hidden)
            sizes = program.call(torch.ops.prims.convert_element_type.default, there, torch.float32)
        return _Level(tokens, sizes, None)
