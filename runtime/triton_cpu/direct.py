"""Operands of products read where they lie in memory, without a copy.

That needs a load whose addresses grow evenly along both dimensions and whose mask holds everywhere. What is not known when
the kernel is compiled is tested for each tile; a tile that fails is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import masks
from . import scalars as s
from .buffers import Buffer, storage_type
from .emit import Text
from .values import BYTES, Coord, Pointer, Uniform

if TYPE_CHECKING:
    from .lowering import Lowering
    from .ttir import Value

PAGE_BYTES = 4096
"""Rows this far apart fall into the same few sets of the first-level cache, and drive each other out."""


def source(lowering: Lowering, value: Value) -> tuple[Value, list[int]] | None:
    """The load behind a rank-2 operand, and which of its dimensions each dimension of the operand is; None if unfit."""
    order = [0, 1]
    while value.op is not None and value.op.name == "tt.trans":
        order = [value.op.attrs["order"][d] for d in order]
        value = value.op.operands[0]
    op = value.op
    if op is None or op.name != "tt.load" or len(value.shape) != 2 or value.element in ("i1", "ptr"):
        return None
    if lowering.options.checked or value in lowering.plan.pinned or value in lowering.buffers:
        return None
    if len(op.operands) > 1 and not masks.is_monotone(lowering, op.operands[1]):
        return None
    pointer = op.operands[0]
    # The first, second and last address show whether one remainder wraps; two could cancel there.
    fits = masks.is_affine(lowering, pointer, remainders=True) and _remainders(lowering, pointer) <= 1
    return (value, order) if fits else None


def _remainders(lowering: Lowering, pointer: Value) -> int:
    """Number of remainders that an affine pointer is made from."""
    stack, seen, count = [pointer], {pointer}, 0
    while stack:
        at = stack.pop()
        if at in lowering.inductions:
            inputs = [lowering.inductions[at].initial]
        else:
            inputs = at.op.operands if at.op is not None and at.shape else []
            count += at.op is not None and bool(at.shape) and at.op.name in ("arith.remsi", "arith.remui")
        stack.extend(v for v in inputs if v not in seen)
        seen.update(inputs)
    return count


def suits_vectors(lowering: Lowering, load: Value, order: list[int], lane: int) -> bool:
    """Whether rows lie close enough together to be read as vectors, and their elements side by side."""
    assert load.op is not None
    strides = lowering.plan.layout.strides(load.op.operands[0])
    pitch = strides[order[1 - lane]]
    if strides[order[lane]] != 1 or not isinstance(pitch, int):
        return False
    return 0 < pitch <= 2 * load.shape[order[lane]] and pitch * BYTES[load.element] % PAGE_BYTES != 0


def in_memory(lowering: Lowering, load: Value, order: list[int]) -> tuple[Text, Buffer] | None:
    """A view of a loaded tile in memory, and an i1 ("true" if known) that says whether the tile may be read through it."""
    assert load.op is not None
    pointer_value, *rest = load.op.operands
    lowering.prepare(*load.op.operands)
    e = lowering.e
    with e.scope():
        tests: list[Text] = []
        if rest:
            whole = masks.all_corners(lowering, frozenset(rest[:1]))
            if whole is None:
                return None
            tests.append(whole)
        corner = _offset(lowering, pointer_value, 0, 0)
        if corner is None:
            return None
        base, first = corner
        steps = lowering.plan.layout.strides(pointer_value)
        exact = masks.is_affine(lowering, pointer_value)
        strides: list[int | Text] = []
        for d, (size, known) in enumerate(zip(load.shape, steps, strict=True)):
            if size == 1 or (exact and isinstance(known, int)):
                strides.append(int(known) if size > 1 else 0)
                continue
            step = _difference(lowering, pointer_value, d, 1, first)
            if step is None:
                return None
            strides.append(known if isinstance(known, int) else step)
            if not exact:
                last = _difference(lowering, pointer_value, d, size - 1, first)
                tests.append(e.op(f"icmp eq i64 {last}, {e.combine((strides[-1], size - 1))}"))
        address = e.address(storage_type(load.element), base, first.value)  # type: ignore[arg-type]
        condition = "true"
        for test in tests:
            if test != "true":
                condition = test if condition == "true" else e.op(f"and i1 {condition}, {test}")
    shape = tuple(load.shape[d] for d in order)
    return condition, Buffer(address, shape, [strides[d] for d in order], load.element)


def corner(lowering: Lowering, pointers: Value) -> tuple[Text, int | Text, int | Text] | None:
    """The base of an affine rank-2 tile, the offset of its first element and the distance of its rows; None without a base."""
    found = _offset(lowering, pointers, 0, 0)
    if found is None:
        return None
    base, first = found
    known = lowering.plan.layout.strides(pointers)[0]
    step = known if isinstance(known, int) else _difference(lowering, pointers, 0, 1, first)
    return None if step is None else (base, first.value, step)  # type: ignore[return-value]


def _offset(lowering: Lowering, pointers: Value, i: int, j: int) -> tuple[Text, Uniform] | None:
    pointer = lowering.eval(pointers, (Coord(i), Coord(j)))
    assert isinstance(pointer, Pointer)
    if pointer.base is None or not isinstance(pointer.offset, Uniform):
        return None
    return pointer.base, pointer.offset


def _difference(lowering: Lowering, pointers: Value, d: int, at: int, first: Uniform) -> int | Text | None:
    corner = _offset(lowering, pointers, *((at, 0) if d == 0 else (0, at)))
    if corner is None:
        return None
    return s.uniform_binary(lowering.e, "sub", corner[1], first).value  # type: ignore[return-value]
