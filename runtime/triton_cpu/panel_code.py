"""Matrix products by a weight that lies in panels, in LLVM IR.

The weight [N, K] is cut into *panels* of a few vectors of columns, each [K, width] and contiguous, so that all of it is read in
the order in which it lies. The last panel is filled up with columns of any value.

    for each slab of K:                                 all of it, if there are few rows
        for each sweep of rows, for each panel:         a task: threads take them one by one
            for each chunk of the slab:                 stays in the caches
                for each block of rows:                 accumulators stay in registers
                    sums = x[rows, chunk] @ panel[chunk]
                    out = sums, or out + sums

The part of x that belongs to a slab and a sweep stays in the second-level cache while all panels pass.

A forward pass sweeps through all its weights before it comes back to one, so that each comes from memory. With few rows,
reading it takes as long as multiplying by it, and what counts is that both happen at once: while a chunk is multiplied, the
one after it is fetched into the second-level cache, a few lines in each iteration over K, evenly spread over the blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from . import jit
from .emit import Emitter, Text, mangle, vector_type
from .isa import Isa
from .worker import PARALLEL

ENTRY = "panel_product"
"""Exported: `void panel_product(const float *x, float *out, const float *panels, const Plan *plan)`."""

THREADS = "graphwright_threads"
"""Symbol that the code calls to learn how many threads to use: `int threads(void)`."""

PLAN = struct.Struct("<12q")
"""What the code must know of a product, in the order of `PLAN_FIELDS`."""

PLAN_FIELDS = ("k", "n", "panels", "chunk", "m", "x.row", "out.row", "accumulate", "slab", "sweep", "tasks", "parallel")
"""Sizes K and N; number of panels; K of a chunk; size M; bytes from row to row of x and of the result; 1 to add to the result;
K of a slab; rows of a sweep; panels times sweeps; 1 to use several threads."""

LINE_BYTES = 64
UNROLL = 4

# On the caller's stack, so that overlapping calls do not meet: the next task, x, out, panels, plan, where the slab starts.
_CONTEXT_FIELDS = ("next", "x", "out", "weight", "plan", "k.start")
_FIELD_TYPES = dict.fromkeys(("x", "out", "weight", "plan"), "ptr")

_SECOND_LEVEL = 2
_FIRST_LEVEL = 3


@dataclass(frozen=True, slots=True)
class Block:
    """A block of accumulators, which stay in registers while K runs.

    Args:
        rows: most rows of a block.
        vectors: vectors of a row.
        lanes: floats of a vector.
    """

    rows: int
    vectors: int
    lanes: int

    @property
    def width(self) -> int:
        """Columns of a block and of a panel."""
        return self.vectors * self.lanes


def module_text(isa: Isa, block: Block) -> str:
    """Return the module that multiplies by panels of `block.width` columns; it defines `ENTRY`.

    Args:
        isa: an instruction set with FMA.
        block: the accumulators; all, a row of the panel and an element of x need a register each.
    """
    triple, layout = jit.target_description(isa)
    bodies, declarations = [], {}
    for rows in range(1, block.rows + 1):
        e = Emitter()
        _emit_block(e, block, rows)
        declarations.update(e.declarations)
        body = "\n".join(e.lines)
        bodies.append(f"define internal void @rows{rows}({_BLOCK_PARAMETERS}) #0 {{\nentry:\n{body}\n  ret void\n}}\n")
    width = f'"prefer-vector-width"="{isa.vector_bits}" "min-legal-vector-width"="{isa.vector_bits}"'
    return "\n".join(
        [
            f'target datalayout = "{layout}"\ntarget triple = "{triple}"',
            *declarations.values(),
            *bodies,
            _worker(block),
            _ENTRY_TEXT,
            f'attributes #0 = {{ noinline nounwind {width} "no-trapping-math"="true" }}\n',
        ]
    )


_BLOCK_PARAMETERS = (
    "ptr %x, ptr %panel, ptr %out, i64 %depth, i64 %lines, ptr %ahead, i64 %x.row, i64 %out.row, i64 %add, i32 %columns"
)
_BLOCK_ARGUMENTS = (
    "ptr %x.at, ptr %chunk.at, ptr %out.at, i64 %depth, i64 %lines, ptr %ahead.at, i64 %x.row, i64 %out.row, i64 %add, "
    "i32 %columns"
)


def _emit_block(e: Emitter, block: Block, rows: int) -> None:
    """Emit out[rows, columns] = or += x[rows, depth] panel[depth, width]; fetch `lines` lines in each iteration."""
    kind, lanes = vector_type("float", block.lanes), block.lanes
    positions = ", ".join(f"i32 {lane}" for lane in range(lanes))
    left = [e.splat(e.op(f"sub i32 %columns, {v * lanes}"), "i32", lanes) for v in range(block.vectors)]
    inside = [e.op(f"icmp slt <{lanes} x i32> <{positions}>, {count}") for count in left]
    out_rows = [e.address("i8", "%out", e.combine((r, "%out.row"))) for r in range(rows)]
    places = [(e.address(kind, row, v), inside[v]) for row in out_rows for v in range(block.vectors)]
    # The stores at the end would otherwise wait for the lines that they write to.
    for place, _ in places:
        _prefetch(e, place, _FIRST_LEVEL, write=True)
    x_rows = [e.address("i8", "%x", e.combine((r, "%x.row"))) for r in range(rows)]

    def step(sums: list[Text], k: Text, u: int, panel: Text) -> list[Text]:
        at = [e.address(kind, panel, u * block.vectors + v) for v in range(block.vectors)]
        vectors = [e.op(f"load {kind}, ptr {address}, align 4") for address in at]
        result = []
        for r, row in enumerate(x_rows):
            element = e.op(f"load float, ptr {e.address('float', row, e.combine((k, 1), (u, 1)))}, align 4")
            splat = e.splat(element, "float", lanes)
            for v, vector in enumerate(vectors):
                operands = [(kind, splat), (kind, vector), (kind, sums[r * block.vectors + v])]
                result.append(e.call(kind, f"llvm.fma.{mangle('float', lanes)}", operands))
        return result

    whole = e.op(f"and i64 %depth, {-UNROLL}")
    carried = [*((kind, "zeroinitializer") for _ in places), ("ptr", "%panel"), ("ptr", "%ahead")]
    with e.loop(0, whole, UNROLL, carried=carried) as loop:
        *sums, panel, ahead = loop.phis
        with e.loop(0, "%lines", 1, carried=[("ptr", ahead)]) as fetch:
            _prefetch(e, fetch.phis[0], _SECOND_LEVEL)
            fetch.next = [e.address("i8", fetch.phis[0], LINE_BYTES)]
        for u in range(UNROLL):
            sums = step(sums, loop.index, u, panel)
        loop.next = [*sums, e.address(kind, panel, UNROLL * block.vectors), fetch.results[0]]
    *sums, panel, _ = loop.results
    with e.loop(whole, "%depth", 1, carried=[*((kind, total) for total in sums), ("ptr", panel)]) as rest:
        *sums, panel = rest.phis
        rest.next = [*step(sums, rest.index, 0, panel), e.address(kind, panel, block.vectors)]
    _emit_stores(e, kind, lanes, rest.results[:-1], places)


def _emit_stores(e: Emitter, kind: str, lanes: int, sums: list[Text], places: list[tuple[Text, Text]]) -> None:
    """Emit the stores of sums, each (address, mask of lanes), or of what is there plus the sums."""
    mask_kind, suffix = vector_type("i1", lanes), f"{mangle('float', lanes)}.p0"
    before, add, ready = e.current, e.fresh_label(), e.fresh_label()
    e.branch(e.op("icmp eq i64 %add, 0"), ready, add)
    e.label(add)
    totals = []
    for value, (place, mask) in zip(sums, places, strict=True):
        operands = [("ptr", place), ("i32", "4"), (mask_kind, mask), (kind, "zeroinitializer")]
        totals.append(e.op(f"fadd {kind} {value}, {e.call(kind, f'llvm.masked.load.{suffix}', operands)}"))
    e.jump(ready)
    e.label(ready)
    pairs = zip(sums, totals, strict=True)
    values = [e.op(f"phi {kind} [ {value}, %{before} ], [ {total}, %{add} ]") for value, total in pairs]
    for value, (place, mask) in zip(values, places, strict=True):
        operands = [(kind, value), ("ptr", place), ("i32", "4"), (mask_kind, mask)]
        e.call("void", f"llvm.masked.store.{suffix}", operands)


def _prefetch(e: Emitter, address: Text, level: int, *, write: bool = False) -> None:
    e.call("void", "llvm.prefetch.p0", [("ptr", address), ("i32", str(int(write))), ("i32", str(level)), ("i32", "1")])


def _fields(struct: str, names: Sequence[str], *, load: bool = True) -> str:
    """Text that reads 64-bit fields: %name, and its address %name.struct."""
    lines = []
    for i, name in enumerate(names):
        lines.append(f"  %{name}.{struct} = getelementptr i64, ptr %{struct}, i64 {i}")
        lines += [f"  %{name} = load {_FIELD_TYPES.get(name, 'i64')}, ptr %{name}.{struct}"] if load else []
    return "\n".join(lines)


def _worker(block: Block) -> str:
    """Text of the function that each thread runs: take a task, until none is left.

    A thread takes its next task before it starts on one, to know what to fetch. The rows of a sweep are shared evenly among
    its blocks, because a block of few rows is slow.
    """
    counts = range(1, block.rows + 1)
    cases = "\n".join(f"    i64 {rows}, label %rows{rows}" for rows in counts)
    calls = "\n".join(f"rows{rows}:\n  call void @rows{rows}({_BLOCK_ARGUMENTS})\n  br label %block.done" for rows in counts)
    row_bytes = 4 * block.width
    row_lines = row_bytes // LINE_BYTES
    return f"""\
declare i64 @llvm.umin.i64(i64, i64)

define internal void @worker(ptr %context) {{
entry:
{_fields("context", _CONTEXT_FIELDS)}
{_fields("plan", PLAN_FIELDS)}
  %k.rest = sub i64 %k, %k.start
  %k.slab = call i64 @llvm.umin.i64(i64 %k.rest, i64 %slab)
  %k.end = add i64 %k.start, %k.slab
  %later = icmp ne i64 %k.start, 0
  %add.first = select i1 %later, i64 1, i64 %accumulate
  %start.offset = mul i64 %k.start, {row_bytes}
  %panel.bytes = mul i64 %k, {row_bytes}
  %first = atomicrmw add ptr %context, i64 1 monotonic
  br label %task.head
task.head:
  %task = phi i64 [ %first, %entry ], [ %following, %chunk.done ]
  %more = icmp slt i64 %task, %tasks
  br i1 %more, label %task.body, label %leave
task.body:
  %following = atomicrmw add ptr %context, i64 1 monotonic
  %sweep.number = udiv i64 %task, %panels
  %sweep.start = mul i64 %sweep.number, %sweep
  %sweep.left = sub i64 %m, %sweep.start
  %sweep.rows = call i64 @llvm.umin.i64(i64 %sweep.left, i64 %sweep)
  %sweep.up = add i64 %sweep.rows, {block.rows - 1}
  %blocks = udiv i64 %sweep.up, {block.rows}
  %fewest.rows = udiv i64 %sweep.rows, %blocks
  %longer.blocks = urem i64 %sweep.rows, %blocks
  %panel = urem i64 %task, %panels
  %panel.offset = mul i64 %panel, %panel.bytes
  %panel.at = getelementptr i8, ptr %weight, i64 %panel.offset
  %next.panel = urem i64 %following, %panels
  %next.panel.start = mul i64 %next.panel, %panel.bytes
  %next.panel.offset = add i64 %next.panel.start, %start.offset
  %next.panel.at = getelementptr i8, ptr %weight, i64 %next.panel.offset
  %last.task = icmp sge i64 %following, %tasks
  %column = mul i64 %panel, {block.width}
  %columns.left = sub i64 %n, %column
  %columns.some = call i64 @llvm.umin.i64(i64 %columns.left, i64 {block.width})
  %columns = trunc i64 %columns.some to i32
  %x.offset = mul i64 %sweep.start, %x.row
  %x.sweep = getelementptr i8, ptr %x, i64 %x.offset
  %out.offset = mul i64 %sweep.start, %out.row
  %out.sweep = getelementptr i8, ptr %out, i64 %out.offset
  %out.first = getelementptr float, ptr %out.sweep, i64 %column
  br label %chunk.body
chunk.body:
  %k.at = phi i64 [ %k.start, %task.body ], [ %k.next, %chunk.done ]
  %add = phi i64 [ %add.first, %task.body ], [ 1, %chunk.done ]
  %k.left = sub i64 %k.end, %k.at
  %depth = call i64 @llvm.umin.i64(i64 %k.left, i64 %chunk)
  %k.next = add i64 %k.at, %depth
  %chunk.offset = mul i64 %k.at, {row_bytes}
  %chunk.at = getelementptr i8, ptr %panel.at, i64 %chunk.offset
  %next.chunk.offset = mul i64 %k.next, {row_bytes}
  %next.chunk.at = getelementptr i8, ptr %panel.at, i64 %next.chunk.offset
  %last.chunk = icmp eq i64 %k.next, %k.end
  %ahead = select i1 %last.chunk, ptr %next.panel.at, ptr %next.chunk.at
  %nothing.ahead = and i1 %last.chunk, %last.task
  %iterations = udiv i64 %depth, {UNROLL}
  %lines.up = add i64 %blocks, {UNROLL * row_lines - 1}
  %lines.iteration = udiv i64 %lines.up, %blocks
  %lines.block = mul i64 %lines.iteration, %iterations
  %lines.chunk = mul i64 %depth, {row_lines}
  %x.first = getelementptr float, ptr %x.sweep, i64 %k.at
  br label %block.body
block.body:
  %block = phi i64 [ 0, %chunk.body ], [ %block.next, %block.done ]
  %x.at = phi ptr [ %x.first, %chunk.body ], [ %x.next, %block.done ]
  %out.at = phi ptr [ %out.first, %chunk.body ], [ %out.next, %block.done ]
  %fetched = mul i64 %block, %lines.block
  %fetched.all = icmp uge i64 %fetched, %lines.chunk
  %no.lines = or i1 %fetched.all, %nothing.ahead
  %lines = select i1 %no.lines, i64 0, i64 %lines.iteration
  %ahead.offset = mul i64 %fetched, {LINE_BYTES}
  %ahead.at = getelementptr i8, ptr %ahead, i64 %ahead.offset
  %is.longer = icmp ult i64 %block, %longer.blocks
  %extra = zext i1 %is.longer to i64
  %rows = add i64 %fewest.rows, %extra
  switch i64 %rows, label %block.done [
{cases}
  ]
{calls}
block.done:
  %x.step = mul i64 %rows, %x.row
  %x.next = getelementptr i8, ptr %x.at, i64 %x.step
  %out.step = mul i64 %rows, %out.row
  %out.next = getelementptr i8, ptr %out.at, i64 %out.step
  %block.next = add i64 %block, 1
  %block.more = icmp ult i64 %block.next, %blocks
  br i1 %block.more, label %block.body, label %chunk.done
chunk.done:
  br i1 %last.chunk, label %task.head, label %chunk.body
leave:
  ret void
}}
"""


_ENTRY_TEXT = f"""\
declare void @{PARALLEL}(ptr, ptr, i32, i32)
declare i32 @{THREADS}()

define void @{ENTRY}(ptr %x, ptr %out, ptr %weight, ptr %plan) {{
entry:
  %context = alloca [{len(_CONTEXT_FIELDS)} x i64], align 64
{_fields("context", _CONTEXT_FIELDS, load=False)}
{_fields("plan", PLAN_FIELDS)}
  store ptr %x, ptr %x.context
  store ptr %out, ptr %out.context
  store ptr %weight, ptr %weight.context
  store ptr %plan, ptr %plan.context
  %wanted = icmp ne i64 %parallel, 0
  br i1 %wanted, label %ask, label %begin
ask:
  %available = call i32 @{THREADS}()
  br label %begin
begin:
  %threads = phi i32 [ 1, %entry ], [ %available, %ask ]
  %alone = icmp sle i32 %threads, 1
  br label %slab.body
slab.body:
  %k.start = phi i64 [ 0, %begin ], [ %k.end, %slab.done ]
  store i64 0, ptr %next.context
  store i64 %k.start, ptr %k.start.context
  br i1 %alone, label %here, label %team
here:
  call void @worker(ptr %context)
  br label %slab.done
team:
  call void @{PARALLEL}(ptr @worker, ptr %context, i32 %threads, i32 0)
  br label %slab.done
slab.done:
  %k.end = add i64 %k.start, %slab
  %more = icmp slt i64 %k.end, %k
  br i1 %more, label %slab.body, label %done
done:
  ret void
}}
"""
