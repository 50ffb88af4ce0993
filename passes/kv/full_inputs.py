"""Inputs that say which tokens are there, and where they stand, for sequences without gaps."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from graphwright.ir.program import Program

from .refusing import NotCausal

aten = torch.ops.aten

MASK, POSITIONS = "attention_mask", "position_ids"


def main_input(program: Program) -> fx.Node:
    """Return the input that holds the tokens.

    Raises:
        NotCausal: there is none, or more than one.
    """
    names = [spec.name for spec in program.signature.tensors]
    main = [node for node, name in zip(program.inputs, names, strict=True) if name not in (MASK, POSITIONS)]
    if len(main) != 1:
        found = ", ".join(names) or "none"
        raise NotCausal(program.output, f"one input beside {MASK} and {POSITIONS} must hold the tokens; the inputs are {found}")
    if main[0].meta["val"].dim() < 2:
        raise NotCausal(main[0], "the input with the tokens must be [batch, tokens, ...]")
    return main[0]


def with_full_inputs(program: Program) -> Program:
    """Return the program without the inputs attention_mask and position_ids: every token is there, and stands where it is.

    Raises:
        NotCausal: it has other inputs than one with tokens and these, or these are not [batch, tokens].
    """
    main_input(program)
    result = program.copy()
    main = main_input(result)
    kept = []
    batch, tokens = main.meta["val"].shape[:2]
    for node, spec in zip(result.inputs, program.signature.tensors, strict=True):
        if node is main:
            kept.append(spec)
            continue
        if result.shape(node) != result.shape(main)[:2]:
            raise NotCausal(node, f"the input {spec.name} must be [batch, tokens]")
        device, dtype = node.meta["val"].device, node.meta["val"].dtype
        with result.graph.inserting_after(result.inputs[-1]):
            last = result.graph.call_function(aten.sym_size.int, (main, 1))
            last.meta["val"] = tokens
        with result.graph.inserting_before(last):
            first = result.graph.call_function(aten.sym_size.int, (main, 0))
            first.meta["val"] = batch
        with result.graph.inserting_after(last):
            if spec.name == MASK:
                new = result.call(aten.ones.default, [first, last], dtype=dtype, device=device)
            else:
                row = result.call(aten.arange.default, last, dtype=dtype, device=device)
                with result.graph.inserting_after(row):
                    wide = result.call(aten.unsqueeze.default, row, 0)
                with result.graph.inserting_after(wide):
                    new = result.call(aten.expand.default, wide, [first, last])
        node.replace_all_uses_with(new)
        result.graph.erase_node(node)
    result.signature = dataclasses.replace(result.signature, tensors=tuple(kept))
    result.drop_unused()
    return result
