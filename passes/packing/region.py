"""What of a program can be computed for the tokens that are there alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses.axes import Axes, Label, analyse_axes
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
        exits: those of `nodes` whose padded form other nodes read, or the caller, and that depend on an attention. What does
            not is computed for padding too where that is asked for.
    """

    axes: Axes
    mask: fx.Node
    hidden: int
    nodes: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]


def find_region(program: Program, *, among: Collection[fx.Node] | None = None) -> Region | None:
    """Return what can be packed; None where there is no attention.

    Args:
        program: the program.
        among: pack no other nodes than these; None for all that can be.

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
    nodes = [
        node for node in program.graph.nodes if (among is None or node in among) and _is_packable(axes, mask, hidden, node)
    ]
    return Region(axes, mask, hidden, tuple(nodes), tuple(_exits(program, axes, mask, hidden, nodes)))


def _is_packable(axes: Axes, mask: fx.Node, hidden: int, node: fx.Node) -> bool:
    """Return whether a node depends on what tokens hold, and can be computed for packed tokens."""
    if node not in axes.main or not _is_token_tensor(axes, node):
        return False
    if node.target is dialect.attention:
        return True
    # What the mask makes another number than 0 is made when it is padded again.
    return node not in axes.mixing and not why_not_local(node) and value_at_padding(node, mask, hidden) in (None, 0)


def _exits(program: Program, axes: Axes, mask: fx.Node, hidden: int, nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """Yield the nodes that have to be padded again.

    Raises:
        NotPackable: something would read what eager computes for padding, which is then 0.
    """
    inside, after = set(nodes), set[fx.Node]()
    for node in program.graph.nodes:
        if node.target is dialect.attention or any(n in after for n in node.all_input_nodes):
            after.add(node)
    for node in nodes:
        outside = [user for user in node.users if user not in inside]
        if node not in after or not outside:
            continue
        for user in outside if value_at_padding(node, mask, hidden) != 0 else ():
            takes = op_name(user) in ("select", "slice") and user in axes.mixing and axes.mixing[user].kind == "select"
            if user.op != "output" and not takes and value_at_padding(user, mask, hidden) is None:
                reason = str(axes.mixing.get(user) or why_not_local(user) or "it reads all positions")
                raise NotPackable(user.name, f"{reason}, padding included")
        yield node


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


def _mask_of(axes: Axes, node: fx.Node) -> tuple[fx.Node, int]:
    """Return the mask that tells which keys an attention hides, and its element for these.

    Raises:
        NotPackable: it hides others, or does more.
    """
    given = arguments(node)
    if given["sink"] is not None:
        raise NotPackable(node.name, "the attention has a sink")
    if any(axes.roles.get(given[name], ((),) * 4)[2] != (Label.TOKEN,) for name in "qkv"):
        raise NotPackable(node.name, "queries and keys are not the same tokens")
    written = " and ".join(filter(None, (given["predicate"], given["bias"] and f"scores + {given['bias']}")))
    if not written:
        raise NotPackable(node.name, "no input of the model says which tokens are there")
    if len(given["operands"]) != 1:
        raise NotPackable(node.name, f"the mask does more than hide padding: {written}")
    (mask,) = given["operands"]
    if mask.op != "placeholder" or axes.roles.get(mask) != ((Label.BATCH,), (Label.TOKEN,)):
        raise NotPackable(node.name, f"%{mask.name} is no input [batch, tokens] of the model")
    hidden = hidden_element(given["predicate"], given["bias"], mask.meta["val"].dtype)
    if hidden is None:
        raise NotPackable(node.name, f"the mask does more than hide padding: {written}")
    return mask, hidden
