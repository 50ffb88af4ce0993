"""The call that a model is captured with: its tensors, the names of their dimensions, and samples of other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphwright.ir.containers import Constant, Leaf, Structure, build, describe
from graphwright.ir.errors import InputError, OptionError, unknown
from graphwright.ir.signature import POSITIONAL, Parameter

Dynamic = Mapping[str, Mapping[int, str]] | bool | None
"""Names of dimensions by the path of a tensor and the number of the dimension; None for the default, False for none."""

PLAIN_DEFAULTS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Call:
    """How a model is called, apart from the tensors.

    Args:
        parameters: those of the model's forward.
        arguments: structure of each argument by name, those of `*args` as "args.0" and so on.
        names: path of each tensor, in flat order.
        positional: names of the arguments that are passed by position: hooks see the difference.
    """

    parameters: tuple[Parameter, ...]
    arguments: dict[str, Structure]
    names: tuple[str, ...]
    positional: tuple[str, ...]

    def __call__(self, model: torch.nn.Module, tensors: Sequence[Any]) -> Any:
        """Call the model with flat tensors."""
        values = {name: build(structure, tensors) for name, structure in self.arguments.items()}
        args = [values.pop(name) for name in self.positional]
        return model(*args, **values)


def bind(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Call, list[torch.Tensor]]:
    """Return the call, and its tensors in flat order.

    Raises:
        InputError: the arguments do not fit the model's forward, or hold no tensor.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{type(model).__name__}.forward{signature}: {error}") from error
    parameters = tuple(_parameter(p) for p in signature.parameters.values())
    kinds = {p.name: p.kind for p in parameters}
    values: dict[str, Any] = {}
    positional: list[str] = [p.name for p in parameters if p.kind in POSITIONAL][: len(args)]
    for name, value in bound.arguments.items():
        if kinds[name] == "var_positional":
            items = {f"{name}.{i}": item for i, item in enumerate(value)}
            positional += items
            values.update(items)
        elif kinds[name] == "var_keyword":
            values.update(value)
        else:
            values[name] = value
    names: list[str] = []
    tensors: list[torch.Tensor] = []

    def leaf(path: str, value: Any) -> Structure | None:
        if not isinstance(value, torch.Tensor):
            return None
        names.append(path)
        tensors.append(value.detach())
        return Leaf(len(tensors) - 1)

    arguments = {name: describe(value, leaf, name) for name, value in values.items()}
    if not tensors:
        raise InputError(f"{type(model).__name__}: pass the arguments of a sample call; no tensor was found among them")
    return Call(parameters, arguments, tuple(names), tuple(positional)), tensors


def _parameter(parameter: inspect.Parameter) -> Parameter:
    plain = isinstance(parameter.default, PLAIN_DEFAULTS)
    return Parameter(parameter.name, parameter.kind.name.lower(), parameter.default if plain else None, plain)


def add_constant(call: Call, name: str, value: Any) -> Call:
    """Return the call with one more constant argument, which calls of the program may pass or leave out."""
    return replace(call, arguments={**call.arguments, name: Constant(value)})


Names = tuple[dict[int, str], ...]
"""The names of the dynamic dimensions of each tensor, by dimension."""


def dimension_names(call: Call, tensors: Sequence[torch.Tensor], dynamic: Dynamic) -> Names:
    """Return the names of the dimensions that may vary.

    By default dimension 0 of every tensor is "batch"; dimension 1 of integer and boolean tensors of rank 2 or 3, and of
    float tensors of rank 3, is "tokens" if it is as long as the first such, a name of its own otherwise. Sizes of 1 that
    stand beside longer ones of the same name are broadcast, and stay 1.

    Args:
        call: how the model is called.
        tensors: in flat order.
        dynamic: names by path, which replace the default ones of that tensor.

    Raises:
        OptionError: `dynamic` names a tensor or a dimension that is not there, or calls two different sizes by one name.
    """
    if dynamic is False:
        return tuple({} for _ in tensors)
    names = _default_names(call.names, tensors)
    if dynamic is None or dynamic is True:
        return names
    if not isinstance(dynamic, Mapping) or not all(isinstance(dims, Mapping) for dims in dynamic.values()):
        raise OptionError(
            f"dynamic: expected names by tensor and dimension, such as {{{call.names[0]!r}: {{0: 'batch'}}}}, or True, False "
            f"or None, and found {dynamic!r}"
        )
    for path, dims in dynamic.items():
        if path not in call.names:
            raise OptionError(f"dynamic: {unknown('tensor argument', path, call.names)}")
        index = call.names.index(path)
        rank = tensors[index].dim()
        for dim in dims:
            if not -rank <= dim < rank:
                raise OptionError(f"dynamic: {path} has {rank} dimensions, and no dimension {dim}")
        names[index].clear()
        names[index].update({dim % rank: name for dim, name in dims.items()})
    sizes_of(tensors, names)
    return names


def _default_names(paths: Sequence[str], tensors: Sequence[torch.Tensor]) -> Names:
    batch = next((len(t) for t in tensors if t.dim() > 0), 1)
    tokens = next((t.shape[1] for t in tensors if _has_tokens("", t)), None)
    found = []
    for path, tensor in zip(paths, tensors, strict=True):
        name = path.rpartition(".")[2]
        masks = "mask" in name or "bias" in name
        names: dict[int, str] = {}
        for dim, size in enumerate(tensor.shape):
            is_row_of_mask = masks and dim >= tensor.dim() - 2 and size == tokens
            if dim == 0 and size == batch:
                names[dim] = "batch"
            elif dim == 0 and not is_row_of_mask and not (tensor.dim() == 1 and size == tokens):
                if size != 1:
                    names[dim] = f"{name}_batch"
            elif dim == 1 and _has_tokens(name, tensor):
                if name.startswith("decoder_"):
                    names[dim] = "decoder_tokens"
                elif size == tokens or size != 1:
                    names[dim] = "tokens" if size == tokens else f"{name}_tokens"
            elif is_row_of_mask or dim == 0:
                names[dim] = "tokens"
        found.append(names)
    return tuple(found)


def _has_tokens(name: str, tensor: torch.Tensor) -> bool:
    if tensor.is_floating_point():
        return tensor.dim() == 3 or (tensor.dim() == 2 and "mask" in name)
    return tensor.dim() in (2, 3)


def sizes_of(tensors: Sequence[torch.Tensor], names: Names) -> dict[str, int]:
    """Return the size of each named dimension.

    Raises:
        OptionError: one name stands for two sizes.
    """
    sizes: dict[str, int] = {}
    for tensor, dims in zip(tensors, names, strict=True):
        for dim, name in dims.items():
            if sizes.setdefault(name, tensor.shape[dim]) != tensor.shape[dim]:
                raise OptionError(f"dynamic: {name!r} is both {sizes[name]} and {tensor.shape[dim]} in the sample")
    return sizes


def widened(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return sizes of which none is 0 or 1, for which export would make the graph special."""
    result = dict(sizes)
    for name, size in sizes.items():
        if size <= 1:
            new = 3 if "batch" in name else 7
            while new in result.values():
                new += 2
            result[name] = new
    return result


def resized(tensors: Sequence[torch.Tensor], names: Names, sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """Return tensors of other sizes: rows are repeated, or left away from the end."""
    result = []
    for tensor, dims in zip(tensors, names, strict=True):
        for dim, name in dims.items():
            size, wanted = tensor.shape[dim], sizes[name]
            if size == 0 and wanted:
                shape = list(tensor.shape)
                shape[dim] = wanted
                tensor = tensor.new_zeros(shape)
            elif size != wanted:
                tensor = tensor.index_select(dim, torch.arange(wanted, device=tensor.device) % max(size, 1))
        result.append(tensor)
    return result
