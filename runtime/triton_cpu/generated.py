"""What the code generator hands to the rest of the backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SiteKind = Literal["load", "store", "atomic", "assert", "print"]


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the kernel's source that can fail or print.

    Args:
        kind: what the source does there.
        line: 'file:line' of the source, or '' when the TTIR carries no location.
        message: text of a `device_assert` or `device_print`; '' for an access.
    """

    kind: SiteKind
    line: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Generated:
    """A kernel as LLVM IR.

    Args:
        name: the kernel's name.
        llvm_ir: module text that defines `@program`, the work of one program, and leaves the launch to be appended.
        arguments: TTIR element type of each kernel parameter that remains, in order: "ptr", "i1", "i8", "i16", "i32", "i64",
            "f16", "bf16", "f32" or "f64".
        scratch_bytes: size of the buffer that `@program` needs for its tiles; 0 for none.
        sites: what fault records and prints refer to, by index.
    """

    name: str
    llvm_ir: str
    arguments: tuple[str, ...]
    scratch_bytes: int
    sites: tuple[Site, ...] = ()
