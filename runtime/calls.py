"""Operations of PyTorch that a schedule calls: finding them by name, and nothing that reaches beyond tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from graphwright.ir.errors import ArtifactError

from .schedule import Symbolic, View

NAMESPACES = frozenset({"aten", "prims", "graphwright", "transformers"})
"""Libraries whose operations may be called."""

# They read or write files, or change the process.
_REFUSED_WORDS = ("file", "load", "save", "print", "warn", "seed", "import", "open", "exec", "pickle")


def find_operation(name: str, *, into: bool = False) -> torch._ops.OpOverload:
    """Return the operation called `name`.

    Args:
        name: such as "aten::convolution.default".
        into: return the overload of the same parameters that writes into tensors passed as `out`.

    Raises:
        ArtifactError: there is no such operation in this process, or it may not be called from a schedule: it must return
            tensors, change none of its arguments, and belong to a known library.
    """
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    if namespace not in NAMESPACES:
        raise ArtifactError(f"{name}: only operations of {', '.join(sorted(NAMESPACES))} may be called")
    if not base.isidentifier() or base.startswith("__") or any(word in base for word in _REFUSED_WORDS):
        raise ArtifactError(f"{name}: this operation may not be called from a compiled program")
    packet = getattr(getattr(torch.ops, namespace), base, None)
    found = getattr(packet, overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload):
        library = "" if namespace in ("aten", "prims") else f"; import the library that defines {namespace}:: first"
        raise ArtifactError(f"{name}: PyTorch {torch.__version__} has no such operation{library}")
    _check_schema(name, found)
    return _writing(name, packet, found) if into else found


def _check_schema(name: str, operation: torch._ops.OpOverload) -> None:
    schema = operation._schema
    changed = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write and not a.is_out]
    if changed:
        raise ArtifactError(
            f"{name}: it changes its argument {changed[0]!r}; only operations that change nothing may be called"
        )
    if not schema.returns or not any("Tensor" in str(result.type) for result in schema.returns):
        raise ArtifactError(f"{name}: it returns no tensor")


def _writing(name: str, packet: Any, functional: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """Return the overload of a packet that takes what `functional` takes, and `out`."""
    wanted = [(a.name, str(a.type)) for a in functional._schema.arguments]
    for overload in packet.overloads():
        candidate: torch._ops.OpOverload = getattr(packet, overload)
        arguments = candidate._schema.arguments
        outs = [a.name for a in arguments if a.is_out]
        if outs == ["out"] and [(a.name, str(a.type)) for a in arguments if not a.is_out] == wanted:
            return candidate
    raise ArtifactError(f"{name}: there is no overload of the same arguments that writes into `out`")


def filled(value: Any, tensor: Callable[[View], Any], size: Callable[[Any], int]) -> Any:
    """Return an argument of a call with tensors for views and numbers for sizes, in nested lists and mappings as well."""
    if isinstance(value, View):
        return tensor(value)
    if isinstance(value, Symbolic):
        return size(value.size)
    if isinstance(value, list | tuple):
        return [filled(entry, tensor, size) for entry in value]
    if isinstance(value, Mapping):
        return {key: filled(entry, tensor, size) for key, entry in value.items()}
    return value


def copy_result(result: Any, outs: list[torch.Tensor | None]) -> None:
    """Copy what an operation returned into the buffers of its results.

    Args:
        result: a tensor, or several.
        outs: one per result; None for one that nothing uses.

    Raises:
        ArtifactError: the number of results, a shape or a dtype is another than planned.
    """
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    if len(results) != len(outs):
        raise ArtifactError(f"it returned {len(results)} tensors, and {len(outs)} were planned")
    for found, out in zip(results, outs, strict=True):
        if out is None:
            continue
        if found.shape != out.shape or found.dtype != out.dtype:
            raise ArtifactError(
                f"it returned {found.dtype} of shape {list(found.shape)}; planned was {out.dtype} of shape {list(out.shape)}"
            )
        out.copy_(found)
