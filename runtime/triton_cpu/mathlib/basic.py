"""Functions that are one instruction or a few: rounding, signs, predicates, and what IEEE 754 rounds correctly."""

from __future__ import annotations

from graphwright.runtime.triton_cpu.emit import Text

from .body import Body
from .registry import function, nested

INF = float("inf")


def _intrinsic(name: str, symbol: str, arity: int = 1) -> None:
    def write(b: Body, *args: Text) -> Text:
        return b.intrinsic(symbol, *args)

    function(name, "f32", "f64", arity=arity, inline=True)(write)


for _name in ("sqrt", "floor", "ceil", "trunc", "rint", "round", "fabs"):
    _intrinsic(_name, _name)
_intrinsic("nearbyint", "rint")
_intrinsic("copysign", "copysign", arity=2)


@function("rsqrt", "f32", "f64", inline=True)
def rsqrt(b: Body, x: Text) -> Text:
    """Return 1 / sqrt(x) by two correctly rounded operations: within 1.5 ulp."""
    return b.div(1.0, b.intrinsic("sqrt", x))


@function("rcp", "f32", "f64", inline=True)
def rcp(b: Body, x: Text) -> Text:
    """Return 1 / x, correctly rounded."""
    return b.div(1.0, x)


@function("fma", "f32", "f64", arity=3, inline=True)
def fma(b: Body, x: Text, y: Text, z: Text) -> Text:
    """Return x * y + z rounded once."""
    return b.intrinsic("fma", x, y, z) if b.has_fma else nested(b, "libm.fma", x, y, z)


@function("add", "f32", "f64", arity=2, inline=True)
def add(b: Body, x: Text, y: Text) -> Text:
    """Return x + y."""
    return b.add(x, y)


@function("sub", "f32", "f64", arity=2, inline=True)
def sub(b: Body, x: Text, y: Text) -> Text:
    """Return x - y."""
    return b.sub(x, y)


@function("mul", "f32", "f64", arity=2, inline=True)
def mul(b: Body, x: Text, y: Text) -> Text:
    """Return x * y."""
    return b.mul(x, y)


@function("div", "f32", "f64", arity=2, inline=True)
def div(b: Body, x: Text, y: Text) -> Text:
    """Return x / y, correctly rounded."""
    return b.div(x, y)


@function("fdim", "f32", "f64", arity=2)
def fdim(b: Body, x: Text, y: Text) -> Text:
    """Return x - y where that is positive, else 0."""
    return b.select(b.cmp("ole", x, y), 0.0, b.sub(x, y))


@function("saturate", "f32", "f64")
def saturate(b: Body, x: Text) -> Text:
    """Return x clamped to [0, 1]; 0 for a NaN."""
    return b.at_most(b.select(b.cmp("ogt", x, 0.0), x, 0.0), 1.0)


def _as_int(b: Body, condition: Text) -> Text:
    return b.cast("zext", condition, "i1", "i32")


@function("isnan", "f32", "f64", result="i32")
def isnan(b: Body, x: Text) -> Text:
    """1 for a NaN, else 0."""
    return _as_int(b, b.cmp("uno", x, x))


@function("isinf", "f32", "f64", result="i32")
def isinf(b: Body, x: Text) -> Text:
    """1 for an infinity, else 0."""
    return _as_int(b, b.cmp("oeq", b.abs(x), INF))


@function("isfinite", "f32", "f64", result="i32")
def isfinite(b: Body, x: Text) -> Text:
    """1 for a finite number, else 0."""
    return _as_int(b, b.cmp("olt", b.abs(x), INF))


@function("signbit", "f32", "f64", result="i32")
def signbit(b: Body, x: Text) -> Text:
    """1 where the sign bit is set, else 0."""
    return _as_int(b, b.icmp("slt", b.to_bits(x), 0))
