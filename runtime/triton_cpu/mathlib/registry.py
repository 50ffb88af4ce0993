"""The table of functions, and the emission of a call."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphwright.runtime.triton_cpu.emit import LLVM_TYPES, Emitter, Text, mangle, vector_type
from graphwright.runtime.triton_cpu.errors import UnsupportedError
from graphwright.runtime.triton_cpu.isa import Isa

from .body import Body

Writer = Callable[..., Text]
"""Writes the instructions: (body, *operands) -> result."""


@dataclass(frozen=True, slots=True)
class Function:
    """An elementary function on one element type.

    Args:
        write: emits the instructions.
        args: element type of each operand.
        result: element type of the result.
        inline: emit at the call itself rather than in a helper function (for one or two instructions).
        out_of_line: keep the helper from being inlined (for what calls libm lane by lane).
    """

    write: Writer
    args: tuple[str, ...]
    result: str
    inline: bool = False
    out_of_line: bool = False


FUNCTIONS: dict[tuple[str, str], Function] = {}
"""(name, element) -> the function; filled by the modules of this package."""


def function(
    name: str,
    *elements: str,
    arity: int = 1,
    result: str = "",
    inline: bool = False,
) -> Callable[[Writer], Writer]:
    """Register a writer as `name` on each of `elements`, the type of the operands and, by default, of the result."""

    def register(write: Writer) -> Writer:
        for element in elements:
            FUNCTIONS[name, element] = Function(write, (element,) * arity, result or element, inline)
        return write

    return register


def function_via_f64(name: str, *, arity: int = 1) -> Callable[[Writer], Writer]:
    """Register an f32 function whose writer computes in f64: it is given a body and operands of that type."""

    def register(write: Writer) -> Writer:
        def widen(b: Body, *args: Text) -> Text:
            wide = (b.cast("fpext", a, "f32", "f64") for a in args)
            return b.cast("fptrunc", write(b.widened(), *wide), "f64", "f32")

        FUNCTIONS[name, "f32"] = Function(widen, ("f32",) * arity, "f32")
        return write

    return register


def nested(b: Body, name: str, *args: Text) -> Text:
    """Call another function of the table on the element type of `b`."""
    return call(b.emitter, b.isa, name, b.element, b.lanes, args)


def find(name: str, element: str) -> Function:
    """Look a function up.

    Raises:
        UnsupportedError: there is none of that name on that element type.
    """
    found = FUNCTIONS.get((name, element))
    if found is None:
        near = difflib.get_close_matches(name, sorted({n for n, e in FUNCTIONS if e == element}), n=1)
        raise UnsupportedError(f"math function {name!r} on {element}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return found


def call(e: Emitter, isa: Isa, name: str, element: str, lanes: int, args: Sequence[Text]) -> Text:
    """Emit a call of an elementary function.

    The function is emitted once per (name, element, lanes) as an internal helper at module level.

    Args:
        e: emitter of the kernel.
        isa: instruction set of the kernel.
        name: such as "exp"; the keys of `FUNCTIONS` list them.
        element: "f32" or "f64" ("i32" or "i64" for the integer functions).
        lanes: a power of two from 1 to 64; 1 is the scalar type.
        args: operands, of the types that `find(name, element).args` tells.

    Returns:
        SSA name of the result, whose element type is `find(name, element).result`.

    Raises:
        UnsupportedError: the function is not known on that type.
    """
    f = find(name, element)
    if len(args) != len(f.args):
        raise UnsupportedError(f"math function {name!r} with {len(args)} operands; it takes {len(f.args)}")
    if f.inline:
        return f.write(Body(e, isa, element, lanes), *args)
    symbol = f"gw.{name}.{mangle(LLVM_TYPES[element], lanes)}"
    types = [vector_type(LLVM_TYPES[a], lanes) for a in f.args]
    result = vector_type(LLVM_TYPES[f.result], lanes)
    if symbol not in e.declarations:
        inner = Emitter()
        operands = [f"%x{i}" for i in range(len(types))]
        value = f.write(Body(inner, isa, element, lanes), *operands)
        for inner_symbol, text in inner.declarations.items():
            e.declare(inner_symbol, text)
        parameters = ", ".join(f"{t} {o}" for t, o in zip(types, operands, strict=True))
        attribute = "noinline" if f.out_of_line else "alwaysinline"
        lines = [f"define internal {result} @{symbol}({parameters}) {attribute} nounwind {{", "entry:", *inner.lines]
        e.declare(symbol, "\n".join([*lines, f"  ret {result} {value}", "}"]))
    return e.op(f"call {result} @{symbol}({', '.join(f'{t} {a}' for t, a in zip(types, args, strict=True))})")
