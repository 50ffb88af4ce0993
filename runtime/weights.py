"""The weights of a loaded program: as tensors where kernels read them, prepared where they are multiplied by."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphwright.ir.errors import ArtifactError, unknown

from .layout import dtype_of
from .matmul import PreparedWeight, prepare_weight
from .memory import buffers_of, views_in
from .schedule import Buffer, MatmulStep, Schedule
from .sizes import compile_sizes, size_names

ALIGNED = 16
"""Bytes of which a weight's address is a multiple; kernels are compiled for it."""


class WeightStore:
    """Holds each weight in the forms that the steps need, and in no other.

    A weight that is only multiplied by is kept in the layout for that alone: what was passed is not referred to any more.

    Args:
        schedule: says how each weight is used.
        weights: by name; left alone.
        typical: dimensions that calls usually have; weights are laid out for the numbers of rows that follow.
        shared: weights of another schedule of the same model, whose forms are used where they are there.

    Raises:
        ArtifactError: a weight is missing, or has another shape, dtype or device than the schedule says.
    """

    def __init__(
        self,
        schedule: Schedule,
        weights: Mapping[str, torch.Tensor],
        typical: Mapping[str, int] | None = None,
        shared: WeightStore | None = None,
    ) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._prepared: dict[str, PreparedWeight] = {}
        self._sources: dict[str, Buffer] = {}
        self._sources_of = {buffer.name: buffer.source for buffer in schedule.buffers.values() if buffer.kind == "weight"}
        rows = _multiplied(schedule, typical or {})
        plain = _read(schedule)
        buffers = [buffer for buffer in schedule.buffers.values() if buffer.kind == "weight"]
        stored: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        prepared: dict[str, PreparedWeight] = {} if shared is None else shared._by_source()
        for buffer in buffers:
            if buffer.source not in weights:
                raise ArtifactError(f"weight {buffer.name}: {unknown('weight', buffer.source, weights)}")
            weight = weights[buffer.source].detach()
            _check(buffer, weight, schedule.device)
            self._sources.setdefault(buffer.source, buffer)
            if buffer.name in plain:
                strides = tuple(int(n) for n in buffer.strides)
                key = (buffer.source, strides)
                if key not in stored:
                    stored[key] = _stored(weight, strides)
                self._tensors[buffer.name] = stored[key]
            if buffer.name in rows:
                if buffer.source not in prepared:
                    prepared[buffer.source] = prepare_weight(weight, rows=rows[buffer.name])
                self._prepared[buffer.name] = prepared[buffer.source]

    def tensor(self, buffer: str) -> torch.Tensor:
        """Return the weight of a buffer as a tensor."""
        return self._tensors[buffer]

    def prepared(self, buffer: str) -> PreparedWeight:
        """Return the weight of a buffer in the form for multiplying."""
        return self._prepared[buffer]

    def _by_source(self) -> dict[str, PreparedWeight]:
        return {self._sources_of[name]: weight for name, weight in self._prepared.items()}

    def originals(self) -> dict[str, torch.Tensor]:
        """Return all weights by name, as they were passed; values that were only kept prepared are unpacked."""
        return {
            source: self._tensors[buffer.name] if buffer.name in self._tensors else self._prepared[buffer.name].unpack()
            for source, buffer in self._sources.items()
            if buffer.name in self._tensors or buffer.name in self._prepared
        }

    def shared(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return those of the weights passed whose memory is used, and not a form of it, by name."""
        used = {tensor.untyped_storage().data_ptr() for tensor in self._tensors.values()}
        return {name: weight for name, weight in weights.items() if weight.untyped_storage().data_ptr() in used}

    @property
    def nbytes(self) -> int:
        """Memory of all forms together; memory that is shared counts once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._tensors.values()}
        return sum(storages.values()) + sum({id(p): p.bytes for p in self._prepared.values()}.values())


def _multiplied(schedule: Schedule, typical: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the buffers that are multiplied by, each with the numbers of rows that are known."""
    rows: dict[str, set[int]] = {}
    counts = {step.x.shape[0] for step in schedule.steps if isinstance(step, MatmulStep)}
    texts = [n for n in counts if isinstance(n, str) and size_names(n) <= typical.keys()]
    values = compile_sizes(texts, tuple(typical))(typical)
    for step in schedule.steps:
        if isinstance(step, MatmulStep):
            known = rows.setdefault(step.weight, set())
            count = values.get(step.x.shape[0], step.x.shape[0])
            if isinstance(count, int) and count > 0:
                known.add(count)
    return {name: tuple(sorted(known)) or (128,) for name, known in rows.items()}


def _read(schedule: Schedule) -> frozenset[str]:
    """Return the buffers that something else than a product's second operand is read from."""
    names = {view.buffer for view in views_in(schedule.outputs)}
    for step in schedule.steps:
        used = buffers_of(step)
        names |= {step.x.buffer, step.out.buffer} if isinstance(step, MatmulStep) else used
    return frozenset(names)


def _check(buffer: Buffer, weight: torch.Tensor, device: str) -> None:
    if tuple(weight.shape) != buffer.shape or weight.dtype != dtype_of(buffer.dtype) or weight.device.type != device:
        raise ArtifactError(
            f"weight {buffer.source}: expected {buffer.dtype} of shape {list(buffer.shape)} on {device}, "
            f"got {weight.dtype} of shape {list(weight.shape)} on {weight.device}"
        )


def _stored(weight: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Return a weight with the strides and the alignment that steps expect: itself where it has them."""
    same = weight.numel() == 0 or all(
        found == wanted for found, wanted, size in zip(weight.stride(), strides, weight.shape, strict=True) if size > 1
    )
    if same and weight.data_ptr() % ALIGNED == 0:
        return weight
    shape = weight.shape
    for dim, stride in enumerate(strides):
        if stride == 0 and shape[dim] > 1:
            # All elements along it are one.
            weight = weight.narrow(dim, 0, 1)
    stored = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device)
    return stored.copy_(weight).expand(shape)
