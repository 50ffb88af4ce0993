"""Writing a fused loop kernel: the values of its stores as readable Triton source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from .indexing import Index, product, text
from .kernel_text import dtype_text
from .tiling import Segment
from .value_text import ValueText
from .values import Value, Values, ordered
from .walk import Walk


@dataclass(frozen=True)
class Store:
    """What a kernel writes.

    Args:
        buffer: the buffer's name.
        offset: of the element, in elements.
        value: what is written.
        dtype: of the buffer.
        varies: whether it is written once per column; once per row if not.
    """

    buffer: str
    offset: Index
    value: Value
    dtype: torch.dtype
    varies: bool


@dataclass(frozen=True)
class LoopKernel:
    """A written kernel.

    Args:
        body: the source of the function, with "{name}" for its name.
        buffers: the buffers that its pointer parameters stand for, in order.
        sizes: the sizes that follow, by the names of its parameters.
        constants: its compile-time constants.
        grid: number of programs.
        reads: buffers that it reads.
        writes: buffers that it writes.
    """

    body: str
    buffers: tuple[str, ...]
    sizes: dict[str, Any]
    constants: dict[str, int]
    grid: Any
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def write_kernel(
    values: Values, stores: Sequence[Store], outer: Sequence[tuple[sympy.Symbol, Any]], columns: Any, *, on_cuda: bool
) -> LoopKernel:
    """Return the kernel that makes all stores.

    Args:
        values: the values' maker.
        stores: what to write.
        outer: index variable and size of each dimension of the rows, outermost first.
        columns: length of a row.
        on_cuda: whether the kernel is for a GPU.
    """
    return _Writer(values, stores, outer, columns, on_cuda).write()


class _Writer:
    def __init__(
        self, values: Values, stores: Sequence[Store], outer: Sequence[tuple[sympy.Symbol, Any]], columns: Any, on_cuda: bool
    ) -> None:
        self.stores = stores
        self.order = ordered([store.value for store in stores])
        self.walk = Walk(self.order, [(s.offset, s.varies) for s in stores], outer, columns, on_cuda)
        self.out = ValueText(values, self.walk, _use_counts(stores, self.order))

    def write(self) -> LoopKernel:
        """Write the kernel."""
        tiling = self.walk.tiling
        rows = product([n for _, n in self.walk.outer])
        offsets = [self.walk.in_rows(o) for o in self.walk.offsets]
        constants: dict[str, int] = {}
        if tiling.mode == "flat":
            total = sympy.expand(rows * self.walk.columns)
            self.out.size("n_elements", total)
            constants["BLOCK"] = tiling.block
            self.out.line("col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)")
            self.out.line("inside = col < n_elements")
            self.out.segment = Segment(0, tiling.block, 0)
            self._write_stores(varying=True)
            grid = _ceil_div(total, tiling.block)
        else:
            self.out.size("n_rows", rows)
            constants["ROWS"] = tiling.rows
            if tiling.mode == "loop":
                self.out.size("n_columns", sympy.sympify(self.walk.columns))
                constants["BLOCK"] = tiling.block
            if tiling.mode == "tiles":
                self.out.line("row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]")
                self.out.line("# Rows past the end repeat the last one.")
                self.out.line("row = tl.minimum(row, n_rows - 1)")
            elif tiling.rows > 1:
                self.out.line("first = tl.program_id(0).to(tl.int64) * ROWS")
                self.out.line("for row in range(first, tl.minimum(first + ROWS, n_rows)):")
                self.out.depth += 1
            else:
                self.out.line("row = tl.program_id(0).to(tl.int64)")
            self._decode(offsets)
            self._write_rows()
            grid = _ceil_div(rows, tiling.rows)
        return self._finish(constants, grid)

    def _decode(self, offsets: Sequence[Index]) -> None:
        needed = set().union(*(o.free_symbols for o in offsets)) if offsets else set()
        for symbol, size in self.walk.outer[:-1]:
            if symbol not in needed:
                continue
            stride = self.walk.rows_at[symbol]
            quotient = f"row // {self.out.factor(stride)}" if stride != 1 else "row"
            outermost = symbol == self.walk.outer[0][0]
            self.out.line(f"{symbol} = {quotient}" if outermost else f"{symbol} = {quotient} % {self.out.factor(size)}")

    def _write_rows(self) -> None:
        if self.walk.tiling.mode == "loop":
            varying = [s for s in self.stores if s.varies]
            for value in self.order:
                if not value.varies and value.kind == "reduce":
                    self.out.text(value)
            self._write_stores(varying=False)
            if varying:
                with self.out.columns_loop([s.value for s in varying]):
                    self._write_stores(varying=True)
            return
        for segment in self.walk.tiling.segments:
            with self.out.in_segment(segment):
                self._write_stores(varying=True)
        self._write_stores(varying=False)

    def _write_stores(self, *, varying: bool) -> None:
        segment = self.out.segment
        for store in self.stores:
            if store.varies != varying:
                continue
            value, offset = self.out.text(store.value), self.out.index(store.offset)
            pointer = self.out.pointer(store.buffer)
            if varying and not store.value.varies:
                value = self.out.spread(store.value, value)
            cast = "" if store.value.dtype is store.dtype else f".to({dtype_text(store.dtype)})"
            written = f"({value}){cast}" if cast and not value.isidentifier() else f"{value}{cast}"
            mask = f", mask={self.walk.inside(segment)}" if varying and segment and segment.masked else ""
            self.out.line(f"tl.store({pointer} + {offset}, {written}{mask})")

    def _finish(self, constants: dict[str, int], grid: Any) -> LoopKernel:
        writes = tuple(dict.fromkeys(s.buffer for s in self.stores))
        reads = tuple(dict.fromkeys(v.payload[0] for v in self.order if v.kind == "load" and v.payload[0] in self.out.buffers))
        pointers = [f"p{k}" for k in range(len(self.out.buffers))]
        parameters = [*pointers, *self.out.sizes, *(f"{name}: tl.constexpr" for name in constants)]
        lines = [
            f"@triton.jit(do_not_specialize=[{', '.join(repr(name) for name in self.out.sizes)}])",
            f"def {{name}}({', '.join(parameters)}):",
            *self.out.lines,
        ]
        return LoopKernel("\n".join(lines) + "\n", tuple(self.out.buffers), self.out.sizes, constants, grid, reads, writes)


def _use_counts(stores: Sequence[Store], order: Sequence[Value]) -> dict[Value, int]:
    counts: dict[Value, int] = {}
    for value in order:
        for operand in value.args:
            counts[operand] = counts.get(operand, 0) + 1
    for store in stores:
        counts[store.value] = counts.get(store.value, 0) + 1
    return counts


def _ceil_div(value: Any, divisor: int) -> Any:
    if divisor == 1:
        return value
    value = sympy.sympify(value)
    if value.is_Integer:
        return -(-int(value) // divisor)
    return f"({text(value)} + {divisor - 1}) // {divisor}"
