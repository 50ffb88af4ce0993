"""States: what a program changes in place from call to call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphwright.ir.errors import LoweringError
from graphwright.ir.program import Program

from .fusion import is_item
from .lowering import arguments
from .step_table import step_maker


@dataclass(frozen=True)
class InPlace:
    """What is changed in place.

    Args:
        states: result -> the state that it becomes the value of, and whose memory it has.
        after: operation -> those that read what it changes, and have to run before it.
    """

    states: Mapping[fx.Node, fx.Node]
    after: Mapping[fx.Node, frozenset[fx.Node]]


def states_in_place(program: Program) -> InPlace:
    """Return how a program's states are changed.

    Raises:
        LoweringError: one cannot be changed in place: no operation that can do so makes its new value, or its old value is
            read later.
    """
    states: dict[fx.Node, fx.Node] = {}
    after: dict[fx.Node, set[fx.Node]] = {}
    order = {node: k for k, node in enumerate(program.graph.nodes)}
    for state in program.inputs:
        if state.name not in program.states:
            continue
        result: Any = program.results[program.states[state.name]]
        maker_node, number = (result.args[0], result.args[1]) if is_item(result) else (result, 0)
        maker = step_maker(maker_node)
        if maker is None or arguments(maker_node).get(maker.in_place.get(number, "")) is not state:
            raise LoweringError(f"{state.name}: {maker_node.target} does not change a state in place, but makes its new value")
        for reader in state.users:
            if reader is maker_node:
                continue
            if step_maker(reader) is None or order[reader] > order[maker_node]:
                raise LoweringError(
                    f"{state.name}: {reader.name} reads it, and only an operation with steps of its own can do so before "
                    f"{maker_node.name} changes it in place"
                )
            after.setdefault(maker_node, set()).add(reader)
        states[result] = state
    return InPlace(states, {node: frozenset(readers) for node, readers in after.items()})
