"""What every pass promises, on small models of several kinds."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree

from graphwright.ir.inference import CHECKED
from graphwright.ir.printer import print_program
from graphwright.ir.verifier import verify
from graphwright.passes.base import Context, Fidelity
from graphwright.passes.registry import PASSES, format_pass, parse_pass

TOLERANCE = 1e-5
"""Largest difference over largest value that a CLOSE pass may make."""

ROUNDED_BY_LAYOUT = {("mixtral", "constant-folding"), ("qwen3-moe", "constant-folding")}
"""Where an exact pass stores a weight in another layout, and PyTorch's grouped products round by the layout."""


def tensors(results) -> list[torch.Tensor]:
    """Return the tensors of a model's results."""
    plain = dict(results) if hasattr(results, "keys") else results
    return [leaf for leaf in _pytree.tree_leaves(plain) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", sorted(PASSES))
def test_contract(family, name, captured, families) -> None:
    """It verifies, leaves the program alone, plans the same twice, is done after one run, and keeps the values."""
    program = captured(family)
    step = parse_pass(name)
    before = print_program(program)
    weights = dict(program.weights)
    plan = step.plan(program, Context())
    assert step.plan(program, Context()) == plan
    result = step.apply(program, plan)
    assert print_program(program) == before
    assert all(program.weights[key] is value for key, value in weights.items())
    assert len(program.weights) == len(weights)
    assert print_program(step.apply(program, plan)) == print_program(result)
    for node in result.graph.nodes:
        node.meta.pop(CHECKED, None)
    verify(result)
    assert step.plan(result, Context()).decisions == ()
    assert parse_pass(format_pass(step)) == step
    if not plan.decisions:
        assert print_program(result) == before
        return
    inputs = families[family].sample(2, 7, 3)
    for old, new in zip(tensors(program.reference(**inputs)), tensors(result.reference(**inputs)), strict=True):
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
        if step.fidelity is Fidelity.EXACT and (family, name) not in ROUNDED_BY_LAYOUT:
            assert torch.equal(old, new)
        else:
            assert ((old - new).abs().max() / old.abs().max()).item() <= TOLERANCE
