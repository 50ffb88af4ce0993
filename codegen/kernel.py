"""Writing a fused loop kernel: the values of its stores as readable Triton source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from .indexing import Index, Quotient, contiguous_strides, product, text
from .kernel_text import COMBINED, OPERATIONS, TYPED, dtype_text, identity_of, number_text
from .tiling import Segment, choose
from .values import COLUMN, Value, Values

ROW = sympy.Symbol("row", integer=True, nonnegative=True)
LONGEST_INLINE = 48
"""A value that is used once is written where it is used, if its text is not longer than this."""


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
        self.values = values
        self.stores = stores
        self.outer = [(symbol, size) for symbol, size in outer if size != 1]
        self.columns = columns
        self.order = _ordered(stores)
        self.rows_at = dict(zip([s for s, _ in self.outer], contiguous_strides([n for _, n in self.outer]), strict=True))
        self.buffers: list[str] = []
        self.sizes: dict[str, Any] = {}
        self.lines: list[str] = []
        self.depth = 1
        self.names: list[dict[Any, str]] = [{}]
        self.counts: dict[str, int] = {}
        self.uses = _use_counts(stores, self.order)
        self.segment: Segment | None = None
        flat = self._is_flat()
        self.tiling = choose(columns, flat, not self.outer, self._cuts(), on_cuda)
        if flat:
            # A flat kernel's rows are its columns: one row of all elements.
            self.flat_index = sympy.expand(sum((s * n * columns for s, n in self.rows_at.items()), sympy.Integer(0)) + COLUMN)

    # -- looking at the offsets

    def _offsets(self) -> Iterator[Index]:
        for value in self.order:
            if value.kind == "load":
                yield value.payload[1]
            elif value.kind == "index":
                yield value.payload
            elif value.kind == "less":
                yield from value.payload
        for store in self.stores:
            yield store.offset

    def _is_flat(self) -> bool:
        if any(v.kind in ("reduce", "less") for v in self.order) or not all(s.varies for s in self.stores):
            return False
        position = sympy.expand(sum((s * n * self.columns for s, n in self.rows_at.items()), sympy.Integer(0)) + COLUMN)
        own = {COLUMN, *self.rows_at}
        return all(
            sympy.expand(o - position).free_symbols.isdisjoint(own) or o.free_symbols.isdisjoint(own) for o in self._offsets()
        )

    def _cuts(self) -> set[int]:
        """Return the columns at which comparisons of the column with a number change."""
        cuts = set()
        for value in self.order:
            if value.kind == "less":
                left, right = value.payload
                difference = sympy.expand(right - left)
                linear = difference.free_symbols == {COLUMN} and not difference.has(Quotient)
                if linear and abs(difference.coeff(COLUMN)) == 1:
                    cuts.add(int(difference.as_coeff_Add()[0] * -difference.coeff(COLUMN)))
                    # `right - left > 0` changes between two columns.
                    if difference.coeff(COLUMN) == 1:
                        cuts = (cuts - {int(-difference.as_coeff_Add()[0])}) | {int(-difference.as_coeff_Add()[0]) + 1}
        return cuts

    def _in_rows(self, expression: Index) -> Index:
        """Return an expression with the row's number in place of index variables, as far as they stand for it together."""
        if self.tiling.mode == "flat":
            position = self.flat_index
            if not expression.free_symbols.isdisjoint({COLUMN, *self.rows_at}):
                expression = sympy.expand(expression - position + COLUMN)
            return expression
        if not self.outer or expression.free_symbols.isdisjoint(self.rows_at):
            return expression
        last = self.outer[-1][0]
        others = sum((s * n for s, n in self.rows_at.items() if s != last), sympy.Integer(0))
        return sympy.expand(expression.xreplace({last: ROW - others}))

    # -- writing

    def write(self) -> LoopKernel:
        """Write the kernel."""
        tiling = self.tiling
        rows = product([n for _, n in self.outer])
        offsets = [self._in_rows(o) for o in self._offsets()]
        constants: dict[str, int] = {}
        if tiling.mode == "flat":
            total = sympy.expand(rows * self.columns)
            self._size("n_elements", total)
            constants["BLOCK"] = tiling.block
            self._line("col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)")
            self._line("inside = col < n_elements")
            self.segment = Segment(0, tiling.block, 0)
            self._write_stores(varying=True)
            grid = _ceil_div(total, tiling.block)
        else:
            self._size("n_rows", rows)
            constants["ROWS"] = tiling.rows
            if tiling.mode == "loop":
                self._size("n_columns", sympy.sympify(self.columns))
                constants["BLOCK"] = tiling.block
            if tiling.mode == "tiles":
                self._line("row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]")
                self._line("# Rows past the end repeat the last one.")
                self._line("row = tl.minimum(row, n_rows - 1)")
            elif tiling.rows > 1:
                self._line("first = tl.program_id(0).to(tl.int64) * ROWS")
                self._line("for row in range(first, tl.minimum(first + ROWS, n_rows)):")
                self.depth += 1
            else:
                self._line("row = tl.program_id(0).to(tl.int64)")
            self._decode(offsets)
            self._write_rows()
            grid = _ceil_div(rows, tiling.rows)
        return self._finish(constants, grid)

    def _decode(self, offsets: Sequence[Index]) -> None:
        needed = set().union(*(o.free_symbols for o in offsets)) if offsets else set()
        for symbol, size in self.outer[:-1]:
            if symbol not in needed:
                continue
            stride = self.rows_at[symbol]
            quotient = f"row // {self._factor(stride)}" if stride != 1 else "row"
            outermost = symbol == self.outer[0][0]
            self._line(f"{symbol} = {quotient}" if outermost else f"{symbol} = {quotient} % {self._factor(size)}")

    def _write_rows(self) -> None:
        if self.tiling.mode == "loop":
            varying = [s for s in self.stores if s.varies]
            for value in self.order:
                if not value.varies and value.kind == "reduce":
                    self._text(value)
            self._write_stores(varying=False)
            if varying:
                self._hoist([s.value for s in varying])
                with self._columns_loop():
                    self._write_stores(varying=True)
            return
        for segment in self.tiling.segments:
            with self._in_segment(segment):
                self._write_stores(varying=True)
        self._write_stores(varying=False)

    def _write_stores(self, *, varying: bool) -> None:
        for store in self.stores:
            if store.varies != varying:
                continue
            value, offset = self._text(store.value), self._index(store.offset)
            pointer = self._pointer(store.buffer)
            if varying and not store.value.varies:
                value = self._spread(store.value, value)
            cast = "" if store.value.dtype is store.dtype else f".to({dtype_text(store.dtype)})"
            written = f"({value}){cast}" if cast and not value.isidentifier() else f"{value}{cast}"
            mask = f", mask={self._inside(self.segment)}" if varying and self.segment and self.segment.masked else ""
            self._line(f"tl.store({pointer} + {offset}, {written}{mask})")

    def _shape(self) -> str:
        size = "BLOCK" if self.tiling.mode in ("flat", "loop") else str(self.segment.size if self.segment else 1)
        return f"ROWS, {size}" if self.tiling.mode == "tiles" else size

    @contextmanager
    def _in_segment(self, segment: Segment) -> Iterator[None]:
        before, self.segment = self.segment, segment
        self._line_once(("column", segment), self._column_lines(segment))
        yield
        self.segment = before

    def _column_lines(self, segment: Segment) -> list[str]:
        name = self._column_name(segment)
        start = f"{segment.start} + " if segment.start else ""
        lines = [f"{name} = {start}tl.arange(0, {segment.size})"]
        if self.tiling.mode == "tiles":
            lines = [f"{name} = ({start}tl.arange(0, {segment.size}))[None, :]"]
        if segment.masked:
            lines.append(f"{self._inside(segment)} = {name} < {segment.stop}")
        return lines

    def _inside(self, segment: Segment) -> str:
        """Return the name of the mask of the columns that count."""
        masked = [s for s in self.tiling.segments if s.masked]
        return f"inside{masked.index(segment)}" if len(masked) > 1 else "inside"

    def _column_name(self, segment: Segment) -> str:
        return "col" if len(self.tiling.segments) == 1 else f"col{self.tiling.segments.index(segment)}"

    @contextmanager
    def _columns_loop(self) -> Iterator[None]:
        self._line("for start in range(0, n_columns, BLOCK):")
        self.depth += 1
        self.names.append({})
        self._line("col = start + tl.arange(0, BLOCK)")
        self._line("inside = col < n_columns")
        before, self.segment = self.segment, Segment(0, self.tiling.block, 0)
        yield
        self.segment = before
        self.names.pop()
        self.depth -= 1

    def _hoist(self, roots: Sequence[Value]) -> None:
        """Write what does not differ from column to column before the loop over the columns."""
        for value in _ordered_values(roots):
            if not value.varies and value.kind not in ("constant",):
                self._text(value)

    # -- values

    def _key(self, value: Value) -> Any:
        return (value, self.segment) if value.varies else value

    def _text(self, value: Value) -> str:
        if value.kind == "op" and value.payload == "where":
            # Where a whole segment lies on one side of a condition, the other side is not computed.
            known = self._known(value.args[0])
            if known is not None:
                chosen: Value = value.args[1 if known else 2]
                return self._spread(chosen, self._text(chosen)) if value.varies and not chosen.varies else self._text(chosen)
        key = self._key(value)
        for names in reversed(self.names):
            if (written := names.get(key)) is not None:
                return written
        written, simple = self._expression(value)
        if simple or (self.uses.get(value, 0) <= 1 and len(written) <= LONGEST_INLINE and value.kind in ("op", "less")):
            return written if simple else f"({written})"
        name = self._fresh(_stem(value))
        self._line(f"{name} = {written}")
        self.names[-1 if value.varies else 0][key] = name
        return name

    def _expression(self, value: Value) -> tuple[str, bool]:
        """Return a value's text, and whether it is a single term."""
        if value.kind == "constant":
            return number_text(value.payload, value.dtype), True
        if value.kind == "index":
            written = self._index(value.payload)
            return written, written.isidentifier()
        if value.kind == "less":
            left, right = (self._index(side) for side in value.payload)
            return f"{left} < {right}", False
        if value.kind == "load":
            return self._load(value), False
        if value.kind == "reduce":
            return self._reduction(value), True
        if value.payload.startswith("cast:"):
            return self._cast(value), False
        if value.payload == "not":
            (x,) = value.args
            return (f"{self._text(x)} == 0" if x.dtype is torch.bool else f"~{self._text(x)}"), False
        return OPERATIONS[value.payload].format(*self._operands(value)), False

    def _operands(self, value: Value) -> list[str]:
        """Return the texts of an operation's operands; numbers take the dtype of what they stand beside, if anything does."""
        texts = [self._text(a) for a in value.args]
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
        operand = self._text(x)
        if x.kind == "constant":
            operand = self._typed(x, operand)
        result = f"{operand}.to({dtype_text(dtype)})"
        return result if dtype is value.dtype else f"{result}.to({dtype_text(value.dtype)})"

    def _load(self, value: Value) -> str:
        buffer, offset, dtype = value.payload
        conditions = [self._decided(c) for c in value.args]
        if any(c is False for c in conditions):
            return f"tl.zeros([{self._shape()}], {dtype_text(value.dtype)})"
        masks = [c for c in conditions if isinstance(c, str)]
        if value.varies and self.segment is not None and self.segment.masked:
            masks.append(self._inside(self.segment))
        pointer = f"{self._pointer(buffer)} + {self._index(offset)}"
        alone = value.varies and not self.values.depends(offset)
        if masks and alone:
            # A mask per column needs a pointer per column, and a mask per row one per row.
            pointer += f" + tl.zeros([{self._shape()}], tl.int32)"
        elif masks and self.tiling.mode == "tiles" and offset.free_symbols.isdisjoint({COLUMN, *self.rows_at}):
            pointer += " + tl.zeros([ROWS, 1], tl.int32)"
        mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
        cast = "" if dtype is value.dtype else f".to({dtype_text(value.dtype)})"
        written = f"tl.load({pointer}{mask}){cast}"
        return f"tl.broadcast_to({written}, [{self._shape()}])" if alone and not masks else written

    def _decided(self, condition: Value) -> bool | str:
        """Return whether a condition holds for the whole segment, or its text."""
        known = self._known(condition)
        return self._text(condition) if known is None else known

    def _known(self, condition: Value) -> bool | None:
        if condition.kind == "constant":
            return bool(condition.payload)
        if condition.kind == "op" and condition.payload == "not":
            known = self._known(condition.args[0])
            return None if known is None else not known
        if condition.kind != "less" or self.segment is None or self.tiling.mode in ("flat", "loop"):
            return None
        left, right = condition.payload
        difference = sympy.expand(right - left)
        if difference.free_symbols != {COLUMN} or difference.has(Quotient):
            return None
        segment = self.segment
        ends = [difference.subs(COLUMN, c) for c in (segment.start, segment.stop - 1)]
        if min(ends) > 0:
            return True
        return False if max(ends) <= 0 else None

    def _reduction(self, value: Value) -> str:
        kind, _ = value.payload
        (body,) = value.args
        name = self._fresh({"sum": "total", "max": "top", "max_nan": "top", "min": "least", "min_nan": "least"}.get(kind, kind))
        if self.tiling.mode == "loop":
            self._loop_reduction(name, kind, body)
        else:
            parts = [self._part(kind, body, segment) for segment in self.tiling.segments]
            result = parts[0]
            for part in parts[1:]:
                result = COMBINED[kind].format(result, part)
            self._line(f"{name} = {result}")
        self.names[0][value] = name
        return name

    def _part(self, kind: str, body: Value, segment: Segment) -> str:
        with self._in_segment(segment):
            written = self._text(body)
            if not body.varies:
                written = self._spread(body, written)
            if segment.masked:
                start = number_text(identity_of(kind, body.dtype), body.dtype)
                written = f"tl.where({self._inside(segment)}, {written}, {start})"
            return self._collapse(kind, written, body.dtype)

    def _collapse(self, kind: str, written: str, dtype: torch.dtype) -> str:
        axis = ", axis=1, keep_dims=True" if self.tiling.mode == "tiles" else ""
        if kind in ("max", "min", "sum"):
            return f"tl.{kind}({written}{axis})"
        if kind in ("any", "all"):
            function = "tl.max" if kind == "any" else "tl.min"
            return f"({function}(({written}).to(tl.int32){axis}) != 0)"
        function = "tl.max" if kind == "max_nan" else "tl.min"
        held = self._fresh("part")
        self._line(f"{held} = {written}")
        if not dtype.is_floating_point:
            return f"{function}({held}{axis})"
        unordered = f"tl.max(({held} != {held}).to(tl.int32){axis}) != 0"
        return f'tl.where({unordered}, float("nan"), {function}({held}{axis}))'

    def _loop_reduction(self, name: str, kind: str, body: Value) -> None:
        self._hoist([body])
        start = number_text(identity_of(kind, body.dtype), body.dtype)
        self._line(f"{name}_block = tl.full([BLOCK], {start}, {dtype_text(body.dtype)})")
        with self._columns_loop():
            written = f"tl.where(inside, {self._text(body)}, {start})"
            self._line(f"{name}_block = {COMBINED[kind].format(f'{name}_block', written)}")
        self._line(f"{name} = {self._collapse(kind, f'{name}_block', body.dtype)}")

    # -- small things

    def _spread(self, value: Value, written: str) -> str:
        """Return the text of a value that is the same in every column, once per column."""
        if value.kind == "constant":
            return f"tl.full([{self._shape()}], {written}, {dtype_text(value.dtype)})"
        return f"tl.broadcast_to({written}, [{self._shape()}])"

    def _index(self, expression: Index) -> str:
        expression = self._in_rows(expression)
        replaced = {}
        for symbol in expression.free_symbols:
            if symbol == COLUMN and self.tiling.mode in ("rows", "tiles") and self.segment is not None:
                replaced[symbol] = sympy.Symbol(self._column_name(self.segment), integer=True)
        for symbol in expression.free_symbols - {COLUMN, ROW, *self.rows_at}:
            self._size(str(symbol), symbol)
        written = text(expression.xreplace(replaced))
        return written if written.isidentifier() or written.isdigit() else f"({written})"

    def _factor(self, size: Any) -> str:
        for symbol in sympy.sympify(size).free_symbols:
            self._size(str(symbol), symbol)
        written = text(size)
        return written if written.isidentifier() or written.isdigit() else f"({written})"

    def _size(self, name: str, size: Any) -> None:
        self.sizes[name] = size

    def _pointer(self, buffer: str) -> str:
        if buffer not in self.buffers:
            self.buffers.append(buffer)
        return f"p{self.buffers.index(buffer)}"

    def _fresh(self, stem: str) -> str:
        count = self.counts.get(stem, 0)
        self.counts[stem] = count + 1
        return f"{stem}{count}" if count or stem in _TAKEN else stem

    def _line(self, line: str) -> None:
        self.lines.append("    " * self.depth + line)

    def _line_once(self, key: Any, lines: Sequence[str]) -> None:
        if not any(key in names for names in self.names):
            for line in lines:
                self._line(line)
            self.names[0][key] = ""

    def _finish(self, constants: dict[str, int], grid: Any) -> LoopKernel:
        writes = tuple(dict.fromkeys(s.buffer for s in self.stores))
        reads = tuple(dict.fromkeys(v.payload[0] for v in self.order if v.kind == "load" and v.payload[0] in self.buffers))
        pointers = [f"p{k}" for k in range(len(self.buffers))]
        parameters = [*pointers, *self.sizes, *(f"{name}: tl.constexpr" for name in constants)]
        lines = [
            f"@triton.jit(do_not_specialize=[{', '.join(repr(name) for name in self.sizes)}])",
            f"def {{name}}({', '.join(parameters)}):",
            *self.lines,
        ]
        return LoopKernel("\n".join(lines) + "\n", tuple(self.buffers), self.sizes, constants, grid, reads, writes)


_TAKEN = {"row", "col", "first", "start", "inside"}


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


def _ordered(stores: Sequence[Store]) -> list[Value]:
    return _ordered_values([store.value for store in stores])


def _ordered_values(roots: Sequence[Value]) -> list[Value]:
    """Return all values that `roots` are computed from, operands first."""
    seen: dict[Value, None] = {}
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        value, ready = stack.pop()
        if value in seen:
            continue
        if ready:
            seen[value] = None
            continue
        stack.append((value, True))
        stack.extend((a, False) for a in reversed(value.args) if a not in seen)
    return list(seen)


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
