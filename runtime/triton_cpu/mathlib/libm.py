"""Functions left to the C library, called lane by lane.

They are out of line, so that a kernel holds one loop of calls per function and width. Each is also known as
"libm.<name>". glibc documents its errors in "Known Maximum Errors in Math Functions"; the gamma and Bessel functions,
whose f32 versions are several ulp off, are called in f64 for f32 too.
"""

from __future__ import annotations

import functools

from graphwright.runtime.triton_cpu.emit import LLVM_TYPES, Text

from .body import Body
from .registry import FUNCTIONS, Function, function_via_f64, nested

BOTH = {"fmod": 2, "remainder": 2, "nextafter": 2}
"""C function -> number of operands; used for f32 and f64."""

WIDENED = {"lgamma": 1, "tgamma": 1, "j0": 1, "j1": 1, "y0": 1, "y1": 1}
"""The same for what f32 computes by the function of f64."""

DOUBLE_ONLY = {
    "sin": 1, "cos": 1, "tan": 1, "asin": 1, "acos": 1, "atan": 1, "atan2": 2, "sinh": 1, "cosh": 1, "tanh": 1,
    "asinh": 1, "acosh": 1, "atanh": 1, "expm1": 1, "log1p": 1, "erf": 1, "erfc": 1, "cbrt": 1, "pow": 2, "hypot": 2,
}  # fmt: skip
"""The same for what has a vector form in f32; there it serves the arguments that the vector form does not."""


def lane_by_lane(b: Body, symbol: str, args: tuple[str, ...], result: str, operands: tuple[Text, ...]) -> Text:
    """Call `symbol` of the C library on every lane.

    Args:
        b: body to write to.
        symbol: C function.
        args: element type of each operand.
        result: element type of the result.
        operands: vectors.
    """
    e = b.emitter
    scalars = [LLVM_TYPES[a] for a in args]
    if b.lanes == 1:
        return e.call(LLVM_TYPES[result], symbol, list(zip(scalars, operands, strict=True)))
    slots = [e.op(f"alloca {b.of(a)}") for a in args]
    out = e.op(f"alloca {b.of(result)}")
    for slot, a, operand in zip(slots, args, operands, strict=True):
        e.raw(f"store {b.of(a)} {operand}, ptr {slot}")
    with e.loop(0, b.lanes, 1) as lane:
        values = [
            (scalar, e.op(f"load {scalar}, ptr {e.address(scalar, slot, lane.index)}"))
            for slot, scalar in zip(slots, scalars, strict=True)
        ]
        value = e.call(LLVM_TYPES[result], symbol, values)
        e.raw(f"store {LLVM_TYPES[result]} {value}, ptr {e.address(LLVM_TYPES[result], out, lane.index)}")
    return e.op(f"load {b.of(result)}, ptr {out}")


def libm_function(name: str, element: str, symbol: str, args: tuple[str, ...], result: str) -> None:
    """Register a C function under `name`."""

    def write(b: Body, *operands: Text) -> Text:
        return lane_by_lane(b, symbol, args, result, operands)

    FUNCTIONS[name, element] = Function(write, args, result, out_of_line=True)


def _register() -> None:
    for element, suffix in (("f32", "f"), ("f64", "")):
        for name, arity in {**BOTH, **DOUBLE_ONLY}.items():
            libm_function(f"libm.{name}", element, name + suffix, (element,) * arity, element)
            if name in BOTH or element == "f64":
                libm_function(name, element, name + suffix, (element,) * arity, element)
        libm_function("libm.fma", element, "fma" + suffix, (element,) * 3, element)
        libm_function("ldexp", element, "ldexp" + suffix, (element, "i32"), element)
        libm_function("ilogb", element, "ilogb" + suffix, (element,), "i32")
        libm_function("logb", element, "logb" + suffix, (element,), element)
        libm_function("jn", element, "jn" + suffix, ("i32", element), element)
        libm_function("yn", element, "yn" + suffix, ("i32", element), element)
    for name, arity in WIDENED.items():
        libm_function(name, "f64", name, ("f64",) * arity, "f64")
        function_via_f64(name, arity=arity)(functools.partial(_same_in_f64, name))


def _same_in_f64(name: str, b: Body, *args: Text) -> Text:
    return nested(b, name, *args)


_register()
