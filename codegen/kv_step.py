"""The steps of programs with caches: new entries that are put into them in place, and attention over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.spans import Spans, spans_of
from graphwright.ir.errors import LoweringError
from graphwright.ir.program import Program
from graphwright.runtime.schedule import KernelStep, View

from .attention import AttentionSpec, attention_parameters, attention_tiles
from .attention_parts import LARGEST_DIM
from .attention_step import body_of, mask_form, mask_operands, result_strides, span_options
from .external import view_of
from .index_code import triton_code
from .indexing import size_text, text
from .loops import Stored
from .lowering import arguments
from .provenance import provenance_of
from .sources import KernelSources
from .steps import Place, StepMaker

ROWS = 32
"""Entries that one program puts into a cache."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

APPEND = '''\
@triton.jit(do_not_specialize=["rows", "tokens", "capacity"])
def {name}(
    p_cache, p_new, p_past, rows, tokens, capacity, new_batch, new_head, new_token, cache_batch,
    columns: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Put ROWS entries of one sequence, of all heads one after the other, into its slots of a cache."""
    i_b = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    head = row // tokens
    token = row - head * tokens
    slot = tl.load(p_past + i_b).to(tl.int32) + token
    inside = (row < rows) & (slot < capacity) & (column < columns)
    new = i_b.to(tl.int64) * new_batch + head.to(tl.int64) * new_head + token.to(tl.int64) * new_token + column
    cache = i_b.to(tl.int64) * cache_batch + (head.to(tl.int64) * capacity + slot) * columns + column
    tl.store(p_cache + cache, tl.load(p_new + new, mask=inside), mask=inside)
'''


def is_append(node: fx.Node) -> bool:
    """Whether a node puts entries into a cache, which its result is then."""
    return node.target is dialect.kv_append


def _accepts(reader: fx.Node, arg: fx.Node, stored: Stored, shape: tuple[Any, ...]) -> bool:
    if arg in arguments(reader).get("operands", ()):
        return True
    return bool(stored.strides[-1] == 1)


def _append_steps(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    if any(user.target is dialect.kv_attention and _is_one(program, user) for user in node.users):
        return ()
    return (_append(program, node, place, sources),)


def _is_one(program: Program, node: fx.Node) -> bool:
    """Whether an attention has one query and puts its own entries into the caches."""
    given = arguments(node)
    appends = all(
        is_append(given[name]) and [user for user in given[name].users if user.op != "output"] == [node] for name in "kv"
    )
    return appends and program.shape(given["q"])[2] == 1


def _append(program: Program, node: fx.Node, place: Place, sources: KernelSources) -> KernelStep:
    cache, new, past = (node.args[k] for k in range(3))
    batch, heads, tokens, columns = program.shape(new)  # type: ignore[arg-type]
    capacity = program.shape(cache)[2]  # type: ignore[arg-type]
    provenance = provenance_of([node])
    strides = tuple(size_text(stride) for stride in place(new).strides[:3])  # type: ignore[arg-type]
    rows = size_text(heads * tokens)
    blocks = -(-rows // ROWS) if isinstance(rows, int) else f"({rows} + {ROWS - 1}) // {ROWS}"
    return KernelStep(
        node.name,
        sources.add("kv_append", APPEND, provenance),
        (blocks, size_text(batch)),
        (
            *(view_of(place(t), program.shape(t)) for t in (cache, new, past)),  # type: ignore[arg-type]
            rows,
            size_text(tokens),
            size_text(capacity),
            *strides,
            size_text(place(cache).strides[0]),  # type: ignore[arg-type]
        ),
        {"columns": int(columns), "ROWS": ROWS, "BLOCK": 1 << max(int(columns) - 1, 0).bit_length()},
        (place(new).buffer, place(past).buffer),  # type: ignore[arg-type]
        (place(cache).buffer,),  # type: ignore[arg-type]
        provenance,
    )


def _attention(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    given = arguments(node)
    q, k, v = (given[name] for name in "qkv")
    (batch, heads, queries, head_dim), (_, key_heads, capacity, value_dim) = program.shape(q), program.shape(v)
    dtype = q.meta["val"].dtype
    if dtype not in _DTYPES or max(int(head_dim), int(value_dim)) > LARGEST_DIM:
        raise LoweringError(
            f"{node.name}: attention over a cache is generated for float32, float16 and bfloat16 and heads of up to "
            f"{LARGEST_DIM} features; this one is {dtype}, {head_dim} and {value_dim} features"
        )
    one, group = _is_one(program, node), int(heads) // int(key_heads)
    form = mask_form(node, given["predicate"], given["bias"])
    operands = mask_operands(program, given["operands"], place)
    spans = spans_of(form)
    if not spans.causal:
        spans = Spans(form.predicate)
    names = {
        "b": "i_b",
        "h": f"(i_h * {group} + o_q)" if one else "i_h",
        "q": "offset" if one else "(o_q + offset)",
        "k": "o_k",
    }
    limits = {("h" if one else "q"): "o_q < query_length", "k": "o_k < key_length"}

    def code(e: ix.Expr | None) -> str | None:
        return None if e is None or e is ix.TRUE else triton_code(e, names, operands.loads, in_range=limits)

    spec = AttentionSpec(
        head_dim=int(head_dim),
        value_dim=int(value_dim),
        dtype=str(dtype).removeprefix("torch."),
        group=group,
        causal=not one,
        **span_options(spans),
        predicate=code(spans.rest),
        bias=code(form.bias),
        operands=tuple(operands.values),
        softcap=given["softcap"] or None,
        sink=given["sink"] is not None,
        cached=True,
        one=one,
    )
    rows = group if one else queries
    tiles = attention_tiles(spec, device == "cuda", query_length=rows if isinstance(rows, int) else None)
    if device != "cuda":
        tiles = {name: value for name, value in tiles.items() if name.startswith("BLOCK")}
    tensors = {"q": q, "k": k, "v": v, "out": node}
    if one:
        tensors |= {"new_k": k.args[1], "new_v": v.args[1]}
    values: dict[str, Any] = {f"p_{name}": view_of(place(t), program.shape(t)) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        for dim, stride in zip(("batch", "head", "token"), place(tensor).strides, strict=False):
            values[f"{name}_{dim}"] = size_text(stride)
    values["p_past"] = view_of(place(given["past"]), program.shape(given["past"]))
    if given["sink"] is not None:
        values["p_sink"] = view_of(place(given["sink"]), program.shape(given["sink"]))
    values.update(query_length=size_text(queries), capacity=size_text(capacity), scale=float(given["scale"]))
    values.update(operands.values)
    ordered = tuple(values[name] for name in attention_parameters(spec))
    block = tiles["BLOCK_M"]
    blocks = -(-int(rows) // block) if isinstance(rows, int) else f"({text(queries)} + {block - 1}) // {block}"
    caches = [place(t).buffer for t in (k, v)] if one else []
    reads = tuple(dict.fromkeys(a.buffer for a in ordered if isinstance(a, View) and a.buffer != place(node).buffer))
    provenance = provenance_of([node])
    step = KernelStep(
        node.name,
        sources.add("kv_attention", body_of(spec), provenance),
        (blocks, size_text(key_heads if one else heads), size_text(batch)),
        ordered,
        tiles,
        reads,
        (place(node).buffer, *caches),
        provenance,
    )
    return (step,)


MAKERS = {
    dialect.kv_append: StepMaker(make=_append_steps, accepts=_accepts, in_place={0: "cache"}),
    dialect.kv_attention: StepMaker(make=_attention, accepts=_accepts, strides=result_strides),
}
"""Operation -> what makes its steps."""
