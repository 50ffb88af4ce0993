"""Faults of running kernels: the record they are written to, the code that writes it, and the error raised from it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import KernelFault
from .generated import Site

OUT_OF_MEMORY = -1
"""Site number of a fault of the launch itself: no memory for a thread's scratch buffer."""


class FaultRecord(ctypes.Structure):
    """What the first fault of a launch leaves behind; generated code knows the layout."""

    _fields_ = (
        ("state", ctypes.c_int32),
        ("site", ctypes.c_int32),
        ("program", ctypes.c_int32 * 3),
        ("_padding", ctypes.c_int32),
        ("address", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("range_count", ctypes.c_int64),
        ("ranges", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class Extent:
    """The memory of one tensor argument, from its first element to the end of its last.

    Args:
        name: parameter of the kernel.
        begin: first address.
        end: address behind the last element.
    """

    name: str
    begin: int
    end: int


# State 1 is taken before the fields are written and nobody reads them before all threads have joined, so one
# compare-exchange makes the first fault win.
REPORT_FAULT = """\
define internal void @report_fault(ptr %fault, i32 %site, i32 %pid0, i32 %pid1, i32 %pid2, i64 %address)
    cold noinline optnone nounwind {
  %swap = cmpxchg ptr %fault, i32 0, i32 1 acq_rel monotonic
  %first = extractvalue { i32, i1 } %swap, 1
  br i1 %first, label %write, label %done
write:
  %site.at = getelementptr i8, ptr %fault, i64 4
  store i32 %site, ptr %site.at
  %pid0.at = getelementptr i8, ptr %fault, i64 8
  store i32 %pid0, ptr %pid0.at
  %pid1.at = getelementptr i8, ptr %fault, i64 12
  store i32 %pid1, ptr %pid1.at
  %pid2.at = getelementptr i8, ptr %fault, i64 16
  store i32 %pid2, ptr %pid2.at
  %address.at = getelementptr i8, ptr %fault, i64 24
  store i64 %address, ptr %address.at
  br label %done
done:
  ret void
}
"""

# Without ranges (a raw address was passed for a pointer) nothing can be told apart, so everything is in bounds.
IN_BOUNDS = """\
define internal i1 @in_bounds(ptr %fault, i64 %address, i64 %bytes) noinline nounwind {
entry:
  %count.at = getelementptr i8, ptr %fault, i64 40
  %count = load i64, ptr %count.at
  %ranges.at = getelementptr i8, ptr %fault, i64 48
  %ranges = load ptr, ptr %ranges.at
  %stop = add i64 %address, %bytes
  %unchecked = icmp eq ptr %ranges, null
  br i1 %unchecked, label %inside, label %head
head:
  %k = phi i64 [ 0, %entry ], [ %following, %next ]
  %more = icmp slt i64 %k, %count
  br i1 %more, label %test, label %outside
test:
  %range = getelementptr { i64, i64 }, ptr %ranges, i64 %k
  %begin = load i64, ptr %range
  %end.at = getelementptr i8, ptr %range, i64 8
  %end = load i64, ptr %end.at
  %above = icmp uge i64 %address, %begin
  %below = icmp ule i64 %stop, %end
  %ordered = icmp ule i64 %address, %stop
  %fits = and i1 %above, %below
  %found = and i1 %fits, %ordered
  br i1 %found, label %inside, label %next
next:
  %following = add i64 %k, 1
  br label %head
inside:
  ret i1 true
outside:
  ret i1 false
}
"""


def fault_error(record: FaultRecord, kernel: str, sites: Sequence[Site], extents: Sequence[Extent] = ()) -> KernelFault:
    """Return the error that tells what a fault record says.

    Args:
        record: a record whose state is not 0.
        kernel: the kernel's name.
        sites: the kernel's sites.
        extents: the memory of the tensor arguments, when the launch was checked.
    """
    program = tuple(record.program)
    if record.site == OUT_OF_MEMORY:
        return KernelFault(
            f"{kernel}: out of memory: no room for a scratch buffer of {record.address} bytes per thread; "
            "use fewer threads (torch.set_num_threads) or smaller blocks"
        )
    if not 0 <= record.site < len(sites):
        return KernelFault(f"{kernel}: program {program} failed at an unknown place (site {record.site} of {len(sites)})")
    site = sites[record.site]
    line = site.line or "an unknown line"
    if site.kind == "assert":
        return KernelFault(f"{kernel}: device-side assertion failed in program {program} at {line}: {site.message}")
    where = _describe(record.address, extents)
    return KernelFault(f"{kernel}: {site.kind} outside the tensors of the launch in program {program} at {line}: {where}")


def _describe(address: int, extents: Sequence[Extent]) -> str:
    address &= (1 << 64) - 1
    if not extents:
        return f"address {address:#x}, and the launch has no tensor arguments"

    def distance(extent: Extent) -> int:
        return extent.begin - address if address < extent.begin else max(0, address - extent.end)

    nearest = min(extents, key=distance)
    size = nearest.end - nearest.begin
    return (
        f"address {address:#x} is at byte offset {address - nearest.begin} of '{nearest.name}', "
        f"the nearest tensor, which has {size} bytes"
    )
