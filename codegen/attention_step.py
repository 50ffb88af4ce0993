"""The step of `graphwright::attention`: a kernel from the attention template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.index_text import parse
from graphwright.ir.analyses.masks import MaskForm, recognise
from graphwright.ir.analyses.spans import Spans, spans_of
from graphwright.ir.program import Program
from graphwright.runtime.schedule import KernelStep, View

from .attention import AttentionSpec, attention_parameters, attention_source, attention_tiles
from .attention_parts import LARGEST_DIM
from .external import view_of
from .index_code import LoadCode, triton_code
from .indexing import contiguous_strides, size_text, text
from .loops import Stored
from .lowering import arguments
from .provenance import provenance_of
from .sources import KernelSources
from .steps import Place, StepMaker

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_VARIABLES = {
    **{"b": "i_b", "h": "i_h", "q": "o_q", "k": "o_k"},
    **{"query_length": "query_length", "key_length": "key_length"},
    **{"heads": "tl.num_programs(1)", "batch_size": "tl.num_programs(2)"},
}
_IN_RANGE = {"q": "o_q < query_length", "k": "o_k < key_length"}


def _applies(node: fx.Node) -> bool:
    """Whether a node is an attention that the template makes."""
    q, _, v = (operand.meta["val"] for operand in node.args[:3])  # type: ignore[union-attr]
    return q.dtype in _DTYPES and all(isinstance(t.shape[-1], int) and t.shape[-1] <= LARGEST_DIM for t in (q, v))


def result_strides(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the strides of a result [B, H, S, D]: tokens before heads, as the projection after it reads them."""
    batch, heads, tokens, size = shape
    outer = contiguous_strides((batch, tokens, heads, size))
    return (outer[0], outer[2], outer[1], outer[3])


@dataclass(frozen=True)
class MaskOperands:
    """The tensors that a mask reads, as parameters of the kernel.

    Args:
        loads: name in the expressions -> how it is read.
        values: parameter -> its argument.
    """

    loads: dict[str, LoadCode]
    values: dict[str, Any]


def _steps(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    given = arguments(node)
    q, k, v = (given[name] for name in "qkv")
    (batch, heads, queries, head_dim), (_, key_heads, keys, value_dim) = program.shape(q), program.shape(v)
    form = mask_form(node, given["predicate"], given["bias"])
    operands = mask_operands(program, given["operands"], place)
    spans = spans_of(form)
    spec = AttentionSpec(
        head_dim=int(head_dim),
        value_dim=int(value_dim),
        dtype=str(q.meta["val"].dtype).removeprefix("torch."),
        group=int(heads) // int(key_heads),
        causal=spans.causal,
        **span_options(spans),
        predicate=None if spans.rest is ix.TRUE else triton_code(spans.rest, _VARIABLES, operands.loads, in_range=_IN_RANGE),
        bias=None if form.bias is None else triton_code(form.bias, _VARIABLES, operands.loads, in_range=_IN_RANGE),
        operands=tuple(operands.values),
        softcap=given["softcap"] or None,
        sink=given["sink"] is not None,
    )
    tiles = attention_tiles(spec, device == "cuda", query_length=queries if isinstance(queries, int) else None)
    if device != "cuda":
        tiles = {name: value for name, value in tiles.items() if name.startswith("BLOCK")}
    kernel = sources.add("attention", body_of(spec), provenance_of([node]))
    tensors = {"q": q, "k": k, "v": v, "out": node}
    values: dict[str, Any] = {f"p_{name}": view_of(place(t), program.shape(t)) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        for dim, stride in zip(("batch", "head", "token"), place(tensor).strides, strict=False):
            values[f"{name}_{dim}"] = size_text(stride)
    if given["sink"] is not None:
        values["p_sink"] = view_of(place(given["sink"]), program.shape(given["sink"]))
    values.update(query_length=size_text(queries), key_length=size_text(keys), offset=0, scale=float(given["scale"]))
    values.update(operands.values)
    ordered = tuple(values[name] for name in attention_parameters(spec))
    blocks = -(-sympy.sympify(queries) // tiles["BLOCK_M"]) if isinstance(queries, int) else None
    grid = int(blocks) if blocks is not None else f"({text(queries)} + {tiles['BLOCK_M'] - 1}) // {tiles['BLOCK_M']}"
    reads = tuple(dict.fromkeys(a.buffer for a in ordered if isinstance(a, View) and a.buffer != place(node).buffer))
    step = KernelStep(
        node.name,
        kernel,
        (grid, size_text(heads), size_text(batch)),
        ordered,
        tiles,
        reads,
        (place(node).buffer,),
        provenance_of([node]),
    )
    return (step,)


def span_options(spans: Spans) -> dict[str, Any]:
    """Return what a kernel's specification says of the keys to walk, causality aside."""
    names = ("window", "right_window", "sinks", "free", "chunk", "chunks_behind", "chunks_ahead")
    return {name: getattr(spans, name) for name in names}


def mask_form(node: fx.Node, predicate: str, bias: str) -> MaskForm:
    """Return what an attention's predicate and bias say."""
    facts = ix.NO_FACTS.known("b", ix.ZERO, None).known("h", ix.ZERO, None)
    facts = facts.known("q", ix.ZERO, None).known("k", ix.ZERO, None)
    operands = arguments(node)["operands"]
    types = {f"in{k}": _type(operand) for k, operand in enumerate(operands)}
    seen = parse(predicate, types, facts) if predicate else ix.TRUE
    added = parse(bias, types, facts) if bias else None
    return recognise(seen, added, (), True, facts)


def _type(operand: fx.Node) -> Any:
    dtype = operand.meta["val"].dtype
    return "bool" if dtype is torch.bool else "float" if dtype.is_floating_point else "int"


def mask_operands(program: Program, nodes: list[fx.Node], place: Callable[[fx.Node], Stored]) -> MaskOperands:
    """Return the operands of an attention's mask as parameters of its kernel."""
    loads: dict[str, LoadCode] = {}
    values: dict[str, Any] = {}
    for k, node in enumerate(nodes):
        stored = place(node)
        values[f"p_in{k}"] = view_of(stored, program.shape(node))
        strides = []
        for dim, stride in enumerate(stored.strides):
            size = size_text(stride)
            if isinstance(size, int):
                strides.append(str(size))
            else:
                strides.append(f"in{k}_stride{dim}")
                values[f"in{k}_stride{dim}"] = size
        loads[f"in{k}"] = LoadCode(f"p_in{k}", tuple(strides))
    return MaskOperands(loads, values)


def body_of(spec: AttentionSpec) -> str:
    """Return the kernel's function with "{name}" for its name."""
    placeholder = "attention_kernel_name"
    source = attention_source(spec, placeholder)
    return source[source.index("@triton.jit") :].replace(placeholder, "{name}")


def _accepts(node: fx.Node, arg: fx.Node, stored: Stored, shape: tuple[Any, ...]) -> bool:
    return arg not in node.args[:3] or bool(stored.strides[-1] == 1)


MAKERS = {dialect.attention: StepMaker(make=_steps, accepts=_accepts, strides=result_strides, applies=_applies)}
"""Operation -> what makes its steps."""
