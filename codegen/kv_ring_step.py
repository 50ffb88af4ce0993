"""The steps of programs whose caches are rings: old and new tokens side by side, attention over them, and what then stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses import index as ix
from graphwright.ir.errors import LoweringError
from graphwright.ir.program import Program
from graphwright.runtime.schedule import KernelStep, View

from .attention import AttentionSpec, attention_parameters, attention_tiles
from .attention_parts import LARGEST_DIM
from .attention_step import body_of, mask_form, mask_operands, result_strides
from .external import view_of
from .index_code import triton_code
from .indexing import size_text, text
from .loops import Stored
from .lowering import arguments
from .provenance import provenance_of
from .sources import KernelSources
from .steps import Place, StepMaker

ROWS = 32
"""Entries that one program of the first two kernels takes."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

READ = '''\
@triton.jit(do_not_specialize=["rows", "tokens"])
def {name}(
    p_ring, p_new, p_past, p_out, rows, tokens, new_batch, new_head, new_token, ring_batch, out_batch,
    slots: tl.constexpr, columns: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Put ROWS entries of one sequence, of all heads one after the other, in order: those of its ring, then the new ones."""
    i_b = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    keys = slots + tokens
    head = row // keys
    entry = row - head * keys
    position = tl.load(p_past + i_b).to(tl.int32) - slots + entry
    inside = (row < rows) & (column < columns)
    old = inside & (entry < slots) & (position >= 0)
    ring = i_b.to(tl.int64) * ring_batch + (head.to(tl.int64) * slots + position % slots) * columns + column
    token = entry - slots
    new = i_b.to(tl.int64) * new_batch + head.to(tl.int64) * new_head + token.to(tl.int64) * new_token + column
    kept = tl.load(p_ring + ring, mask=old, other=0.0)
    added = tl.load(p_new + new, mask=inside & (entry >= slots), other=0.0)
    out = i_b.to(tl.int64) * out_batch + row.to(tl.int64) * columns + column
    tl.store(p_out + out, tl.where(entry < slots, kept, added), mask=inside)
'''

APPEND = '''\
@triton.jit(do_not_specialize=["rows", "tokens"])
def {name}(
    p_ring, p_new, p_past, p_count, rows, tokens, new_batch, new_head, new_token, ring_batch,
    counted: tl.constexpr, slots: tl.constexpr, columns: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Put ROWS new entries of one sequence, of all heads one after the other, into its ring: those that stay in it."""
    i_b = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    head = row // tokens
    token = row - head * tokens
    count = tokens
    if counted:
        count = tl.load(p_count + i_b).to(tl.int32)
    # Of two tokens for one slot the later stays.
    inside = (row < rows) & (token < count) & (token >= count - slots) & (column < columns)
    slot = (tl.load(p_past + i_b).to(tl.int32) + token) % slots
    new = i_b.to(tl.int64) * new_batch + head.to(tl.int64) * new_head + token.to(tl.int64) * new_token + column
    ring = i_b.to(tl.int64) * ring_batch + (head.to(tl.int64) * slots + slot) * columns + column
    tl.store(p_ring + ring, tl.load(p_new + new, mask=inside), mask=inside)
'''


def _accepts(reader: fx.Node, arg: fx.Node, stored: Stored, shape: tuple[Any, ...]) -> bool:
    return arg in arguments(reader).get("operands", ()) or bool(stored.strides[-1] == 1)


def _append_of(read: fx.Node) -> fx.Node | None:
    """Return what puts the same new tokens into the ring that is read."""
    ring = read.args[0]
    found = [
        user
        for user in ring.users  # type: ignore[union-attr]
        if user.target is dialect.kv_ring_append and user.args[:3] == read.args[:3] and arguments(user)["count"] is None
    ]
    return found[0] if len(found) == 1 else None


def _is_one(program: Program, node: fx.Node) -> bool:
    """Whether an attention has one query, over rings that it can put its own entries into."""
    given = arguments(node)
    if program.shape(given["q"])[2] != 1:
        return False
    reads = [given["k"], given["v"]]
    return all(
        read.target is dialect.kv_ring_read and set(read.users) == {node} and _append_of(read) is not None for read in reads
    )


def _read(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    if any(user.target is dialect.kv_ring_attention and _is_one(program, user) for user in node.users):
        return ()
    ring, new, past = node.args[:3]
    stays = place(node).strides[0]
    return (_rows(program, node, place, sources, "kv_ring_read", READ, (ring, new, past, node), (stays,), {}),)


def _append(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    given = arguments(node)
    ring, new, past, count = (given[name] for name in ("ring", "new", "past", "count"))
    reads = [user for user in ring.users if user.target is dialect.kv_ring_read]
    if any(_append_of(read) is node and _is_one(program, user) for read in reads for user in read.users):
        return ()
    constants = {"counted": int(count is not None)}
    return (_rows(program, node, place, sources, "kv_ring_append", APPEND, (ring, new, past, count or past), (), constants),)


def _rows(
    program: Program,
    node: fx.Node,
    place: Place,
    sources: KernelSources,
    name: str,
    body: str,
    tensors: tuple[Any, ...],
    strides: tuple[Any, ...],
    constants: dict[str, int],
) -> KernelStep:
    """Return the step of a kernel whose programs take rows of one sequence."""
    ring, new = tensors[:2]
    batch, heads, tokens, columns = program.shape(new)
    slots, written = int(program.shape(ring)[2]), node if node in tensors else ring
    rows = size_text(heads * (tokens + slots if node in tensors else tokens))
    blocks = -(-rows // ROWS) if isinstance(rows, int) else f"({rows} + {ROWS - 1}) // {ROWS}"
    provenance = provenance_of([node])
    return KernelStep(
        node.name,
        sources.add(name, body, provenance),
        (blocks, size_text(batch)),
        (
            *(view_of(place(t), program.shape(t)) for t in tensors),
            *(rows, size_text(tokens)),
            *(size_text(stride) for stride in (*place(new).strides[:3], place(ring).strides[0], *strides)),
        ),
        constants
        | {"slots": slots, "columns": int(columns), "ROWS": ROWS, "BLOCK": 1 << max(int(columns) - 1, 0).bit_length()},
        tuple(dict.fromkeys(place(t).buffer for t in tensors if t is not written)),
        (place(written).buffer,),
        provenance,
    )


def _attention(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    given = arguments(node)
    q, k, v = (given[name] for name in "qkv")
    (batch, heads, queries, head_dim), (_, key_heads, keys, value_dim) = program.shape(q), program.shape(v)
    slots, dtype = int(keys - queries), q.meta["val"].dtype
    if dtype not in _DTYPES or max(int(head_dim), int(value_dim)) > LARGEST_DIM:
        raise LoweringError(
            f"{node.name}: attention over a ring is generated for float32, float16 and bfloat16 and heads of up to "
            f"{LARGEST_DIM} features; this one is {dtype}, {head_dim} and {value_dim} features"
        )
    one, group = _is_one(program, node), int(heads) // int(key_heads)
    form = mask_form(node, given["predicate"], given["bias"])
    operands = mask_operands(program, given["operands"], place)
    # Limits are distances from a query to its keys, and the same wherever both are counted from.
    window = form.window if form.causal and form.offset is ix.ZERO else None
    rest = form.predicate if window is None else form.residual
    first = f"(tl.load(p_entries + i_b).to(tl.int32) - {slots})"
    if one:
        # The token in a slot is the last one before the query, or the query's own, that goes there.
        names = {"q": "offset", "k": f"(offset - (offset - o_k) % {slots})", "h": f"(i_h * {group} + o_q)"}
        conditions = [] if window is None or window == slots else [f"({names['k']} > offset - {window})"]
        limits = {"h": "o_q < query_length", "k": "o_k < key_length"}
    else:
        names = {"q": f"(o_q + {first} + {slots})", "k": f"(o_k + {first})", "h": "i_h"}
        conditions = [f"({names['k']} >= 0)"]
        limits = {"q": "o_q < query_length", "k": f"(o_k < key_length) & ({names['k']} >= 0)"}

    def code(e: ix.Expr | None) -> str | None:
        return None if e is None or e is ix.TRUE else triton_code(e, {"b": "i_b", **names}, operands.loads, in_range=limits)

    told = code(rest)
    conditions += [f"({told})"] * (told is not None)
    extra = {} if one else {"p_entries": view_of(place(given["past"]), program.shape(given["past"]))}
    spec = AttentionSpec(
        head_dim=int(head_dim),
        value_dim=int(value_dim),
        dtype=str(dtype).removeprefix("torch."),
        group=group,
        causal=not one,
        window=None if one else window,
        predicate=" & ".join(conditions) or None,
        bias=code(form.bias),
        operands=(*operands.values, *extra),
        softcap=given["softcap"] or None,
        sink=given["sink"] is not None,
        cached=one,
        one=one,
        ring=one,
    )
    rows = group if one else queries
    tiles = attention_tiles(spec, device == "cuda", query_length=rows if isinstance(rows, int) else None)
    if device != "cuda":
        tiles = {name: value for name, value in tiles.items() if name.startswith("BLOCK")}
    rings = [k.args[0], v.args[0]] if one else []
    tensors = {"q": q, "k": rings[0] if one else k, "v": rings[1] if one else v, "out": node}
    if one:
        tensors |= {"new_k": k.args[1], "new_v": v.args[1]}
    values: dict[str, Any] = {f"p_{name}": view_of(place(t), program.shape(t)) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        for dim, stride in zip(("batch", "head", "token"), place(tensor).strides, strict=False):
            values[f"{name}_{dim}"] = size_text(stride)
    values["p_past"] = view_of(place(given["past"]), program.shape(given["past"]))
    if given["sink"] is not None:
        values["p_sink"] = view_of(place(given["sink"]), program.shape(given["sink"]))
    values.update(query_length=size_text(queries), key_length=size_text(keys), capacity=slots, offset=slots)
    values.update(scale=float(given["scale"]), **operands.values, **extra)
    ordered = tuple(values[name] for name in attention_parameters(spec))
    block = tiles["BLOCK_M"]
    blocks = -(-int(rows) // block) if isinstance(rows, int) else f"({text(queries)} + {block - 1}) // {block}"
    reads = tuple(dict.fromkeys(a.buffer for a in ordered if isinstance(a, View) and a.buffer != place(node).buffer))
    provenance = provenance_of([node])
    step = KernelStep(
        node.name,
        sources.add("kv_ring_attention", body_of(spec), provenance),
        (blocks, size_text(key_heads if one else heads), size_text(batch)),
        ordered,
        tiles,
        reads,
        (place(node).buffer, *(place(ring).buffer for ring in rings)),
        provenance,
    )
    return (step,)


MAKERS = {
    dialect.kv_ring_read: StepMaker(make=_read, accepts=_accepts),
    dialect.kv_ring_append: StepMaker(make=_append, accepts=_accepts, in_place={0: "ring"}),
    dialect.kv_ring_attention: StepMaker(make=_attention, accepts=_accepts, strides=result_strides),
}
"""Operation -> what makes its steps."""
