"""The `__nv_*` symbols of CUDA's libdevice that kernels reach through `triton.language.extra.libdevice`."""

from __future__ import annotations

from dataclasses import dataclass

from graphwright.runtime.triton_cpu.errors import UnsupportedError

from .registry import FUNCTIONS


@dataclass(frozen=True, slots=True)
class Entry:
    """What a symbol is computed by: the arguments of `call`, and the types of the operands and of the result."""

    name: str
    element: str
    args: tuple[str, ...]
    result: str


FLOAT_FUNCTIONS = (
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "copysign", "cos", "cosh", "cospi",
    "erf", "erfc", "erfcinv", "erfcx", "erfinv", "exp", "exp10", "exp2", "expm1", "fabs", "fdim", "floor", "fma",
    "fmod", "hypot", "ilogb", "j0", "j1", "jn", "ldexp", "lgamma", "log", "log10", "log1p", "log2", "logb",
    "nearbyint", "nextafter", "norm3d", "norm4d", "normcdf", "normcdfinv", "pow", "powi", "rcbrt", "remainder",
    "rhypot", "rint", "rnorm3d", "rnorm4d", "round", "rsqrt", "sin", "sinh", "sinpi", "sqrt", "tan", "tanh", "tgamma",
    "trunc", "y0", "y1", "yn",
)  # fmt: skip
"""Functions whose symbols are `__nv_<name>f` and `__nv_<name>`."""

OTHERS: dict[str, tuple[str, str]] = {
    "scalbnf": ("ldexp", "f32"), "scalbn": ("ldexp", "f64"), "saturatef": ("saturate", "f32"),
    "fmaf_rn": ("fma", "f32"), "fma_rn": ("fma", "f64"), "fast_fdividef": ("div", "f32"), "frsqrt_rn": ("rsqrt", "f32"),
    "isnanf": ("isnan", "f32"), "isnand": ("isnan", "f64"), "isinff": ("isinf", "f32"), "isinfd": ("isinf", "f64"),
    "finitef": ("isfinite", "f32"), "isfinited": ("isfinite", "f64"),
    "signbitf": ("signbit", "f32"), "signbitd": ("signbit", "f64"),
    "llrintf": ("f32_to_i64_rn", "f32"), "llrint": ("f64_to_i64_rn", "f64"),
    "llroundf": ("f32_to_i64_ra", "f32"), "llround": ("f64_to_i64_ra", "f64"),
    "clz": ("clz", "i32"), "clzll": ("clz", "i64"), "popc": ("popc", "i32"), "popcll": ("popc", "i64"),
    "ffs": ("ffs", "i32"), "ffsll": ("ffs", "i64"), "brev": ("brev", "i32"), "brevll": ("brev", "i64"),
    "abs": ("iabs", "i32"), "llabs": ("iabs", "i64"), "mulhi": ("mulhi", "i32"), "umulhi": ("umulhi", "i32"),
    "mul64hi": ("mulhi", "i64"), "umul64hi": ("umulhi", "i64"), "byte_perm": ("byte_perm", "i32"),
    "mul24": ("mul24", "i32"), "umul24": ("umul24", "i32"), "sad": ("sad", "i32"), "usad": ("usad", "i32"),
    "hadd": ("hadd", "i32"), "uhadd": ("uhadd", "i32"), "rhadd": ("rhadd", "i32"), "urhadd": ("urhadd", "i32"),
    "int_as_float": ("i32_as_f32", "i32"), "uint_as_float": ("i32_as_f32", "i32"),
    "float_as_int": ("f32_as_i32", "f32"), "float_as_uint": ("f32_as_i32", "f32"),
    "longlong_as_double": ("i64_as_f64", "i64"), "double_as_longlong": ("f64_as_i64", "f64"),
    "hiloint2double": ("hiloint2double", "f64"), "double2hiint": ("double2hiint", "f64"),
    "double2loint": ("double2loint", "f64"),
    "cyl_bessel_i0f": ("i0", "f32"), "cyl_bessel_i0": ("i0", "f64"),
    "cyl_bessel_i1f": ("i1", "f32"), "cyl_bessel_i1": ("i1", "f64"),
}  # fmt: skip
"""Symbols, without `__nv_`, whose names follow no rule."""

FAST = ("sin", "cos", "tan", "exp", "exp10", "log", "log2", "log10", "pow")
"""`__nv_fast_<name>f` stands for an approximation on a GPU; here it is the accurate function."""

TYPES = {
    "int": "i32", "uint": "ui32", "ll": "i64", "ull": "ui64", "float": "f32", "double": "f64",
}  # fmt: skip


def _table() -> dict[str, tuple[str, str]]:
    found = dict(OTHERS)
    for name in FLOAT_FUNCTIONS:
        found[name + "f"] = (name, "f32")
        found[name] = (name, "f64")
    for name in FAST:
        found[f"fast_{name}f"] = (name, "f32")
    for letter, element in (("f", "f32"), ("d", "f64")):
        for name in ("add", "sub", "mul", "div", "rcp", "sqrt"):
            found[f"{letter}{name}_rn"] = (name, element)
    for source, source_type in TYPES.items():
        for target, target_type in TYPES.items():
            for rounding in ("rn", "rz", "rd", "ru"):
                name, element = f"{source_type}_to_{target_type}_{rounding}", source_type.removeprefix("u")
                if (name, element) in FUNCTIONS:
                    found[f"{source}2{target}_{rounding}"] = (name, element)
    return {f"__nv_{symbol}": entry for symbol, entry in found.items() if entry in FUNCTIONS}


LIBDEVICE = _table()
"""Symbol -> (name, element) of every libdevice function that is supported."""


def lookup(symbol: str) -> Entry:
    """Find what computes a libdevice symbol.

    Raises:
        UnsupportedError: the symbol is not known, or has no counterpart on a CPU (directed rounding of an arithmetic
            operation, some special functions of f64).
    """
    entry = LIBDEVICE.get(symbol)
    if entry is None:
        raise UnsupportedError(f"libdevice function {symbol}")
    f = FUNCTIONS[entry]
    return Entry(*entry, f.args, f.result)
