"""Conversions of fp8e4b15, a type of Triton's front end alone: in the IR its values are bytes.

It is the upper byte of fp16's bits, shifted left by one bit after the sign, and has neither infinities nor NaN. The results
are those of Triton on NVIDIA GPUs.
"""

from __future__ import annotations

from typing import Any

from triton.language import core

GREATEST = 0x3F00
"""Bits of 1.75 in fp16: what is larger, NaN included, becomes this number."""


def convert(value: Any, target: Any, semantic: Any) -> Any:
    """Convert a tensor from or to fp8e4b15.

    Args:
        value: the tensor.
        target: the type to convert to; its shape is the tensor's.
        semantic: Triton's builder of operations.
    """
    if value.dtype.is_fp8e4b15():
        return _widen(value, semantic).to(target.scalar, _semantic=semantic)
    if not value.dtype.is_fp16():
        single = value.to(core.float32, "rtz" if value.dtype.is_fp64() else None, _semantic=semantic)
        value = single.to(core.float16, "rtz", _semantic=semantic)
    return _narrow(value, semantic)


def _widen(value: Any, semantic: Any) -> Any:
    bits = semantic.bitcast(value, core.uint8).to(core.uint16, _semantic=semantic)
    sign = (bits.__and__(0x80, _semantic=semantic)).__lshift__(8, _semantic=semantic)
    magnitude = bits.__and__(0x7F, _semantic=semantic).__lshift__(7, _semantic=semantic)
    return semantic.bitcast(sign.__or__(magnitude, _semantic=semantic), core.float16)


def _narrow(value: Any, semantic: Any) -> Any:
    bits = semantic.bitcast(value, core.uint16)
    sign = bits.__and__(0x8000, _semantic=semantic).__rshift__(8, _semantic=semantic)
    limit = core.full(bits.shape, GREATEST, core.uint16, _semantic=semantic)
    magnitude = core.minimum(bits.__and__(0x7FFF, _semantic=semantic), limit, _semantic=semantic)
    # Ties round away from zero.
    code = magnitude.__add__(0x40, _semantic=semantic).__rshift__(7, _semantic=semantic)
    byte = sign.__or__(code, _semantic=semantic).to(core.uint8, _semantic=semantic)
    return semantic.bitcast(byte, core.float8e4b15)
