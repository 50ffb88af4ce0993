"""Writing values as Triton text, each once, in the rows and columns that a kernel walks over."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch

from .indexing import Index, text
from .kernel_text import COMBINED, OPERATIONS, TYPED, dtype_text, identity_of, number_text
from .tiling import Segment
from .values import COLUMN, Value, Values, ordered
from .walk import ROW, Walk

LONGEST_INLINE = 48
"""A value that is used once is written where it is used, if its text is not longer than this."""

_RESERVED = re.compile(
    r"row|n_rows|n_columns|n_elements|first|start|ROWS|BLOCK|tl|triton|libdevice|float|range|(p|i|col|inside)\d*"
)
"""Names in kernels that no size may have."""


class ValueText:
    """Writes values, and the lines that they need.

    Args:
        values: the values' maker.
        walk: how the kernel walks.
        uses: how often each value is used.
    """

    def __init__(self, values: Values, walk: Walk, uses: dict[Value, int]) -> None:
        self.values = values
        self.walk = walk
        self.buffers: list[str] = []
        self.sizes: dict[str, Any] = {}
        self.lines: list[str] = []
        self.depth = 1
        self.segment: Segment | None = None
        self._uses = uses
        self._names: list[dict[Any, str]] = [{}]
        self._counts: dict[str, int] = {}
        sizes = [walk.columns, *(n for _, n in walk.outer), *walk.offsets]
        symbols = set().union(*(sympy.sympify(s).free_symbols for s in sizes)) - {ROW, *walk.variables}
        self._size_names = {symbol: _size_name(str(symbol)) for symbol in symbols}

    # -- lines

    def line(self, line: str) -> None:
        """Add a line."""
        self.lines.append("    " * self.depth + line)

    def size(self, name: str, size: Any) -> None:
        """Make a size a parameter of the kernel."""
        self.sizes[name] = size

    def pointer(self, buffer: str) -> str:
        """Return the parameter that points to a buffer."""
        if buffer not in self.buffers:
            self.buffers.append(buffer)
        return f"p{self.buffers.index(buffer)}"

    @contextmanager
    def in_segment(self, segment: Segment) -> Iterator[None]:
        """Write for the columns of a segment."""
        before, self.segment = self.segment, segment
        key = ("column", segment)
        if key not in self._names[0]:
            for line in self.walk.column_lines(segment):
                self.line(line)
            self._names[0][key] = ""
        yield
        self.segment = before

    @contextmanager
    def columns_loop(self, roots: Sequence[Value]) -> Iterator[None]:
        """Write a loop over the columns for `roots`; what does not differ from column to column is written before it."""
        for value in ordered(roots):
            if not value.varies and value.kind != "constant":
                self.text(value)
        self.line("for start in range(0, n_columns, BLOCK):")
        self.depth += 1
        self._names.append({})
        self.line("col = start + tl.arange(0, BLOCK)")
        self.line("inside = col < n_columns")
        before, self.segment = self.segment, Segment(0, self.walk.tiling.block, 0)
        yield
        self.segment = before
        self._names.pop()
        self.depth -= 1

    def _fresh(self, stem: str) -> str:
        while True:
            count = self._counts.get(stem, 0)
            self._counts[stem] = count + 1
            name = f"{stem}{count}" if count else stem
            if name not in self._size_names.values():
                return name

    # -- values

    def text(self, value: Value) -> str:
        """Return the text of a value, in the present segment if it differs from column to column."""
        if value.kind == "op" and value.payload == "where":
            # Where a whole segment lies on one side of a condition, the other side is not computed.
            known = self.walk.known(value.args[0], self.segment)
            if known is not None:
                chosen: Value = value.args[1 if known else 2]
                return self.spread(chosen, self.text(chosen)) if value.varies and not chosen.varies else self.text(chosen)
        key = (value, self.segment) if value.varies else value
        for names in reversed(self._names):
            found: str | None = names.get(key)
            if found is not None:
                return found
        written, simple = self._expression(value)
        if simple or (self._uses.get(value, 0) <= 1 and len(written) <= LONGEST_INLINE and value.kind in ("op", "less")):
            return written if simple else f"({written})"
        name = self._fresh(_stem(value))
        self.line(f"{name} = {written}")
        self._names[-1 if value.varies else 0][key] = name
        return name

    def _expression(self, value: Value) -> tuple[str, bool]:
        """Return a value's text, and whether it is a single term."""
        if value.kind == "constant":
            return number_text(value.payload, value.dtype), True
        if value.kind == "index":
            written = self.index(value.payload)
            return written, written.isidentifier()
        if value.kind == "less":
            left, right = (self.index(side) for side in value.payload)
            return f"{left} < {right}", False
        if value.kind == "load":
            return self._load(value), False
        if value.kind == "reduce":
            return self._reduction(value), True
        if value.payload.startswith("cast:"):
            return self._cast(value), False
        if value.payload == "not":
            (x,) = value.args
            return (f"{self.text(x)} == 0" if x.dtype is torch.bool else f"~{self.text(x)}"), False
        return OPERATIONS[value.payload].format(*self._operands(value)), False

    def _operands(self, value: Value) -> list[str]:
        """Return the texts of an operation's operands; numbers take the dtype of what they stand beside, if anything does."""
        texts = [self.text(a) for a in value.args]
        numbers = value.args[1:] if value.payload == "where" else value.args
        if all(a.kind == "constant" for a in numbers) or value.payload in TYPED:
            texts = [self._typed(a, t) if a.kind == "constant" else t for a, t in zip(value.args, texts, strict=True)]
        return texts

    def _typed(self, constant: Value, written: str) -> str:
        return f"tl.full([], {written}, {dtype_text(constant.dtype)})"

    def _cast(self, value: Value) -> str:
        (x,) = value.args
        narrow = value.payload.removeprefix("cast:torch.")
        dtype = getattr(torch, narrow)
        operand = self.text(x)
        if x.kind == "constant":
            operand = self._typed(x, operand)
        result = f"{operand}.to({dtype_text(dtype)})"
        return result if dtype is value.dtype else f"{result}.to({dtype_text(value.dtype)})"

    def _load(self, value: Value) -> str:
        buffer, offset, dtype = value.payload
        conditions = [self._decided(c) for c in value.args]
        if any(c is False for c in conditions):
            return f"tl.zeros([{self.walk.shape(self.segment)}], {dtype_text(value.dtype)})"
        masks = [c for c in conditions if isinstance(c, str)]
        if value.varies and self.segment is not None and self.segment.masked:
            masks.append(self.walk.inside(self.segment))
        pointer = f"{self.pointer(buffer)} + {self.index(offset)}"
        alone = value.varies and not self.values.depends(offset)
        if masks and alone:
            # A mask per column needs a pointer per column, and a mask per row one per row.
            pointer += f" + tl.zeros([{self.walk.shape(self.segment)}], tl.int32)"
        elif masks and self.walk.tiling.mode == "tiles" and self.walk.is_fixed(offset):
            pointer += " + tl.zeros([ROWS, 1], tl.int32)"
        mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
        cast = "" if dtype is value.dtype else f".to({dtype_text(value.dtype)})"
        written = f"tl.load({pointer}{mask}){cast}"
        return f"tl.broadcast_to({written}, [{self.walk.shape(self.segment)}])" if alone and not masks else written

    def _decided(self, condition: Value) -> bool | str:
        """Return whether a condition holds for the whole segment, or its text."""
        known = self.walk.known(condition, self.segment)
        return self.text(condition) if known is None else known

    def _reduction(self, value: Value) -> str:
        kind, _ = value.payload
        (body,) = value.args
        name = self._fresh({"sum": "total", "max": "top", "max_nan": "top", "min": "least", "min_nan": "least"}.get(kind, kind))
        if self.walk.tiling.mode == "loop":
            self._loop_reduction(name, kind, body)
        else:
            parts = [self._part(kind, body, segment) for segment in self.walk.tiling.segments]
            result = parts[0]
            for part in parts[1:]:
                result = COMBINED[kind].format(result, part)
            self.line(f"{name} = {result}")
        self._names[0][value] = name
        return name

    def _part(self, kind: str, body: Value, segment: Segment) -> str:
        with self.in_segment(segment):
            written = self.text(body)
            if not body.varies:
                written = self.spread(body, written)
            if segment.masked:
                start = number_text(identity_of(kind, body.dtype), body.dtype)
                written = f"tl.where({self.walk.inside(segment)}, {written}, {start})"
            return self._collapse(kind, written, body.dtype)

    def _collapse(self, kind: str, written: str, dtype: torch.dtype) -> str:
        axis = ", axis=1, keep_dims=True" if self.walk.tiling.mode == "tiles" else ""
        if kind in ("max", "min", "sum"):
            return f"tl.{kind}({written}{axis})"
        if kind in ("any", "all"):
            function = "tl.max" if kind == "any" else "tl.min"
            return f"({function}(({written}).to(tl.int32){axis}) != 0)"
        function = "tl.max" if kind == "max_nan" else "tl.min"
        held = self._fresh("part")
        self.line(f"{held} = {written}")
        if not dtype.is_floating_point:
            return f"{function}({held}{axis})"
        unordered = f"tl.max(({held} != {held}).to(tl.int32){axis}) != 0"
        return f'tl.where({unordered}, float("nan"), {function}({held}{axis}))'

    def _loop_reduction(self, name: str, kind: str, body: Value) -> None:
        start = number_text(identity_of(kind, body.dtype), body.dtype)
        self.line(f"{name}_block = tl.full([BLOCK], {start}, {dtype_text(body.dtype)})")
        with self.columns_loop([body]):
            written = f"tl.where(inside, {self.text(body)}, {start})"
            self.line(f"{name}_block = {COMBINED[kind].format(f'{name}_block', written)}")
        self.line(f"{name} = {self._collapse(kind, f'{name}_block', body.dtype)}")

    # -- small things

    def spread(self, value: Value, written: str) -> str:
        """Return the text of a value that is the same in every column, once per column."""
        if value.kind == "constant":
            return f"tl.full([{self.walk.shape(self.segment)}], {written}, {dtype_text(value.dtype)})"
        return f"tl.broadcast_to({written}, [{self.walk.shape(self.segment)}])"

    def index(self, expression: Index) -> str:
        """Return the text of an index expression."""
        written = self.walk.in_rows(expression)
        if self.walk.tiling.mode in ("rows", "tiles") and self.segment is not None:
            written = written.xreplace({COLUMN: sympy.Symbol(self.walk.column_name(self.segment), integer=True)})
        return self.factor(written)

    def factor(self, size: Any) -> str:
        """Return the text of a size, in brackets where it is more than one operand."""
        size = sympy.sympify(size)
        names = {symbol: self._size_names[symbol] for symbol in size.free_symbols if symbol in self._size_names}
        for symbol, name in sorted(names.items(), key=str):
            self.size(name, symbol)
        written = text(size.xreplace({s: sympy.Symbol(n, integer=True) for s, n in names.items() if n != str(s)}))
        return written if written.isidentifier() or written.isdigit() else f"({written})"


def _size_name(name: str) -> str:
    """Return what a size is called in a kernel: its own name, if a kernel has no other use for that."""
    return f"{name}_size" if _RESERVED.fullmatch(name) or keyword.iskeyword(name) else name


def _stem(value: Value) -> str:
    if value.kind == "load":
        return "x"
    if value.kind in ("index", "less"):
        return "at" if value.kind == "index" else "below"
    return (
        "cast"
        if value.payload.startswith("cast:")
        else {"and": "both", "or": "either", "not": "other"}.get(value.payload, f"{value.payload}_")
    )
