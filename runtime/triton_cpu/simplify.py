"""Removal of operations that change nothing."""

from __future__ import annotations

from .structure import relink
from .ttir import Block, Function, Value

_MOVES = frozenset({"tt.reshape", "tt.broadcast"})


def drop_identities(function: Function) -> None:
    """Let what uses a reshape to the same shape use its operand: `tl.sum(x)` of a vector reshapes it first."""
    same: dict[Value, Value] = {}

    def visit(block: Block) -> None:
        kept = []
        for op in block.ops:
            op.operands = [same.get(v, v) for v in op.operands]
            if op.name in _MOVES and op.result.type == op.operands[0].type:
                same[op.result] = op.operands[0]
                continue
            kept.append(op)
            for region in op.regions:
                for inner in region:
                    visit(inner)
        block.ops = kept

    for block in function.blocks:
        visit(block)
    if same:
        relink(function)
