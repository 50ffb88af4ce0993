"""The lexical level of TTIR text: tokens, types, number literals, strings and source locations.

The printer writes one operation per line, so the unit of reading is a line; `tokenize` splits one.
"""

from __future__ import annotations

import math
import re
import struct
from functools import lru_cache

from .errors import TtirSyntaxError
from .ttir import Type

_STRING = r'"(?:[^"\\]|\\.)*+"'


def _nested(opening: str, closing: str, depth: int) -> str:
    """Regular expression of balanced brackets that may hold strings, up to `depth` levels."""
    plain = rf'[^{opening}{closing}"]'
    inner = rf"(?:{plain}++|{_STRING})*+"
    for _ in range(depth):
        inner = rf"(?:{plain}++|{_STRING}|[{opening}]{inner}[{closing}])*+"
    return rf"[{opening}]{inner}[{closing}]"


_ANGLE = _nested("<", ">", 4)
_TOKEN = re.compile(
    rf"""%[\w$.-]+(?:\#\d+)?            # value
    |loc{_nested("(", ")", 4)}          # location
    |[!\#]?[A-Za-z_][\w$.]*+(?:(?!<\{{){_ANGLE})?  # keyword, operation, alias, type
    |->
    |-?(?:0x[0-9A-Fa-f]+|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)
    |{_STRING}
    |@(?:{_STRING}|[\w$.-]+)            # symbol
    |\^[\w$.-]+                         # block label
    |<\{{|\}}>                          # properties
    |{_ANGLE}                           # abbreviated type
    |//.*                               # comment
    |\S""",
    re.VERBOSE,
)
tokenize = _TOKEN.findall
"""Split a line into tokens; brackets `<...>` and locations `loc(...)` stay whole, and comments are tokens."""

_ESCAPE = re.compile(rb'\\(?:([0-9A-Fa-f]{2})|([\\"nt]))')
_SIMPLE_ESCAPES = {b"\\": b"\\", b'"': b'"', b"n": b"\n", b"t": b"\t"}


def unquote(token: str) -> str:
    """Return the text that a quoted string token stands for."""
    if "\\" not in token:
        return token[1:-1]
    raw = _ESCAPE.sub(lambda m: bytes.fromhex(m[1].decode()) if m[1] else _SIMPLE_ESCAPES[m[2]], token[1:-1].encode())
    return raw.decode(errors="surrogateescape")


# ---------------------------------------------------------------------------------------------------------------- types

_SCALAR = re.compile(r"(?:i[1-9]\d*|bf16|f16|f32|f64|f8E\w+|index)$")
_DIMENSIONS = re.compile(r"(?:\d+x)*")


@lru_cache(maxsize=4096)
def parse_type(token: str) -> Type:
    """Read a type: a scalar, a pointer, a tensor of these, or a tensor descriptor (element "tensordesc").

    Pointers to pointers and to tensors keep the MLIR text of what they point to as `pointee`.

    Raises:
        TtirSyntaxError: the type is none of these.
    """
    if token.startswith("tensor<"):
        body = token[7:-1]
        end = _DIMENSIONS.match(body).end()  # type: ignore[union-attr]
        shape = tuple(int(d) for d in body[:end].split("x")[:-1])
        element = parse_type(body[end:])
        if element.shape:
            raise TtirSyntaxError(f"not a type: {token}")
        return element.with_shape(shape)
    if token.startswith("!tt.ptr<"):
        pointee, _, space = token[8:-1].rpartition(",")
        if not space.strip().isdigit():
            pointee = token[8:-1]
        parse_type(pointee)
        return Type((), "ptr", pointee)
    if token.startswith("!tt.tensordesc<"):
        parse_type(token[15:-1])
        return Type((), "tensordesc", token[15:-1])
    if _SCALAR.match(token):
        return Type((), token)
    raise TtirSyntaxError(f"not a type: {token}")


# ------------------------------------------------------------------------------------------------------------- literals

_FLOAT_FORMATS = {
    # element: (exponent bits, mantissa bits, exponent bias, has infinities)
    "bf16": (8, 7, 127, True),
    "f8E5M2": (5, 2, 15, True),
    "f8E5M2FNUZ": (5, 2, 16, False),
    "f8E4M3": (4, 3, 7, True),
    "f8E4M3FN": (4, 3, 7, False),
    "f8E4M3FNUZ": (4, 3, 8, False),
    "f8E4M3B11FNUZ": (4, 3, 11, False),
}
_STRUCT_FORMATS = {"f16": ("<e", "<H"), "f32": ("<f", "<I"), "f64": ("<d", "<Q")}
_DENSE_BYTES = {"i8": "b", "i16": "h", "i32": "i", "i64": "q", "f16": "H", "bf16": "H", "f32": "I", "f64": "Q"}
_DENSE_BYTES |= {element: "B" for element in _FLOAT_FORMATS if element != "bf16"}


def float_from_bits(bits: int, element: str) -> float:
    """Return the value of a float's bit pattern; a NaN's payload is lost."""
    if element in _STRUCT_FORMATS:
        form, integer = _STRUCT_FORMATS[element]
        return float(struct.unpack(form, struct.pack(integer, bits))[0])
    exponent_bits, mantissa_bits, bias, has_infinity = _FLOAT_FORMATS[element]
    mantissa = bits & ((1 << mantissa_bits) - 1)
    exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = -1.0 if bits >> (mantissa_bits + exponent_bits) & 1 else 1.0
    top = exponent == (1 << exponent_bits) - 1
    if element.endswith("FNUZ"):
        if sign < 0 and not exponent and not mantissa:
            return math.nan
    elif top and (has_infinity or mantissa == (1 << mantissa_bits) - 1):
        return sign * math.inf if has_infinity and not mantissa else math.nan
    if exponent:
        mantissa |= 1 << mantissa_bits
    return sign * math.ldexp(mantissa, max(exponent, 1) - bias - mantissa_bits)


def _round(value: float, element: str) -> float:
    """Round to the element type: a decimal literal has just enough digits to identify its value."""
    if element == "f64" or value == 0 or math.isinf(value):
        return value
    if element in _STRUCT_FORMATS:
        form = _STRUCT_FORMATS[element][0]
        return float(struct.unpack(form, struct.pack(form, value))[0])
    _, mantissa_bits, bias, _ = _FLOAT_FORMATS[element]
    quantum = max(math.frexp(value)[1] - 1, 1 - bias) - mantissa_bits
    return math.ldexp(round(math.ldexp(value, -quantum)), quantum)


@lru_cache(maxsize=4096)
def parse_number(token: str, element: str) -> int | float:
    """Read a literal of an element type: an int (bools as 0 and 1), or a float exact for its type.

    Raises:
        TtirSyntaxError: the token is no literal of that type.
    """
    try:
        if element[0] in "fb":
            if token.startswith("0x"):
                return float_from_bits(int(token, 16), element)
            return _round(float(token), element)
        if token in ("true", "false"):
            return int(token == "true")
        return int(token, 0)
    except (ValueError, KeyError, OverflowError, struct.error):
        raise TtirSyntaxError(f"not a literal of type {element}: {token}") from None


def parse_dense(token: str, type_: Type) -> int | float | list[int | float]:
    """Read `dense<...>`: one number for a splat, otherwise the elements in row-major order.

    Raises:
        TtirSyntaxError: the elements are not literals of the type, or not as many as it has.
    """
    body, element = token[6:-1], type_.element
    if body[:3] == '"0x':
        data = bytes.fromhex(body[3:-1])
        if element not in _DENSE_BYTES or len(data) % struct.calcsize(_DENSE_BYTES[element]):
            raise TtirSyntaxError(f"dense bytes of type {element}")
        count = len(data) // struct.calcsize(_DENSE_BYTES[element])
        items = struct.unpack(f"<{count}{_DENSE_BYTES[element]}", data)
        values = [float_from_bits(v, element) if type_.is_float else v for v in items]
        if len(values) == 1:
            return values[0]
    elif body[:1] != "[":
        return parse_number(body, element)
    else:
        values = [parse_number(v, element) for v in body.translate({91: " ", 93: " ", 44: " "}).split()]
    if len(values) != type_.numel:
        raise TtirSyntaxError(f"{len(values)} elements for {type_}")
    return values


# ------------------------------------------------------------------------------------------------------------ locations

_ALIAS = re.compile(r"^(#loc\d*) = (loc\(.*\))$", re.MULTILINE)
_PLACE = re.compile(rf"({_STRING})(?::(\d+))?|(#loc\d*)")


class Locations:
    """The location aliases of a module, resolved to 'file:line' on demand."""

    def __init__(self, text: str) -> None:
        self._aliases: dict[str, str] = dict(_ALIAS.findall(text))
        self._known: dict[str, str] = {"": ""}

    def line(self, location: str) -> str:
        """Return 'file:line' of a token `loc(...)`: the first place it names, which for a call site is the callee's."""
        known = self._known.get(location)
        if known is None:
            self._known[location] = ""  # An alias that is defined by itself ends here.
            known = ""
            for file, line, alias in _PLACE.findall(location, 4):
                known = f"{unquote(file)}:{line}" if line else self.line(self._aliases.get(alias, ""))
                if known:
                    break
            self._known[location] = known
        return known
