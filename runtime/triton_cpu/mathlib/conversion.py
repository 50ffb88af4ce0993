"""Conversions between numbers: `f32_to_i32_rn` and the like, and reinterpretations such as `f32_as_i32`.

The last part is the rounding: rn to nearest even, rz towards zero, rd down, ru up. Conversions to integers saturate,
and give 0 for a NaN. The element that the functions are registered on is the source's.
"""

from __future__ import annotations

from graphwright.runtime.triton_cpu.emit import LLVM_TYPES, Text, mangle

from .body import Body
from .registry import FUNCTIONS, Function

ROUNDINGS = {"rn": "rint", "rz": "", "rd": "floor", "ru": "ceil", "ra": "round"}
"""Rounding -> intrinsic that leaves an integer; "ra" is to nearest, halves away from zero."""


def _to_integer(source: str, target: str, rounding: str) -> None:
    signed = target[0] == "i"
    kind = target if signed else target[1:]

    def write(b: Body, x: Text) -> Text:
        x = b.intrinsic(ROUNDINGS[rounding], x) if ROUNDINGS[rounding] else x
        suffix = f"{mangle(LLVM_TYPES[kind], b.lanes)}.{mangle(LLVM_TYPES[source], b.lanes)}"
        return b.emitter.call(b.of(kind), f"llvm.fpto{'s' if signed else 'u'}i.sat.{suffix}", [(b.type, x)])

    FUNCTIONS[f"{source}_to_{target}_{rounding}", source] = Function(write, (source,), kind)


def _from_integer(source: str, target: str) -> None:
    signed = source[0] == "i"
    kind = source if signed else source[1:]

    def write(b: Body, x: Text) -> Text:
        return b.cast("sitofp" if signed else "uitofp", x, kind, target)

    FUNCTIONS[f"{source}_to_{target}_rn", kind] = Function(write, (kind,), target, inline=True)


def _reinterpret(source: str, target: str) -> None:
    def write(b: Body, x: Text) -> Text:
        return b.cast("bitcast", x, source, target)

    FUNCTIONS[f"{source}_as_{target}", source] = Function(write, (source,), target, inline=True)


def _narrow(rounding: str) -> None:
    def write(b: Body, x: Text) -> Text:
        near = b.cast("fptrunc", x, "f64", "f32")
        if rounding == "rn":
            return near
        back = b.cast("fpext", near, "f32", "f64")
        bits = b.cast("bitcast", near, "f32", "i32")
        negative = b.icmp("slt", b.to_bits(x), 0)
        if rounding == "rz":
            wrong = b.cmp("ogt", b.abs(back), b.abs(x))
            inwards = wrong
        else:
            wrong = b.cmp("ogt" if rounding == "rd" else "olt", back, x)
            inwards = b.ints("xor", negative, b.const(1 if rounding == "rd" else 0, "i1"), of="i1")
        # The sign of x, not of a rounded zero, tells which way its neighbours lie: one up in the bits is outwards.
        step = b.select(inwards, b.const(-1, "i32"), b.const(1, "i32"), of="i32")
        moved = b.ints("add", bits, step, of="i32")
        return b.cast("bitcast", b.select(wrong, moved, bits, of="i32"), "i32", "f32")

    FUNCTIONS[f"f64_to_f32_{rounding}", "f64"] = Function(write, ("f64",), "f32")


def _register() -> None:
    for source in ("f32", "f64"):
        for target in ("i32", "ui32", "i64", "ui64"):
            for rounding in ROUNDINGS:
                _to_integer(source, target, rounding)
            _from_integer(target, source)
    for source, target in (("f32", "i32"), ("f64", "i64")):
        _reinterpret(source, target)
        _reinterpret(target, source)
    for rounding in ("rn", "rz", "rd", "ru"):
        _narrow(rounding)


_register()
