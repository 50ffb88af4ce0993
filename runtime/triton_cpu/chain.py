"""Several launches and C calls as one call from Python.

Between two launches that Python makes, a few microseconds go by: what the interpreter needs has been pushed out of the caches
by the kernel before. A chain holds the contexts of all its links in one piece of memory and runs them one after the other
without going back to Python; the interpreter's lock is free all the while.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import jit
from .isa import host_isa
from .launch_code import CHAIN_LINK, launch_code
from .worker import CONTEXT_HEADER

FAULT_BYTES = 64
_LINE = 64
_HEADER = CONTEXT_HEADER.size
_FAULT_AT = CONTEXT_HEADER.size - 8


@dataclass(frozen=True)
class Link:
    """One call of a chain.

    Args:
        address: of a function `void (ptr context, i32 threads)`.
        context: what it is passed: a launch context, whose first 8 bytes are set to 0 and whose pointer to the fault record is
            filled in before each call.
        programs: how many programs it runs; several may use several threads.
        fault: called with the address of the fault record where the function has left one; raises.
    """

    address: int
    context: bytes
    programs: int
    fault: Callable[[int], None] | None = None


class Chain:
    """Links in one piece of memory. Calls of one chain must not overlap.

    Args:
        links: in the order in which they run, at least one.

    Attributes:
        function: runs all links.
        failed: the number of the link that failed last.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = tuple(links)
        self.failed = 0
        self._memory, self._offsets = _arrange(self._links)
        base = ctypes.addressof(self._memory)
        self._base = base + -base % _LINE
        self._write(self._links)
        self.function = launch_code().chain(self._base, len(self._links), self._fail)

    def set(self, link: int, offset: int, value: int) -> None:
        """Replace 8 bytes of a link's context.

        Args:
            link: its number.
            offset: in the context, in bytes.
            value: an address, or other 64 bits.
        """
        ctypes.c_uint64.from_address(self._base + self._offsets[link] + offset).value = value

    def slot(self, link: int, offset: int) -> ctypes.c_uint64:
        """Return 8 bytes of a link's context as a number that can be set, which is faster than `set`."""
        slot = ctypes.c_uint64.from_address(self._base + self._offsets[link] + offset)
        # The number looks into the chain's memory, and keeps it.
        slot._chain = self  # type: ignore[attr-defined]
        return slot

    def _write(self, links: Sequence[Link]) -> None:
        fault = self._base + CHAIN_LINK.size * len(links)
        fault += -fault % _LINE
        for k, (link, offset) in enumerate(zip(links, self._offsets, strict=True)):
            record = CHAIN_LINK.pack(link.address, self._base + offset, link.programs, fault)
            ctypes.memmove(self._base + k * CHAIN_LINK.size, record, len(record))
            ctypes.memmove(self._base + offset, link.context, len(link.context))
            if link.fault is not None:
                self.set(k, _FAULT_AT, fault)
        ctypes.memset(fault, 0, FAULT_BYTES)

    def _fail(self, number: int, record: object) -> int:
        self.failed = number
        raise_fault = self._links[number].fault
        if raise_fault is not None:
            raise_fault(int(record))  # type: ignore[call-overload]
        raise RuntimeError(f"link {number} of a chain failed without saying why")


def _arrange(links: Sequence[Link]) -> tuple[Any, list[int]]:
    """Return memory for a chain, and where each link's context begins: the table, the fault record, the contexts."""
    at = CHAIN_LINK.size * len(links)
    at += -at % _LINE + FAULT_BYTES
    offsets = []
    for link in links:
        at += -at % _LINE
        offsets.append(at)
        at += len(link.context)
    return (ctypes.c_char * (at + 2 * _LINE))(), offsets


def launch_context(grid: tuple[int, int, int], bits: Sequence[int]) -> bytes:
    """Return the context of a kernel's launch.

    Args:
        grid: number of programs in each direction.
        bits: the arguments that the kernel takes when it runs, as 64 bits each.
    """
    x, y, z = grid
    return CONTEXT_HEADER.pack(0, x * y * z, 0, x, y, z, 0, 0) + b"".join(struct.pack("<Q", b & (2**64 - 1)) for b in bits)


C_TYPES = {"i32": "i32", "float": "float", "ptr": "ptr", "ref": "ptr"}
"""How an argument of a C call is passed; "ref" passes the address of the argument's own 8 bytes."""


def call_link(address: int, arguments: Sequence[tuple[str, int]]) -> tuple[Link, tuple[int, ...]]:
    """Return a link that calls a C function which returns nothing, and where in its context each argument stands.

    Args:
        address: of the function.
        arguments: kind and 64 bits of each, see `C_TYPES`.
    """
    kinds = tuple(kind for kind, _ in arguments)
    bits = [address, *(value for _, value in arguments)]
    positions = tuple(_HEADER + 8 * (k + 1) for k in range(len(arguments)))
    return Link(_thunk(kinds), launch_context((1, 1, 1), bits), 1), positions


@functools.cache
def _thunk(kinds: tuple[str, ...]) -> int:
    """Return the address of a function that calls a C function with the arguments in its context."""
    lines, passed = [], []
    for k, kind in enumerate(kinds):
        lines.append(f"  %at{k} = getelementptr i8, ptr %context, i64 {_HEADER + 8 * (k + 1)}")
        if kind == "ref":
            passed.append(f"ptr %at{k}")
        else:
            lines.append(f"  %a{k} = load {C_TYPES[kind]}, ptr %at{k}")
            passed.append(f"{C_TYPES[kind]} %a{k}")
    isa = host_isa()
    triple, layout = jit.target_description(isa)
    body = "\n".join(lines)
    text = f"""\
target datalayout = "{layout}"
target triple = "{triple}"

define void @thunk(ptr %context, i32 %threads) {{
  %function.at = getelementptr i8, ptr %context, i64 {_HEADER}
  %function = load ptr, ptr %function.at
{body}
  call void %function({", ".join(passed)})
  ret void
}}
"""
    code = jit.load(jit.compile_object(text, isa, effort=0), {})
    _loaded.append(code)
    return code.function("thunk")


_loaded: list[Any] = []
"""Loaded code, which is called by address and must stay."""
