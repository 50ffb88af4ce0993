"""The shapes of nested values, as plain data: how tensors sit in what a model takes and returns."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import ArtifactError

TRUSTED_PACKAGES = ("transformers",)
"""Packages that may be imported to make a result of the type that the model returned."""


@dataclass(frozen=True)
class Leaf:
    """The place of one tensor (or symbolic number) in flat order."""

    index: int


@dataclass(frozen=True)
class Constant:
    """A value that is the same in every call."""

    value: Any


@dataclass(frozen=True)
class Container:
    """A nested value.

    Args:
        kind: "list", "tuple", "dict", "named_tuple" or "dataclass".
        name: "module:qualified.name" of the type; "" for the plain list, tuple and dict.
        keys: of a dict, or the names of the fields; empty for lists and tuples.
        children: in the order of `keys`.
        type: the type itself, where it is known in this process.
    """

    kind: str
    name: str
    keys: tuple[Any, ...]
    children: tuple[Structure, ...]
    type: type | None = field(default=None, compare=False, repr=False)


Structure = Leaf | Constant | Container


class StandIn:
    """A result whose own type this process does not know: fields by attribute, by key and by position.

    Positions count the fields that are not None, as in the outputs of Hugging Face models.
    """

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __getitem__(self, key: str | int | slice) -> Any:
        return self.__dict__[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.to_tuple())

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({fields})"

    def keys(self) -> list[str]:
        """Return the names of the fields that are not None."""
        return [name for name, value in self.__dict__.items() if value is not None]

    def values(self) -> list[Any]:
        """Return the fields that are not None."""
        return list(self.to_tuple())

    def items(self) -> list[tuple[str, Any]]:
        """Return names and values of the fields that are not None."""
        return [(name, value) for name, value in self.__dict__.items() if value is not None]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, `default` if there is none of that name."""
        return self.__dict__.get(name, default)

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, in order."""
        return tuple(value for value in self.__dict__.values() if value is not None)


def type_name(kind: type) -> str:
    """Return "module:qualified.name" of a type."""
    return f"{kind.__module__}:{kind.__qualname__}"


def open_container(value: Any) -> Container | None:
    """Return the container that `value` is, with the values in it as children; None if it is none."""
    kind = type(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return Container("named_tuple", type_name(kind), tuple(value._fields), tuple(value), kind)
    if isinstance(value, (list, tuple)):
        plain = "list" if isinstance(value, list) else "tuple"
        return Container(plain, "" if kind in (list, tuple, torch.Size) else type_name(kind), (), tuple(value), kind)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(f.name for f in dataclasses.fields(value))
        return Container("dataclass", type_name(kind), names, tuple(getattr(value, n) for n in names), kind)
    if isinstance(value, Mapping):
        return Container("dict", "" if kind is dict else type_name(kind), tuple(value), tuple(value.values()), kind)
    return None


def describe(value: Any, leaf: Callable[[str, Any], Structure | None], path: str = "") -> Structure:
    """Return the structure of `value`.

    Args:
        value: nested lists, tuples, mappings and dataclasses of anything.
        leaf: called with the path and the value of each thing that is not None; returns its structure, None for a container
            to be opened.
        path: of `value`, such as "outputs.hidden_states.2".
    """
    if value is None:
        return Constant(None)
    found = leaf(path, value)
    if found is not None:
        return found
    container = open_container(value)
    if container is None:
        return Constant(value)
    keys = container.keys or range(len(container.children))
    prefix = f"{path}." if path else ""
    children = tuple(describe(child, leaf, f"{prefix}{key}") for key, child in zip(keys, container.children, strict=True))
    return dataclasses.replace(container, children=children)


def build(structure: Structure, leaves: Sequence[Any]) -> Any:
    """Return the nested value of a structure; the types are those that it was described from where they are known."""
    if isinstance(structure, Leaf):
        return leaves[structure.index]
    if isinstance(structure, Constant):
        return structure.value
    children = [build(child, leaves) for child in structure.children]
    if structure.kind in ("list", "tuple"):
        plain = list if structure.kind == "list" else tuple
        kind = _type_of(structure) if structure.name else None
        return kind(children) if kind is not None else plain(children)
    fields = dict(zip(structure.keys, children, strict=True))
    if structure.kind == "dict":
        return _build_mapping(structure, fields)
    kind = _type_of(structure)
    if kind is None:
        return type(structure.name.rpartition(".")[2].rpartition(":")[2], (StandIn,), {})(**fields)
    if structure.kind == "named_tuple":
        return kind(**fields)
    given = {f.name for f in dataclasses.fields(kind) if f.init}
    made = kind(**{name: value for name, value in fields.items() if name in given})
    for name in fields.keys() - given:
        object.__setattr__(made, name, fields[name])
    return made


def _build_mapping(structure: Container, fields: dict[Any, Any]) -> Any:
    kind = _type_of(structure) if structure.name else None
    if kind is None:
        return OrderedDict(fields) if structure.name == "collections:OrderedDict" else fields
    try:
        return kind(fields)
    except TypeError:
        # Such as a defaultdict, whose first argument is another thing.
        made = kind()
        made.update(fields)
        return made


def _type_of(structure: Container) -> type | None:
    if structure.type is not None:
        return structure.type
    module, _, path = structure.name.partition(":")
    if module not in sys.modules and module.partition(".")[0] in TRUSTED_PACKAGES:
        try:
            __import__(module)
        except ImportError:
            return None
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        return None
    # A name in a file must not decide which callable runs: only what can hold results is made.
    holds = {
        "list": issubclass(found, list),
        "tuple": issubclass(found, tuple),
        "dict": issubclass(found, Mapping),
        "named_tuple": issubclass(found, tuple) and hasattr(found, "_fields"),
        "dataclass": dataclasses.is_dataclass(found),
    }
    return found if holds[structure.kind] else None


PLAIN = (type(None), bool, int, float, str)


def to_data(structure: Structure) -> Any:
    """Return a structure as values that JSON can hold."""
    if isinstance(structure, Leaf):
        return {"leaf": structure.index}
    if isinstance(structure, Constant):
        return {"constant": constant_to_data(structure.value)}
    children = [to_data(child) for child in structure.children]
    return {"kind": structure.kind, "name": structure.name, "keys": list(structure.keys), "children": children}


def from_data(data: Any) -> Structure:
    """Return the structure that `to_data` wrote.

    Raises:
        ArtifactError: the data is something else.
    """
    match data:
        case {"leaf": int(index)}:
            return Leaf(index)
        case {"constant": value}:
            return Constant(constant_from_data(value))
        case {
            "kind": "list" | "tuple" | "dict" | "named_tuple" | "dataclass" as kind,
            "name": str(name),
            "keys": list(keys),
            "children": list(children),
        }:
            return Container(kind, name, tuple(keys), tuple(from_data(child) for child in children))
    raise ArtifactError(f"not the structure of a value: {str(data)[:80]}")


@dataclass(frozen=True)
class Opaque:
    """A constant that only the process that captured the model knows.

    Args:
        text: how it printed.
    """

    text: str


def constant_to_data(value: Any) -> Any:
    """Return a constant as something that JSON can hold."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    return {"opaque": value.text if isinstance(value, Opaque) else repr(value)}


def constant_from_data(data: Any) -> Any:
    """Return the constant that `constant_to_data` wrote."""
    match data:
        case {"dtype": str(name)}:
            dtype = getattr(torch, name, None)
            if isinstance(dtype, torch.dtype):
                return dtype
        case {"device": str(name)}:
            return torch.device(name)
        case {"opaque": str(text)}:
            return Opaque(text)
        case None | bool() | int() | float() | str():
            return data
    raise ArtifactError(f"not a constant: {str(data)[:80]}")
