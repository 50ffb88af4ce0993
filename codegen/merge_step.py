"""The steps that merge tokens: which are most alike, in which order they go, where they go, and the means of what is merged.

No program of a kernel reads what another writes, and sums go over tokens in order: results are the same in every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.errors import LoweringError
from graphwright.ir.ops.merge import PADDING_SCORE, UNLIKE_SCORE
from graphwright.ir.program import Program
from graphwright.runtime.schedule import KernelStep, View

from .external import view_of
from .indexing import contiguous_strides, product, size_text
from .loops import Stored
from .lowering import arguments
from .provenance import provenance_of
from .sources import KernelSources
from .steps import Place, StepMaker

BLOCK_TOKENS = 32
"""Tokens of one program."""

BLOCK_OTHERS = 64
"""Tokens that they are compared with at a time."""

_LONGEST_BLOCK = 1024
_FEATURES = (16, 128)
"""The least and the most features that are looked at at a time."""

METRIC = '''\
@triton.jit(do_not_specialize=["tokens"])
def {name}(
    p_keys, p_out, tokens, keys_batch, keys_head, keys_token,
    heads: tl.constexpr, features: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Mean over the heads of the keys of BLOCK_M tokens, scaled to length 1."""
    i_b = tl.program_id(1).to(tl.int64)
    o_t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    p_keys += i_b * keys_batch + o_t.to(tl.int64) * keys_token
    p_out += (i_b * tokens + o_t) * features
    squares = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(0, features, BLOCK_D):
        o_d = part + tl.arange(0, BLOCK_D)[None, :]
        inside = (o_t < tokens) & (o_d < features)
        mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for head in range(heads):
            mean += tl.load(p_keys + head * keys_head + o_d, mask=inside, other=0.0).to(tl.float32) / heads
        squares += tl.sum(mean * mean, 1)
        tl.store(p_out + o_d, mean, mask=inside)
    length = tl.maximum(tl.sqrt(squares), 1e-12)[:, None]
    tl.debug_barrier()
    for part in tl.static_range(0, features, BLOCK_D):
        o_d = part + tl.arange(0, BLOCK_D)[None, :]
        inside = (o_t < tokens) & (o_d < features)
        tl.store(p_out + o_d, tl.load(p_out + o_d, mask=inside, other=0.0) / length, mask=inside)
'''

MATCH = f'''\
@triton.jit(do_not_specialize=["tokens"])
def {{name}}(
    p_metric, p_size, p_score, p_partner, tokens,
    protect: tl.constexpr, features: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """The best partners of BLOCK_M tokens that may go, every other one behind the protected ones."""
    first_row = tl.program_id(1).to(tl.int64) * tokens
    p_metric += first_row * features
    p_size += first_row
    p_score += first_row
    p_partner += first_row
    o_m = protect + 2 * (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))
    there = tl.load(p_size + o_m, mask=o_m < tokens, other=0.0) > 0
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    partner = o_m
    for first in range(protect + 1, tokens, 2 * BLOCK_N):
        o_n = first + 2 * tl.arange(0, BLOCK_N)
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for part in tl.static_range(0, features, BLOCK_D):
            o_d = part + tl.arange(0, BLOCK_D)[None, :]
            a = tl.load(p_metric + o_m[:, None] * features + o_d, mask=(o_m[:, None] < tokens) & (o_d < features), other=0.0)
            b = tl.load(p_metric + o_n[:, None] * features + o_d, mask=(o_n[:, None] < tokens) & (o_d < features), other=0.0)
            s = tl.dot(a, tl.trans(b), s, input_precision="ieee")
        s = tl.where(s == s, s, -1.0)
        other_there = tl.load(p_size + o_n, mask=o_n < tokens, other=0.0) > 0
        s = tl.where(there[:, None] == other_there[None, :], s, {UNLIKE_SCORE})
        s = tl.where(o_n[None, :] < tokens, s, float("-inf"))
        most = tl.max(s, 1)
        at = tl.min(tl.where(s == most[:, None], o_n[None, :], tokens), 1)
        # Of equals the earlier one stays.
        partner = tl.where(most > best, at, partner)
        best = tl.maximum(best, most)
    found = best > float("-inf")
    score = tl.where(found & (there == 0), {PADDING_SCORE}, best)
    tl.store(p_score + o_m, score, mask=o_m < tokens)
    tl.store(p_partner + o_m, partner.to(tl.int64), mask=o_m < tokens)
    # The tokens between them stay, and so do the protected ones.
    tl.store(p_score + o_m + 1, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=o_m + 1 < tokens)
    tl.store(p_partner + o_m + 1, (o_m + 1).to(tl.int64), mask=o_m + 1 < tokens)
    if tl.program_id(0) == 0:
        for token in range(0, tl.minimum(protect, tokens)):
            tl.store(p_score + token, float("-inf"))
            tl.store(p_partner + token, token.to(tl.int64))
'''

RANK = '''\
@triton.jit(do_not_specialize=["tokens"])
def {name}(p_score, p_rank, tokens, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many tokens of the sequence have a better score than each of BLOCK_M, or an equal one and come before it."""
    first_row = tl.program_id(1).to(tl.int64) * tokens
    p_score += first_row
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.load(p_score + o_m, mask=o_m < tokens, other=0.0)[:, None]
    rank = tl.zeros([BLOCK_M], tl.int32)
    for first in range(0, tokens, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)[None, :]
        score = tl.load(p_score + o_n, mask=o_n < tokens, other=float("-inf"))
        before = (score > own) | ((score == own) & (o_n < o_m[:, None]))
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(p_rank + first_row + o_m, rank.to(tl.int64), mask=o_m < tokens)
'''

PLAN = '''\
@triton.jit(do_not_specialize=["tokens", "kept"])
def {name}(p_rank, p_partner, p_out, tokens, kept, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows of BLOCK_M tokens: the number of tokens that stay in front of each one, or of the partner of one that goes."""
    first_row = tl.program_id(1).to(tl.int64) * tokens
    p_rank += first_row
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    goes = tl.load(p_rank + o_m, mask=o_m < tokens, other=0) < tokens - kept
    partner = tl.load(p_partner + first_row + o_m, mask=o_m < tokens, other=0).to(tl.int32)
    stays = tl.where(goes, partner, o_m)
    gone = tl.zeros([BLOCK_M], tl.int32)
    for first in range(0, tokens, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)[None, :]
        before = (tl.load(p_rank + o_n, mask=o_n < tokens, other=tokens) < tokens - kept) & (o_n < stays[:, None])
        gone += tl.sum(before.to(tl.int32), 1)
    tl.store(p_out + first_row + o_m, (stays - gone).to(tl.int64), mask=o_m < tokens)
'''

MERGE = '''\
@triton.jit(do_not_specialize=["tokens", "kept"])
def {name}(
    p_x, p_size, p_destination, p_out, p_sizes, tokens, kept,
    columns: tl.constexpr, with_sizes: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):
    """ROWS weighted means of the tokens that go to each row, and the sums of their sizes if they are wanted."""
    i_b = tl.program_id(1).to(tl.int64)
    p_x += i_b * tokens * columns
    p_size += i_b * tokens
    p_destination += i_b * tokens
    first_row = tl.program_id(0) * ROWS
    o_n = tl.arange(0, BLOCK_N)
    for row in range(first_row, tl.minimum(first_row + ROWS, kept)):
        sizes = tl.zeros([BLOCK_N], tl.float32)
        counts = tl.zeros([BLOCK_N], tl.int32)
        tokens_here = tl.zeros([BLOCK_N], tl.int32)
        for first in range(0, tokens, BLOCK_N):
            inside = first + o_n < tokens
            here = inside & (tl.load(p_destination + first + o_n, mask=inside, other=-1) == row)
            sizes += tl.load(p_size + first + o_n, mask=here, other=0.0)
            counts += here.to(tl.int32)
            tokens_here += tl.where(here, first + o_n, 0)
        total = tl.sum(sizes)
        count = tl.sum(counts)
        p_row = p_out + (i_b * kept + row) * columns
        if count == 1:
            p_token = p_x + tl.sum(tokens_here).to(tl.int64) * columns
            for column in tl.static_range(0, columns, BLOCK):
                o_c = column + tl.arange(0, BLOCK)
                tl.store(p_row + o_c, tl.load(p_token + o_c, mask=o_c < columns), mask=o_c < columns)
        else:
            # Padding that nothing else is merged with weighs alike.
            empty = (total == 0.0).to(tl.float32)
            weights = total + empty * count.to(tl.float32)
            for column in tl.static_range(0, columns, BLOCK):
                o_c = column + tl.arange(0, BLOCK)
                mean = tl.zeros([BLOCK], tl.float32)
                for first in range(0, tokens, BLOCK_N):
                    inside = first + o_n < tokens
                    here = inside & (tl.load(p_destination + first + o_n, mask=inside, other=-1) == row)
                    for found in range(tl.sum(here.to(tl.int32))):
                        token = tl.min(tl.where(here, first + o_n, tokens))
                        here = here & (first + o_n != token)
                        weight = (tl.load(p_size + token) + empty) / weights
                        x = tl.load(p_x + token.to(tl.int64) * columns + o_c, mask=o_c < columns, other=0.0)
                        mean += x.to(tl.float32) * weight
                tl.store(p_row + o_c, mean.to(p_out.dtype.element_ty), mask=o_c < columns)
        if with_sizes:
            tl.store(p_sizes + i_b * kept + row, total)
'''

UNMERGE = '''\
@triton.jit(do_not_specialize=["tokens", "kept"])
def {name}(
    p_x, p_destination, p_out, tokens, kept, columns: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Copy what ROWS tokens were merged into."""
    i_b = tl.program_id(1).to(tl.int64)
    first_token = tl.program_id(0) * ROWS
    for token in range(first_token, tl.minimum(first_token + ROWS, tokens)):
        row = tl.load(p_destination + i_b * tokens + token)
        for column in tl.static_range(0, columns, BLOCK):
            o_c = column + tl.arange(0, BLOCK)
            x = tl.load(p_x + (i_b * kept + row) * columns + o_c, mask=o_c < columns)
            tl.store(p_out + (i_b * tokens + token) * columns + o_c, x, mask=o_c < columns)
'''


def _metric(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    keys = arguments(node)["keys"]
    batch, heads, tokens, features = program.shape(keys)
    _expect_fixed(node, heads, features)
    strides = [size_text(stride) for stride in place(keys).strides[:3]]
    values = (*_views(program, place, keys, node), size_text(tokens), *strides)
    constants = {"heads": heads, "features": features, "BLOCK_M": BLOCK_TOKENS, "BLOCK_D": _feature_block(features)}
    return (_step(node, sources.add("merge_metric", METRIC, provenance_of([node])), (tokens, batch), values, constants, place),)


def _match(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    given, found = arguments(node), _results(node)
    if len(found) < 2:
        raise LoweringError(f"{node.name}: a result of {node.target} is not used; read both, or drop the call")
    outs = (found[0], found[1])
    batch, tokens, features = program.shape(given["metric"])
    _expect_fixed(node, features)
    values = (*_views(program, place, given["metric"], given["size"], *outs), size_text(tokens))
    constants = {
        "protect": given["protect"],
        "features": features,
        "BLOCK_M": BLOCK_TOKENS,
        "BLOCK_N": BLOCK_OTHERS,
        "BLOCK_D": _feature_block(features),
    }
    if device == "cuda":
        # What is loaded ahead would not fit into the shared memory of smaller GPUs.
        constants["num_stages"] = 1
    kernel = sources.add("merge_match", MATCH, provenance_of([node]))
    # Every other token may go.
    return (_step(node, kernel, (tokens, batch), values, constants, place, outs, 2 * BLOCK_TOKENS),)


def _rank(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    score = arguments(node)["score"]
    batch, tokens = program.shape(score)
    values = (*_views(program, place, score, node), size_text(tokens))
    kernel = sources.add("merge_rank", RANK, provenance_of([node]))
    return (_step(node, kernel, (tokens, batch), values, _BLOCKS, place),)


def _plan(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    given = arguments(node)
    batch, tokens = program.shape(node)
    values = (*_views(program, place, given["rank"], given["partner"], node), *map(size_text, (tokens, _kept(program, given))))
    kernel = sources.add("merge_plan", PLAN, provenance_of([node]))
    return (_step(node, kernel, (tokens, batch), values, _BLOCKS, place),)


def _merge(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    given, found = arguments(node), _results(node)
    if 0 not in found:
        raise LoweringError(f"{node.name}: nothing uses what is merged: drop the call")
    batch, tokens, features = program.shape(given["x"])
    kept = _kept(program, given)
    _expect_fixed(node, features)
    outs = tuple(found.values())
    # Sizes that nothing reads, as behind the last attention, have no buffer; what stands in for it is not touched.
    tensors = _views(program, place, given["x"], given["size"], given["destination"], found[0], found.get(1, found[0]))
    values = (*tensors, size_text(tokens), size_text(kept))
    constants = {"columns": features, "with_sizes": int(1 in found), "ROWS": BLOCK_TOKENS, "BLOCK_N": BLOCK_OTHERS}
    constants["BLOCK"] = _row_block(features)
    kernel = sources.add("merge", MERGE, provenance_of([node]))
    return (_step(node, kernel, (kept, batch), values, constants, place, outs),)


def _unmerge(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    given = arguments(node)
    batch, kept, *rest = program.shape(given["x"])
    tokens, columns = program.shape(node)[1], product(rest)
    if columns == 0:
        return ()
    _expect_fixed(node, columns)
    values = (*_views(program, place, given["x"], given["destination"], node), size_text(tokens), size_text(kept))
    constants = {"columns": int(columns), "ROWS": BLOCK_TOKENS, "BLOCK": _row_block(int(columns))}
    kernel = sources.add("unmerge", UNMERGE, provenance_of([node]))
    return (_step(node, kernel, (tokens, batch), values, constants, place),)


_BLOCKS: Mapping[str, int] = {"BLOCK_M": BLOCK_TOKENS, "BLOCK_N": BLOCK_OTHERS}


def _kept(program: Program, given: Mapping[str, Any]) -> Any:
    return given["kept"] if isinstance(given["kept"], int) else program.size(given["kept"])


def _views(program: Program, place: Place, *tensors: fx.Node) -> tuple[View, ...]:
    return tuple(view_of(place(tensor), program.shape(tensor)) for tensor in tensors)


def _results(node: fx.Node) -> dict[int, fx.Node]:
    """Return the nodes of a call's results, by number, that are used."""
    return {int(user.args[1]): user for user in node.users if user.users}  # type: ignore[arg-type]


def _expect_fixed(node: fx.Node, *sizes: Any) -> None:
    if not all(isinstance(size, int) or getattr(size, "is_Integer", False) for size in sizes):
        raise LoweringError(f"{node.name}: {node.target} wants fixed numbers of heads and features, got {sizes}")


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _feature_block(features: int) -> int:
    return min(max(_power(features), _FEATURES[0]), _FEATURES[1])


def _row_block(columns: int) -> int:
    return min(_power(columns), _LONGEST_BLOCK)


def _step(
    node: fx.Node,
    kernel: str,
    over: tuple[Any, Any],
    values: tuple[Any, ...],
    constants: Mapping[str, int],
    place: Place,
    outs: Sequence[fx.Node] = (),
    block: int = BLOCK_TOKENS,
) -> KernelStep:
    """Return a launch with one program for each `block` of the first of `over`, and for each of the second."""
    written = tuple(place(out).buffer for out in outs or (node,))
    reads = tuple(dict.fromkeys(a.buffer for a in values if isinstance(a, View) and a.buffer not in written))
    count = size_text(over[0])
    blocks = -(-count // block) if isinstance(count, int) else f"({count} + {block - 1}) // {block}"
    return KernelStep(node.name, kernel, (blocks, size_text(over[1])), values, constants, reads, written, provenance_of([node]))


def _accepts(node: fx.Node, arg: fx.Node, stored: Stored, shape: tuple[Any, ...]) -> bool:
    """Keys may lie as the projection wrote them; all else lies in order."""
    if node.target is dialect.merge_metric:
        return bool(stored.strides[-1] == 1)
    found = zip(shape, stored.strides, contiguous_strides(shape), strict=True)
    return all(size == 1 or stride == wanted for size, stride, wanted in found)


def _applies(node: fx.Node) -> bool:
    """Whether the kernels make a call: they compute in float32."""
    tensors = [n.meta["val"] for n in node.all_input_nodes]
    return all(t.dtype is not torch.float64 for t in tensors if isinstance(t, torch.Tensor))


MAKERS = {
    dialect.merge_metric: StepMaker(make=_metric, accepts=_accepts, applies=_applies),
    dialect.merge_match: StepMaker(make=_match, accepts=_accepts),
    dialect.merge_rank: StepMaker(make=_rank, accepts=_accepts),
    dialect.merge_plan: StepMaker(make=_plan, accepts=_accepts),
    dialect.merge: StepMaker(make=_merge, accepts=_accepts, applies=_applies),
    dialect.unmerge: StepMaker(make=_unmerge, accepts=_accepts),
}
"""Operation -> what makes its steps."""
