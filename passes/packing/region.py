"""What of a program can be computed for the tokens that are there alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses.axes import Axes, Label, Mixing, analyse_axes
from graphwright.ir.analyses.axes_registry import arguments, op_name
from graphwright.ir.program import Program, calls
from graphwright.passes.local import is_random

from .padding import hidden_element, value_at_padding

aten = torch.ops.aten

RESHAPING = (aten.reshape.default, aten.view.default, aten.expand.default)
"""Operations whose sizes are those of their result."""


class NotPackable(Exception):
    """A program cannot be packed; a reason to refuse, caught by the pass.

    Args:
        where: the name of the node.
        reason: a sentence for people.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(reason)
        self.where = where


@dataclass(frozen=True)
class Region:
    """What is packed.

    Args:
        axes: what every dimension counts.
        mask: the input [batch, tokens] that says which tokens are there.
        hidden: its element, 0 or 1, where there is none.
        nodes: what depends on what tokens hold, and is computed for packed tokens; in the graph's order.
    """

    axes: Axes
    mask: fx.Node
    hidden: int
    nodes: tuple[fx.Node, ...]


def find_region(program: Program) -> Region | None:
    """Return what can be packed; None where there is no attention.

    Raises:
        NotPackable: there is attention, but padding cannot be left out.
    """
    attentions = list(calls(program.graph, dialect.attention))
    if not attentions:
        return None
    axes = analyse_axes(program.graph)
    for what, size in (("sequences", axes.batch_size), ("tokens", axes.token_size)):
        if size is None or not size.is_Symbol:
            raise NotPackable(attentions[0].name, f"the number of {what} is not a dimension of the program")
    masks = {_mask_of(axes, node): node for node in attentions}
    if len(masks) > 1:
        raise NotPackable(list(masks.values())[1].name, "attentions differ in their masks")
    (mask, hidden) = next(iter(masks))
    for node, mixing in axes.mixing.items():
        if node.target is not dialect.attention:
            _check_mixing(axes, mask, hidden, node, mixing)
    nodes = []
    for node in program.graph.nodes:
        local = node.target is dialect.attention or node not in axes.mixing
        if node in axes.main and local and _is_token_tensor(axes, node):
            reason = why_not_local(node)
            if reason:
                raise NotPackable(node.name, reason)
            nodes.append(node)
    return Region(axes, mask, hidden, tuple(nodes))


def has_both(axes: Axes, node: fx.Node) -> bool:
    """Return whether a tensor has one batch axis and one token axis, and no other axis over sequences or tokens."""
    found = sorted(label.value for dim in axes.roles.get(node, ()) for label in dim)
    return found == [Label.BATCH.value, Label.TOKEN.value]


def why_not_local(node: fx.Node) -> str:
    """Return why an operation on each token alone cannot be computed for packed tokens; "" if it can."""
    if is_random(node):
        return "it draws random numbers"
    if node.target is aten.squeeze.default:
        return "it drops whatever dimension is 1"
    sizes = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), torch.Tensor | list | tuple)]
    if sizes and node.target not in RESHAPING:
        return f"{node.target} takes a size"
    return ""


def _is_token_tensor(axes: Axes, node: fx.Node) -> bool:
    """Return whether a call makes a tensor with batch and tokens, or several tensors all of which are."""
    if node.op != "call_function":
        return False
    if isinstance(node.meta.get("val"), list | tuple):
        return bool(node.users) and all(has_both(axes, user) for user in node.users)
    return has_both(axes, node)


def _check_mixing(axes: Axes, mask: fx.Node, hidden: int, node: fx.Node, mixing: Mixing) -> None:
    """Raise if an operation that mixes tokens would get something else than before.

    Raises:
        NotPackable: it would.
    """
    sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if len(sources) == 1 and has_both(axes, sources[0]):
        if mixing.kind == "select" and op_name(node) in ("select", "slice"):
            return
        if mixing.kind == "reduce":
            if value_at_padding(sources[0], mask, hidden) == 0:
                return
            raise NotPackable(node.name, f"{mixing.reason}, and not only of tokens that the mask keeps")
    raise NotPackable(node.name, mixing.reason)


def _mask_of(axes: Axes, node: fx.Node) -> tuple[fx.Node, int]:
    """Return the mask that tells which keys an attention hides, and its element for these.

    Raises:
        NotPackable: it hides others, or does more.
    """
    given = arguments(node)
    for name in ("bias", "sink"):
        if given[name]:
            raise NotPackable(node.name, f"the attention has a {name}")
    if any(axes.roles.get(given[name], ((),) * 4)[2] != (Label.TOKEN,) for name in "qkv"):
        raise NotPackable(node.name, "queries and keys are not the same tokens")
    if not given["predicate"] or len(given["operands"]) != 1:
        raise NotPackable(node.name, "no input of the model says which tokens are there")
    (mask,) = given["operands"]
    if mask.op != "placeholder" or axes.roles.get(mask) != ((Label.BATCH,), (Label.TOKEN,)):
        raise NotPackable(node.name, f"%{mask.name} is no input [batch, tokens] of the model")
    hidden = hidden_element(given["predicate"], mask.meta["val"].dtype)
    if hidden is None:
        raise NotPackable(node.name, f"the mask hides more than padding: {given['predicate']}")
    return mask, hidden
