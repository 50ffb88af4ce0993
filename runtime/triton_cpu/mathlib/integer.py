"""Integer functions of libdevice."""

from __future__ import annotations

from graphwright.runtime.triton_cpu.emit import Text, mangle, vector_type

from .body import Body
from .registry import FUNCTIONS, Function, function


def _count(b: Body, x: Text, intrinsic: str) -> Text:
    """Call llvm.ctlz, llvm.cttz or llvm.ctpop; the result is i32."""
    operands = [(b.type, x)] + ([] if intrinsic == "ctpop" else [("i1", "false")])
    n = b.emitter.call(b.type, f"llvm.{intrinsic}.{mangle(b.element, b.lanes)}", operands)
    return b.cast("trunc", n, b.element, "i32")


@function("clz", "i32", "i64", result="i32")
def clz(b: Body, x: Text) -> Text:
    """Number of leading zero bits."""
    return _count(b, x, "ctlz")


@function("popc", "i32", "i64", result="i32")
def popc(b: Body, x: Text) -> Text:
    """Number of bits set."""
    return _count(b, x, "ctpop")


@function("ffs", "i32", "i64", result="i32")
def ffs(b: Body, x: Text) -> Text:
    """Position of the lowest bit set, counted from 1; 0 for 0."""
    position = b.ints("add", _count(b, x, "cttz"), 1, of="i32")
    return b.select(b.icmp("eq", x, 0), b.const(0, "i32"), position, of="i32")


@function("brev", "i32", "i64", inline=True)
def brev(b: Body, x: Text) -> Text:
    """Bits in reverse order."""
    return b.intrinsic("bitreverse", x)


@function("iabs", "i32", "i64", inline=True)
def iabs(b: Body, x: Text) -> Text:
    """Absolute value; the least integer stays itself."""
    return b.emitter.call(b.type, f"llvm.abs.{mangle(b.element, b.lanes)}", [(b.type, x), ("i1", "false")])


def _wide(b: Body, signed: bool, opcode: str, *operands: Text, shift: int, plus: int = 0) -> Text:
    """(a `opcode` b + plus) >> shift in twice the width."""
    e, kind = b.emitter, vector_type(f"i{2 * b.bits}", b.lanes)
    x, y = (e.op(f"{'sext' if signed else 'zext'} {b.type} {o} to {kind}") for o in operands)
    value = e.op(f"{opcode} {kind} {x}, {y}")

    def constant(v: int) -> str:
        return str(v) if b.lanes == 1 else f"splat (i{2 * b.bits} {v})"

    if plus:
        value = e.op(f"add {kind} {value}, {constant(plus)}")
    value = e.op(f"{'ashr' if signed else 'lshr'} {kind} {value}, {constant(shift)}")
    return e.op(f"trunc {kind} {value} to {b.type}")


def _register_wide() -> None:
    def mulhi(b: Body, x: Text, y: Text) -> Text:
        return _wide(b, True, "mul", x, y, shift=b.bits)

    def umulhi(b: Body, x: Text, y: Text) -> Text:
        return _wide(b, False, "mul", x, y, shift=b.bits)

    function("mulhi", "i32", "i64", arity=2)(mulhi)
    function("umulhi", "i32", "i64", arity=2)(umulhi)
    for signed, name, plus in ((True, "hadd", 0), (True, "rhadd", 1), (False, "uhadd", 0), (False, "urhadd", 1)):

        def average(b: Body, x: Text, y: Text, signed: bool = signed, plus: int = plus) -> Text:
            return _wide(b, signed, "add", x, y, shift=1, plus=plus)

        function(name, "i32", arity=2)(average)


_register_wide()


def _low_24(b: Body, x: Text, shift: str) -> Text:
    return b.ints(shift, b.ints("shl", x, 8), 8)


@function("mul24", "i32", arity=2)
def mul24(b: Body, x: Text, y: Text) -> Text:
    """Low 32 bits of the product of the low 24 bits, with sign."""
    return b.ints("mul", _low_24(b, x, "ashr"), _low_24(b, y, "ashr"))


@function("umul24", "i32", arity=2)
def umul24(b: Body, x: Text, y: Text) -> Text:
    """Low 32 bits of the product of the low 24 bits, without sign."""
    return b.ints("mul", _low_24(b, x, "lshr"), _low_24(b, y, "lshr"))


def _sad(b: Body, x: Text, y: Text, z: Text, less: str) -> Text:
    difference = b.select(b.icmp(less, x, y), b.ints("sub", y, x), b.ints("sub", x, y))
    return b.ints("add", difference, z)


@function("sad", "i32", arity=3)
def sad(b: Body, x: Text, y: Text, z: Text) -> Text:
    """|x - y| + z."""
    return _sad(b, x, y, z, "slt")


@function("usad", "i32", arity=3)
def usad(b: Body, x: Text, y: Text, z: Text) -> Text:
    """|x - y| + z of unsigned operands."""
    return _sad(b, x, y, z, "ult")


@function("byte_perm", "i32", arity=3)
def byte_perm(b: Body, x: Text, y: Text, selector: Text) -> Text:
    """Four bytes picked from the eight of (y, x): bits 4 k to 4 k + 2 of the selector pick byte k."""

    def widen(v: Text) -> Text:
        return b.cast("zext", v, "i32", "i64")

    both = b.ints("or", widen(x), b.ints("shl", widen(y), 32, of="i64"), of="i64")
    chosen = widen(selector)
    result = ""
    for k in range(4):
        nibble = b.ints("lshr", chosen, 4 * k, of="i64")
        shift = b.ints("shl", b.ints("and", nibble, 7, of="i64"), 3, of="i64")
        byte = b.ints("and", b.ints("lshr", both, shift, of="i64"), 255, of="i64")
        placed = b.ints("shl", byte, 8 * k, of="i64")
        result = b.ints("or", result, placed, of="i64") if result else placed
    return b.cast("trunc", result, "i64", "i32")


def _hiloint(b: Body, high: Text, low: Text) -> Text:
    wide = b.ints("shl", b.cast("zext", high, "i32", "i64"), 32, of="i64")
    return b.cast("bitcast", b.ints("or", wide, b.cast("zext", low, "i32", "i64"), of="i64"), "i64", "f64")


FUNCTIONS["hiloint2double", "f64"] = Function(_hiloint, ("i32", "i32"), "f64")


@function("double2hiint", "f64", result="i32")
def double2hiint(b: Body, x: Text) -> Text:
    """High half of the bits."""
    return b.cast("trunc", b.ints("lshr", b.to_bits(x), 32), "i64", "i32")


@function("double2loint", "f64", result="i32")
def double2loint(b: Body, x: Text) -> Text:
    """Low half of the bits."""
    return b.cast("trunc", b.to_bits(x), "i64", "i32")
