"""The keys that a block of queries walks in an attention kernel, and the conditions that are left to test for each key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .attention_parts import both

if TYPE_CHECKING:
    from .attention import AttentionSpec


def key_ranges(spec: AttentionSpec) -> Iterator[str]:
    """The keys that some query of the block sees, and among them the blocks that all its queries see whole."""
    stop = all_stop = keys_end(spec)
    for some, whole in _ends(spec):
        stop, all_stop = f"tl.minimum({stop}, {some})", f"tl.minimum({all_stop}, {whole})"
    if spec.ragged and stop == all_stop:
        stop = f"tl.where(first_q < query_length, {stop}, 0)"
    yield f"stop = {stop}"
    if spec.listed:
        return
    if not spec.starts:
        yield f"whole_stop = tl.maximum({all_stop}, 0) // BLOCK_N * BLOCK_N"
        yield "# Every query of the block sees the keys up to whole_stop, and none sees one from stop on."
        yield "bounds = (0, whole_stop, stop)"
        return
    start, all_start = "0", "start"
    for some, whole in _beginnings(spec):
        start, all_start = f"tl.maximum({some}, {start})", f"tl.maximum({whole}, {all_start})"
    yield f"start = {start}"
    yield f"all_start = {all_start}"
    yield "whole_start = tl.minimum(start + tl.cdiv(all_start - start, BLOCK_N) * BLOCK_N, stop)"
    yield f"whole_stop = whole_start + tl.maximum({all_stop} - whole_start, 0) // BLOCK_N * BLOCK_N"
    yield "# Every query of the block sees the keys from whole_start to whole_stop, and none sees one outside start and stop."
    if spec.sinks:
        yield f"# But for the first {spec.sinks}, which are seen by all."
        yield f"sink_stop = tl.minimum(tl.minimum({spec.sinks}, start), {keys_end(spec)})"
        yield "starts = (0, start, whole_start, whole_stop)"
        yield "stops = (sink_stop, whole_start, whole_stop, stop)"
    else:
        yield "bounds = (start, whole_start, whole_stop, stop)"


def _ends(spec: AttentionSpec) -> Iterator[tuple[str, str]]:
    """Limits before which some query of the block sees keys, each with the one before which all do."""
    position, last = position_of(spec, "first_q"), "tl.minimum(BLOCK_M, query_length - first_q)"
    if spec.reach is not None:
        some = f"{position} + {last}{f' + {spec.reach - 1}' if spec.reach > 1 else ''}"
        if spec.free:
            some = f"tl.where({position} < {spec.free}, {keys_end(spec)}, {some})"
        yield some, f"{position} + {spec.reach}"
    if spec.chunk is not None and spec.chunks_ahead is not None:
        ahead = f"{spec.chunk} * {spec.chunk} + {(spec.chunks_ahead + 1) * spec.chunk}"
        yield f"({position} + {'1' if spec.one else last} - 1) // {ahead}", f"({position}) // {ahead}"


def _beginnings(spec: AttentionSpec) -> Iterator[tuple[str, str]]:
    """Keys from which on some query of the block sees keys, each with the one from which on all do."""
    position, rows = position_of(spec, "first_q"), "1" if spec.one else "BLOCK_M"
    if spec.window is not None:
        yield f"{position} - {spec.window - 1}", f"{position} + {rows} - {spec.window}"
    if spec.chunk is not None and spec.chunks_behind is not None:
        behind = f"{spec.chunk} * {spec.chunk} - {spec.chunks_behind * spec.chunk}"
        yield f"({position}) // {behind}", f"({position} + {rows} - 1) // {behind}"


def key_limits(spec: AttentionSpec) -> str:
    """Return the condition, an i1, that keys are there and positions let queries see them."""
    position = position_of(spec, "o_q")
    # Parts of a walk with sinks do not end where a block of keys does.
    limits = ["o_k < stops[part]" if spec.sinks else f"o_k < {keys_end(spec)}"]
    limits += ["o_k >= 0"] * spec.listed
    if spec.reach is not None:
        reach = f"o_k < {position} + {spec.reach}" if spec.reach > 1 else f"o_k <= {position}"
        limits.append(f"({reach}) | ({position} < {spec.free})" if spec.free else reach)
    if spec.window is not None:
        window = f"o_k > {position} - {spec.window}"
        limits.append(f"({window}) | (o_k < {spec.sinks})" if spec.sinks else window)
    if spec.chunk is not None:
        own, other = f"({position}) // {spec.chunk}", f"o_k // {spec.chunk}"
        limits += [f"{other} >= {own} - {spec.chunks_behind}"] * (spec.chunks_behind is not None)
        limits += [f"{other} <= {own} + {spec.chunks_ahead}"] * (spec.chunks_ahead is not None)
    return both(limits)


def row_stride(spec: AttentionSpec, tensor: str) -> str:
    """The stride between a tensor's rows: tokens, or the heads of the one query."""
    return f"{tensor}_head" if spec.one else f"{tensor}_token"


def position_of(spec: AttentionSpec, query: str) -> str:
    """The position of a query among the keys, given its number."""
    return "offset" if spec.one else query if spec.ragged else f"{query} + offset"


def keys_end(spec: AttentionSpec) -> str:
    """Return the name of the number of keys."""
    return "query_length" if spec.ragged else "key_length"
