"""Functions of scalars (combine functions, element-wise maps) applied to lanes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import scalars as s
from .arithmetic import choose
from .casts import as_number
from .effects import check_lanes
from .errors import UnsupportedError
from .registry import evaluator
from .values import Coords, Number, Val

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Block, Op, Value


def apply_region(lowering: Lowering, block: Block, args: list[Val], active: Number | None = None) -> list[Val]:
    """Apply a region of scalar operations (a combine function) to lanes; branches in it become selections.

    Args:
        lowering: the kernel.
        block: the region's body.
        args: values of its arguments.
        active: lanes whose results are used, for its assertions; None for all.
    """
    lowering.environment.update(zip(block.args, args, strict=True))
    outer, lowering.active = lowering.active, active
    results = _evaluate(lowering, block)
    lowering.active = outer
    return results


@evaluator("tt.map_elementwise")
def map_elementwise(lowering: Lowering, op: Op, value: Value, coords: Coords) -> Val:
    """A function of scalars applied to each element of tensors."""
    if int(op.attrs.get("pack", 1)) != 1:
        raise UnsupportedError("tl.map_elementwise that takes several elements at a time", op.line)
    results = apply_region(lowering, op.body, [lowering.eval(v, coords) for v in op.operands])
    for other, result in zip(op.results, results, strict=True):
        lowering.e.scopes[-1][(other, coords)] = result
    return results[value.index]


def _evaluate(lowering: Lowering, block: Block) -> list[Val]:
    for op in block.ops[:-1]:
        if op.name == "scf.if":
            condition = as_number(lowering.environment[op.operands[0]])
            then, otherwise = (_evaluate(lowering, r[0]) if r else [] for r in op.regions)
            for r, a, b in zip(op.results, then, otherwise, strict=True):
                lowering.environment[r] = choose(lowering, condition, a, b, r.type.pointee)
        elif op.name == "tt.assert":
            check_lanes(lowering, op, as_number(lowering.environment[op.operands[0]]))
        elif op.name == "arith.constant":
            lowering.environment[op.result] = s.constant(op.attrs["value"], op.result.element)
        else:
            lowering.environment[op.result] = lowering.elementwise(op, [lowering.environment[v] for v in op.operands])
    return [lowering.environment[v] for v in block.terminator.operands]
