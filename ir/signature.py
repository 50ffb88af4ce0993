"""How a call's arguments become a program's tensors, and its results what the model returned."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .containers import (
    Constant,
    Container,
    Leaf,
    Structure,
    build,
    constant_from_data,
    constant_to_data,
    from_data,
    open_container,
    to_data,
)
from .errors import ArtifactError, InputError, unknown
from .packing import Packing

POSITIONAL = ("positional_only", "positional_or_keyword")


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model's forward.

    Args:
        name: its name.
        kind: "positional_only", "positional_or_keyword", "var_positional", "keyword_only" or "var_keyword".
        default: its default where that is a plain value; passing it explicitly changes nothing.
        has_default: whether it has one.
    """

    name: str
    kind: str
    default: Any = None
    has_default: bool = False


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a call passes.

    Args:
        name: its path in the arguments, such as "input_ids" or "batch.mask".
        dtype: its dtype.
        device: its device, such as "cpu" or "cuda:0".
        shape: sizes: numbers, names of dimensions, or formulas of these such as "2*tokens".
    """

    name: str
    dtype: torch.dtype
    device: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(str(n) for n in self.shape)}] on {self.device}"


@dataclass(frozen=True)
class Range:
    """What a dimension may be: `low` to `high`, both included; None for no limit."""

    low: int
    high: int | None


@dataclass(frozen=True, eq=False)
class Signature:
    """How a model is called.

    Args:
        parameters: those of the model's forward, in order.
        arguments: what each argument that was passed at capture looks like, by name: those of a `*args` parameter are
            "name.0", "name.1" and so on. Constants need not be passed again.
        tensors: the tensors in it, in flat order.
        dimensions: the range of each dimension in `tensors`.
        results: what the model returned, as a structure of flat results.
        packing: what is worked out of the tensors of a call, and handed to the program after them; None for nothing.

    Raises:
        ArtifactError: the packing does not fit the tensors.
    """

    parameters: tuple[Parameter, ...]
    arguments: Mapping[str, Structure]
    tensors: tuple[TensorSpec, ...]
    dimensions: Mapping[str, Range]
    results: Structure
    packing: Packing | None = None
    _checks: list[Any] = field(init=False, repr=False)
    _positional: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        positional = [p.name for p in self.parameters if p.kind in POSITIONAL]
        spread = next((p.name for p in self.parameters if p.kind == "var_positional"), None)
        if spread is not None:
            positional += [name for name in self.arguments if name.startswith(f"{spread}.")]
        object.__setattr__(self, "_positional", tuple(positional))
        checks = [(spec, spec.dtype, torch.device(spec.device), spec.shape) for spec in self.tensors]
        object.__setattr__(self, "_checks", checks)
        if self.packing is not None:
            mask = self.tensors[self.packing.mask] if self.packing.mask < len(self.tensors) else None
            if mask is None or len(mask.shape) != 2 or self.packing.dimension in self.dimensions:
                raise ArtifactError(
                    f"packing: tensor {self.packing.mask} is no mask [batch, tokens], or a dimension is there twice"
                )

    # -- calling

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the tensors of a call, in flat order, checked, and what is derived of them.

        Raises:
            InputError: the arguments are not what the model was captured for.
        """
        tensors = self.collect(args, kwargs)
        self.check(tensors)
        return [*tensors, *self.derive(tensors)]

    def derive(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return what the program takes beside the tensors of a call, worked out of these.

        Raises:
            InputError: the tensor that it is worked out of is not what the model was captured for.
        """
        if self.packing is None:
            return []
        mask = tensors[self.packing.mask]
        _, dtype, device, shape = self._checks[self.packing.mask]
        if mask.dtype is not dtype or mask.device != device or mask.dim() != len(shape):
            self.check(tensors)
        return self.packing.derive(mask)

    def collect(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the tensors of a call in flat order; their dtypes, devices and sizes are not looked at.

        Raises:
            InputError: an argument is missing or unknown, is no tensor where one is needed, or is another constant.
        """
        values = dict(zip(self._positional, args, strict=False))
        if len(args) > len(self._positional):
            raise InputError(
                f"{len(args)} positional arguments were passed, and there are {len(self._positional)}{self._expected()}"
            )
        if kwargs:
            for name in kwargs:
                if name in values:
                    raise InputError(f"{name!r} was passed twice: by position and by name")
            values.update(kwargs)
        tensors: list[Any] = [None] * len(self.tensors)
        used = 0
        for name, structure in self.arguments.items():
            if name in values:
                used += 1
                value = values[name]
                if type(structure) is Leaf and isinstance(value, torch.Tensor):
                    tensors[structure.index] = value
                else:
                    self._take(name, structure, value, tensors)
            elif type(structure) is not Constant:
                self._require(name, structure, kwargs)
        if used != len(values):
            self._check_extra(values)
        return tensors

    def check(self, tensors: Sequence[torch.Tensor]) -> dict[str, int]:
        """Check dtypes, devices and sizes of flat tensors; return the dimensions.

        Raises:
            InputError: a tensor is not what the model was captured for.
        """
        sizes: dict[str, int] = {}
        later = []
        for (spec, dtype, device, shape), tensor in zip(self._checks, tensors, strict=True):
            if tensor.dtype is not dtype or tensor.device != device or tensor.dim() != len(shape):
                self._refuse_kind(spec, tensor)
            for dim, (expected, found) in enumerate(zip(shape, tensor.shape, strict=True)):
                if type(expected) is int:
                    if found != expected:
                        raise InputError(
                            f"{spec.name}: dimension {dim} must be {expected}, which is fixed since capture, and is {found} "
                            f"(expected {spec}, found shape {list(tensor.shape)})"
                        )
                elif expected in self.dimensions:
                    if sizes.setdefault(str(expected), found) != found:
                        raise InputError(
                            f"{spec.name}: dimension {dim} is {found}, and {expected!r} is {sizes[str(expected)]} in "
                            f"{self._first_with(str(expected))}: they must be equal"
                        )
                else:
                    later.append((spec, dim, str(expected), found))
        for name, found in sizes.items():
            allowed = self.dimensions[name]
            if found < allowed.low or (allowed.high is not None and found > allowed.high):
                self._refuse_range(name, found)
        for spec, dim, formula, found in later:
            expected = evaluate(formula, sizes)
            if expected != found:
                raise InputError(
                    f"{spec.name}: dimension {dim} must be {formula} = {expected}, and is {found} (expected {spec})"
                )
        return sizes

    def unflatten(self, results: Sequence[Any]) -> Any:
        """Return flat results in the containers that the model returned."""
        return build(self.results, results)

    # -- errors, off the common path

    def _expected(self) -> str:
        return f": the model takes {', '.join(self.arguments) or 'no arguments'}"

    def _take(self, path: str, structure: Structure, value: Any, tensors: list[Any]) -> None:
        if isinstance(structure, Leaf):
            if not isinstance(value, torch.Tensor):
                spec = self.tensors[structure.index]
                raise InputError(f"{path}: expected a tensor, {spec}, and found {type(value).__name__} {_short(value)}")
            tensors[structure.index] = value
        elif isinstance(structure, Constant):
            if not same_constant(structure.value, value):
                raise InputError(
                    f"{path}={_short(value)}: the model was captured with {path}={_short(structure.value)}, which is fixed "
                    f"since; capture it again with the other value"
                )
        else:
            opened = open_container(value)
            fits = opened is not None and (opened.keys == structure.keys or set(opened.keys) == set(structure.keys))
            if opened is None or not fits or len(opened.children) != len(structure.children):
                raise InputError(
                    f"{path}: expected {_outline(structure)}, and found {_outline(opened) if opened else _short(value)}"
                )
            inside = dict(zip(opened.keys or range(len(opened.children)), opened.children, strict=True))
            for key, child in zip(structure.keys or range(len(structure.children)), structure.children, strict=True):
                self._take(f"{path}.{key}", child, inside[key], tensors)

    def _require(self, name: str, structure: Structure, kwargs: Mapping[str, Any]) -> None:
        if not _has_leaf(structure):
            return
        extra = [given for given in kwargs if given not in self.arguments]
        hint = f" ({extra[0]!r} is not an argument of it)" if extra else ""
        raise InputError(f"the argument {name!r} is missing{hint}{self._expected()}")

    def _check_extra(self, values: Mapping[str, Any]) -> None:
        parameters = {p.name: p for p in self.parameters}
        for name, value in values.items():
            if name in self.arguments or (value is None and name in parameters):
                continue
            parameter = parameters.get(name)
            if parameter is None:
                raise InputError(unknown("argument", name, self.arguments))
            if not (parameter.has_default and same_constant(parameter.default, value)):
                raise InputError(
                    f"{name}={_short(value)}: the model was captured without {name!r}; capture it again with it"
                    f"{self._expected()}"
                )

    def _refuse_kind(self, spec: TensorSpec, tensor: torch.Tensor) -> None:
        found = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
        what = "dtype" if tensor.dtype != spec.dtype else "device" if tensor.device != torch.device(spec.device) else "rank"
        raise InputError(f"{spec.name}: wrong {what}: expected {spec}, and found {found}")

    def _refuse_range(self, name: str, found: int) -> None:
        allowed = self.dimensions[name]
        limit = f"at least {allowed.low}" if allowed.high is None else f"from {allowed.low} to {allowed.high}"
        raise InputError(f"{self._first_with(name)}: {name!r} must be {limit}, and is {found}")

    def _first_with(self, name: str) -> str:
        return next(f"{spec.name} (dimension {spec.shape.index(name)})" for spec in self.tensors if name in spec.shape)

    # -- files

    def to_json(self) -> str:
        """Return the signature as JSON; `from_json` reads it."""
        data = {
            "parameters": [[p.name, p.kind, p.has_default, constant_to_data(p.default)] for p in self.parameters],
            "arguments": {name: to_data(structure) for name, structure in self.arguments.items()},
            "tensors": [[t.name, constant_to_data(t.dtype), t.device, list(t.shape)] for t in self.tensors],
            "dimensions": {name: [r.low, r.high] for name, r in self.dimensions.items()},
            "results": to_data(self.results),
        }
        if self.packing is not None:
            packing = self.packing
            data["packing"] = [packing.mask, packing.inverted, packing.multiple, list(packing.parts), packing.dimension]
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> Signature:
        """Return the signature that `to_json` wrote.

        Raises:
            ArtifactError: the text is something else.
        """
        try:
            data = json.loads(text)
            packing = None
            if data.get("packing") is not None:
                mask, inverted, multiple, parts, dimension = data["packing"]
                packing = Packing(mask, inverted, multiple, tuple(parts), dimension)
            return cls(
                tuple(Parameter(name, kind, constant_from_data(d), bool(has)) for name, kind, has, d in data["parameters"]),
                {str(name): from_data(structure) for name, structure in data["arguments"].items()},
                tuple(TensorSpec(n, constant_from_data(t), d, tuple(shape)) for n, t, d, shape in data["tensors"]),
                {str(name): Range(low, high) for name, (low, high) in data["dimensions"].items()},
                from_data(data["results"]),
                packing,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ArtifactError(f"not the signature of a model: {error}") from error


def same_constant(expected: Any, found: Any) -> bool:
    """Return whether an argument is the constant it was at capture."""
    if expected is found:
        return True
    if isinstance(found, torch.Tensor) or type(expected) is not type(found):
        return (
            isinstance(expected, int | float)
            and type(found) in (int, float)
            and type(expected) is not bool
            and expected == found
        )
    return bool(expected == found)


_OPERATIONS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def evaluate(formula: str, sizes: Mapping[str, int]) -> int:
    """Return the value of a size formula: numbers, names, + - * // % and parentheses.

    Raises:
        InputError: it holds something else, or a name that is not in `sizes`.
    """

    def value(node: ast.AST) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in sizes:
                return sizes[name]
            case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATIONS:
                return int(_OPERATIONS[type(operation)](value(left), value(right)))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
        raise InputError(f"the size {formula!r} cannot be worked out from {dict(sizes)}")

    return value(ast.parse(formula, mode="eval").body)


def _has_leaf(structure: Structure) -> bool:
    if isinstance(structure, Container):
        return any(_has_leaf(child) for child in structure.children)
    return isinstance(structure, Leaf)


def _outline(structure: Container) -> str:
    inside = ", ".join(str(k) for k in structure.keys) if structure.keys else f"{len(structure.children)} items"
    return f"a {structure.name.rpartition(':')[2] or structure.kind} of {inside or 'nothing'}"


def _short(value: Any) -> str:
    text = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
