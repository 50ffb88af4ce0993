"""How many pairs of a query and a key an attention computes, as an expression of the sizes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import sympy

from . import index_core as ix
from .index_text import parse
from .masks import MaskForm, recognise

if TYPE_CHECKING:
    from graphwright.ir.program import Size

_HALF = sympy.Rational(1, 2)


def visible_pairs(predicate: str, types: dict[str, ix.Type], queries: Size, keys: Size) -> Size:
    """Return the pairs of a query and a key that a predicate lets see each other, as far as its form tells.

    Causality, sliding windows, sinks and chunks are told; whatever hides keys beyond that, such as padding, counts as visible.

    Args:
        predicate: an index expression over b, h, q and k; "" for all pairs.
        types: type of each tensor that it reads, by name.
        queries: number of queries S.
        keys: number of keys T; those before the first query's own are T - S.
    """
    if not predicate:
        return queries * keys
    form = _form(predicate, tuple(sorted(types.items())))
    if form.chunk is not None:
        length = sympy.Min(form.chunk, keys)
        return queries * ((length + 1) * _HALF if form.causal else length)
    window = form.window if form.window is not None else form.sink_window
    if not form.causal:
        reach = None if window is None or form.right_window is None else window + form.right_window - 1
        return queries * keys if reach is None else queries * sympy.Min(reach, keys)
    if window is None:
        return queries * keys - queries * (queries - 1) * _HALF
    reach = sympy.Min(window, keys)
    if queries != keys:
        return queries * sympy.Min(window + form.sinks, keys)
    beyond = sympy.Max(keys - window, 0) if form.sinks else 0
    some = sympy.Min(form.sinks, beyond)
    # The first queries see fewer keys than a window holds, and the first beyond it not all sinks as well.
    return keys * reach - reach * (reach - 1) * _HALF + form.sinks * (beyond - some) + some * (some + 1) * _HALF


@functools.lru_cache(256)
def _form(predicate: str, types: tuple[tuple[str, ix.Type], ...]) -> MaskForm:
    return recognise(parse(predicate, dict(types)), None, (), True, ix.NO_FACTS)
