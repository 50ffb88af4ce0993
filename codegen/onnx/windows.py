"""Attention in which a query sees a window of keys, written block by block, so that its time grows with the window.

onnxruntime's attention computes all scores and masks them afterwards. Here queries are cut into blocks, and each block gets the
keys that its window reaches, as a sequence of its own. Where a sequence is too short for that to pay, sizes that are worked out
when the model runs make one block of all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.analyses.masks import recognise
from graphwright.ir.errors import ExportError
from graphwright.ir.ops.attention import SIZES, operand_name, operand_type
from graphwright.ir.program import Program, calls

from .calls import onnx_call
from .masks import INDICES, ExpressionWriter

SMALLEST_BLOCK = 16
"""Queries of a block at the least: smaller products do not pay."""

SHORT = 2
"""Up to so many times what a window reaches a sequence is one block."""

_FACTS = ix.NO_FACTS.known("q", ix.ZERO, None).known("k", ix.ZERO, None)


@dataclass(frozen=True)
class Window:
    """What the queries of an attention can see at most.

    Args:
        left: keys before a query's own.
        right: keys after it.
        first: how many keys at the beginning of the sequence every query may see beside these.
    """

    left: int
    right: int
    first: int

    @property
    def block(self) -> int:
        """Queries of a block."""
        return max((self.left + self.right + 1) // 2, SMALLEST_BLOCK)

    @property
    def short(self) -> int:
        """Up to how many tokens a sequence is one block."""
        return SHORT * (self.left + self.right + 1 + self.first)


def find_windows(program: Program) -> dict[fx.Node, Window]:
    """Return the window of each attention that is worth writing in blocks: of a sequence to itself, and far shorter than it.

    Args:
        program: after all passes.
    """
    found = {}
    for node in calls(program.graph, dialect.attention):
        given = arguments(node)
        tokens, keys = program.shape(given["q"])[2], program.shape(given["k"])[2]
        window = _window(given) if tokens == keys and given["predicate"] else None
        if window is None:
            continue
        dimension = program.dimensions.get(str(tokens))
        longest = tokens if isinstance(tokens, int) else dimension.high if dimension is not None else 0
        if longest is None or longest > window.short:
            found[node] = window
    return found


def long_sizes(program: Program) -> Mapping[str, int]:
    """Return sizes at which every window is written in blocks: a tracer takes what it sees of sizes for a fact."""
    sizes: dict[str, int] = {}
    for node, window in find_windows(program).items():
        name = str(program.shape(arguments(node)["q"])[2])
        if name in program.dimensions:
            sizes[name] = max(sizes.get(name, 0), window.short + 2 * window.block + 3)
    return sizes


def _window(given: Mapping[str, Any]) -> Window | None:
    types = {operand_name(at): operand_type(operand.meta["val"].dtype) for at, operand in enumerate(given["operands"])}
    predicate = ix.parse(given["predicate"], types, _FACTS)
    bias = ix.parse(given["bias"], types, _FACTS) if given["bias"] else predicate
    if ix.contains(predicate, "sum") or ix.contains(bias, "sum"):
        return None  # Sums over keys need all of them.
    form = recognise(predicate, None, (), True, _FACTS)
    if form.offset is not ix.ZERO:
        return None
    lefts = [reach - 1 for reach in (form.window, form.chunk) if reach is not None]
    rights = [0] if form.causal else [reach - 1 for reach in (form.right_window, form.chunk) if reach is not None]
    first = 0
    if not lefts and form.sink_window is not None:
        lefts, first = [form.sink_window - 1], form.sinks
    return Window(min(lefts), min(rights), first) if lefts and rights else None


class Blocks:
    """The blocks of the attentions of one shape and mask.

    Args:
        q: [B, T, H * D].
        window: what queries see at most.
    """

    def __init__(self, q: torch.Tensor, window: Window) -> None:
        self.batch, self.tokens = q.shape[:2]
        last, device = self.tokens - 1, q.device
        # Sizes that are values of tensors: as expressions of the tokens' number they keep the tracer busy for minutes.
        self._length = torch.full((), self.tokens, dtype=torch.int64, device=device)
        whole = self._length <= window.short
        size = torch.where(whole, self._length, window.block)
        self.block = _size(size, 1)
        self.count = _size(torch.div(self._length + size - 1, size, rounding_mode="floor"), 1)
        left, right = (_size(torch.where(whole, 0, reach), 0) if reach else 0 for reach in (window.left, window.right))
        starts = torch.arange(self.count, device=device)[:, None] * self.block
        self.queries = starts + torch.arange(self.block, device=device)
        self.keys = starts - left + torch.arange(left + self.block + right, device=device)
        self.there = (self.keys >= 0) & (self.keys <= last)
        if window.first:
            leading = torch.arange(window.first, device=device).expand(self.count, window.first)
            self.there = torch.cat(((leading < starts - left) & (leading <= last), self.there), 1)
            self.keys = torch.cat((leading, self.keys), 1)
        self.reach = window.first + left + self.block + right
        self._query_rows = self.queries.reshape(-1).clamp(0, last)
        self._key_rows = self.keys.reshape(-1).clamp(0, last)

    def split(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the blocks of queries [B * n, block, E], and the keys and values that each can see [B * n, reach, E]."""
        rows = self.batch * self.count
        queries = q.index_select(1, self._query_rows).reshape(rows, self.block, q.shape[2])
        keys, values = (x.index_select(1, self._key_rows).reshape(rows, self.reach, x.shape[2]) for x in (k, v))
        return queries, keys, values

    def join(self, y: torch.Tensor) -> torch.Tensor:
        """Return [B, T, E] of the results of blocks [B * n, block, E]."""
        whole = y.reshape(self.batch, self.count * self.block, y.shape[2])
        first, axis = (torch.full((1,), value, dtype=torch.int64, device=y.device) for value in (0, 1))
        # PyTorch does not know that there are as many rows.
        inputs = [whole, first, self._length.reshape(1), axis]
        return onnx_call("Slice", inputs, {}, y.dtype, (self.batch, self.tokens, y.shape[2]))

    def flatten(self, mask: torch.Tensor) -> torch.Tensor:
        """Return what is broadcastable to [B, n, H, block, reach] as [B * n, H or 1, block, reach]."""
        heads = mask.shape[-3]
        whole = mask.expand(self.batch, self.count, heads, self.block, self.reach)
        return whole.reshape(self.batch * self.count, heads, self.block, self.reach)


def _size(value: torch.Tensor, least: int) -> Any:
    """Return a size that is worked out when the model runs."""
    size = value.item()
    check: Any = torch._check
    check(size >= least)
    return size


class BlockWriter(ExpressionWriter):
    """Writes expressions over b, h, q and k for the queries and keys of blocks, broadcastable to [B, n, H, block, reach].

    Args:
        blocks: where queries and keys stand.
        shape: the scores' sizes [B, H, T, T].
        loads: the tensors that expressions read, by name.
        device: where the tensors are.
    """

    def __init__(self, blocks: Blocks, shape: tuple[Any, ...], loads: Mapping[str, torch.Tensor], device: torch.device) -> None:
        super().__init__(dict(zip(SIZES, shape, strict=True)), shape, loads, device)
        batch, heads = (torch.arange(size, device=device) for size in shape[:2])
        self._at = {
            "b": batch[:, None, None, None, None],
            "h": heads[:, None, None],
            "q": blocks.queries[:, None, :, None],
            "k": blocks.keys[:, None, None, :],
        }

    def _variable(self, name: str) -> torch.Tensor:
        return self._at[name] if name in INDICES else super()._variable(name)

    def _read(self, e: ix.Expr) -> torch.Tensor:
        return self._gather(self.read_as(e), e)

    def _prefix_sum(self, e: ix.Expr) -> torch.Tensor:
        raise ExportError(f"{e} has no form in blocks of queries")
