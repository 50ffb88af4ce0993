"""Loop nests in two versions: one for tiles in which every mask holds everywhere, one that looks at the masks.

Nearly all tiles of a tensor are whole. Whether one is follows from the corners of its masks, where these compare indices
that grow evenly: a few scalar comparisons in place of a vector comparison and a masked access per chunk. In the same way
an index taken modulo a size (`offsets % N`) nearly always is a run of consecutive integers.
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

_MONOTONE = frozenset({"slt", "sle", "sgt", "sge"})
"""Comparisons that hold everywhere if they hold at both ends; without sign, an index that passes zero would not."""

_LINEAR = frozenset(f"tt.{n}" for n in ("make_range", "expand_dims", "broadcast", "trans", "splat", "addptr")) | {
    "arith.extsi",
    "arith.addi",
    "arith.subi",
}
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
    masks = provable(lowering, roots)
    runs = _runs(lowering, roots)
    if not (masks or runs) or sum(lowering.plan.cost(v) for v in roots) > _COST_LIMIT:
        emit()
        return
    e = lowering.e
    whole = all_corners(lowering, masks)
    if whole is None:
        emit()
        return
    for run in runs.values():
        whole = run if whole == "true" else e.op(f"and i1 {whole}, {run}")
    masks |= frozenset(runs)
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


def provable(lowering: Lowering, roots: Sequence[Value]) -> frozenset[Value]:
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
        if value.element == "i1" and value in roots and is_monotone(lowering, value):
            found.add(value)
            continue
        if op is None or op.name in MATERIALISERS or (op.name not in ELEMENTWISE and op.name not in EVALUATORS):
            continue
        if op.name == "tt.load" and len(op.operands) > 1 and is_monotone(lowering, op.operands[1]):
            found.add(op.operands[1])
            stack.extend((op.operands[0], *op.operands[2:]))
        elif value in lowering.inductions:
            stack.append(lowering.inductions[value].initial)
        else:
            stack.extend(op.operands)
    return frozenset(found)


def _runs(lowering: Lowering, roots: Sequence[Value]) -> dict[Value, Text]:
    """Index buffers behind `roots` that may be runs, with the i1 that says whether they are."""
    found: dict[Value, Text] = {}
    seen: set[Value] = set()
    stack = list(roots)
    while stack:
        value = stack.pop()
        if value in seen or not value.shape or value in lowering.assumed:
            continue
        seen.add(value)
        held = lowering.buffers.get(value)
        if held is not None:
            if held.run is not None:
                found[value] = held.run[0]
        elif value in lowering.inductions:
            stack.append(lowering.inductions[value].initial)
        elif value.op is not None and value.op.name not in MATERIALISERS:
            stack.extend(value.op.operands)
    return found


def is_monotone(lowering: Lowering, mask: Value) -> bool:
    """Whether a mask holds everywhere if it holds at its corners."""
    op = mask.op
    if op is None:
        return False
    if op.name in ("tt.expand_dims", "tt.broadcast", "tt.trans"):
        return is_monotone(lowering, op.operands[0])
    if op.name == "tt.splat" or (op.name == "arith.constant" and not isinstance(op.attrs["value"], list)):
        return True
    if op.name == "arith.andi":
        return all(is_monotone(lowering, v) for v in op.operands)
    return (
        op.name == "arith.cmpi"
        and op.attrs["predicate"] in _MONOTONE
        and op.operands[0].element != "i1"
        and all(is_affine(lowering, v) for v in op.operands)
    )


def is_affine(lowering: Lowering, value: Value, *, remainders: bool = False) -> bool:
    """Whether an index or pointer grows by the same amount at every step along each dimension.

    Args:
        lowering: the kernel.
        value: the tensor.
        remainders: accept remainders of such indices, which grow evenly as long as they do not wrap.
    """
    if not value.shape:
        return True
    if value in lowering.inductions:
        return is_affine(lowering, lowering.inductions[value].initial, remainders=remainders)
    op = value.op
    if op is None:
        return False
    if op.name == "arith.constant":
        return not isinstance(op.attrs["value"], list)
    if op.name == "arith.muli":
        if not any(all(s == 0 for s in lowering.plan.layout.strides(v)) for v in op.operands):
            return False
    elif op.name in ("arith.remsi", "arith.remui"):
        if not remainders or any(s != 0 for s in lowering.plan.layout.strides(op.operands[1])):
            return False
    elif op.name not in _LINEAR:
        return False
    return all(is_affine(lowering, v, remainders=remainders) for v in op.operands)


def all_corners(lowering: Lowering, masks: frozenset[Value]) -> Text | None:
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
