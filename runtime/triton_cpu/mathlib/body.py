"""Arithmetic on whole vectors, written into the body of a helper function."""

from __future__ import annotations

from collections.abc import Sequence

from graphwright.runtime.triton_cpu.emit import LLVM_TYPES, Emitter, Text, mangle, vector_type
from graphwright.runtime.triton_cpu.isa import Isa
from graphwright.runtime.triton_cpu.literals import literal

BITS = {"f32": 32, "f64": 64, "i32": 32, "i64": 64, "i1": 1}
INTEGER_OF = {"f32": "i32", "f64": "i64"}


class Body:
    """The body of a helper being written: every method emits one or two instructions and returns the SSA name.

    Operands are vectors of `lanes` lanes. The element type of the operands is `element` unless a method takes `of`.

    Args:
        emitter: receives the instructions and the declarations.
        isa: instruction set that the code is for.
        element: "f32", "f64", "i32" or "i64".
        lanes: number of lanes; 1 is the scalar type.
    """

    def __init__(self, emitter: Emitter, isa: Isa, element: str, lanes: int) -> None:
        self.emitter = emitter
        self.isa = isa
        self.element = element
        self.lanes = lanes
        self.bits = BITS[element]
        self.integer = INTEGER_OF.get(element, element)
        self.type = self.of(element)
        # LLVM expands llvm.fma into a library call per lane where the CPU has no such instruction.
        self.has_fma = isa.name != "portable" or not isa.cpu.startswith("x86")

    def of(self, element: str) -> str:
        """LLVM type of `lanes` lanes of an element type."""
        return vector_type(LLVM_TYPES[element], self.lanes)

    def widened(self) -> Body:
        """Return the same body, computing in f64."""
        return Body(self.emitter, self.isa, "f64", self.lanes)

    def const(self, value: float, of: str = "") -> Text:
        """A constant in every lane."""
        element = of or self.element
        text = literal(value, element)
        return text if self.lanes == 1 else f"splat ({LLVM_TYPES[element]} {text})"

    def _binary(self, opcode: str, a: Text, b: Text | float, of: str = "") -> Text:
        right = b if isinstance(b, str) else self.const(b, of)
        return self.emitter.op(f"{opcode} {self.of(of or self.element)} {a}, {right}")

    def add(self, a: Text, b: Text | float) -> Text:
        """Return a + b."""
        return self._binary("fadd", a, b)

    def sub(self, a: Text, b: Text | float) -> Text:
        """Return a - b."""
        return self._binary("fsub", a, b)

    def mul(self, a: Text, b: Text | float) -> Text:
        """Return a * b."""
        return self._binary("fmul", a, b)

    def div(self, a: Text | float, b: Text) -> Text:
        """Return a / b."""
        return self._binary("fdiv", a if isinstance(a, str) else self.const(a), b)

    def neg(self, a: Text) -> Text:
        """Return -a."""
        return self.emitter.op(f"fneg {self.type} {a}")

    def ints(self, opcode: str, a: Text, b: Text | int, of: str = "") -> Text:
        """An integer instruction on lanes as wide as the element (or of type `of`)."""
        return self._binary(opcode, a, b, of or self.integer)

    def mul_add(self, a: Text, b: Text | float, c: Text | float) -> Text:
        """Return a * b + c, fused where the CPU can."""
        b, c = (v if isinstance(v, str) else self.const(v) for v in (b, c))
        return self.intrinsic("fma" if self.has_fma else "fmuladd", a, b, c)

    def polynomial(self, x: Text, coefficients: Sequence[float], lowest: Text | None = None) -> Text:
        """Horner's scheme; `coefficients` from the constant term upwards, after `lowest` if that is given."""
        value: Text | float = coefficients[-1]
        terms: list[Text | float] = [*([] if lowest is None else [lowest]), *coefficients[:-1]]
        for c in reversed(terms):
            value = self.mul_add(x, value, c)
        return value if isinstance(value, str) else self.const(value)

    def intrinsic(self, name: str, *args: Text, result: str = "") -> Text:
        """Call an intrinsic that is overloaded on the element type."""
        element = result or self.element
        symbol = f"llvm.{name}.{mangle(LLVM_TYPES[element], self.lanes)}"
        return self.emitter.call(self.of(element), symbol, [(self.of(element), a) for a in args])

    def abs(self, a: Text) -> Text:
        """Return |a|."""
        return self.intrinsic("fabs", a)

    def with_sign(self, magnitude: Text, sign: Text) -> Text:
        """Return `magnitude` with the sign bit of `sign`."""
        return self.intrinsic("copysign", magnitude, sign)

    def cmp(self, predicate: str, a: Text, b: Text | float) -> Text:
        """Compare floats: one i1 per lane."""
        return self._binary(f"fcmp {predicate}", a, b)

    def icmp(self, predicate: str, a: Text, b: Text | int, of: str = "") -> Text:
        """Compare integers as wide as the element (or of type `of`): one i1 per lane."""
        return self._binary(f"icmp {predicate}", a, b, of or self.integer)

    def select(self, condition: Text, a: Text | float, b: Text | float, of: str = "") -> Text:
        """Return a where `condition` holds, else b."""
        left, right = (v if isinstance(v, str) else self.const(v, of) for v in (a, b))
        kind = self.of(of or self.element)
        return self.emitter.op(f"select {self.of('i1')} {condition}, {kind} {left}, {kind} {right}")

    def at_most(self, a: Text, limit: float) -> Text:
        """Return min(a, limit); a NaN stays a NaN."""
        return self.select(self.cmp("ogt", a, limit), limit, a)

    def cast(self, opcode: str, a: Text, source: str, target: str) -> Text:
        """Convert between element types by an LLVM cast; nothing is emitted when they are the same."""
        return a if source == target else self.emitter.op(f"{opcode} {self.of(source)} {a} to {self.of(target)}")

    def to_bits(self, a: Text) -> Text:
        """Reinterpret floats as integers."""
        return self.cast("bitcast", a, self.element, self.integer)

    def from_bits(self, a: Text) -> Text:
        """Reinterpret integers as floats."""
        return self.cast("bitcast", a, self.integer, self.element)
