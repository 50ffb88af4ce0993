"""Functions that are one instruction or a few."""

from __future__ import annotations

from graphwright.runtime.triton_cpu.emit import Text
from .body import Body
from .registry import function


def _intrinsic(name: str, symbol: str, arity: int = 1) -> None:
    def write(b: Body, *args: Text) -> Text:
        return b.intrinsic(symbol, *args)

    function(name, "f32", "f64", arity=arity, inline=True)(write)


for _name in ("sqrt", "floor", "ceil", "trunc", "rint", "fabs"):
    _intrinsic(_name, _name)
_intrinsic("nearbyint", "rint")
_intrinsic("copysign", "copysign", arity=2)


@function("rsqrt", "f32", "f64", inline=True)
def rsqrt(b: Body, x: Text) -> Text:
    """1 / sqrt(x) by two correctly rounded operations."""
    return b.div(1.0, b.intrinsic("sqrt", x))
