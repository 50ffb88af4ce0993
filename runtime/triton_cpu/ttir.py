"""The Triton IR as plain Python data.

`parse` (in `ttir_parse`) turns the text of a TTIR module into these classes; everything after it works on them alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Type:
    """A TTIR type.

    Args:
        shape: dimensions of a tensor; `()` for a scalar.
        element: "i1", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64" or "ptr" (fp8 types keep their MLIR name).
        pointee: for "ptr", the element type pointed to; `None` otherwise.
    """

    shape: tuple[int, ...]
    element: str
    pointee: str | None = None

    @property
    def is_pointer(self) -> bool:
        """Whether the elements are pointers."""
        return self.element == "ptr"

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.element[0] in "fb"

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        n = 1
        for d in self.shape:
            n *= d
        return n

    def with_shape(self, shape: tuple[int, ...]) -> Type:
        """Return this element type with another shape."""
        return Type(shape, self.element, self.pointee)

    def __str__(self) -> str:
        element = f"!tt.ptr<{self.pointee}>" if self.is_pointer else self.element
        return f"tensor<{'x'.join(map(str, self.shape))}x{element}>" if self.shape else element


@dataclass(eq=False, slots=True)
class Value:
    """An SSA value: the result of `op`, or an argument of `block` when `op` is None."""

    name: str
    type: Type
    op: Op | None = None
    index: int = 0
    """Position among the results of `op` or the arguments of `block`."""
    block: Block | None = None
    uses: list[Op] = field(default_factory=list)
    """Operations that take this value as an operand, once per operand position."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value's type."""
        return self.type.shape

    @property
    def element(self) -> str:
        """Element type of the value's type."""
        return self.type.element

    def __repr__(self) -> str:
        return f"{self.name}: {self.type}"


@dataclass(eq=False, slots=True)
class Op:
    """One operation.

    `attrs` holds Python values: ints, floats, bools, strings, lists of ints. `regions` are blocks: a region of several
    blocks (control flow from an early return) is a list of blocks in order, so `regions[i][0]` is the entry.
    """

    name: str
    operands: list[Value]
    attrs: dict[str, Any] = field(default_factory=dict)
    results: list[Value] = field(default_factory=list)
    regions: list[list[Block]] = field(default_factory=list)
    block: Block | None = None
    position: int = 0
    """Position in a pre-order walk of the function."""
    successors: list[tuple[Block, list[Value]]] = field(default_factory=list)
    """For cf.br / cf.cond_br: target blocks with the values passed to their arguments."""
    line: str = ""
    """Source location 'file:line' of the kernel's Python code, or ''."""

    @property
    def result(self) -> Value:
        """The only result."""
        return self.results[0]

    @property
    def body(self) -> Block:
        """The first block of the first region."""
        return self.regions[0][0]

    def walk(self) -> Iterator[Op]:
        """Yield this operation and everything nested in it, in order."""
        yield self
        for region in self.regions:
            for block in region:
                yield from block.walk()

    def __repr__(self) -> str:
        head = ", ".join(r.name for r in self.results) + " = " if self.results else ""
        return f"{head}{self.name} {', '.join(v.name for v in self.operands)}"


@dataclass(eq=False, slots=True)
class Block:
    """A list of operations with arguments; the last operation is the terminator."""

    args: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    parent: Op | None = None
    """The operation whose region this block is in; None at the top of a function."""

    @property
    def terminator(self) -> Op:
        """The last operation."""
        return self.ops[-1]

    def walk(self) -> Iterator[Op]:
        """Yield every operation in the block, nested ones included, in order."""
        for op in self.ops:
            yield from op.walk()


@dataclass(eq=False, slots=True)
class Function:
    """A tt.func."""

    name: str
    blocks: list[Block]
    arg_attrs: list[dict[str, Any]]
    """Per argument, such as {'tt.divisibility': 16}."""
    is_public: bool
    result_types: list[Type] = field(default_factory=list)

    @property
    def args(self) -> list[Value]:
        """Arguments of the entry block."""
        return self.blocks[0].args

    def walk(self) -> Iterator[Op]:
        """Yield every operation of the function in order."""
        for block in self.blocks:
            yield from block.walk()
