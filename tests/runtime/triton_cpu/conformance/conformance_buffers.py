"""Poisoned and guarded tensors for kernels to work on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from conformance_numbers import torch_dtype

GUARD_BYTES = 256
FLOAT_POISON = 0xFF  # NaN in every floating-point dtype but float8e4b8 and float8e5b16, where it is the least number
INTEGER_POISON = 0xA5


class Buffers:
    """Allocates tensors whose surroundings are poisoned and must stay as they are."""

    def __init__(self) -> None:
        self._guards: list[tuple[torch.Tensor, int, int, int]] = []
        self._inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def empty(self, shape: int | Sequence[int], dtype: str, offset: int = 0) -> torch.Tensor:
        """Return a tensor full of poison between two guard zones.

        Args:
            shape: the tensor's shape.
            dtype: name of the Triton dtype.
            offset: elements by which the first element is moved off its 64-byte alignment.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = torch_dtype(dtype)
        poison = FLOAT_POISON if kind.is_floating_point else 0 if kind is torch.bool else INTEGER_POISON
        start = GUARD_BYTES + offset * kind.itemsize
        stop = start + int(np.prod(shape)) * kind.itemsize
        storage = torch.full((-(-(stop + GUARD_BYTES) // 64) * 64,), poison, dtype=torch.uint8)
        self._guards.append((storage, start, stop, poison))
        return storage[start:stop].view(kind).view(shape)

    def put(self, values: torch.Tensor | np.ndarray, dtype: str, offset: int = 0, writable: bool = False) -> torch.Tensor:
        """Return a guarded tensor that holds `values`, which kernels may change only where `writable`."""
        source = torch.from_numpy(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else values
        if isinstance(values, np.ndarray):
            source = source.view(values.shape)
        tensor = self.empty(tuple(source.shape), dtype, offset)
        tensor.copy_(source.to(torch_dtype(dtype)))
        if not writable:
            self._inputs.append((tensor, self._bytes(tensor).clone()))
        return tensor

    def check(self) -> None:
        """Fail where a guard zone or an input changed."""
        for storage, start, stop, poison in self._guards:
            assert bool((storage[:start] == poison).all()), "a kernel wrote below a tensor"
            assert bool((storage[stop:] == poison).all()), "a kernel wrote above a tensor"
        for tensor, before in self._inputs:
            assert torch.equal(self._bytes(tensor), before), "a kernel changed an input"

    @staticmethod
    def _bytes(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1).view(torch.uint8)
