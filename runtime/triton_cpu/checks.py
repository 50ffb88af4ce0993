"""Checked mode: every access is tested against the tensors of the launch before it is made.

A bad access is reported with its place in the kernel and ends the program.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import scalars as s
from .values import BYTES, Number, Pointer

if TYPE_CHECKING:
    from .generated import SiteKind
    from .lowering import Lowering
    from .ttir import Op

_CHECK_LANES = """\
define internal i1 @check_lanes(ptr %fault, i32 %site, i32 %pid0, i32 %pid1, i32 %pid2, ptr %addresses, ptr %mask,
                                i64 %lanes, i64 %bytes) {
entry:
  br label %head
head:
  %i = phi i64 [0, %entry], [%next, %good]
  %done = icmp eq i64 %i, %lanes
  br i1 %done, label %passed, label %test
test:
  %p_mask = getelementptr i8, ptr %mask, i64 %i
  %active = load i8, ptr %p_mask
  %skip = icmp eq i8 %active, 0
  %p_address = getelementptr i64, ptr %addresses, i64 %i
  %address = load i64, ptr %p_address
  br i1 %skip, label %good, label %look
look:
  %ok = call i1 @in_bounds(ptr %fault, i64 %address, i64 %bytes)
  br i1 %ok, label %good, label %bad
good:
  %next = add i64 %i, 1
  br label %head
bad:
  call void @report_fault(ptr %fault, i32 %site, i32 %pid0, i32 %pid1, i32 %pid2, i64 %address)
  ret i1 false
passed:
  ret i1 true
}"""


def check(lowering: Lowering, op: Op, kind: SiteKind, pointer: Pointer, mask: Number | None, widths: tuple[int, ...]) -> None:
    """Emit the test of one access; a failed one returns from the program."""
    e, lanes = lowering.e, math.prod(widths)
    e.declare("check_lanes", _CHECK_LANES)
    with lowering.scratch.frame():
        addresses = lowering.scratch.take(e, lanes, "i64")
        active = lowering.scratch.take(e, lanes, "i8")
    text = s.vector_text(e, s.absolute(e, pointer), lanes)
    e.raw(f"store {'i64' if lanes == 1 else f'<{lanes} x i64>'} {text}, ptr {addresses}, align 8")
    flags = "1" if lanes == 1 else "splat (i8 1)"
    if mask is not None:
        source = "i1" if lanes == 1 else f"<{lanes} x i1>"
        target = "i8" if lanes == 1 else f"<{lanes} x i8>"
        flags = e.op(f"zext {source} {s.vector_text(e, mask, lanes)} to {target}")
    e.raw(f"store {'i8' if lanes == 1 else f'<{lanes} x i8>'} {flags}, ptr {active}, align 1")
    site = site_of(lowering, op, kind)
    programs = "i32 %pid0, i32 %pid1, i32 %pid2"
    ok = e.op(
        f"call i1 @check_lanes(ptr %fault, i32 {site}, {programs}, ptr {addresses}, ptr {active}, "
        f"i64 {lanes}, i64 {BYTES[pointer.pointee]})"
    )
    bad, good = e.fresh_label("bad"), e.fresh_label("good")
    e.branch(ok, good, bad)
    e.label(bad)
    e.raw("ret void")
    e.label(good)


def site_of(lowering: Lowering, op: Op, kind: SiteKind, message: str = "") -> int:
    """Number of the operation's entry in the table of places that can report a fault; one an operation."""
    for number, site in enumerate(lowering.sites):
        if site.kind == kind and site.line == op.line and site.message == message:
            return number
    return lowering.add_site(kind, op, message)
