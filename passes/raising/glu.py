"""Recognition of gated feed-forwards."""

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

from .matching import MUL, either_order, is_call

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class RaiseGlu(LocalPass):
    """Turn the product of an activated gate and values into one operation.

    Before: `%a = silu(%gate); %y = mul(%a, %up)`

    After: `%y = graphwright.glu(%gate, %up, "silu")`

    Applies when: one factor of a product is SiLU, GELU, ReLU or a sigmoid, the other another value of the same shape and dtype.

    Declines when: the activated gate is used for something else too.
    Declines when: the shapes differ, so that one factor would be repeated.
    """

    name = "raise-glu"
    fidelity = Fidelity.EXACT

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the products with an activated gate."""
        for node in calls(program.graph, *MUL):
            for gate, up in either_order(node):
                activation = _activation(gate)
                if activation is None or not isinstance(up, fx.Node) or gate is up or gate.args[0] is up:
                    continue
                mine, other = gate.meta["val"], up.meta["val"]
                if len(gate.users) > 1:
                    yield Refusal(node.name, f"%{gate.name} is used for something else too")
                elif program.shape(gate) != program.shape(up):
                    yield Refusal(node.name, f"%{gate.name} and %{up.name} differ in shape")
                elif mine.dtype != other.dtype:
                    yield Refusal(node.name, f"the gate is {mine.dtype}, the values are {other.dtype}")
                else:
                    detail = {"gate": gate.args[0].name, "up": up.name, "activation": activation}
                    yield Decision(node.name, "glu", f"{activation} of one value times another", detail)
                    break

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Return a call of the gated product."""
        return program.call(dialect.glu, places[detail["gate"]], places[detail["up"]], detail["activation"], like=node)


def _activation(node: Any) -> str | None:
    if is_call(node, aten.silu.default):
        return "silu"
    if is_call(node, aten.relu.default):
        return "relu"
    if is_call(node, aten.sigmoid.default):
        return "sigmoid"
    if is_call(node, aten.gelu.default):
        return {"none": "gelu", "tanh": "gelu_tanh"}[node.kwargs.get("approximate", "none")]
    return None
