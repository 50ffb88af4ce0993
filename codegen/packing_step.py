"""The steps of packed programs: rows taken by number, and attention over sequences that lie one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.errors import LoweringError
from graphwright.ir.program import Program
from graphwright.runtime.schedule import KernelStep, View

from .attention import AttentionSpec, attention_parameters, attention_source, attention_tiles
from .attention_parts import LARGEST_DIM
from .attention_step import result_strides
from .external import view_of
from .indexing import contiguous_strides, product, size_text
from .loops import Stored
from .lowering import arguments
from .provenance import provenance_of
from .sources import KernelSources
from .steps import Place, StepMaker

ROWS = 32
"""Rows that one program copies."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LONGEST_BLOCK = 1024

TAKE_ROWS = '''\
@triton.jit
def {name}(p_x, p_index, p_out, count, x_row, columns: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy ROWS rows, each from where its index says; zeros where that is negative."""
    first = tl.program_id(0) * ROWS
    o_n = tl.arange(0, BLOCK)
    for i in range(first, tl.minimum(first + ROWS, count)):
        row = tl.load(p_index + i)
        for column in tl.static_range(0, columns, BLOCK):
            inside = column + o_n < columns
            x = tl.load(p_x + row * x_row + column + o_n, mask=inside & (row >= 0), other=0)
            tl.store(p_out + i.to(tl.int64) * columns + column + o_n, x, mask=inside)
'''


def _take_rows(program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str) -> Sequence[KernelStep]:
    given = arguments(node)
    x, index = given["x"], given["index"]
    columns, count = size_text(product(program.shape(x)[1:])), size_text(product(program.shape(index)))
    if not isinstance(columns, int):
        raise LoweringError(f"{node.name}: the rows are of {columns} elements, and must be of a fixed number")
    values = (
        *(view_of(place(tensor), program.shape(tensor)) for tensor in (x, index, node)),
        count,
        size_text(place(x).strides[0]),
    )
    block = min(1 << max(columns - 1, 0).bit_length(), _LONGEST_BLOCK)
    constants = {"columns": columns, "ROWS": ROWS, "BLOCK": block}
    kernel = sources.add("take_rows", TAKE_ROWS, provenance_of([node]))
    return (_step(node, kernel, (_blocks(count, ROWS),), values, constants, place),)


def _ragged_attention(
    program: Program, node: fx.Node, place: Place, sources: KernelSources, device: str
) -> Sequence[KernelStep]:
    given = arguments(node)
    q, k, v, starts = (given[name] for name in ("q", "k", "v", "starts"))
    (_, heads, _, head_dim), (_, key_heads, _, value_dim) = program.shape(q), program.shape(v)
    dtype = q.meta["val"].dtype
    sizes = (heads, key_heads, head_dim, value_dim)
    if dtype not in _DTYPES or not all(isinstance(n, int) for n in sizes) or max(head_dim, value_dim) > LARGEST_DIM:
        raise LoweringError(
            f"{node.name}: there is no kernel for {heads} heads of {head_dim} and {value_dim} {dtype}: up to {LARGEST_DIM} "
            f"of {', '.join(map(str, _DTYPES))}"
        )
    spec = AttentionSpec(
        head_dim=int(head_dim),
        value_dim=int(value_dim),
        dtype=str(dtype).removeprefix("torch."),
        group=int(heads) // int(key_heads),
        softcap=given["softcap"] or None,
        ragged=True,
    )
    tiles = attention_tiles(spec, device == "cuda")
    if device != "cuda":
        tiles = {name: value for name, value in tiles.items() if name.startswith("BLOCK")}
    placeholder = "attention_kernel_name"
    source = attention_source(spec, placeholder)
    # What is above the helpers is written for all kernels alike.
    body = source[source.index("@triton.jit") :].replace(placeholder, "{name}")
    kernel = sources.add("ragged_attention", body, provenance_of([node]))
    tensors = {"q": q, "k": k, "v": v, "out": node}
    values: dict[str, Any] = {f"p_{name}": view_of(place(t), program.shape(t)) for name, t in tensors.items()}
    values["p_starts"] = view_of(place(starts), program.shape(starts))
    for name, tensor in tensors.items():
        values |= {f"{name}_{dim}": size_text(place(tensor).strides[at]) for dim, at in (("head", 1), ("token", 2))}
    values["scale"] = float(given["scale"])
    ordered = tuple(values[name] for name in attention_parameters(spec))
    longest, sequences = size_text(program.size(given["longest"])), size_text(program.shape(starts)[0] - 1)
    grid = (_blocks(longest, tiles["BLOCK_M"]), int(heads), sequences)
    return (_step(node, kernel, grid, ordered, tiles, place),)


def _blocks(count: int | str, block: int) -> int | str:
    return -(-count // block) if isinstance(count, int) else f"({count} + {block - 1}) // {block}"


def _step(
    node: fx.Node, kernel: str, grid: Any, values: tuple[Any, ...], constants: dict[str, int], place: Place
) -> KernelStep:
    written = place(node).buffer
    reads = tuple(dict.fromkeys(a.buffer for a in values if isinstance(a, View) and a.buffer != written))
    return KernelStep(node.name, kernel, grid, values, constants, reads, (written,), provenance_of([node]))


def _accepts(node: fx.Node, arg: fx.Node, stored: Stored, shape: tuple[Any, ...]) -> bool:
    if node.target is dialect.ragged_attention and arg is not node.args[3]:
        return bool(stored.strides[-1] == 1)
    # The rows of a tensor may lie anywhere; what is in one, and all else, lies in order.
    first = 1 if node.target is dialect.take_rows and arg is node.args[0] else 0
    expected = contiguous_strides(shape)
    found = list(zip(shape, stored.strides, expected, strict=True))[first:]
    return all(size == 1 or stride == wanted for size, stride, wanted in found)


MAKERS = {
    dialect.take_rows: StepMaker(make=_take_rows, accepts=_accepts),
    dialect.ragged_attention: StepMaker(make=_ragged_attention, accepts=_accepts, strides=result_strides),
}
"""Operation -> what makes its steps."""
