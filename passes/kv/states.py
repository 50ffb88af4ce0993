"""Exchanging the states of a program with caches: other tensors that are kept from call to call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir.containers import Leaf
from graphwright.ir.program import Program
from graphwright.ir.signature import Parameter, TensorSpec


def new_state(program: Program, name: str, shape: Sequence[Any], dtype: torch.dtype) -> fx.Node:
    """Add an input after all others, which `exchange_states` makes a state.

    Args:
        program: a program with caches; it is changed.
        name: of the input; made unique.
        shape: sizes as the program's nodes have them: numbers, or symbolic numbers such as those of a cache's shape and
            what is computed of these, `cache.meta["val"].shape[2] // 32`.
        dtype: of its elements.
    """
    last = program.inputs[-1]
    with program.graph.inserting_after(last):
        node = program.graph.placeholder(name)
    with program.fake_mode:
        node.meta["val"] = torch.empty(tuple(shape), dtype=dtype, device=last.meta["val"].device)
    return node


def exchange_states(program: Program, gone: Sequence[fx.Node], made: Mapping[fx.Node, fx.Node]) -> None:
    """Take states out of a program and put others in; what nothing uses then is erased.

    Args:
        program: with caches; it is changed.
        gone: states that nothing but operations without users reads any more.
        made: input made by `new_state` -> the node that is its value for the next call.
    """
    values = {state: program.results[at] for state in program.inputs if (at := program.states.get(state.name)) is not None}
    kept = {**{state: value for state, value in values.items() if state not in gone}, **made}
    at_results = set(program.states.values())
    results = [value for at, value in enumerate(program.results) if at not in at_results]
    program.states = {state.name: len(results) + at for at, state in enumerate(kept)}
    program.output.args = ((*results, *kept.values()),)
    program.drop_unused()
    for state in gone:
        program.graph.erase_node(state)
    _sign(program)


def _sign(program: Program) -> None:
    """Let the signature say what inputs there are now."""
    known = {spec.name: spec for spec in program.signature.tensors}
    specs = [known.get(node.name) or _spec(program, node) for node in program.inputs]
    program.signature = dataclasses.replace(
        program.signature,
        parameters=tuple(Parameter(spec.name, "positional_or_keyword") for spec in specs),
        arguments={spec.name: Leaf(at) for at, spec in enumerate(specs)},
        tensors=tuple(specs),
    )


def _spec(program: Program, node: fx.Node) -> TensorSpec:
    value = node.meta["val"]
    sizes = tuple(n if isinstance(n, int) else str(n) for n in program.shape(node))
    return TensorSpec(node.name, value.dtype, str(value.device), sizes)
