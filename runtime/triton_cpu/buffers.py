"""Tensors that are held in memory while a program runs, and the scratch space they live in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .emit import LLVM_TYPES, Emitter, Text
from .values import BYTES, Uniform

ALIGNMENT_BYTES = 64


def storage_type(element: str) -> str:
    """LLVM type of an element in a buffer: bytes for booleans, 64-bit addresses for pointers."""
    return {"i1": "i8", "ptr": "i64"}.get(element, LLVM_TYPES[element])


@dataclass(eq=False)
class Buffer:
    """A tensor in memory.

    Args:
        pointer: address of the first element.
        shape: dimensions.
        strides: element strides, ints or i64 SSA names.
        element: TTIR element type.
        consecutive: every aligned chunk along the only dimension holds consecutive integers, so that its first one says all.
        run: an i1 that says whether the whole tensor is consecutive integers, and the first of them.
    """

    pointer: Text
    shape: tuple[int, ...]
    strides: list[int | Text]
    element: str
    consecutive: bool = False
    run: tuple[Text, Uniform] | None = None

    @property
    def lane(self) -> int:
        """The dimension whose elements lie side by side; the last one if there is none."""
        for d, stride in enumerate(self.strides):
            if stride == 1 and self.shape[d] > 1:
                return d
        return len(self.shape) - 1


def strides_for(shape: Sequence[int], lane: int, padding: int = 0) -> list[int | Text]:
    """Strides of a layout in which dimension `lane` is innermost, then padded, and the others keep their order."""
    order = [d for d in range(len(shape)) if d != lane] + [lane]
    strides: list[int | Text] = [0] * len(shape)
    step = 1
    for d in reversed(order):
        strides[d] = step
        step *= shape[d] + (padding if d == lane else 0)
    return strides


class Scratch:
    """Hands out pieces of a program's scratch memory, stack-wise.

    `size_bytes` is what the whole kernel needs.
    """

    def __init__(self) -> None:
        self.size_bytes = 0
        self._top = 0

    def take(self, e: Emitter, elements: int, element: str) -> Text:
        """Reserve room for `elements` values and emit its address."""
        bytes_each = 8 if element == "ptr" else BYTES[element]
        at = self._top
        needed = elements * bytes_each
        self._top = -(-(at + needed) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.size_bytes = max(self.size_bytes, self._top)
        return e.op(f"getelementptr i8, ptr %scratch, i64 {at}")

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Give back at the end what was taken inside."""
        mark = self._top
        try:
            yield
        finally:
            self._top = mark
