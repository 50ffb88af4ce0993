"""Emission of LLVM IR text.

Text is built line by line: it is an order of magnitude faster than building objects, and reads the same as what LLVM prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

LLVM_TYPES = {
    "i1": "i1", "i8": "i8", "i16": "i16", "i32": "i32", "i64": "i64",
    "f16": "half", "bf16": "i16", "f32": "float", "f64": "double", "ptr": "ptr",
    "f8E5M2": "i8", "f8E4M3FN": "i8", "f8E5M2FNUZ": "i8", "f8E4M3FNUZ": "i8",
}  # fmt: skip
"""LLVM type in a register of each TTIR element type (bf16 and the 8-bit floats travel as their bits)."""

INTRINSIC_NAMES = {"float": "f32", "double": "f64", "half": "f16", "ptr": "p0"}

Text = str
"""An LLVM operand: an SSA name or a literal, without its type."""


def vector_type(scalar: str, lanes: int) -> str:
    """LLVM type of `lanes` values of the LLVM type `scalar`; the scalar itself for one lane."""
    return scalar if lanes == 1 else f"<{lanes} x {scalar}>"


def mangle(scalar: str, lanes: int) -> str:
    """Suffix that overloaded intrinsics use for a type: `v16f32`, `i64`, ..."""
    name = INTRINSIC_NAMES.get(scalar, scalar)
    return name if lanes == 1 else f"v{lanes}{name}"


@dataclass
class Loop:
    """A counted loop being emitted: read `index` and `phis`, set `next` to the carried values of the next iteration."""

    index: Text
    phis: list[Text]
    next: list[Text] = field(default_factory=list)
    results: list[Text] = field(default_factory=list)
    """Carried values after the loop; filled in when the loop is closed."""


class Emitter:
    """Builds the body of one LLVM function."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.declarations: dict[str, str] = {}
        """Symbol -> text of a `declare`, `define` or global, emitted once at module level."""
        self.current = "entry"
        """Label of the block being written."""
        self.scopes: list[dict[Any, Any]] = [{}]
        """Memo tables, innermost last: what is in a scope was emitted where it dominates everything up to the scope's end."""
        self._count = 0

    def fresh(self, prefix: str = "t") -> Text:
        """Return an unused SSA name."""
        self._count += 1
        return f"%{prefix}{self._count}"

    def fresh_label(self, prefix: str = "L") -> str:
        """Return an unused block label."""
        self._count += 1
        return f"{prefix}{self._count}"

    def op(self, right_hand_side: str) -> Text:
        """Emit an instruction with a result; return its name."""
        name = self.fresh()
        self.lines.append(f"  {name} = {right_hand_side}")
        return name

    def raw(self, text: str) -> None:
        """Emit an instruction without a result."""
        self.lines.append("  " + text)

    def declare(self, symbol: str, text: str) -> None:
        """Put `text` at module level, once per symbol."""
        self.declarations.setdefault(symbol, text)

    def call(self, result: str, symbol: str, args: Sequence[tuple[str, Text]], *, flags: str = "") -> Text:
        """Declare an external function or intrinsic by the types of this call, and call it.

        Args:
            result: LLVM result type; "void" for none (the returned text is then empty).
            symbol: name without '@'.
            args: (LLVM type, operand) pairs.
            flags: fast-math flags with a trailing space, such as "contract ".
        """
        self.declare(symbol, f"declare {result} @{symbol}({', '.join(t for t, _ in args)})")
        text = f"call {flags}{result} @{symbol}({', '.join(f'{t} {v}' for t, v in args)})"
        if result == "void":
            self.raw(text)
            return ""
        return self.op(text)

    def label(self, label: str) -> None:
        """Start a block."""
        self.lines.append(label + ":")
        self.current = label

    def jump(self, label: str) -> None:
        """End the block by a jump."""
        self.raw(f"br label %{label}")

    def branch(self, condition: Text, if_true: str, if_false: str) -> None:
        """End the block by a conditional jump."""
        self.raw(f"br i1 {condition}, label %{if_true}, label %{if_false}")

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Open a memo scope."""
        self.scopes.append({})
        try:
            yield
        finally:
            self.scopes.pop()

    @contextmanager
    def when(self, condition: Text) -> Iterator[None]:
        """Emit the body so that it runs only when `condition` (an i1) holds."""
        then, done = self.fresh_label("T"), self.fresh_label("E")
        self.branch(condition, then, done)
        self.label(then)
        with self.scope():
            yield
        self.jump(done)
        self.label(done)

    @contextmanager
    def loop(
        self,
        lower: int | Text,
        upper: int | Text,
        step: int | Text,
        *,
        type: str = "i64",
        carried: Sequence[tuple[str, Text]] = (),
        unsigned: bool = False,
    ) -> Iterator[Loop]:
        """Emit `for index in range(lower, upper, step)` with a positive step.

        Args:
            lower: first index; an int or an SSA name of type `type`.
            upper: exclusive bound.
            step: positive step.
            type: LLVM integer type of the index.
            carried: (LLVM type, initial value) of the values carried round the loop. Set `Loop.next` before the body ends.
            unsigned: compare the index without sign.

        Yields:
            The `Loop`; its `results` hold the carried values once the `with` statement has ended.
        """
        before, head, done = self.current, self.fresh_label("H"), self.fresh_label("X")
        loop = Loop(self.fresh("i"), [self.fresh("p") for _ in carried])
        less = "ult" if unsigned else "slt"
        runs = isinstance(lower, int) and isinstance(upper, int) and lower < upper
        if runs:
            self.jump(head)
        else:
            self.branch(self.op(f"icmp {less} {type} {lower}, {upper}"), head, done)
        self.label(head)
        at = len(self.lines)
        self.lines.extend("" for _ in range(1 + len(carried)))
        with self.scope():
            yield loop
        following = self.op(f"add {type} {loop.index}, {step}")
        # The distance to the bound is compared, so that an index near its type's limit cannot wrap into a longer loop. With
        # the index below the bound, the distance is exact without sign.
        distance = self.op(f"sub {type} {upper}, {loop.index}")
        again = self.op(f"icmp ugt {type} {distance}, {step}")
        latch = self.current
        self.branch(again, head, done)
        self.lines[at] = f"  {loop.index} = phi {type} [{lower}, %{before}], [{following}, %{latch}]"
        for k, (carried_type, initial) in enumerate(carried):
            self.lines[at + 1 + k] = f"  {loop.phis[k]} = phi {carried_type} [{initial}, %{before}], [{loop.next[k]}, %{latch}]"
        self.label(done)
        for k, (carried_type, initial) in enumerate(carried):
            if runs:
                loop.results.append(loop.next[k])
            else:
                loop.results.append(self.op(f"phi {carried_type} [{initial}, %{before}], [{loop.next[k]}, %{latch}]"))

    def splat(self, value: Text, scalar: str, lanes: int) -> Text:
        """Broadcast a scalar to a vector."""
        if lanes == 1:
            return value
        kind = vector_type(scalar, lanes)
        first = self.op(f"insertelement {kind} poison, {scalar} {value}, i32 0")
        return self.op(f"shufflevector {kind} {first}, {kind} poison, <{lanes} x i32> zeroinitializer")

    def shuffle(self, value: Text, scalar: str, lanes: int, order: Sequence[int], other: Text | None = None) -> Text:
        """Pick lanes: `order` indexes the lanes of `value`, then those of `other`; -1 leaves a lane undefined."""
        kind = vector_type(scalar, lanes)
        if lanes == 1:
            value, kind, lanes = (
                self.op(f"insertelement <1 x {scalar}> poison, {scalar} {value}, i32 0"),
                f"<1 x {scalar}>",
                1,
            )
            if other is not None:
                other = self.op(f"insertelement <1 x {scalar}> poison, {scalar} {other}, i32 0")
        if len(order) == 1:
            picked, source = (order[0], value) if order[0] < lanes else (order[0] - lanes, str(other))
            return self.op(f"extractelement {kind} {source}, i32 {picked}")
        picks = ", ".join(f"i32 {i}" if i >= 0 else "i32 poison" for i in order)
        return self.op(
            f"shufflevector {kind} {value}, {kind} {other if other is not None else 'poison'}, <{len(order)} x i32> <{picks}>"
        )

    def address(self, scalar: str, base: Text, offset: int | Text) -> Text:
        """Address of element `offset` (i64) of an array of the LLVM type `scalar` at `base`."""
        return base if offset == 0 else self.op(f"getelementptr {scalar}, ptr {base}, i64 {offset}")

    def combine(self, *terms: tuple[int | Text, int | Text]) -> int | Text:
        """Sum of products of i64 values, constants folded: an int when everything is constant."""
        constant = 0
        total: Text | None = None
        for a, b in terms:
            if isinstance(a, int) and isinstance(b, int):
                constant += a * b
                continue
            if a == 0 or b == 0:
                continue
            if isinstance(b, int):
                a, b = b, a
            product = str(b) if a == 1 else self.op(f"mul i64 {b}, {a}")
            total = product if total is None else self.op(f"add i64 {total}, {product}")
        if total is None:
            return constant
        return total if constant == 0 else self.op(f"add i64 {total}, {constant}")
