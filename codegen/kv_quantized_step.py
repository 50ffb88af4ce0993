"""The steps of programs with quantised caches: new tokens that are put into them in place, and attention over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses import index as ix
from graphwright.ir.errors import LoweringError
from graphwright.ir.ops.kv_quantized import TOKEN
from graphwright.ir.program import Program
from graphwright.runtime.schedule import KernelStep, View

from .attention_parts import LARGEST_DIM
from .attention_step import mask_form, mask_operands, result_strides
from .external import view_of
from .index_code import triton_code
from .indexing import size_text, text
from .kv_quantized_append import PARAMETERS, AppendSpec, append_body
from .kv_quantized_text import QuantizedSpec, attention_body, attention_parameters
from .loops import Stored
from .lowering import arguments
from .provenance import provenance_of
from .sources import KernelSources
from .steps import Place, StepMaker

LARGEST_BLOCK = 64
"""Most queries of a program, and keys of their own that it takes at a time."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STATES = ("codes", "scale", "minimum", "ring")


def _accepts(reader: fx.Node, arg: fx.Node, stored: Stored, shape: tuple[Any, ...]) -> bool:
    if arg in arguments(reader).get("operands", ()):
        return True
    return bool(stored.strides[-1] == 1)


def _append(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    given = arguments(node)
    states, new = [given[name] for name in _STATES], given["new"]
    batch, heads, tokens, size = program.shape(new)
    _check(node, new.meta["val"].dtype, int(size))
    by_token = given["along"] == TOKEN
    spec = AppendSpec(
        size=int(size),
        bits=given["bits"],
        group=given["group"],
        slots=int(program.shape(given["ring"])[2]),
        groups=int(program.shape(given["scale"])[2]) if by_token else 0,
        limit=torch.finfo(given["scale"].meta["val"].dtype).max,
        counted=given["count"] is not None,
    )
    read = [new, given["past"], given["count"] or given["past"]]
    values = {f"p_{name}": view_of(place(t), program.shape(t)) for name, t in zip(_STATES, states, strict=True)}
    values |= {f"p_{name}": view_of(place(t), program.shape(t)) for name, t in zip(("new", "past", "count"), read, strict=True)}
    sizes = {"tokens": size_text(tokens), "capacity": size_text(program.shape(given["codes"])[2])}
    strides = dict(zip(("new_batch", "new_head", "new_token"), map(size_text, place(new).strides), strict=False))
    ordered = tuple({**values, **sizes, **strides}[name] for name in PARAMETERS)
    provenance = provenance_of([node])
    written = tuple(place(t).buffer for t in states)
    step = KernelStep(
        node.name,
        sources.add("kv_quantized_append", append_body(spec), provenance),
        (size_text(heads), size_text(batch)),
        ordered,
        {},
        tuple(dict.fromkeys([*(place(t).buffer for t in read), place(given["ring"]).buffer])),
        written,
        provenance,
    )
    return (step,)


def _attention(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    return (attention_step(program, node, place, sources, device),)


def attention_step(
    program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str, *, continued: bool = False
) -> KernelStep:
    """Return the step of attention over a quantised cache.

    Args:
        program: the program.
        node: the call.
        place: tells where a tensor lies.
        sources: takes the kernel's source.
        device: the device type.
        continued: leave the results of sequences without tokens before alone.
    """
    given = arguments(node)
    q, k, v = (given[name] for name in "qkv")
    (batch, heads, queries, head_dim), (_, key_heads, _, value_dim) = program.shape(q), program.shape(v)
    _check(node, q.meta["val"].dtype, max(int(head_dim), int(value_dim)))
    one, group = queries == 1 and not continued, int(heads) // int(key_heads)
    form = mask_form(node, given["predicate"], given["bias"])
    operands = mask_operands(program, given["operands"], place)
    # The kernel shows a query no key after its own in any case.
    known = form.causal and form.offset is ix.ZERO and form.window is None
    names = {
        "b": "i_b",
        "h": f"(i_h * {group} + o_q)" if one else "i_h",
        "q": "past" if one else "(o_q + past)",
        "k": "o_k",
    }
    limits = {("h" if one else "q"): "o_q < query_length", "k": "o_k < key_length"}

    def code(e: ix.Expr | None) -> str | None:
        return None if e is None or e is ix.TRUE else triton_code(e, names, operands.loads, in_range=limits)

    spec = QuantizedSpec(
        head_dim=int(head_dim),
        value_dim=int(value_dim),
        bits=given["bits"],
        group=given["group"],
        slots=int(program.shape(given["k_ring"])[2]),
        value_groups=int(program.shape(given["v_scale"])[2]),
        heads=group,
        one=one,
        predicate=code(form.residual if known else form.predicate),
        bias=code(form.bias),
        operands=tuple(operands.values),
        softcap=given["softcap"] or None,
        sink=given["sink"] is not None,
        continued=continued,
    )
    tensors = {"q": q, "k": k, "v": v, "out": node, "past": given["past"]}
    tensors |= {f"{x}_{state}": given[f"{x}_{state}"] for x in "kv" for state in _STATES}
    tensors |= {"sink": given["sink"]} if spec.sink else {}
    values: dict[str, Any] = {f"p_{name}": view_of(place(t), program.shape(t)) for name, t in tensors.items()}
    for name in ("q", "k", "v", "out"):
        for dim, stride in zip(("batch", "head", "token"), place(tensors[name]).strides, strict=False):
            values[f"{name}_{dim}"] = size_text(stride)
    capacity = size_text(program.shape(given["k_codes"])[2])
    values.update(query_length=size_text(queries), capacity=capacity, scale=float(given["scale"]), **operands.values)
    ordered = tuple(values[name] for name in attention_parameters(spec))
    rows = group if one else queries
    block = min(LARGEST_BLOCK, _tile(rows, 16 if device == "cuda" else 1)) if isinstance(rows, int) else LARGEST_BLOCK
    blocks = -(-int(rows) // block) if isinstance(rows, int) else f"({text(queries)} + {block - 1}) // {block}"
    reads = tuple(dict.fromkeys(a.buffer for a in ordered if isinstance(a, View) and a.buffer != place(node).buffer))
    provenance = provenance_of([node])
    return KernelStep(
        f"{node.name}_continued" if continued else node.name,
        sources.add("kv_quantized_attention", attention_body(spec), provenance),
        (blocks, size_text(key_heads if one else heads), size_text(batch)),
        ordered,
        {"BLOCK_M": block, "BLOCK_N": LARGEST_BLOCK},
        reads,
        (place(node).buffer,),
        provenance,
    )


def _tile(rows: int, smallest: int) -> int:
    return max(smallest, 1 << max(rows - 1, 0).bit_length())


def _check(node: fx.Node, dtype: torch.dtype, size: int) -> None:
    if dtype not in _DTYPES or size > LARGEST_DIM:
        raise LoweringError(
            f"{node.name}: quantised caches are generated for float32, float16 and bfloat16 and heads of up to {LARGEST_DIM} "
            f"features; this one is {dtype}, {size} features"
        )


MAKERS = {
    dialect.kv_quantized_append: StepMaker(
        make=_append, accepts=_accepts, in_place={0: "codes", 1: "scale", 2: "minimum", 3: "ring"}
    ),
    dialect.kv_quantized_attention: StepMaker(make=_attention, accepts=_accepts, strides=result_strides),
}
"""Operation -> what makes its steps."""
