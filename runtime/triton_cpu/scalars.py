"""Arithmetic on the forms of `values`: constant folding, and integers kept affine in the lanes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from .emit import LLVM_TYPES, Text, vector_type
from .literals import literal
from .values import BYTES, INTEGER_BITS, MAX_DIVISOR, Affine, Number, Pointer, Uniform, Val, Vector, wrap

if TYPE_CHECKING:
    from .emit import Emitter


def constant(value: int | float, element: str) -> Uniform:
    """A known uniform value."""
    return Uniform(wrap(value, element) if isinstance(value, int) and element in INTEGER_BITS else value, element)


def known_integers(*operands: Val) -> list[int] | None:
    """The operands as Python integers, if all are known."""
    values = [x.value for x in operands if isinstance(x, Uniform) and isinstance(x.value, int)]
    return values if len(values) == len(operands) else None


def text(x: Uniform) -> Text:
    """LLVM operand of a uniform value."""
    return x.value if isinstance(x.value, str) else literal(x.value, x.element)


def widths_with(*operands: Val) -> tuple[int, ...]:
    """Lane widths of the first operand that has lanes; () if all are uniform."""
    for x in operands:
        n = x.offset if isinstance(x, Pointer) else x
        if not isinstance(n, Uniform):
            return n.widths
    return ()


def vector_text(e: Emitter, x: Number, lanes: int) -> Text:
    """LLVM operand with all lanes of a number (a scalar operand for one lane)."""
    if isinstance(x, Vector):
        return x.text
    kind = LLVM_TYPES[x.element]
    if isinstance(x, Uniform):
        if lanes == 1:
            return text(x)
        if x.is_constant:
            return f"splat ({kind} {text(x)})"
        return memo(e, ("splat", x, lanes), lambda: e.splat(text(x), kind, lanes))
    return memo(e, ("affine", x), lambda: _affine_text(e, x))


def _affine_text(e: Emitter, x: Affine) -> Text:
    kind, lanes = LLVM_TYPES[x.element], math.prod(x.widths)
    total = vector_text(e, x.base, lanes)
    vector = vector_type(kind, lanes)
    known = [0] * lanes
    inner = lanes
    for stride, width in zip(x.strides, x.widths, strict=True):
        inner //= width
        index = [(lane // inner) % width for lane in range(lanes)]
        if isinstance(stride.value, int):
            known = [k + i * stride.value for k, i in zip(known, index, strict=True)]
            continue
        picks = ", ".join(f"{kind} {i}" for i in index)
        total = e.op(f"add {vector} {total}, {e.op(f'mul {vector} {vector_text(e, stride, lanes)}, <{picks}>')}")
    if any(known):
        picks = ", ".join(f"{kind} {wrap(k, x.element)}" for k in known)
        total = e.op(f"add {vector} {total}, <{picks}>")
    return total


def memo(e: Emitter, key: object, make: Callable[[], Text]) -> Text:
    """The operand that `make` emits, or emitted before where it is still known."""
    for scope in reversed(e.scopes):
        if key in scope:
            return scope[key]  # type: ignore[no-any-return]
    result = make()
    e.scopes[-1][key] = result
    return result


def uniform_binary(e: Emitter, op: str, a: Uniform, b: Uniform) -> Uniform:
    """`op` ("add", "sub" or "mul") of two uniform integers."""
    element = a.element
    if isinstance(a.value, int) and isinstance(b.value, int):
        folded = {"add": a.value + b.value, "sub": a.value - b.value, "mul": a.value * b.value}[op]
        return constant(folded, element)
    if op == "mul":
        for x, y in ((a, b), (b, a)):
            if x.value == 1:
                return y
            if x.value == 0:
                return constant(0, element)
    if b.value == 0 and op in ("add", "sub"):
        return a
    if a.value == 0 and op == "add":
        return b
    divisors = a.known_divisor, b.known_divisor
    divisor = min(math.prod(divisors), MAX_DIVISOR) if op == "mul" else math.gcd(*divisors)
    nonnegative = op != "sub" and a.is_nonnegative and b.is_nonnegative
    kind = LLVM_TYPES[element]
    key = (op, a, b)
    value = memo(e, key, lambda: e.op(f"{op} {kind} {text(a)}, {text(b)}"))
    return Uniform(value, element, divisor, nonnegative)


def add(e: Emitter, a: Number, b: Number, op: str = "add") -> Number:
    """Sum (or difference, `op` = "sub") of two integers, affine if both are."""
    if isinstance(a, Uniform) and isinstance(b, Uniform):
        return uniform_binary(e, op, a, b)
    widths = widths_with(a, b)
    if isinstance(a, Vector) or isinstance(b, Vector):
        lanes = math.prod(widths)
        kind = vector_type(LLVM_TYPES[a.element], lanes)
        return Vector(e.op(f"{op} {kind} {vector_text(e, a, lanes)}, {vector_text(e, b, lanes)}"), a.element, widths)
    zero = tuple(constant(0, a.element) for _ in widths)
    base_a, strides_a = (a, zero) if isinstance(a, Uniform) else (a.base, a.strides)
    base_b, strides_b = (b, zero) if isinstance(b, Uniform) else (b.base, b.strides)
    strides = tuple(uniform_binary(e, op, x, y) for x, y in zip(strides_a, strides_b, strict=True))
    return affine(uniform_binary(e, op, base_a, base_b), strides, widths)


def affine(base: Uniform, strides: tuple[Uniform, ...], widths: tuple[int, ...]) -> Number:
    """An affine number, or its base when every stride is zero."""
    if all(s.value == 0 for s in strides):
        return base
    return Affine(base, strides, widths, base.element)


def multiply(e: Emitter, a: Number, b: Number) -> Number:
    """Product of two integers, affine if one is affine and the other uniform."""
    if isinstance(a, Uniform) and isinstance(b, Uniform):
        return uniform_binary(e, "mul", a, b)
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Affine) and isinstance(y, Uniform):
            strides = tuple(uniform_binary(e, "mul", s, y) for s in x.strides)
            return affine(uniform_binary(e, "mul", x.base, y), strides, x.widths)
    widths = widths_with(a, b)
    lanes = math.prod(widths)
    kind = vector_type(LLVM_TYPES[a.element], lanes)
    return Vector(e.op(f"mul {kind} {vector_text(e, a, lanes)}, {vector_text(e, b, lanes)}"), a.element, widths)


def to_i64(e: Emitter, x: Number) -> Number:
    """Sign-extend an integer to 64 bits. An affine index is assumed not to wrap within a chunk, unless its constants say so."""
    if x.element == "i64":
        return x
    if isinstance(x, Uniform):
        if isinstance(x.value, int):
            return constant(-(x.value & 1) if x.element == "i1" else x.value, "i64")
        kind = LLVM_TYPES[x.element]
        value = memo(e, ("sext", x), lambda: e.op(f"sext {kind} {x.value} to i64"))
        return Uniform(value, "i64", x.divisor, x.nonnegative)
    if isinstance(x, Affine) and not _wraps(x):
        base = to_i64(e, x.base)
        strides = tuple(to_i64(e, s) for s in x.strides)
        assert isinstance(base, Uniform)
        return affine(base, strides, x.widths)  # type: ignore[arg-type]
    lanes = math.prod(x.widths)
    source = vector_type(LLVM_TYPES[x.element], lanes)
    return Vector(e.op(f"sext {source} {vector_text(e, x, lanes)} to <{lanes} x i64>"), "i64", x.widths)


def _wraps(x: Affine) -> bool:
    """Whether a constant affine number leaves the range of its type in some lane."""
    if x.element in ("i1", "i8", "i16"):
        return True
    if not isinstance(x.base.value, int) or not all(isinstance(s.value, int) for s in x.strides):
        return False
    spans = [int(s.value) * (w - 1) for s, w in zip(x.strides, x.widths, strict=True)]
    low = x.base.value + sum(min(0, s) for s in spans)
    high = x.base.value + sum(max(0, s) for s in spans)
    return wrap(low, x.element) != low or wrap(high, x.element) != high


def absolute(e: Emitter, p: Pointer) -> Number:
    """Address of a pointer in bytes."""
    if p.base is None:
        return p.offset
    base = Uniform(memo(e, ("ptrtoint", p.base), lambda: e.op(f"ptrtoint ptr {p.base} to i64")), "i64")
    return add(e, base, multiply(e, p.offset, constant(BYTES[p.pointee], "i64")))


def advance(e: Emitter, p: Pointer, by: Number) -> Pointer:
    """Pointer `by` elements further."""
    by = to_i64(e, by)
    if p.base is None:
        by = multiply(e, by, constant(BYTES[p.pointee], "i64"))
    return Pointer(p.base, add(e, p.offset, by), p.pointee)
