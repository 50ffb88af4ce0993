"""The forms in which TTIR prints types, attributes and the words of operations.

Attributes keep their TTIR names, except that those which are bare words in the text get a name, and a few are renamed:

    arith.constant      value: int, float, or list of elements in row-major order
    arith.cmpi, cmpf    predicate: 'slt', 'oeq', ...
    arith.*, math.*     overflow, fastmath: list of flags; exact, nneg: True; rounding: MLIR's name
    tt.get_program_id, tt.get_num_programs    axis: 0, 1 or 2
    tt.load, tt.store   volatile (load), cache: 'none', 'ca', ...; evict: 'evict_normal', ...; boundary_check, padding
    tt.atomic_rmw       kind: 'fadd', ...; sem; scope
    tt.atomic_cas       sem; scope
    tt.dot              precision: 'ieee', 'tf32', ...; max_num_imprecise_acc
    tt.dot_scaled       lhs, rhs: 'e5m2', ...; has_lhs_scale, has_rhs_scale; fastMath, lhs_k_pack, rhs_k_pack
    tt.fp_to_fp         rounding: 'rtne' or 'rtz'
    tt.clampf           propagate_nan: 'none' or 'all'
    tt.reshape          allow_reorder, efficient_layout: True where present
    tt.print            prefix, hex, is_signed
    tt.assert           message
    tt.elementwise_inline_asm   asm_string, constraints, packed_element, pure
    tt.extern_elementwise       symbol, libname, libpath, pure
    tt.descriptor_reduce        kind
    tt.call             callee
    scf.for             unsigned: bool, and those of tl.range, such as 'tt.num_stages'
"""

from __future__ import annotations

from typing import Any

from .errors import TtirSyntaxError
from .ttir import Op, Type
from .ttir_text import parse_dense, parse_number, parse_type, unquote

WORDS = {
    "arith.cmpi": ("predicate",),
    "arith.cmpf": ("predicate",),
    "arith.truncf": ("rounding",),
    "tt.get_program_id": ("axis",),
    "tt.get_num_programs": ("axis",),
    "tt.atomic_rmw": ("kind", "sem", "scope"),
    "tt.atomic_cas": ("sem", "scope"),
    "tt.descriptor_reduce": ("kind",),
    "ttg.barrier": ("space",),
}
"""Names of the attributes that are bare words in the text."""

STRINGS = {"tt.print": "prefix", "tt.assert": "message", "tt.elementwise_inline_asm": "asm_string"}
"""Names of the attributes that are bare strings in the text."""

_FLAGS = frozenset({"exact", "nneg", "allow_reorder", "efficient_layout"})

RENAMED = {
    "isVolatile": "volatile",
    "cacheModifier": "cache",
    "evictionPolicy": "evict",
    "boundaryCheck": "boundary_check",
    "inputPrecision": "precision",
    "maxNumImpreciseAcc": "max_num_imprecise_acc",
    "propagateNan": "propagate_nan",
    "isSigned": "is_signed",
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "tt.load": {"volatile": False, "cache": "none", "evict": "evict_normal"},
    "tt.store": {"cache": "none", "evict": "evict_normal"},
    "tt.dot": {"precision": "ieee", "max_num_imprecise_acc": 0},
    "tt.scan": {"reverse": False},
}

_SAME_TYPE = {"tt.addptr", "tt.clampf", "tt.get_num_programs", "tt.get_program_id", "tt.make_range"} | {
    "tt.mulhiui",
    "tt.precise_divf",
    "tt.precise_sqrt",
}
"""Operations outside arith, math and ub whose printed type is that of the result."""

GENERIC = {"tt.map_elementwise", "tt.reduce", "tt.scan"}
"""Operations that are printed in MLIR's generic form, which spells the attributes of others in ways not known here."""

ABBREVIATED = {
    "tt.advance": "!tt.ptr",
    "tt.make_tensor_ptr": "!tt.ptr",
    "tt.make_tensor_descriptor": "!tt.tensordesc",
}
"""Operations that print only what is between the brackets of their (last) type."""


def read_types(tokens: list[str], i: int) -> tuple[int, list[Type]]:
    """Read `type, type * type` or `(type, type)`."""
    types: list[Type] = []
    if tokens[i] == "(":
        i += 1
        while tokens[i] != ")":
            types.append(parse_type(tokens[i]))
            i += 1 + (tokens[i + 1] == ",")
        return i + 1, types
    end = len(tokens)
    while True:
        types.append(parse_type(tokens[i]))
        i += 1
        if i == end or tokens[i] not in (",", "*"):
            return i, types
        i += 1


def read_attributes(tokens: list[str], i: int, attrs: dict[str, Any]) -> int:
    """Read `{key = value, key}` or `<{...}>` into `attrs`."""
    if tokens[i] not in ("{", "<{"):
        raise TtirSyntaxError("expected {")
    i += 1
    while tokens[i] not in ("}", "}>"):
        key = unquote(tokens[i]) if tokens[i][0] == '"' else tokens[i]
        value: Any = True
        i += 1
        if tokens[i] == "=":
            i, value = _read_attribute(tokens, i + 1)
        attrs[RENAMED.get(key, key)] = value
        if tokens[i] == ",":
            i += 1
    return i + 1


def _read_attribute(tokens: list[str], i: int) -> tuple[int, Any]:
    """Read the value of an attribute, with its type if there is one."""
    token = tokens[i]
    first = token[0]
    value: Any = token
    type_ = ""
    i += 1
    if first == "[":
        value = []
        while tokens[i] != "]":
            i, item = _read_attribute(tokens, i)
            value.append(item)
            i += tokens[i] == ","
        return i + 1, value
    if first == "{":
        value = {}
        return read_attributes(tokens, i - 1, value), value
    if tokens[i] == ":":
        type_ = tokens[i + 1]
        i += 2
    if first == '"':
        value = unquote(token)
    elif token == "true" or token == "false":
        value = token == "true"
    elif token.startswith("array<"):
        element, _, items = token[6:-1].partition(":")
        value = [parse_number(item.strip(), element) for item in items.split(",") if item.strip()]
    elif token.startswith("dense<") and type_:
        value = parse_dense(token, parse_type(type_))
    elif first in "-0123456789":
        value = parse_number(token, type_ or ("f64" if "." in token else "i64"))
    elif not (first.isalpha() or first in "#!@"):
        raise TtirSyntaxError(f"unexpected {token}")
    return i, value


def result_type(name: str, types: list[Type]) -> Type:
    """Return the type of the only result of an operation that does not print it after an arrow."""
    first = types[0]
    if name == "tt.load":
        if first.pointee is None:
            raise TtirSyntaxError("expected a pointer type")
        pointee = parse_type(first.pointee)
        return pointee if pointee.shape else pointee.with_shape(first.shape)
    if name == "arith.cmpi" or name == "arith.cmpf":
        return Type(first.shape, "i1")
    if name == "arith.select":
        return types[-1]
    if name in _SAME_TYPE or name.startswith(("arith.", "math.", "ub.")):
        return first
    if name == "tt.unsplat":
        return first.with_shape(())
    raise TtirSyntaxError("the result type of this operation is not known")


def name_words(op: Op, words: list[str]) -> None:
    """Turn the bare words of an operation into attributes."""
    name, attrs = op.name, op.attrs
    if name == "tt.dot_scaled":
        return  # Its only word, `scale`, is where an operand is.
    if name == "ttg.barrier":
        words = ["".join(words)]
    for word in [word for word in words if word in _FLAGS]:
        attrs[word] = True
        words.remove(word)
    keys = WORDS.get(name, ())
    if len(words) > len(keys):
        raise TtirSyntaxError(f"unexpected {words[-1]}")
    if len(words) < len(keys) and name != "arith.truncf":
        raise TtirSyntaxError(f"expected the {keys[len(words)]}")
    attrs.update(zip(keys, words, strict=False))
    if keys == ("axis",):
        attrs["axis"] = "xyz".index(words[0])
