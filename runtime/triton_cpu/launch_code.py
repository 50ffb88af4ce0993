"""The functions that Python calls to launch a kernel, in LLVM IR against Python's C API.

One module serves all kernels: how the arguments are read is told by a descriptor. It is compiled once per process. Only the
common cases are handled here (torch tensors on the CPU, Python numbers); everything else, errors included, is handed to a
Python function that returns the argument's 64 bits or raises.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable, Sequence

from . import jit
from .isa import host_isa
from .threads import thread_pool
from .worker import CONTEXT_HEADER

KINDS = {
    "skip": 0, "ptr": 1, "i1": 2, "i8": 3, "i16": 4, "i32": 5, "i64": 6, "f32": 7, "f64": 8, "f16": 9, "bf16": 9,
}  # fmt: skip
"""How an argument is read; 9 leaves it to Python."""

ALIGNED = 16
"""Added to a kind: the low 4 bits of the value must be 0."""

UPSTREAM_POSITIONS = 9
"""Arguments of Triton's launch call before those of the kernel."""

UPSTREAM_DESCRIPTOR = struct.Struct("<qq")
"""Positions, arguments; the kind of each position follows, a byte each."""

PREPARED_DESCRIPTOR = struct.Struct("<qqqqqiii4x")
"""Entry address, positions, arguments that are not skipped, arguments and tensors that a call may replace, grid x, y, z; the
kind of each position follows, a byte each."""

CHAIN_DESCRIPTOR = struct.Struct("<qq")
"""Address of the links, number of links."""

CHAIN_LINK = struct.Struct("<qqqq")
"""Address of the function, of its context, number of programs, address of the fault record."""

BAD_COUNT, BAD_GRID, FAULT = -1, -2, -3
"""Passed to the Python function in place of a position: a wrong number of arguments, a grid out of range, a kernel fault."""

_HEADER = CONTEXT_HEADER.size
_COUNT = "torch_threads"
_COUNT_DECLARATION = f"declare i32 @{_COUNT}()\n"
_COUNT_ONE = f"define internal i32 @{_COUNT}() {{\n  ret i32 1\n}}\n"

SlowPath = Callable[[int, object], int]

# `self` of both functions is a tuple: descriptor as bytes, the Python function; for prepared launches
# also the expected dtypes and the arguments.
_TEXT = f"""
@_Py_NoneStruct = external global i8
@_Py_TrueStruct = external global i8
@PyLong_Type = external global i8
@forked = global i32 0
@data_ptr = global ptr null
@is_cpu = global ptr null
@dtype = global ptr null

declare i64 @PyLong_AsLongLong(ptr)
declare i64 @PyLong_AsUnsignedLongLong(ptr)
declare ptr @PyLong_FromLongLong(i64)
declare double @PyFloat_AsDouble(ptr)
declare ptr @PyErr_Occurred()
declare void @PyErr_Clear()
declare ptr @PyObject_Type(ptr)
declare ptr @PyObject_GetAttr(ptr, ptr)
declare ptr @PyObject_Vectorcall(ptr, ptr, i64, ptr)
declare ptr @PyObject_VectorcallMethod(ptr, ptr, i64, ptr)
declare ptr @PyTuple_GetItem(ptr, i64)
declare ptr @PyBytes_AsString(ptr)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare void @Py_IncRef(ptr)
declare void @Py_DecRef(ptr)
{_COUNT_DECLARATION}
define void @serial(ptr %worker, ptr %context, i32 %threads, i32 %flags) {{
  call void %worker(ptr %context)
  ret void
}}

define i32 @threads() {{
  %child = load i32, ptr @forked
  %orphan = icmp ne i32 %child, 0
  br i1 %orphan, label %alone, label %ask.torch
ask.torch:
  %count = call i32 @torch_threads()
  ret i32 %count
alone:
  ret i32 1
}}

; The bits of an argument from Python: slow(position, object) -> int. False when it raised.
define internal i1 @ask(ptr %self, i64 %position, ptr %object, ptr %slot) {{
  %args = alloca [2 x ptr]
  %number = call ptr @PyLong_FromLongLong(i64 %position)
  %no.number = icmp eq ptr %number, null
  br i1 %no.number, label %bad, label %ready
ready:
  store ptr %number, ptr %args
  %second = getelementptr ptr, ptr %args, i64 1
  store ptr %object, ptr %second
  %slow = call ptr @PyTuple_GetItem(ptr %self, i64 1)
  %result = call ptr @PyObject_Vectorcall(ptr %slow, ptr %args, i64 2, ptr null)
  call void @Py_DecRef(ptr %number)
  %raised = icmp eq ptr %result, null
  br i1 %raised, label %bad, label %read
read:
  %bits = call i64 @PyLong_AsUnsignedLongLong(ptr %result)
  call void @Py_DecRef(ptr %result)
  %suspect = icmp eq i64 %bits, -1
  br i1 %suspect, label %look, label %good
look:
  %error = call ptr @PyErr_Occurred()
  %fine = icmp eq ptr %error, null
  br i1 %fine, label %good, label %bad
good:
  store i64 %bits, ptr %slot
  ret i1 true
bad:
  ret i1 false
}}

; Tell Python of a failed launch; it raises.
define internal ptr @fail(ptr %self, i64 %what, i64 %detail) {{
  %unused = alloca i64
  %number = call ptr @PyLong_FromLongLong(i64 %detail)
  %none = icmp eq ptr %number, null
  br i1 %none, label %out, label %tell
tell:
  %told = call i1 @ask(ptr %self, i64 %what, ptr %number, ptr %unused)
  call void @Py_DecRef(ptr %number)
  br label %out
out:
  ret ptr null
}}

; Store the bits of `object` at `slot`. False when an error is set.
define internal i1 @convert(ptr %self, i64 %position, i8 %code, ptr %object, ptr %expected, ptr %slot) {{
entry:
  %receiver = alloca ptr
  %kind = and i8 %code, 15
  %flag = and i8 %code, {ALIGNED}
  switch i8 %kind, label %slowly [
    i8 1, label %pointer
    i8 2, label %integer
    i8 3, label %integer
    i8 4, label %integer
    i8 5, label %integer
    i8 6, label %integer
    i8 7, label %float
    i8 8, label %float
  ]
pointer:
  ; An address in place of a tensor.
  %class = call ptr @PyObject_Type(ptr %object)
  call void @Py_DecRef(ptr %class)
  %is.number = icmp eq ptr %class, @PyLong_Type
  br i1 %is.number, label %raw, label %object.pointer
raw:
  %number.pointer = call i64 @PyLong_AsUnsignedLongLong(ptr %object)
  %odd.raw = icmp eq i64 %number.pointer, -1
  br i1 %odd.raw, label %clear, label %aligned
object.pointer:
  %is.cpu = load ptr, ptr @is_cpu
  %on.cpu = call ptr @PyObject_GetAttr(ptr %object, ptr %is.cpu)
  %no.attribute = icmp eq ptr %on.cpu, null
  br i1 %no.attribute, label %clear, label %placed
placed:
  %true = icmp eq ptr %on.cpu, @_Py_TrueStruct
  call void @Py_DecRef(ptr %on.cpu)
  br i1 %true, label %typed, label %slowly
typed:
  %any.type = icmp eq ptr %expected, null
  br i1 %any.type, label %address, label %same.type
same.type:
  %dtype.name = load ptr, ptr @dtype
  %type = call ptr @PyObject_GetAttr(ptr %object, ptr %dtype.name)
  %no.type = icmp eq ptr %type, null
  br i1 %no.type, label %clear, label %compare
compare:
  %equal = icmp eq ptr %type, %expected
  call void @Py_DecRef(ptr %type)
  br i1 %equal, label %address, label %slowly
address:
  %data.ptr = load ptr, ptr @data_ptr
  store ptr %object, ptr %receiver
  %result = call ptr @PyObject_VectorcallMethod(ptr %data.ptr, ptr %receiver, i64 1, ptr null)
  %failed = icmp eq ptr %result, null
  br i1 %failed, label %clear, label %bits
bits:
  %pointed = call i64 @PyLong_AsUnsignedLongLong(ptr %result)
  call void @Py_DecRef(ptr %result)
  %odd.pointer = icmp eq i64 %pointed, -1
  br i1 %odd.pointer, label %clear, label %aligned
integer:
  %number = call i64 @PyLong_AsLongLong(ptr %object)
  %odd.number = icmp eq i64 %number, -1
  br i1 %odd.number, label %number.error, label %range
number.error:
  %number.raised = call ptr @PyErr_Occurred()
  %no.number = icmp ne ptr %number.raised, null
  br i1 %no.number, label %clear, label %range
range:
  %wide = icmp eq i8 %kind, 6
  br i1 %wide, label %aligned, label %narrow
narrow:
  ; Bits of kinds 2 to 5: 1 (as 8 bits, of which only "not 0" counts), 8, 16, 32.
  %order = sub i8 %kind, 3
  %truth = icmp eq i8 %kind, 2
  %shift.small = select i1 %truth, i8 0, i8 %order
  %shift = zext i8 %shift.small to i64
  %width = shl i64 8, %shift
  %below = sub i64 %width, 1
  %half = shl i64 1, %below
  %moved = add i64 %number, %half
  %limit = shl i64 %half, 1
  %fits = icmp ult i64 %moved, %limit
  br i1 %fits, label %in.range, label %slowly
in.range:
  %nonzero = icmp ne i64 %number, 0
  %one = zext i1 %nonzero to i64
  %value = select i1 %truth, i64 %one, i64 %number
  br label %aligned
float:
  %double = call double @PyFloat_AsDouble(ptr %object)
  %odd.double = fcmp oeq double %double, -1.0
  br i1 %odd.double, label %double.error, label %keep
double.error:
  %double.raised = call ptr @PyErr_Occurred()
  %no.double = icmp ne ptr %double.raised, null
  br i1 %no.double, label %clear, label %keep
keep:
  %single = icmp eq i8 %kind, 7
  br i1 %single, label %keep.single, label %keep.double
keep.single:
  %rounded = fptrunc double %double to float
  store float %rounded, ptr %slot
  ret i1 true
keep.double:
  store double %double, ptr %slot
  ret i1 true
aligned:
  %found = phi i64 [ %pointed, %bits ], [ %number.pointer, %raw ], [ %number, %range ], [ %value, %in.range ]
  %rest = and i64 %found, 15
  %even = icmp eq i64 %rest, 0
  %unbound = icmp eq i8 %flag, 0
  %good = or i1 %even, %unbound
  br i1 %good, label %done, label %slowly
done:
  store i64 %found, ptr %slot
  ret i1 true
clear:
  call void @PyErr_Clear()
  br label %slowly
slowly:
  %asked = call i1 @ask(ptr %self, i64 %position, ptr %object, ptr %slot)
  ret i1 %asked
}}

; Run a kernel whose context has its arguments in place. New reference to None, or null with an error set.
define internal ptr @run(ptr %self, ptr %entry.point, ptr %context, i64 %x, i64 %y, i64 %z) {{
entry:
  %fault = alloca [56 x i8], align 8
  %xy = mul i64 %x, %y
  %both = call {{ i64, i1 }} @llvm.smul.with.overflow.i64(i64 %xy, i64 %z)
  %total = extractvalue {{ i64, i1 }} %both, 0
  %overflow = extractvalue {{ i64, i1 }} %both, 1
  ; A negative or huge number in any direction shows in the bits above 31.
  %xy.bits = or i64 %x, %y
  %bits = or i64 %xy.bits, %z
  %huge = icmp ugt i64 %bits, 2147483647
  %bad = or i1 %huge, %overflow
  br i1 %bad, label %bad.grid, label %sized
bad.grid:
  %grid.error = call ptr @fail(ptr %self, i64 {BAD_GRID}, i64 0)
  ret ptr null
sized:
  %empty = icmp eq i64 %total, 0
  br i1 %empty, label %finished, label %fill
fill:
  call void @llvm.memset.p0.i64(ptr align 8 %fault, i8 0, i64 56, i1 false)
  store i64 0, ptr %context
  %total.at = getelementptr i8, ptr %context, i64 8
  store i64 %total, ptr %total.at
  %x.at = getelementptr i8, ptr %context, i64 24
  %x.small = trunc i64 %x to i32
  store i32 %x.small, ptr %x.at
  %y.at = getelementptr i8, ptr %context, i64 28
  %y.small = trunc i64 %y to i32
  store i32 %y.small, ptr %y.at
  %z.at = getelementptr i8, ptr %context, i64 32
  %z.small = trunc i64 %z to i32
  store i32 %z.small, ptr %z.at
  %fault.at = getelementptr i8, ptr %context, i64 40
  store ptr %fault, ptr %fault.at
  %thread = call ptr @PyEval_SaveThread()
  %several = icmp ugt i64 %total, 1
  br i1 %several, label %team, label %go
team:
  %available = call i32 @threads()
  br label %go
go:
  %threads = phi i32 [ 1, %fill ], [ %available, %team ]
  call void %entry.point(ptr %context, i32 %threads)
  call void @PyEval_RestoreThread(ptr %thread)
  %state = load i32, ptr %fault
  %sound = icmp eq i32 %state, 0
  br i1 %sound, label %finished, label %faulted
faulted:
  %record = ptrtoint ptr %fault to i64
  %fault.error = call ptr @fail(ptr %self, i64 {FAULT}, i64 %record)
  ret ptr null
finished:
  call void @Py_IncRef(ptr @_Py_NoneStruct)
  ret ptr @_Py_NoneStruct
}}

declare {{ i64, i1 }} @llvm.smul.with.overflow.i64(i64, i64)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)

; hook(launch_metadata) unless the hook is None. False when it raised.
define internal i1 @hook(ptr %args, i64 %which) {{
  %at = getelementptr ptr, ptr %args, i64 %which
  %function = load ptr, ptr %at
  %absent = icmp eq ptr %function, @_Py_NoneStruct
  br i1 %absent, label %good, label %call
call:
  %metadata = getelementptr ptr, ptr %args, i64 6
  %result = call ptr @PyObject_Vectorcall(ptr %function, ptr %metadata, i64 1, ptr null)
  %raised = icmp eq ptr %result, null
  br i1 %raised, label %bad, label %drop
drop:
  call void @Py_DecRef(ptr %result)
  br label %good
good:
  ret i1 true
bad:
  ret i1 false
}}

; Run the links of a chain. New reference to None, or null with an error set.
define ptr @launch_chain(ptr %self, ptr %args, i64 %count) {{
entry:
  %bytes = call ptr @PyTuple_GetItem(ptr %self, i64 0)
  %descriptor = call ptr @PyBytes_AsString(ptr %bytes)
  %links = load ptr, ptr %descriptor
  %number.at = getelementptr i8, ptr %descriptor, i64 8
  %number = load i64, ptr %number.at
  %thread = call ptr @PyEval_SaveThread()
  %available = call i32 @threads()
  br label %head
head:
  %k = phi i64 [ 0, %entry ], [ %next, %after ]
  %more = icmp slt i64 %k, %number
  br i1 %more, label %body, label %done
body:
  %offset = mul i64 %k, {CHAIN_LINK.size}
  %link = getelementptr i8, ptr %links, i64 %offset
  %function = load ptr, ptr %link
  %context.at = getelementptr i8, ptr %link, i64 8
  %context = load ptr, ptr %context.at
  %programs.at = getelementptr i8, ptr %link, i64 16
  %programs = load i64, ptr %programs.at
  %fault.at = getelementptr i8, ptr %link, i64 24
  %fault = load ptr, ptr %fault.at
  store i64 0, ptr %context
  %several = icmp sgt i64 %programs, 1
  %threads = select i1 %several, i32 %available, i32 1
  call void %function(ptr %context, i32 %threads)
  %state = load i32, ptr %fault
  %sound = icmp eq i32 %state, 0
  br i1 %sound, label %after, label %faulted
after:
  %next = add i64 %k, 1
  br label %head
faulted:
  call void @PyEval_RestoreThread(ptr %thread)
  %record = ptrtoint ptr %fault to i64
  %fault.error = call ptr @fail(ptr %self, i64 %k, i64 %record)
  ; The next call begins with a clean record.
  call void @llvm.memset.p0.i64(ptr align 8 %fault, i8 0, i64 56, i1 false)
  ret ptr null
done:
  call void @PyEval_RestoreThread(ptr %thread)
  call void @Py_IncRef(ptr @_Py_NoneStruct)
  ret ptr @_Py_NoneStruct
}}

; launch(x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments)
define ptr @launch_upstream(ptr %self, ptr %args, i64 %count) {{
entry:
  %numbers = alloca [5 x i64], align 8
  %bytes = call ptr @PyTuple_GetItem(ptr %self, i64 0)
  %descriptor = call ptr @PyBytes_AsString(ptr %bytes)
  %positions = load i64, ptr %descriptor
  %slots.at = getelementptr i8, ptr %descriptor, i64 8
  %slots = load i64, ptr %slots.at
  %kinds = getelementptr i8, ptr %descriptor, i64 {UPSTREAM_DESCRIPTOR.size}
  %expected.count = add i64 %positions, {UPSTREAM_POSITIONS}
  %complete = icmp eq i64 %count, %expected.count
  br i1 %complete, label %number.head, label %bad.count
bad.count:
  %count.error = call ptr @fail(ptr %self, i64 {BAD_COUNT}, i64 %count)
  ret ptr null
number.head:
  ; x, y, z and the function's address; 3, the stream, means nothing here.
  %k = phi i64 [ 0, %entry ], [ %k.next, %number.next ]
  %number.at = getelementptr ptr, ptr %args, i64 %k
  %number.object = load ptr, ptr %number.at
  %is.stream = icmp eq i64 %k, 3
  br i1 %is.stream, label %number.next, label %number.read
number.read:
  %number = call i64 @PyLong_AsLongLong(ptr %number.object)
  %slot.at = getelementptr i64, ptr %numbers, i64 %k
  store i64 %number, ptr %slot.at
  %odd = icmp eq i64 %number, -1
  br i1 %odd, label %number.error, label %number.next
number.error:
  %raised = call ptr @PyErr_Occurred()
  %wrong = icmp ne ptr %raised, null
  br i1 %wrong, label %error, label %number.next
number.next:
  %k.next = add i64 %k, 1
  %numbers.left = icmp ult i64 %k.next, 5
  br i1 %numbers.left, label %number.head, label %enter
error:
  ret ptr null
enter:
  %entered = call i1 @hook(ptr %args, i64 7)
  br i1 %entered, label %make, label %error
make:
  %slot.bytes = mul i64 %slots, 8
  %size = add i64 %slot.bytes, {_HEADER}
  %context = alloca i8, i64 %size, align 16
  %first = getelementptr i8, ptr %context, i64 {_HEADER}
  br label %head
head:
  %p = phi i64 [ 0, %make ], [ %p.next, %next ]
  %slot = phi ptr [ %first, %make ], [ %slot.next, %next ]
  %more = icmp slt i64 %p, %positions
  br i1 %more, label %one, label %launch
one:
  %kind.at = getelementptr i8, ptr %kinds, i64 %p
  %kind = load i8, ptr %kind.at
  %skipped = icmp eq i8 %kind, 0
  br i1 %skipped, label %next, label %take
take:
  %index = add i64 %p, {UPSTREAM_POSITIONS}
  %object.at = getelementptr ptr, ptr %args, i64 %index
  %object = load ptr, ptr %object.at
  %taken = call i1 @convert(ptr %self, i64 %p, i8 %kind, ptr %object, ptr null, ptr %slot)
  %following = getelementptr i8, ptr %slot, i64 8
  br i1 %taken, label %next, label %error
next:
  %slot.next = phi ptr [ %slot, %one ], [ %following, %take ]
  %p.next = add i64 %p, 1
  br label %head
launch:
  %y.at = getelementptr i64, ptr %numbers, i64 1
  %z.at = getelementptr i64, ptr %numbers, i64 2
  %function.at = getelementptr i64, ptr %numbers, i64 4
  %x = load i64, ptr %numbers
  %y = load i64, ptr %y.at
  %z = load i64, ptr %z.at
  %function = load i64, ptr %function.at
  %entry.point = inttoptr i64 %function to ptr
  %result = call ptr @run(ptr %self, ptr %entry.point, ptr %context, i64 %x, i64 %y, i64 %z)
  %failed = icmp eq ptr %result, null
  br i1 %failed, label %error, label %exit
exit:
  %exited = call i1 @hook(ptr %args, i64 8)
  br i1 %exited, label %done, label %drop
drop:
  call void @Py_DecRef(ptr %result)
  ret ptr null
done:
  ret ptr %result
}}

; launch(), launch(*tensors) or launch(*arguments): whatever is not given is read from the arguments of the preparation
define ptr @launch_prepared(ptr %self, ptr %args, i64 %count) {{
entry:
  %unused = alloca i64
  %bytes = call ptr @PyTuple_GetItem(ptr %self, i64 0)
  %descriptor = call ptr @PyBytes_AsString(ptr %bytes)
  %entry.point = load ptr, ptr %descriptor
  %positions.at = getelementptr i8, ptr %descriptor, i64 8
  %positions = load i64, ptr %positions.at
  %slots.at = getelementptr i8, ptr %descriptor, i64 16
  %slots = load i64, ptr %slots.at
  %arguments.at = getelementptr i8, ptr %descriptor, i64 24
  %arguments = load i64, ptr %arguments.at
  %tensors.at = getelementptr i8, ptr %descriptor, i64 32
  %tensors = load i64, ptr %tensors.at
  %x.at = getelementptr i8, ptr %descriptor, i64 40
  %x.small = load i32, ptr %x.at
  %x = sext i32 %x.small to i64
  %y.at = getelementptr i8, ptr %descriptor, i64 44
  %y.small = load i32, ptr %y.at
  %y = sext i32 %y.small to i64
  %z.at = getelementptr i8, ptr %descriptor, i64 48
  %z.small = load i32, ptr %z.at
  %z = sext i32 %z.small to i64
  %kinds = getelementptr i8, ptr %descriptor, i64 {PREPARED_DESCRIPTOR.size}
  %expected.all = call ptr @PyTuple_GetItem(ptr %self, i64 2)
  %kept.all = call ptr @PyTuple_GetItem(ptr %self, i64 3)
  %none = icmp eq i64 %count, 0
  %all = icmp eq i64 %count, %arguments
  %some = icmp eq i64 %count, %tensors
  %either = or i1 %all, %some
  %valid = or i1 %none, %either
  br i1 %valid, label %start, label %bad.count
bad.count:
  %count.error = call ptr @fail(ptr %self, i64 {BAD_COUNT}, i64 %count)
  ret ptr null
start:
  %slot.bytes = mul i64 %slots, 8
  %size = add i64 %slot.bytes, {_HEADER}
  %context = alloca i8, i64 %size, align 16
  %first = getelementptr i8, ptr %context, i64 {_HEADER}
  br label %head
head:
  %p = phi i64 [ 0, %start ], [ %p.next, %next ]
  %given = phi i64 [ 0, %start ], [ %given.next, %next ]
  %slot = phi ptr [ %first, %start ], [ %slot.next, %next ]
  %more = icmp slt i64 %p, %positions
  br i1 %more, label %one, label %launch
one:
  %kind.at = getelementptr i8, ptr %kinds, i64 %p
  %kind = load i8, ptr %kind.at
  %low = and i8 %kind, 15
  %is.pointer = icmp eq i8 %low, 1
  %wanted = or i1 %all, %is.pointer
  %left = icmp slt i64 %given, %count
  %passed = and i1 %wanted, %left
  %kept = call ptr @PyTuple_GetItem(ptr %kept.all, i64 %p)
  br i1 %passed, label %take, label %chosen
take:
  %object.at = getelementptr ptr, ptr %args, i64 %given
  %new = load ptr, ptr %object.at
  %after = add i64 %given, 1
  br label %chosen
chosen:
  %object = phi ptr [ %kept, %one ], [ %new, %take ]
  %given.next = phi i64 [ %given, %one ], [ %after, %take ]
  %constant = icmp eq i8 %kind, 0
  br i1 %constant, label %fixed, label %read
fixed:
  %identical = icmp eq ptr %object, %kept
  br i1 %identical, label %next, label %equal
equal:
  %confirmed = call i1 @ask(ptr %self, i64 %p, ptr %object, ptr %unused)
  br i1 %confirmed, label %next, label %error
read:
  %expected = call ptr @PyTuple_GetItem(ptr %expected.all, i64 %p)
  %taken = call i1 @convert(ptr %self, i64 %p, i8 %kind, ptr %object, ptr %expected, ptr %slot)
  %following = getelementptr i8, ptr %slot, i64 8
  br i1 %taken, label %next, label %error
error:
  ret ptr null
next:
  %slot.next = phi ptr [ %slot, %fixed ], [ %slot, %equal ], [ %following, %read ]
  %p.next = add i64 %p, 1
  br label %head
launch:
  %result = call ptr @run(ptr %self, ptr %entry.point, ptr %context, i64 %x, i64 %y, i64 %z)
  ret ptr %result
}}
"""

_PYTHON_SYMBOLS = (
    "_Py_NoneStruct", "_Py_TrueStruct", "PyLong_Type", "PyLong_AsLongLong", "PyLong_AsUnsignedLongLong", "PyLong_FromLongLong",
    "PyFloat_AsDouble", "PyErr_Occurred", "PyErr_Clear", "PyObject_Type", "PyObject_GetAttr", "PyObject_Vectorcall",
    "PyObject_VectorcallMethod", "PyTuple_GetItem", "PyBytes_AsString", "PyEval_SaveThread", "PyEval_RestoreThread",
    "Py_IncRef", "Py_DecRef",
)  # fmt: skip

_METH_FASTCALL = 0x80


class _MethodDefinition(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


class LaunchCode:
    """The functions of this module, compiled and loaded.

    Attributes:
        parallel: address of the function that starts threads for a kernel, under the name `worker.PARALLEL`.
        thread_count: returns the number of threads that a launch from the calling thread would use.
    """

    def __init__(self) -> None:
        pool = thread_pool()
        isa = host_isa()
        triple, layout = jit.target_description(isa)
        text = f'target datalayout = "{layout}"\ntarget triple = "{triple}"\n{_TEXT}'
        symbols = {name: _python_address(name) for name in _PYTHON_SYMBOLS}
        if pool.count:
            symbols[_COUNT] = pool.count
        else:
            text = text.replace(_COUNT_DECLARATION, _COUNT_ONE)
        code = jit.load(jit.compile_object(text, isa, effort=0), symbols)
        self.parallel = pool.parallel or code.function("serial")
        self.thread_count: Callable[[], int] = ctypes.CFUNCTYPE(ctypes.c_int)(code.function("threads"))
        self._names = ("data_ptr", "is_cpu", "dtype")
        for name in self._names:
            ctypes.c_void_p.from_address(code.variable(name)).value = id(name)
        self._methods = {
            name: _MethodDefinition(b"launch", code.function(name), _METH_FASTCALL, None)
            for name in ("launch_upstream", "launch_prepared", "launch_chain")
        }
        forked = ctypes.c_int32.from_address(code.variable("forked"))

        def after_fork() -> None:
            forked.value = 1

        # A child process has only the thread that forked; the pool's others, which the runtime would wait for, are gone.
        os.register_at_fork(after_in_child=after_fork)

    def upstream(self, kinds: Sequence[int], slow: SlowPath) -> Callable[..., None]:
        """Return the function that Triton calls to launch.

        Args:
            kinds: how to read each argument of the kernel, see `KINDS`.
            slow: called as `slow(position, object)` for what the compiled code leaves over; returns 64 bits or raises.
        """
        descriptor = UPSTREAM_DESCRIPTOR.pack(len(kinds), sum(kind != KINDS["skip"] for kind in kinds)) + bytes(kinds)
        return self._function("launch_upstream", (descriptor, slow))

    def prepared(
        self,
        entry: int,
        grid: tuple[int, int, int],
        kinds: Sequence[int],
        replaceable: int,
        values: tuple[object, ...],
        dtypes: tuple[object, ...],
        slow: SlowPath,
    ) -> Callable[..., None]:
        """Return a function that launches one kernel on one grid.

        Args:
            entry: address of the kernel's entry point.
            grid: number of programs in each direction.
            kinds: how to read each argument, see `KINDS`; skipped are those that the kernel was specialized for.
            replaceable: how many arguments, from the first, a call may replace.
            values: the arguments; kept alive, and read anew at each call that does not replace them.
            dtypes: for each argument the dtype that a tensor must have.
            slow: as in `upstream`.
        """
        slots = sum(kind != KINDS["skip"] for kind in kinds)
        tensors = sum(kind & ~ALIGNED == KINDS["ptr"] for kind in kinds[:replaceable])
        descriptor = PREPARED_DESCRIPTOR.pack(entry, len(kinds), slots, replaceable, tensors, *grid) + bytes(kinds)
        return self._function("launch_prepared", (descriptor, slow, dtypes, values))

    def chain(self, links: int, count: int, slow: SlowPath) -> Callable[[], None]:
        """Return a function that runs the links of a chain; see `chain`.

        Args:
            links: address of the links, each a `CHAIN_LINK`; they stay there.
            count: number of links.
            slow: called as `slow(number of the link, address of the fault record)` where a link has failed; raises.
        """
        return self._function("launch_chain", (CHAIN_DESCRIPTOR.pack(links, count), slow))

    def _function(self, name: str, state: tuple[object, ...]) -> Callable[..., None]:
        new = ctypes.pythonapi.PyCFunction_NewEx
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
        function: Callable[..., None] = new(ctypes.addressof(self._methods[name]), state, None)
        return function


@functools.cache
def launch_code() -> LaunchCode:
    """Return the compiled functions; one set per process."""
    return LaunchCode()


def _python_address(symbol: str) -> int:
    return ctypes.cast(getattr(ctypes.pythonapi, symbol), ctypes.c_void_p).value or 0
