"""Where in a model tokens can be merged: between the attention and the feed-forward of a block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses.axes import Axes, Label, analyse_axes
from graphwright.ir.analyses.axes_registry import arguments, op_name
from graphwright.ir.analyses.blocks import Block, find_blocks
from graphwright.ir.analyses.reach import Reach
from graphwright.ir.program import Program, calls
from graphwright.passes.packing.padding import hidden_element

_STREAM = ((Label.BATCH,), (Label.TOKEN,), ())


class NotMergeable(Exception):
    """Tokens cannot be merged; a reason to refuse, caught by the pass.

    Args:
        where: the name of the node.
        reason: a sentence for people.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(reason)
        self.where = where


@dataclass(frozen=True)
class Site:
    """A place to merge tokens.

    Args:
        block: its number, from 0.
        stream: [B, T, F], the tokens behind the attention, which the feed-forward reads and is added to.
        attention: of the block; its keys tell which tokens are alike.
        inside: the nodes that read merged tokens where they read `stream`.
    """

    block: int
    stream: fx.Node
    attention: fx.Node
    inside: frozenset[fx.Node]


@dataclass(frozen=True)
class Sites:
    """What was found in a program.

    Args:
        axes: what every dimension counts.
        found: the places, in the graph's order.
        refused: blocks without one: the node that it is about, and why.
        mask: the tensor [B, T] that says which tokens are there; None where all are.
        hidden: its element, 0 or 1, where there is none.
    """

    axes: Axes
    found: tuple[Site, ...]
    refused: tuple[tuple[str, str], ...]
    mask: fx.Node | None
    hidden: int


def find_sites(program: Program) -> Sites:
    """Find the places to merge tokens.

    Raises:
        NotMergeable: no place of the program will do, because of how it treats tokens.
    """
    if program.signature.packing is not None:
        raise NotMergeable("", "the program is packed: tokens of all sequences lie in one row")
    if any(calls(program.graph, dialect.merge)):
        raise NotMergeable("", "tokens are merged already")
    if program.states:
        raise NotMergeable("", "the program has caches, which hold every token")
    axes = analyse_axes(program.graph)
    if not axes.attention_nodes:
        axes = analyse_axes(program.graph, seed_from="attention")
    blocks = find_blocks(program.graph, axes)
    if not any("attention" in block.kinds for block in blocks):
        raise NotMergeable("", "no residual block with attention was found")
    attentions = list(calls(program.graph, dialect.attention))
    if not attentions:
        raise NotMergeable("", "none of the attentions is recognised: what decides between tokens is not known")
    masks = {_mask_of(axes, node): node for node in attentions}
    if len(masks) > 1:
        raise NotMergeable(list(masks.values())[1].name, "attentions differ in their masks")
    (mask, hidden) = next(iter(masks))
    reach = Reach(program.graph)
    found: list[Site] = []
    refused: list[tuple[str, str]] = []
    for number, block in enumerate(blocks):
        try:
            found.append(_site(axes, reach, number, block))
        except NotMergeable as error:
            refused.append((error.where, f"block {number}: {error}"))
    return Sites(axes, tuple(found), tuple(refused), mask, hidden)


def _site(axes: Axes, reach: Reach, number: int, block: Block) -> Site:
    where = block.output.name
    attentions = [branch for branch in block.branches if branch.kind == "attention"]
    after = [branch for branch in block.branches if branch.kind == "feed_forward"]
    if len(attentions) != 1 or not after:
        raise NotMergeable(where, f"it has {len(attentions)} attention branches and {len(after)} feed-forward branches")
    fused = [node for node in attentions[0].nodes if node.target is dialect.attention]
    if len(fused) != 1:
        raise NotMergeable(where, "its attention is not recognised")
    stream = after[0].input
    if not reach.leads(attentions[0].add, stream):
        raise NotMergeable(where, "its feed-forward reads the same tokens as its attention")
    if axes.roles.get(stream) != _STREAM:
        raise NotMergeable(stream.name, f"%{stream.name} is not [batch, tokens, features]")
    return Site(number, stream, fused[0], frozenset(block.nodes))


def _mask_of(axes: Axes, node: fx.Node) -> tuple[fx.Node | None, int]:
    """Return the mask that tells which keys an attention hides, and its element for these; None, 0 if it hides none.

    Raises:
        NotMergeable: it does more, so that merged tokens would not do for those that they were made of.
    """
    given = arguments(node)
    if given["sink"] is not None:
        raise NotMergeable(node.name, "the attention has a sink")
    if any(axes.roles.get(given[name], ((),) * 4)[2] != (Label.TOKEN,) for name in "qkv"):
        raise NotMergeable(node.name, "queries and keys are not the same tokens")
    written = " and ".join(filter(None, (given["predicate"], given["bias"] and f"scores + {given['bias']}")))
    if not written:
        return None, 0
    if len(given["operands"]) != 1:
        raise NotMergeable(node.name, f"the mask depends on positions: {written}")
    (mask,) = given["operands"]
    hidden = hidden_element(given["predicate"], given["bias"], mask.meta["val"].dtype)
    if hidden is None:
        raise NotMergeable(node.name, f"the mask does more than hide padding: {written}")
    if axes.roles.get(mask) != ((Label.BATCH,), (Label.TOKEN,)):
        raise NotMergeable(node.name, f"the mask %{mask.name} is not [batch, tokens]")
    return mask, hidden


def positions_read(axes: Axes, graph: fx.Graph, first: fx.Node) -> Iterator[int]:
    """Yield the places of single tokens that are taken from what depends on `first`."""
    after = {first}
    for node in graph.nodes:
        if any(n in after for n in node.all_input_nodes):
            after.add(node)
            place = position_of(axes, node)
            if place is not None:
                yield place


def position_of(axes: Axes, node: fx.Node) -> int | None:
    """Return the place, counted from the front, of the one token that a node takes; None if it does anything else."""
    name = op_name(node)
    if name not in ("select", "slice"):
        return None
    given = arguments(node)
    roles = axes.roles.get(given["self"], ())
    if roles[given["dim"] : given["dim"] + 1] != ((Label.TOKEN,),):
        return None
    if name == "select":
        start = given["index"]
    else:
        start, end = given["start"] or 0, given["end"]
        if not isinstance(start, int) or not isinstance(end, int) or given["step"] != 1 or end != start + 1:
            return None
    return start if isinstance(start, int) and start >= 0 else None
