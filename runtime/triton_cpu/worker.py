"""The launch of a kernel in LLVM IR: what runs the programs of a grid on threads.

The text made here follows a generated kernel's `@program` and defines the exported entry point `void entry(ptr context,
i32 threads)`. The context lives on the caller's stack, so launches from several threads do not meet.
"""

from __future__ import annotations

import re
import struct
import sys

from . import faults
from .emit import LLVM_TYPES
from .generated import Generated

CONTEXT_HEADER = struct.Struct("<qqqiiiiq")
"""Of a launch context: next program, programs, chunk, grid x, y, z, padding, fault record; 8 bytes per argument follow."""

PARALLEL = "graphwright_parallel"
"""Symbol that loaded kernels call to start threads; see `jit`."""

STACK_SCRATCH_BYTES = 256 << 10
"""Largest scratch buffer that is put on a thread's stack."""

SERIAL_WORK_NS = 8000
"""Launches whose programs take less than this in all run on the calling thread: waking the others costs about as much."""

CHUNKS_PER_THREAD = 64
"""Programs are handed out in this many portions per thread, which bounds both contention and the wait for the last one."""

CLOCK_MONOTONIC = 6 if sys.platform == "darwin" else 1

# Optimizing these few instructions would take longer than compiling a small kernel, and they run once per program.
_QUICK = "noinline optnone nounwind"
_STORAGE = {"i1": "i8"}
_PROVIDED = re.compile(r"^declare [^\n]*@(?:report_fault|in_bounds)\([^\n]*\n", re.MULTILINE)


def complete_module(generated: Generated, entry: str, *, triple: str, layout: str, vector_bits: int) -> str:
    """Return the module text of a kernel with its launch.

    Args:
        generated: the kernel.
        entry: name of the exported entry point.
        triple: LLVM target triple.
        layout: LLVM data layout.
        vector_bits: preferred width of vector registers.
    """
    body = _PROVIDED.sub("", generated.llvm_ir)
    parts = [f'target datalayout = "{layout}"\ntarget triple = "{triple}"\n', body]
    parts += [_worker(generated), _entry(generated, entry), faults.REPORT_FAULT]
    if "@in_bounds(" in body:
        parts.append(faults.IN_BOUNDS)
    declarations = {
        PARALLEL: f"declare void @{PARALLEL}(ptr, ptr, i32, i32)",
        "clock_gettime": "declare i32 @clock_gettime(i32, ptr)",
        "aligned_alloc": "declare ptr @aligned_alloc(i64, i64)",
        "free": "declare void @free(ptr)",
        "fflush": "declare i32 @fflush(ptr)",
    }
    parts += [
        text for symbol, text in declarations.items() if not re.search(rf"^(?:declare|define) [^\n]*@{symbol}\(", body, re.M)
    ]
    width = f'"prefer-vector-width"="{vector_bits}" "min-legal-vector-width"="{vector_bits}"'
    parts.append(f'attributes #0 = {{ nounwind {width} "no-trapping-math"="true" }}')
    return "\n".join(parts) + "\n"


def _worker(generated: Generated) -> str:
    """Text of the function that each thread runs: take a portion of the grid, run its programs, until nothing is left."""
    lines, passed = [], []
    for k, element in enumerate(generated.arguments):
        kind, stored = LLVM_TYPES[element], _STORAGE.get(element, LLVM_TYPES[element])
        lines.append(f"  %a{k}.at = getelementptr i8, ptr %context, i64 {CONTEXT_HEADER.size + 8 * k}")
        if stored == kind:
            lines.append(f"  %a{k} = load {kind}, ptr %a{k}.at")
        else:
            lines += [f"  %a{k}.stored = load {stored}, ptr %a{k}.at", f"  %a{k} = trunc {stored} %a{k}.stored to {kind}"]
        passed.append(f", {kind} %a{k}")
    size = -(-generated.scratch_bytes // 64) * 64
    on_heap = size > STACK_SCRATCH_BYTES
    allocate = f"  %scratch = alloca [{max(size, 64)} x i8], align 64\n  br label %grab"
    release = ""
    if on_heap:
        allocate = f"""\
  %scratch = call ptr @aligned_alloc(i64 64, i64 {size})
  %missing = icmp eq ptr %scratch, null
  br i1 %missing, label %no.memory, label %grab
no.memory:
  call void @report_fault(ptr %fault, i32 {faults.OUT_OF_MEMORY}, i32 0, i32 0, i32 0, i64 {size})
  ret void"""
        release = "  call void @free(ptr %scratch)\n"
    arguments = "\n".join(lines)
    return f"""\
@cost = internal global i64 -1

define internal i64 @now() {_QUICK} {{
  %time = alloca {{ i64, i64 }}
  %status = call i32 @clock_gettime(i32 {CLOCK_MONOTONIC}, ptr %time)
  %seconds = load i64, ptr %time
  %rest.at = getelementptr i8, ptr %time, i64 8
  %rest = load i64, ptr %rest.at
  %whole = mul i64 %seconds, 1000000000
  %sum = add i64 %whole, %rest
  ret i64 %sum
}}

define internal void @worker(ptr %context) #0 {_QUICK} {{
entry:
  %total.at = getelementptr i8, ptr %context, i64 8
  %total = load i64, ptr %total.at
  %chunk.at = getelementptr i8, ptr %context, i64 16
  %chunk = load i64, ptr %chunk.at
  %np0.at = getelementptr i8, ptr %context, i64 24
  %np0 = load i32, ptr %np0.at
  %np1.at = getelementptr i8, ptr %context, i64 28
  %np1 = load i32, ptr %np1.at
  %np2.at = getelementptr i8, ptr %context, i64 32
  %np2 = load i32, ptr %np2.at
  %fault.at = getelementptr i8, ptr %context, i64 40
  %fault = load ptr, ptr %fault.at
{arguments}
  %x = zext i32 %np0 to i64
  %y = zext i32 %np1 to i64
  %timed = icmp sgt i64 %total, 1
  br i1 %timed, label %clock, label %begin
clock:
  %began = call i64 @now()
  br label %begin
begin:
  %start = phi i64 [ 0, %entry ], [ %began, %clock ]
{allocate}
grab:
  %before = phi i64 [ 0, %begin ], [ %ran, %run ]
  %first = atomicrmw add ptr %context, i64 %chunk monotonic
  %more = icmp slt i64 %first, %total
  br i1 %more, label %portion, label %leave
portion:
  %end = add i64 %first, %chunk
  %within = icmp slt i64 %end, %total
  %stop = select i1 %within, i64 %end, i64 %total
  br label %check
check:
  %id = phi i64 [ %first, %portion ], [ %next, %run ]
  %count = phi i64 [ %before, %portion ], [ %ran, %run ]
  %state = load atomic i32, ptr %fault monotonic, align 4
  %sound = icmp eq i32 %state, 0
  br i1 %sound, label %run, label %quit
run:
  %id0 = urem i64 %id, %x
  %row = udiv i64 %id, %x
  %id1 = urem i64 %row, %y
  %id2 = udiv i64 %row, %y
  %pid0 = trunc i64 %id0 to i32
  %pid1 = trunc i64 %id1 to i32
  %pid2 = trunc i64 %id2 to i32
  call void @program(ptr %scratch, ptr %fault, i32 %pid0, i32 %pid1, i32 %pid2, i32 %np0, i32 %np1, i32 %np2{"".join(passed)})
  %ran = add i64 %count, 1
  %next = add i64 %id, 1
  %again = icmp slt i64 %next, %stop
  br i1 %again, label %check, label %grab
leave:
  %useful = icmp sgt i64 %before, 0
  %measured = and i1 %useful, %timed
  br i1 %measured, label %measure, label %quit
measure:
  %ended = call i64 @now()
  %spent = sub i64 %ended, %start
  %each = udiv i64 %spent, %before
  store atomic i64 %each, ptr @cost monotonic, align 8
  br label %quit
quit:
{release}  ret void
}}
"""


def _entry(generated: Generated, entry: str) -> str:
    """Text of the entry point: decide between the calling thread and the pool."""
    prints = any(site.kind == "print" for site in generated.sites)
    flush = "  %flushed = call i32 @fflush(ptr null)\n" if prints else ""
    return f"""\
define void @{entry}(ptr %context, i32 %threads) {_QUICK} {{
entry:
  %total.at = getelementptr i8, ptr %context, i64 8
  %total = load i64, ptr %total.at
  %chunk.at = getelementptr i8, ptr %context, i64 16
  %one = icmp sle i64 %total, 1
  %alone = icmp sle i32 %threads, 1
  %serial = or i1 %one, %alone
  br i1 %serial, label %here, label %weigh
weigh:
  %cost = load atomic i64, ptr @cost monotonic, align 8
  %limit = udiv i64 {SERIAL_WORK_NS}, %total
  %small = icmp ule i64 %cost, %limit
  br i1 %small, label %here, label %parallel
here:
  store i64 %total, ptr %chunk.at
  call void @worker(ptr %context)
  br label %done
parallel:
  %wanted = sext i32 %threads to i64
  %fewer = icmp slt i64 %total, %wanted
  %count = select i1 %fewer, i64 %total, i64 %wanted
  %portions = mul i64 %count, {CHUNKS_PER_THREAD}
  %share = udiv i64 %total, %portions
  %none = icmp eq i64 %share, 0
  %chunk = select i1 %none, i64 1, i64 %share
  store i64 %chunk, ptr %chunk.at
  %team = trunc i64 %count to i32
  call void @{PARALLEL}(ptr @worker, ptr %context, i32 %team, i32 0)
  br label %done
done:
{flush}  ret void
}}
"""
