"""Taking the bias out of linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.program import Program, calls
from graphwright.passes.base import Context, Decision, Fidelity, Refusal
from graphwright.passes.local import LocalPass, Places

aten = torch.ops.aten

LINEAR = aten.linear.default


@dataclass(frozen=True, kw_only=True)
class SplitBias(LocalPass):
    """Turn a linear layer with a bias into one without and an addition, which code generation fuses with what follows.

    Before: `%y = linear(%x, weights["w"], weights["b"])`

    After: `%l = linear(%x, weights["w"]); %y = add(%l, weights["b"])`

    Applies when: a linear layer has a bias.

    Fidelity: the bias is added after the sum is rounded, not before.
    """

    name = "split-bias"
    fidelity = Fidelity.CLOSE

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the linear layers with a bias."""
        for node in calls(program.graph, LINEAR):
            if bias_of(node) is not None:
                yield Decision(node.name, "add the bias separately", "it can be fused with what follows")

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Return the sum of the linear layer without bias and the bias."""
        product = program.call(LINEAR, node.args[0], node.args[1], like=node)
        return program.call(aten.add.Tensor, product, bias_of(node), like=node)


def bias_of(node: fx.Node) -> fx.Node | None:
    """Return the bias of a linear layer."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) else None
