"""Recognition of activations that are written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from graphwright.ir.program import Program, calls
from graphwright.passes.base import Context, Decision, Fidelity, Refusal
from graphwright.passes.local import LocalPass, Places

from .matching import ADD, DIV, MUL, NEG, SUB, is_call, number, only_user

aten = torch.ops.aten

SHAPES = (aten.tanh.default, aten.erf.default, aten.sigmoid.default)
"""The functions from which activations are made."""

POINTWISE = (*ADD, *SUB, *MUL, *DIV, *NEG, *SHAPES, aten.pow.Tensor_Scalar, aten.square.default)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}

SAMPLES = torch.linspace(-6.0, 6.0, 49, dtype=torch.float64)
"""Where functions are compared. Sums and products of a few such functions that agree here are the same function."""

TOLERANCE = 1e-5
"""Constants such as sqrt(2 / pi) are written with some digits."""

LONGEST = 6
"""How many nodes may follow the tanh, erf or sigmoid."""


@dataclass(frozen=True, kw_only=True)
class RaiseGelu(LocalPass):
    """Turn GELU and SiLU that are written out, in any spelling, into one operation.

    Before: `%u = mul(add(%x, mul(pow(%x, 3), 0.044715)), 0.79788456); %y = mul(mul(%x, 0.5), add(tanh(%u), 1))`

    After: `%y = gelu(%x, approximate="tanh")`

    Applies when: sums, products and powers of one value around a tanh, an erf or a sigmoid are, as a function of that value,
        the GELU (with erf or tanh) or the SiLU.

    Declines when: the function is another one, such as x * sigmoid(1.702 * x).

    Fidelity: constants and roundings may differ.
    """

    name = "raise-gelu"
    fidelity = Fidelity.CLOSE

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the written-out activations, each at its last node."""
        position = {node: at for at, node in enumerate(program.graph.nodes)}
        done: set[fx.Node] = set()
        for start in calls(program.graph, *SHAPES):
            found: Decision | None = None
            node = start
            for _ in range(LONGEST):
                user = only_user(node)
                if user is None or not is_call(user, *POINTWISE) or user in done:
                    break
                node = user
                match = _recognise(program, node, position)
                if match is not None:
                    x, kind = match
                    found = Decision(node.name, kind, f"as a function of %{x.name} it is {kind}", {"x": x.name, "kind": kind})
            if found is not None:
                done.add(node)
                yield found

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Return a call of the activation."""
        x = places[detail["x"]]
        if detail["kind"] == "silu":
            return program.call(aten.silu.default, x, like=node)
        if detail["kind"] == "gelu_tanh":
            return program.call(aten.gelu.default, x, like=node, approximate="tanh")
        return program.call(aten.gelu.default, x, like=node)


def _recognise(program: Program, node: fx.Node, position: dict[fx.Node, int]) -> tuple[fx.Node, str] | None:
    """Return x and the activation where `node` is an activation of x, element by element."""
    inside: list[fx.Node] = []
    frontier = {node}
    for _ in range(LONGEST * 2):
        if inside and len(frontier) == 1:
            (x,) = frontier
            if _same_kind(x, node) and any(part.target in SHAPES for part in inside):
                values = _evaluate(program, inside, x)
                for kind, function in ACTIVATIONS.items():
                    if torch.allclose(values, function(SAMPLES), rtol=TOLERANCE, atol=TOLERANCE):
                        return x, kind
        if not frontier:
            return None
        latest = max(frontier, key=position.__getitem__)
        if not is_call(latest, *POINTWISE) or latest.kwargs:
            return None
        frontier.discard(latest)
        inside.append(latest)
        frontier.update(arg for arg in latest.args if isinstance(arg, fx.Node) and number(program, arg) is None)
    return None


def _same_kind(x: fx.Node, node: fx.Node) -> bool:
    mine, other = x.meta["val"], node.meta["val"]
    return isinstance(mine, torch.Tensor) and mine.shape == other.shape and mine.dtype == other.dtype


def _evaluate(program: Program, inside: list[fx.Node], x: fx.Node) -> torch.Tensor:
    """Return the values at `SAMPLES` of the first of `inside`, nodes in reverse order, as a function of x."""
    values = {x: SAMPLES}

    def value(argument: Any) -> Any:
        return values[argument] if argument in values else number(program, argument)

    for node in reversed(inside):
        values[node] = torch.as_tensor(node.target(*(value(argument) for argument in node.args)))  # type: ignore[operator]
    return values[inside[0]]
