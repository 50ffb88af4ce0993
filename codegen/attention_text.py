"""The text of an attention kernel.

A program computes BLOCK_M outputs of one head of one sequence. It walks the keys that any of its queries may see in steps of
BLOCK_N with a running softmax, and looks at the limits of visibility only in the blocks that one of them crosses.

The running maximum starts at the smallest finite number instead of -inf, so that the difference of a hidden score from it is
-inf, not NaN, and no query needs a case of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .attention_walk import key_limits, key_ranges, keys_end, row_stride

if TYPE_CHECKING:
    from .attention import AttentionSpec

_LOG2E = math.log2(math.e)
_FLOOR = "-3.4028234663852886e38"


HELPERS = """\
@triton.jit
def larger(a, b):
    # Unlike tl.maximum this says nothing about NaN, and is one instruction. A NaN spoils its row through the exponentials.
    return tl.where(a > b, a, b)
"""


def kernel_body(spec: AttentionSpec) -> Iterator[str]:
    """Yield the lines of the kernel's body, without indentation."""
    yield f'"""{_summary(spec)}"""'
    yield from _places(spec)
    yield ""
    yield from _start(spec)
    yield ""
    yield from key_ranges(spec)
    if spec.listed:
        yield from _listed(spec)
        yield ""
        yield from _end(spec)
        return
    middle = (1 if spec.starts else 0) + (1 if spec.sinks else 0)
    yield f"for part in tl.static_range({middle + 2}):"
    limits = "starts[part], stops[part]" if spec.sinks else "bounds[part], bounds[part + 1]"
    yield f"    for first_k in range({limits}, BLOCK_N):"
    yield from (f"        {line}" for line in _block(spec, f"part == {middle}"))
    yield ""
    yield from _end(spec)


def _summary(spec: AttentionSpec) -> str:
    limits = [f"position - {spec.window}"] * (spec.window is not None) + ["key"]
    limits += [f"position + {spec.reach}"] * (spec.reach is not None)
    seen = f", where {' < '.join(limits)}" if len(limits) > 1 else ""
    named = (
        ["lists of keys"] * spec.listed
        + [f"{spec.sinks} sinks"] * bool(spec.sinks)
        + [f"chunks of {spec.chunk}"] * (spec.chunk is not None)
    )
    extras = [("predicate", spec.predicate), ("bias", spec.bias), ("softcap", spec.softcap), ("sink", spec.sink)]
    named += [name for name, value in extras if value]
    extra = f"; with {', '.join(named)}" if named else ""
    return f"Attention of BLOCK_M queries of one head{seen}{extra}."


def _places(spec: AttentionSpec) -> Iterator[str]:
    """Where the block's queries and its head's keys and values are."""
    if spec.reach is None:
        yield "i_m = tl.program_id(0)"
    else:
        yield "# The last queries see the most keys; started first, they do not leave one thread working alone at the end."
        yield "i_m = tl.num_programs(0) - 1 - tl.program_id(0)"
    yield "i_h = tl.program_id(1)"
    yield "i_b = tl.program_id(2)"
    yield "first_q = i_m * BLOCK_M"
    if spec.ragged:
        yield "first_token = tl.load(p_starts + i_b).to(tl.int64)"
        yield "query_length = tl.load(p_starts + i_b + 1) - first_token.to(tl.int32)"
    if spec.one:
        yield f"query_length = {spec.group}"
    if spec.cached:
        yield "offset = tl.load(p_past + i_b).to(tl.int32)"
        if spec.fresh:
            yield "query_length = tl.where(offset == 0, query_length, 0)"
            yield "offset = 0"
        yield f"key_length = tl.minimum(offset + {1 if spec.one else 'query_length'}, capacity)"
    key_head = "i_h" if spec.one or spec.group == 1 else f"(i_h // {spec.group})"
    first_head = f"(i_h * {spec.group})" if spec.one else "i_h"
    for tensor, head in (("q", first_head), ("k", key_head), ("v", key_head), ("out", first_head)):
        rows = " + first_q" if tensor in ("q", "out") else ""
        if spec.ragged:
            yield f"p_{tensor} += {head}.to(tl.int64) * {tensor}_head + (first_token{rows}) * {tensor}_token"
        else:
            tokens = f" + first_q.to(tl.int64) * {row_stride(spec, tensor)}" if rows else ""
            yield f"p_{tensor} += i_b.to(tl.int64) * {tensor}_batch + {head}.to(tl.int64) * {tensor}_head{tokens}"
    yield "o_m = tl.arange(0, BLOCK_M)[:, None]"
    yield "o_n = tl.arange(0, BLOCK_N)[:, None]"
    yield "o_q = first_q + o_m"
    if spec.one:
        yield from _append(spec)


def _append(spec: AttentionSpec) -> Iterator[str]:
    """The query's own key and value go into the caches."""
    for tensor, parts in (("k", spec.query_parts), ("v", spec.value_parts)):
        yield f"p_new_{tensor} += i_b.to(tl.int64) * new_{tensor}_batch + i_h.to(tl.int64) * new_{tensor}_head"
        for part in parts:
            inside = part.mask(None if spec.ring else "offset < capacity")
            yield f"new = tl.load(p_new_{tensor} + {part.columns}{inside})"
            slot = "(offset % capacity)" if spec.ring else "offset"
            yield f"tl.store(p_{tensor} + {slot}.to(tl.int64) * {tensor}_token + {part.columns}, new{inside})"
    yield "tl.debug_barrier()"


def _start(spec: AttentionSpec) -> Iterator[str]:
    """The queries and the running sums."""
    for i, part in enumerate(spec.query_parts):
        load = f"tl.load(p_q + o_m * {row_stride(spec, 'q')} + {part.columns}{part.mask('o_q < query_length')}, other=0.0)"
        yield f"q{i} = {load}{f' * {_factor(spec)}' if _scales_queries(spec) else ''}"
    yield f"row_max = tl.full([BLOCK_M], {_FLOOR}, tl.float32)"
    if spec.sink:
        rows = f"i_h * {spec.group} + tl.arange(0, BLOCK_M), mask=tl.arange(0, BLOCK_M) < {spec.group}, other=0.0"
        yield f"sink = tl.load(p_sink + {rows if spec.one else 'i_h'}){'' if spec.bias else f' * {_LOG2E!r}'}"
        yield "row_max = tl.maximum(row_max, sink)"
        yield f"row_sum = {_exponential(spec)}(sink - row_max)"
    else:
        yield "row_sum = tl.zeros([BLOCK_M], tl.float32)"
    for i, part in enumerate(spec.value_parts):
        yield f"acc{i} = tl.zeros([BLOCK_M, {part.size}], tl.float32)"


def _listed(spec: AttentionSpec) -> Iterator[str]:
    """The walk over the blocks that a list names, nearest first, and then over its single keys."""
    yield "i_list = (i_b.to(tl.int64) * tl.num_programs(1) + i_h) * tl.num_programs(0) + i_m"
    yield "p_blocks += i_list * blocks_row"
    yield "p_columns += i_list * columns_row"
    yield "block_count = tl.load(p_blocks)"
    yield "# A negative number of blocks stands for all keys."
    yield "has_list = block_count >= 0"
    yield "column_count = tl.load(p_columns, mask=has_list, other=0)"
    yield "block_count = tl.where(has_list, block_count, tl.cdiv(stop, BLOCK_N))"
    yield "# Blocks do not overlap: two at most reach past the first query, and one before the first key."
    yield "bounds = (0, tl.minimum(block_count, 2), tl.maximum(block_count - 1, tl.minimum(block_count, 2)), block_count)"
    yield "for part in tl.static_range(3):"
    yield "    for i_block in range(bounds[part], bounds[part + 1]):"
    yield "        first_k = tl.load(p_blocks + 1 + i_block, mask=has_list, other=0)"
    yield "        first_k = tl.where(has_list, first_k, (block_count - 1 - i_block) * BLOCK_N)"
    yield from (f"        {line}" for line in _block(spec, "part == 1"))
    yield "for first_column in range(0, column_count, BLOCK_N):"
    yield from (f"    {line}" for line in _single_keys(spec))


def _single_keys(spec: AttentionSpec) -> Iterator[str]:
    """One step over keys that lie anywhere."""
    inside = "first_column + {} < column_count"
    for name, numbers, other in (("rows", "o_n", "0"), ("o_k", "tl.arange(0, BLOCK_N)[None, :]", keys_end(spec))):
        yield f"{name} = tl.load(p_columns + 1 + first_column + {numbers}, mask={inside.format(numbers)}, other={other})"
    for tensor, parts in (("k", spec.query_parts), ("v", spec.value_parts)):
        for i, part in enumerate(parts):
            mask = part.mask(inside.format("o_n"))
            yield f"{tensor}{i} = tl.load(p_{tensor} + rows.to(tl.int64) * {tensor}_token + {part.columns}{mask}, other=0.0)"
    yield from _update(spec, None)


def _block(spec: AttentionSpec, whole: str) -> Iterator[str]:
    """One step: scores of a block of keys, and what they do to the running sums."""
    yield "o_k = first_k + tl.arange(0, BLOCK_N)[None, :]"
    for tensor in ("k", "v"):
        yield f"p_{tensor}_block = p_{tensor} + first_k.to(tl.int64) * {tensor}_token"
    yield f"if {whole}:"
    yield from (f"    {line}" for line in _loads(spec, None))
    yield "else:"
    first = "(first_k + o_n >= 0) & " if spec.listed else ""
    rows = f"first_k + o_n < {keys_end(spec)}"
    yield from (f"    {line}" for line in _loads(spec, f"{first}({rows})" if first else rows))
    yield from _update(spec, whole)


def _update(spec: AttentionSpec, whole: str | None) -> Iterator[str]:
    """Scores of loaded keys, and what they do to the running sums; `whole` says where no limit has to be looked at."""
    precision = ', input_precision="ieee"' if spec.dtype == "float32" else ""
    for i in range(len(spec.query_parts)):
        yield f"s = tl.dot(q{i}, tl.trans(k{i}){', s' if i else ''}{precision})"
    if not _scales_queries(spec):
        yield f"s *= {_factor(spec)}"
    if spec.softcap is not None:
        yield f"s = libdevice.tanh(s) * {spec.softcap * (1.0 if spec.bias else _LOG2E)!r}"
    if spec.bias is not None:
        yield f"s += {spec.bias}"
    if spec.predicate is not None:
        yield f's = tl.where({spec.predicate}, s, float("-inf"))'
    limited = f's = tl.where({key_limits(spec)}, s, float("-inf"))'
    if whole is None:
        yield limited
    else:
        yield f"if not ({whole}):"
        yield f"    {limited}"
    exponential = _exponential(spec)
    yield "new_max = larger(row_max, tl.reduce(s, 1, larger))"
    yield f"weights = {exponential}(s - new_max[:, None])"
    yield f"decay = {exponential}(row_max - new_max)"
    yield "row_max = new_max"
    yield "row_sum = row_sum * decay + tl.sum(weights, 1)"
    for i in range(len(spec.value_parts)):
        yield f"acc{i} = tl.dot(weights.to(v{i}.dtype), v{i}, acc{i} * decay[:, None]{precision})"


def _loads(spec: AttentionSpec, rows: str | None) -> Iterator[str]:
    for tensor, parts in (("k", spec.query_parts), ("v", spec.value_parts)):
        for i, part in enumerate(parts):
            mask = part.mask(rows)
            other = ", other=0.0" if mask else ""
            once = ', eviction_policy="evict_first"' if spec.one else ""
            yield f"{tensor}{i} = tl.load(p_{tensor}_block + o_n * {tensor}_token + {part.columns}{mask}{other}{once})"


def _end(spec: AttentionSpec) -> Iterator[str]:
    """Normalise and store."""
    yield "# A query that saw no key has a sum of zero, and gets zeros."
    yield "norm = (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]"
    for i, part in enumerate(spec.value_parts):
        value = f"(acc{i} * norm).to(p_out.dtype.element_ty)"
        yield f"tl.store(p_out + o_m * {row_stride(spec, 'out')} + {part.columns}, {value}{part.mask('o_q < query_length')})"
    if spec.lse:
        yield "m_q = first_q + tl.arange(0, BLOCK_M)"
        if spec.ragged:
            yield "p_lse += (first_token + m_q) * tl.num_programs(1) + i_h"
        else:
            yield "p_lse += (i_b.to(tl.int64) * tl.num_programs(1) + i_h) * query_length + m_q"
        total = "row_max + tl.log(row_sum)" if spec.bias else f"(row_max + tl.log2(row_sum)) * {1 / _LOG2E!r}"
        yield f"tl.store(p_lse, {total}, mask=m_q < query_length)"


def _scales_queries(spec: AttentionSpec) -> bool:
    """Whether queries are scaled once instead of all scores.

    In a narrow type that would round them again. A bias must meet scores, not a bare product: Triton makes a bias added to a
    product its accumulator, and every term of the sum would be rounded to the last place of the bias.
    """
    return spec.dtype == "float32" and spec.bias is None


def _factor(spec: AttentionSpec) -> str:
    """What the product of a query and a key is multiplied by, to be what tanh, or else the exponential, is taken of."""
    if spec.softcap is not None:
        return f"(scale / {spec.softcap!r})"
    return "scale" if spec.bias else f"(scale * {_LOG2E!r})"


def _exponential(spec: AttentionSpec) -> str:
    """The exponential in use. A bias may be near the largest finite number, and must not be multiplied by log2(e)."""
    return "tl.exp" if spec.bias else "tl.exp2"
