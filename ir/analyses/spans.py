"""The spans of keys that a mask leaves to a query, as a kernel walks them, and what is left to test for each key.

spans = spans_of(recognise(parse("q - k >= 0 & (3 - k >= 0 | k - q + 7 >= 0)"), None, (), True, facts))
spans.causal, spans.window, spans.sinks, spans.rest     # True, 8, 4, True
"""

from __future__ import annotations

from dataclasses import dataclass

from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.index import Expr

from .masks import MaskForm

Q, K = ix.var("q"), ix.var("k")
_BEHIND, _AHEAD = ix.subtract(K, Q), ix.subtract(Q, K)


@dataclass(frozen=True)
class Spans:
    """What a mask says of positions. All conditions together, with `rest`, are the mask's predicate.

    Args:
        rest: what none of the others says: the predicate is true where all of them and it hold.
        causal: k <= q.
        window: k > q - window, or k < sinks; None for no limit.
        right_window: k < q + right_window, or q < free; None for no limit.
        sinks: first keys that every query sees whatever the window says.
        free: first queries that see keys whatever the right window says.
        chunk: tokens of a chunk, for the two below; None for no chunks.
        chunks_behind: k // chunk >= q // chunk - chunks_behind; None for no limit.
        chunks_ahead: k // chunk <= q // chunk + chunks_ahead; None for no limit.
    """

    rest: Expr
    causal: bool = False
    window: int | None = None
    right_window: int | None = None
    sinks: int = 0
    free: int = 0
    chunk: int | None = None
    chunks_behind: int | None = None
    chunks_ahead: int | None = None


def spans_of(form: MaskForm) -> Spans:
    """Return the spans of a mask; a mask that is causal from another diagonal than q = k has none."""
    if form.causal and form.offset is not ix.ZERO:
        return Spans(form.predicate)
    window, right_window = form.window, None if form.causal else form.right_window
    sinks = free = 0
    chunk: int | None = None
    limits: list[int | None] = [None, None]
    rest: list[Expr] = []
    for atom in ix.atoms(form.residual):
        exempt = _exempt(atom, K, _BEHIND)
        if exempt is not None and not sinks and (window is None or exempt[1] < window):
            if window is not None:
                rest.append(ix.ge0(ix.add(_BEHIND, ix.const(window - 1)), form.facts))
            sinks, window = exempt
            continue
        exempt = None if form.causal else _exempt(atom, Q, _AHEAD)
        if exempt is not None and not free and (right_window is None or exempt[1] < right_window):
            if right_window is not None:
                rest.append(ix.ge0(ix.add(_AHEAD, ix.const(right_window - 1)), form.facts))
            free, right_window = exempt
            continue
        found = _chunks(atom)
        if found is not None and chunk in (None, found[0]):
            chunk = found[0]
            limits = [
                new if old is None else old if new is None else min(old, new) for old, new in zip(limits, found[1], strict=True)
            ]
            continue
        rest.append(atom)
    return Spans(ix.and_(*rest, facts=form.facts), form.causal, window, right_window, sinks, free, chunk, *limits)


def _exempt(atom: Expr, index: Expr, distance: Expr) -> tuple[int, int] | None:
    """Return n and w where the atom is index < n or distance + w - 1 >= 0."""
    if atom.kind != "not" or atom.operands[0].kind != "and" or len(atom.operands[0].operands) != 2:
        return None
    one, other = (ix.not_(operand) for operand in atom.operands[0].operands)
    for first, second in ((one, other), (other, one)):
        count, reach = _constant(first, ix.negate(index)), _constant(second, distance)
        if count is not None and reach is not None and count >= 0 and reach >= 0:
            return count + 1, reach + 1
    return None


def _constant(atom: Expr, e: Expr) -> int | None:
    """Return c where the atom is e + c >= 0."""
    if atom.kind != "ge0":
        return None
    rest = ix.subtract(atom.operands[0], e)
    return ix.parts(rest)[0] if rest.kind == "const" else None


def _chunks(atom: Expr) -> tuple[int, tuple[int | None, int | None]] | None:
    """Return the size of chunks, and how many more of them an atom lets a query see behind and ahead."""
    if atom.kind not in ("eq0", "ge0"):
        return None
    sizes = {operand.value for operand in ix.parts(atom.operands[0])[1] if operand.kind == "floordiv"}
    size = next(iter(sizes), None)
    if len(sizes) != 1 or not isinstance(size, int):
        return None
    ahead = ix.subtract(ix.floor_divide(Q, size), ix.floor_divide(K, size))
    if atom.kind == "eq0":
        return (size, (0, 0)) if atom.operands[0] in (ahead, ix.negate(ahead)) else None
    behind_count, ahead_count = _constant(atom, ix.negate(ahead)), _constant(atom, ahead)
    if behind_count is not None and behind_count >= 0:
        return size, (behind_count, None)
    return (size, (None, ahead_count)) if ahead_count is not None and ahead_count >= 0 else None


def _least(one: int | None, other: int | None) -> int | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)
