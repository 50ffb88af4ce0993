"""Functions of scalars (combine functions, element-wise maps) applied to lanes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import scalars as s
from .arithmetic import choose
from .casts import as_number
from .effects import check_lanes
from .errors import UnsupportedError
from .registry import evaluator
from .rewrite import Replacement, replace_all
from .values import Coords, Number, Val

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Block, Function, Op, Value


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


def expand_packed_maps(function: Function) -> None:
    """Let functions that take several neighbours at a time take one element of each of several tensors instead.

    Before:
        %y = tt.map_elementwise %x {pack = 2} : tensor<Nxf32>
    After:
        %a, %b = tt.split(tt.reshape %x)                    tensor<N/2xf32> each
        %c, %d = tt.map_elementwise %a, %b {pack = 1}
        %y = tt.reshape(tt.join %c, %d)

    Raises:
        UnsupportedError: a tensor is smaller than a pack.
    """
    replace_all(function, "tt.map_elementwise", _expand_pack)


def _expand_pack(new: Replacement) -> bool:
    op, shape = new.op, new.op.results[0].shape
    pack, size = int(op.attrs.get("pack", 1)), math.prod(shape)
    if pack == 1:
        return False
    if size % pack:
        raise UnsupportedError(f"tl.map_elementwise that takes {pack} of {size} elements at a time", op.line)
    columns = [column for x in op.operands for column in _columns(new, x, pack)]
    results = [new.value(r.type.with_shape((size // pack,))) for r in op.results for _ in range(pack)]
    new.append("tt.map_elementwise", columns, results, {**op.attrs, "pack": 1}).regions = op.regions
    for k, result in enumerate(op.results):
        rows = _rows(new, results[k * pack : (k + 1) * pack])
        new.append("tt.reshape", [rows], [result], {})
    return True


def _columns(new: Replacement, x: Value, pack: int) -> list[Value]:
    """Every `pack`-th element of a tensor in row-major order, for each start."""
    found = [new.moved("tt.reshape", (x.type.numel // pack, *[2] * (pack.bit_length() - 1)), x)]
    while len(found) < pack:
        halves = []
        for v in found:
            sides = [new.value(v.type.with_shape(v.shape[:-1])) for _ in range(2)]
            new.append("tt.split", [v], sides, {})
            halves.append(sides)
        # The last dimension is the lowest bit of a column's number.
        found = [side[k] for k in range(2) for side in halves]
    return found


def _rows(new: Replacement, columns: list[Value]) -> Value:
    """The tensor whose columns are given."""
    while len(columns) > 1:
        half = len(columns) // 2
        columns = [new.moved("tt.join", (*a.shape, 2), a, b) for a, b in zip(columns[:half], columns[half:], strict=True)]
    return columns[0]


@evaluator("tt.map_elementwise")
def map_elementwise(lowering: Lowering, op: Op, value: Value, coords: Coords) -> Val:
    """A function of scalars applied to each element of tensors."""
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
