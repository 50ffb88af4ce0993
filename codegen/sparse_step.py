"""The steps of attention over listed keys: the lists, and the attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.masks import MaskForm
from graphwright.ir.analyses.spans import Spans, spans_of
from graphwright.ir.errors import LoweringError
from graphwright.ir.ops.block_index import FORCED, TILE
from graphwright.ir.program import Program
from graphwright.runtime.schedule import KernelStep, View

from .attention import AttentionSpec, attention_parameters, attention_tiles
from .attention_parts import LARGEST_DIM
from .attention_step import body_of, mask_form, mask_operands, result_strides, span_options
from .block_index_text import LISTS, choice_body, sums_body, weights_body
from .external import view_of
from .fusion import is_item
from .index_code import triton_code
from .indexing import contiguous_strides, size_text, text
from .loops import Stored
from .lowering import arguments
from .provenance import provenance_of
from .sources import KernelSources
from .steps import Place, StepMaker, scratch_view

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SUMMED = 256
"""Sums that one program makes."""

Scratch = Mapping[str, tuple[torch.dtype, tuple[Any, ...]]]


def _enough(tokens: Any, minimum: int) -> Any:
    """Return 1 where there are so many tokens, else 0: a number, or a text for when the sizes are known."""
    if minimum <= 0 or isinstance(tokens, int):
        return int(not isinstance(tokens, int) or tokens >= minimum)
    return f"min(1, ({text(tokens)}) // {minimum})"


def _times(count: Any, factor: Any) -> Any:
    """Return a number of programs, or none."""
    if isinstance(count, int) and isinstance(factor, int):
        return count * factor
    return count if factor == 1 else f"({count}) * ({factor})"


def _blocks(count: Any, block: int) -> Any:
    return -(-count // block) if isinstance(count, int) else f"({text(count)} + {block - 1}) // {block}"


def _unsupported(program: Program, node: fx.Node) -> None:
    """Raise if there are no kernels for an operation's sizes."""
    given = arguments(node)
    sizes = [program.shape(given[name])[at] for name in "qk" for at in (1, 3)]
    dtype = given["q"].meta["val"].dtype
    if dtype not in _DTYPES or not all(isinstance(n, int) for n in sizes) or max(sizes[1::2]) > LARGEST_DIM:
        raise LoweringError(
            f"{node.name}: lists of keys are made and used for float32, float16 and bfloat16, and heads of up to {LARGEST_DIM} "
            f"features; this one is {dtype}, {sizes[1]} features"
        )


# ---- the lists


def _scratch(program: Program, node: fx.Node) -> Scratch:
    given = arguments(node)
    batch, heads, tokens, _ = program.shape(given["q"])
    count = program.size(node.meta["val"][0].shape[2])
    return {
        "weights": (torch.float32, (batch, heads, TILE, tokens)),
        "sums": (torch.float32, (batch, heads, 2, tokens)),
        "keys": (torch.int32, (batch, heads, 1 + max(given["vertical"]))),
        "distances": (torch.int32, (batch, heads, 1 + max(given["slash"]))),
        "starts": (torch.int32, (batch, heads, count + 2)),
        "covered": (torch.int32, (batch, heads, count + 2, TILE)),
    }


def _index_steps(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    _unsupported(program, node)
    given = arguments(node)
    q, k, counts, past = (given[name] for name in ("q", "k", "count", "past"))
    (batch, heads, tokens, head_dim), key_heads = program.shape(q), program.shape(k)[1]
    runs = _enough(tokens, given["minimum_tokens"])
    if runs == 0:
        return ()
    batch, count = size_text(batch), size_text(tokens)
    scratch = {name: scratch_view(node, name, shape) for name, (_, shape) in _scratch(program, node).items()}
    results = {user.args[1]: view_of(place(user), program.shape(user)) for user in node.users if is_item(user)}
    if results.keys() != {0, 1}:
        raise LoweringError(f"{node.name}: both lists must be used, those of blocks and those of single keys")
    of = {name: None if t is None else view_of(place(t), program.shape(t)) for name, t in (("count", counts), ("past", past))}
    q_view, k_view = view_of(place(q), program.shape(q)), view_of(place(k), program.shape(k))
    numbers = {name: [int(value) for value in given[name]] for name in ("vertical", "slash", "fixed")}
    keys_row, has_count = 1 + max(numbers["vertical"]), int(counts is not None)
    on_cuda = {"num_warps": 4, "num_stages": 2} if device == "cuda" else {}
    dtype = str(q.meta["val"].dtype).removeprefix("torch.")

    def step(name: str, body: str, grid: tuple[Any, ...], values: list[Any], written: list[View], constants: Any) -> KernelStep:
        reads = tuple(dict.fromkeys(value.buffer for value in values if isinstance(value, View)))
        kernel = sources.add(f"block_index_{name}", body, provenance_of([node]))
        return KernelStep(
            f"{node.name}_{name}",
            kernel,
            (_times(grid[0], runs), *grid[1:]),
            tuple(values),
            {**constants, **on_cuda},
            tuple(read for read in reads if read not in {view.buffer for view in written}),
            tuple(view.buffer for view in written),
            provenance_of([node]),
        )

    strides = [size_text(stride) for tensor in (q, k) for stride in place(tensor).strides[:3]]
    weights = step(
        "weights",
        weights_body(given["softcap"], dtype),
        (heads, batch),
        [q_view, k_view, of["count"] or q_view, scratch["weights"], count, float(given["scale"]), *strides],
        [scratch["weights"]],
        {
            "group": int(heads) // int(key_heads),
            "head_dim": int(head_dim),
            "has_count": has_count,
            "ROWS": TILE,
            "BLOCK_N": TILE,
            "BLOCK_D": max(16, 1 << max(int(head_dim) - 1, 0).bit_length()),
        },
    )
    sums = step(
        "sums",
        sums_body(int(heads)),
        (_blocks(tokens, _SUMMED), heads, batch),
        [scratch["weights"], of["count"] or scratch["weights"], scratch["sums"], count, *numbers["fixed"]],
        [scratch["sums"]],
        {"has_count": has_count, "ROWS": TILE, "FORCED": FORCED, "BLOCK": _SUMMED},
    )
    made = [scratch[name] for name in ("keys", "distances", "starts", "covered")]
    choice = step(
        "choice",
        choice_body(int(heads)),
        (heads, batch),
        [scratch["sums"], *made, count, *numbers["vertical"], *numbers["slash"]],
        made,
        {"keys_row": keys_row, "distances_row": 1 + max(numbers["slash"]), "TILE": TILE, "BLOCK": _SUMMED},
    )
    lists = step(
        "lists",
        LISTS,
        (_blocks(tokens, TILE), heads, batch),
        [scratch["keys"], scratch["starts"], scratch["covered"], of["past"] or scratch["keys"], results[0], results[1], count],
        [results[0], results[1]],
        {"keys_row": keys_row, "columns_row": keys_row, "has_past": int(past is not None), "TILE": TILE},
    )
    return (weights, sums, choice, lists)


# ---- the attention


def attention_steps(
    program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str, *, fresh: bool = False
) -> Sequence[KernelStep]:
    """Return the steps of attention over listed keys: the dense one, the one with lists, or both, of which one runs.

    Args:
        program: the program.
        node: the call.
        place: tells where a tensor lies.
        sources: takes the kernels' sources.
        device: the device type.
        fresh: compute sequences without tokens before alone, whose keys and values are those of this call.
    """
    _unsupported(program, node)
    given = arguments(node)
    tokens = program.shape(given["q"])[2]
    runs = _enough(tokens, given["minimum_tokens"])
    steps = []
    if runs != 1:
        dense = 1 if runs == 0 else f"1 - {runs}"
        steps.append(_attention_step(program, node, place, sources, device, dense, listed=False, fresh=fresh))
    if runs != 0:
        steps.append(_attention_step(program, node, place, sources, device, runs, listed=True, fresh=fresh))
    return steps


def _attention_step(
    program: Program,
    node: fx.Node,
    place: Place,
    sources: KernelSources,
    device: str,
    runs: Any,
    *,
    listed: bool,
    fresh: bool,
) -> KernelStep:
    given = arguments(node)
    cached = "past" in given
    q, k, v = (given[name] for name in "qkv")
    (batch, heads, queries, head_dim), (_, key_heads, keys, value_dim) = program.shape(q), program.shape(v)
    form = mask_form(node, given["predicate"], given["bias"])
    operands = mask_operands(program, given["operands"], place)
    spans = _listed_spans(form) if listed else spans_of(form)
    if cached and not spans.causal:
        spans = Spans(form.predicate)
    names = {"b": "i_b", "h": "i_h", "q": "(o_q + offset)" if cached else "o_q", "k": "o_k"}
    if not cached:
        names |= {"query_length": "query_length", "key_length": "key_length"}
        names |= {"heads": "tl.num_programs(1)", "batch_size": "tl.num_programs(2)"}
    limits = {"q": "o_q < query_length", "k": "o_k < key_length"}

    def code(e: ix.Expr | None) -> str | None:
        return None if e is None or e is ix.TRUE else triton_code(e, names, operands.loads, in_range=limits)

    spec = AttentionSpec(
        head_dim=int(head_dim),
        value_dim=int(value_dim),
        dtype=str(q.meta["val"].dtype).removeprefix("torch."),
        group=int(heads) // int(key_heads),
        causal=cached or spans.causal,
        **span_options(spans),
        predicate=code(spans.rest),
        bias=code(form.bias),
        operands=tuple(operands.values),
        softcap=given["softcap"] or None,
        sink=given["sink"] is not None,
        cached=cached,
        listed=listed,
        fresh=fresh,
    )
    constants = attention_tiles(spec, device == "cuda", query_length=queries if isinstance(queries, int) else None)
    if device != "cuda":
        constants = {name: value for name, value in constants.items() if name.startswith("BLOCK")}
    tensors = {"q": q, "k": k, "v": v, "out": node}
    tensors |= {"blocks": given["blocks"], "columns": given["columns"]} if listed else {}
    tensors |= {"past": given["past"]} if cached else {}
    tensors |= {"sink": given["sink"]} if given["sink"] is not None else {}
    values: dict[str, Any] = {f"p_{name}": view_of(place(t), program.shape(t)) for name, t in tensors.items()}
    for name in ("q", "k", "v", "out"):
        for dim, stride in zip(("batch", "head", "token"), place(tensors[name]).strides, strict=False):
            values[f"{name}_{dim}"] = size_text(stride)
    values |= {"query_length": size_text(queries), "key_length": size_text(keys), "capacity": size_text(keys), "offset": 0}
    values["scale"] = float(given["scale"])
    if listed:
        values |= {f"{name}_row": size_text(program.shape(tensors[name])[3]) for name in ("blocks", "columns")}
    values.update(operands.values)
    ordered = tuple(values[name] for name in attention_parameters(spec))
    provenance = provenance_of([node])
    return KernelStep(
        node.name if listed else f"{node.name}_dense",
        sources.add(str(node.target).split(".")[1] if listed else "attention", body_of(spec), provenance),
        (_times(_blocks(queries, constants["BLOCK_M"]), runs), size_text(heads), size_text(batch)),
        ordered,
        constants,
        tuple(dict.fromkeys(a.buffer for a in ordered if isinstance(a, View) and a.buffer != place(node).buffer)),
        (place(node).buffer,),
        provenance,
    )


def _listed_spans(form: MaskForm) -> Spans:
    """Return what is told of a mask where lists say which keys to walk: causality, and the rest is tested for each key."""
    spans = spans_of(form)
    if not spans.causal:
        return Spans(form.predicate)
    plain = spans == Spans(spans.rest, causal=True)
    return spans if plain else Spans(form.predicate, causal=True)


def accepts(reader: fx.Node, arg: fx.Node, stored: Stored, shape: tuple[Any, ...]) -> bool:
    """Whether the steps can read an argument where it lies; see `StepMaker`."""
    given = arguments(reader)
    if any(arg is given.get(name) for name in ("blocks", "columns", "past", "count")):
        wanted = contiguous_strides(shape)
        return all(size == 1 or a == b for size, a, b in zip(shape, stored.strides, wanted, strict=True))
    return arg in given.get("operands", ()) or bool(stored.strides[-1] == 1)


MAKERS = {
    dialect.block_index: StepMaker(make=_index_steps, accepts=accepts, scratch=_scratch),
    dialect.sparse_attention: StepMaker(make=attention_steps, accepts=accepts, strides=result_strides),
    dialect.kv_sparse_attention: StepMaker(make=attention_steps, accepts=accepts, strides=result_strides),
}
"""Operation -> what makes its steps."""
