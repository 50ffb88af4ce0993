"""Loop nests in two versions: one for tiles in which every mask holds everywhere, one that looks at the masks.

Nearly all tiles of a tensor are whole. Whether one is follows from the corners of its masks, where these compare indices
that grow evenly: a few scalar comparisons in place of a vector comparison and a masked access per chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .emit import LLVM_TYPES, Text
from .registry import ELEMENTWISE, EVALUATORS, MATERIALISERS
from .ttir import Value
from .values import Coord, Uniform

if TYPE_CHECKING:
    from .lowering import Lowering

_MONOTONE = frozenset({"slt", "sle", "sgt", "sge", "ult", "ule", "ugt", "uge"})
_SHAPE_ONLY = frozenset({"tt.expand_dims", "tt.broadcast", "tt.trans", "tt.splat", "arith.extsi"})
_COST_LIMIT = 160
"""Nests with more operations than this are not emitted twice."""


def versioned(lowering: Lowering, roots: Sequence[Value], emit: Callable[[], None], results: Sequence[Value] = ()) -> None:
    """Emit a nest that evaluates `roots`, in two versions if their masks can be tested beforehand.

    Args:
        lowering: the kernel.
        roots: the tensors that the nest evaluates, and masks that it uses itself. Everything they need is prepared.
        emit: emits the nest; may be called twice, and must make no buffers.
        results: scalars that the nest leaves in the environment.
    """
    masks = _provable(lowering, roots)
    if not masks or sum(lowering.plan.cost(v) for v in roots) > _COST_LIMIT:
        emit()
        return
    e = lowering.e
    whole = _all_corners(lowering, masks)
    if whole is None:
        emit()
        return
    saved = lowering.assumed
    if whole == "true":
        lowering.assumed = saved | masks
        with e.scope():
            emit()
        lowering.assumed = saved
        return
    labels, done = (e.fresh_label("whole"), e.fresh_label("edge")), e.fresh_label("both")
    e.branch(whole, *labels)
    outcomes: list[tuple[str, list[Text]]] = []
    for label, assumed in zip(labels, (saved | masks, saved), strict=True):
        e.label(label)
        lowering.assumed = assumed
        with e.scope():
            emit()
            texts = [lowering.lanes_text(lowering.environment[v], 1) for v in results]
        outcomes.append((e.current, texts))
        e.jump(done)
    lowering.assumed = saved
    e.label(done)
    (first, a), (second, b) = outcomes
    for value, x, y in zip(results, a, b, strict=True):
        phi = e.op(f"phi {LLVM_TYPES[value.element]} [{x}, %{first}], [{y}, %{second}]")
        lowering.environment[value] = Uniform(phi, value.element)


def _provable(lowering: Lowering, roots: Sequence[Value]) -> frozenset[Value]:
    """Masks behind `roots` whose corners tell everything."""
    found: set[Value] = set()
    seen: set[Value] = set()
    stack = list(roots)
    while stack:
        value = stack.pop()
        if value in seen or not value.shape or value in lowering.buffers or value in lowering.assumed:
            continue
        seen.add(value)
        op = value.op
        if value.element == "i1" and value in roots and _is_monotone(lowering, value):
            found.add(value)
            continue
        if op is None or op.name in MATERIALISERS or (op.name not in ELEMENTWISE and op.name not in EVALUATORS):
            continue
        if op.name == "tt.load" and len(op.operands) > 1 and _is_monotone(lowering, op.operands[1]):
            found.add(op.operands[1])
            stack.extend((op.operands[0], *op.operands[2:]))
        else:
            stack.extend(op.operands)
    return frozenset(found)


def _is_monotone(lowering: Lowering, mask: Value) -> bool:
    """Whether a mask holds everywhere if it holds at its corners."""
    op = mask.op
    if op is None or mask in lowering.buffers:
        return False
    if op.name in ("tt.expand_dims", "tt.broadcast", "tt.trans"):
        return _is_monotone(lowering, op.operands[0])
    if op.name == "tt.splat" or (op.name == "arith.constant" and not isinstance(op.attrs["value"], list)):
        return True
    if op.name == "arith.andi":
        return all(_is_monotone(lowering, v) for v in op.operands)
    return (
        op.name == "arith.cmpi"
        and op.attrs["predicate"] in _MONOTONE
        and op.operands[0].element != "i1"
        and all(_is_affine(lowering, v) for v in op.operands)
    )


def _is_affine(lowering: Lowering, value: Value) -> bool:
    """Whether an integer grows by the same amount at every step along each dimension."""
    if not value.shape:
        return True
    if value in lowering.inductions:
        return _is_affine(lowering, lowering.inductions[value].initial)
    op = value.op
    if op is None or value in lowering.buffers:
        return False
    if op.name == "tt.make_range" or op.name in _SHAPE_ONLY:
        return all(_is_affine(lowering, v) for v in op.operands)
    if op.name == "arith.constant":
        return not isinstance(op.attrs["value"], list)
    if op.name in ("arith.addi", "arith.subi"):
        return all(_is_affine(lowering, v) for v in op.operands)
    if op.name == "arith.muli":
        return any(
            all(s == 0 for s in lowering.plan.layout.strides(x)) and _is_affine(lowering, x) and _is_affine(lowering, y)
            for x, y in (op.operands, op.operands[::-1])
        )
    return False


def _all_corners(lowering: Lowering, masks: frozenset[Value]) -> Text | None:
    """An i1 that says whether all masks hold at all their corners; None if one never does."""
    e = lowering.e
    total: Text | None = None
    with e.scope():
        for mask in sorted(masks, key=lambda v: v.op.position if v.op is not None else -1):
            ends = [(0, n - 1) if n > 1 else (0,) for n in mask.shape]
            for corner in itertools.product(*ends):
                holds = lowering.eval(mask, tuple(Coord(i) for i in corner))
                assert isinstance(holds, Uniform)
                if isinstance(holds.value, int):
                    if not holds.value & 1:
                        return None
                    continue
                text = str(holds.value)
                total = text if total is None or total == text else e.op(f"and i1 {total}, {text}")
    return "true" if total is None else total
