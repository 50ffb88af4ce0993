"""Inputs of a compiled model: from files, from text, or at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from graphwright.ir.errors import InputError, unknown
from graphwright.ir.signature import Signature, TensorSpec, evaluate
from graphwright.runtime.schedule import CallStep, Schedule, View

LOOKUPS = ("aten::embedding.default", "aten::index_select.default")


def read_inputs(texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of files by name. Nothing is unpickled.

    Args:
        texts: each `name=file.npy`, `name=file.safetensors` for a file of one tensor, or `file.safetensors` for all its
            tensors by their names.

    Raises:
        InputError: a file is of another kind, damaged, or holds another number of tensors; a name is given twice.
        OSError: a file cannot be read.
    """
    found: dict[str, torch.Tensor] = {}
    for text in texts:
        name, equals, file = text.rpartition("=")
        for key, tensor in _read(Path(file), name if equals else "").items():
            if key in found:
                raise InputError(f"--input: {key!r} is given twice")
            found[key] = tensor
    return found


def _read(path: Path, name: str) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        import safetensors
        import safetensors.torch

        try:
            tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise InputError(f"--input: {path} is no whole safetensors file: {error}") from error
        if name and len(tensors) != 1:
            held = ", ".join(sorted(tensors)) or "none"
            raise InputError(f"--input {name}: {path} should hold one tensor, and holds {held}: leave `{name}=` away")
        return {name: next(iter(tensors.values()))} if name else tensors
    if path.suffix != ".npy":
        raise InputError(f"--input: {path} should end with .npy or .safetensors; files that need unpickling are not read")
    if not name:
        raise InputError(f"--input: write NAME={path}: a .npy file does not say what its array is called")
    import numpy

    try:
        return {name: torch.from_numpy(numpy.load(path, allow_pickle=False))}
    except (ValueError, EOFError, TypeError) as error:
        raise InputError(f"--input: {path} is no whole .npy file of numbers: {error}") from error


def choose_inputs(
    signature: Signature,
    schedule: Schedule,
    given: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
) -> list[torch.Tensor]:
    """Return a call's tensors in flat order: those that are given, and random ones for the rest.

    Sizes of random tensors are those of the given tensors where these have them.

    Args:
        signature: how the model is called.
        schedule: what it runs; it shows how large token ids may be.
        given: tensors by name.
        sizes: dimension -> size wanted; a dimension that is not in it is 1, or the least it may be.

    Raises:
        InputError: a tensor is given that the model does not take, or a size is out of its range.
    """
    names = [spec.name for spec in signature.tensors]
    for name in given:
        if name not in names:
            raise InputError(f"--input: {unknown('tensor argument', name, names)}")
    chosen = _sizes(signature, given, sizes)
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for spec, buffer in zip(signature.tensors, schedule.inputs, strict=False):
        if spec.name in given:
            tensors.append(given[spec.name].to(spec.device))
            continue
        shape = [n if isinstance(n, int) else evaluate(n, chosen) for n in spec.shape]
        tensors.append(_random(spec, shape, _rows(schedule, buffer), generator).to(spec.device))
    return tensors


def _sizes(signature: Signature, given: Mapping[str, torch.Tensor], wanted: Mapping[str, int]) -> dict[str, int]:
    known: dict[str, int] = {}
    for spec in signature.tensors:
        if spec.name in given:
            for size, number in zip(spec.shape, given[spec.name].shape, strict=False):
                if size in signature.dimensions:
                    known.setdefault(str(size), number)
    for name, allowed in signature.dimensions.items():
        size = known.setdefault(name, wanted.get(name, max(1, allowed.low)))
        if size < allowed.low or (allowed.high is not None and size > allowed.high):
            limit = "any" if allowed.high is None else allowed.high
            raise InputError(f"{name} must be {allowed.low} to {limit}, and is {size}: choose another --{name} or --size")
    return known


def _rows(schedule: Schedule, buffer: str) -> int:
    """Return the least number of rows of the tables that an input chooses rows of; 2 if none is known."""
    rows = []
    for step in schedule.steps:
        if isinstance(step, CallStep) and step.operation in LOOKUPS:
            views = [a for a in step.arguments if isinstance(a, View)]
            tables = [schedule.buffers[v.buffer] for v in views]
            if any(v.buffer == buffer for v in views):
                rows += [t.shape[0] for t in tables if t.kind == "weight" and isinstance(t.shape[0], int)]
    return min(rows, default=2)


def _random(spec: TensorSpec, shape: list[int], rows: int, generator: torch.Generator) -> torch.Tensor:
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        return torch.randn(shape, generator=generator).to(spec.dtype)
    if spec.dtype is torch.bool or "mask" in spec.name:
        return torch.ones(shape, dtype=spec.dtype)
    return torch.randint(0, rows, shape, generator=generator).to(spec.dtype)
