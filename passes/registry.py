"""The passes by name, and passes written as text: `name:option=value,option=value`."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.metadata
import types
import typing
from collections.abc import Iterable
from typing import Any

from graphwright.ir.errors import OptionError, unknown

from .base import Pass

ENTRY_POINTS = "graphwright.passes"
"""Other packages add passes under this group: name -> "module:Class"."""

PASSES: dict[str, str] = {
    "cached-decode": "graphwright.passes.kv.cached_decode:CachedDecode",
    "common-subexpressions": "graphwright.passes.cleanup.common_subexpressions:CommonSubexpressions",
    "constant-folding": "graphwright.passes.cleanup.constant_folding:ConstantFolding",
    "dead-code": "graphwright.passes.cleanup.dead_code:DeadCode",
    "dense-when-short": "graphwright.passes.sparsity.dense_when_short:DenseWhenShort",
    "drop-layers": "graphwright.passes.depth.drop_layers:DropLayers",
    "fuse-projections": "graphwright.passes.fusing.projections:FuseProjections",
    "known-tables": "graphwright.passes.cleanup.known_tables:KnownTables",
    "last-token": "graphwright.passes.kv.last_token:LastToken",
    "merge-tokens": "graphwright.passes.tokens.merge_tokens:MergeTokens",
    "pack-tokens": "graphwright.passes.packing.pack_tokens:PackTokens",
    "quantize-cache": "graphwright.passes.kv.quantize_cache:QuantizeCache",
    "raise-attention": "graphwright.passes.raising.attention:RaiseAttention",
    "raise-gelu": "graphwright.passes.raising.gelu:RaiseGelu",
    "raise-glu": "graphwright.passes.raising.glu:RaiseGlu",
    "raise-norms": "graphwright.passes.raising.norms:RaiseNorms",
    "raise-rotary": "graphwright.passes.raising.rotary:RaiseRotary",
    "redundant-casts": "graphwright.passes.cleanup.redundant_casts:RedundantCasts",
    "redundant-layout": "graphwright.passes.cleanup.redundant_layout:RedundantLayout",
    "ring-cache": "graphwright.passes.kv.ring_cache:RingCache",
    "split-bias": "graphwright.passes.fusing.split_bias:SplitBias",
    "tier-cache": "graphwright.passes.kv.tier_cache:TierCache",
    "vertical-slash": "graphwright.passes.sparsity.vertical_slash:VerticalSlash",
    "window-attention": "graphwright.passes.sparsity.window_attention:WindowAttention",
}
"""The passes of this package, imported when they are asked for."""


def pass_names() -> list[str]:
    """Return the names of all passes, those of other packages included, sorted."""
    return sorted({*PASSES, *_installed()})


def pass_class(name: str) -> type[Pass]:
    """Return the pass called `name`.

    Raises:
        OptionError: there is none.
    """
    target = PASSES.get(name)
    if target is None:
        target = _installed().get(name)
    if target is None:
        raise OptionError(unknown("pass", name, pass_names()))
    module, _, attribute = target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise OptionError(f"{target}, registered as pass {name!r}, is not a Pass")
    return found


def parse_pass(text: str) -> Pass:
    """Return the pass that a text such as "fuse-projections:minimum=3" describes.

    Values are written as in Python, without quotes for text; a list's items are separated by `+`.

    Raises:
        OptionError: the pass or an option is unknown, or a value is not of the option's type.
    """
    name, _, rest = (part.strip() for part in text.partition(":"))
    cls = pass_class(name)
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        option, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise OptionError(f"{name}: {item!r} should be written option=value")
        if option not in known:
            raise OptionError(f"{name}: {unknown('option', option, known)}")
        if option in options:
            raise OptionError(f"{name}: {option} is given twice")
        options[option] = _parse_value(f"{name}: {option}", value, hints[option])
    return cls(**options)


def format_pass(given: Pass) -> str:
    """Return the text that `parse_pass` turns into an equal pass: the name and the options that are not at their default."""
    options = []
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if value != default or type(value) is not type(default):
            options.append(f"{field.name}={_format_value(value)}")
    return ":".join(filter(None, (given.name, ",".join(options))))


def as_passes(given: Iterable[Pass | str]) -> list[Pass]:
    """Return passes for passes and their texts.

    Raises:
        OptionError: a pass or an option is unknown, or one text was given where a list is expected.
    """
    if isinstance(given, str):
        raise OptionError(f"passes are a list, and {given!r} is one text: pass [{given!r}]")
    return [parse_pass(item) if isinstance(item, str) else item for item in given]


def _installed() -> dict[str, str]:
    return {entry.name: entry.value for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _parse_value(what: str, text: str, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if text == "none" and type(None) in arguments:
            return None
        problems = []
        for choice in (a for a in arguments if a is not type(None)):
            try:
                return _parse_value(what, text, choice)
            except OptionError as error:
                problems.append(error)
        raise problems[0]
    if origin is tuple:
        return tuple(_parse_value(what, item, arguments[0]) for item in text.split("+") if item)
    if origin is typing.Literal:
        if text not in arguments:
            raise OptionError(f"{what}: {unknown('value', text, map(str, arguments))}")
        return text
    if hint is bool:
        if text not in ("true", "false"):
            raise OptionError(f"{what} must be true or false, got {text!r}")
        return text == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError as error:
            raise OptionError(f"{what} must be {'an integer' if hint is int else 'a number'}, got {text!r}") from error
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        values = {str(member.value): member for member in hint}
        if text not in values:
            raise OptionError(f"{what}: {unknown('value', text, values)}")
        return values[text]
    if hint is str:
        return text
    raise OptionError(f"{what} cannot be given as text; make the pass in Python")


def _format_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "+".join(_format_value(item) for item in value)
    if isinstance(value, enum.Enum):
        return str(value.value)
    return str(value)
