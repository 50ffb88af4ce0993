"""The memory of keys and values that a program with caches reads and writes."""

from __future__ import annotations

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.signature import Range, Signature

INPUTS = ("past", "last")
"""Inputs of a program with caches beside its tokens and its caches."""

STEP = 256
"""Capacities are multiples of it, so that few different ones occur: each needs a plan of its own."""


class KVCache:
    """Keys and values of a batch of sequences.

    Args:
        signature: of a program with caches.
        batch: number of sequences.
        room: tokens that there must be room for.

    Raises:
        InputError: the model has no positions for so many tokens.
    """

    def __init__(self, signature: Signature, batch: int, room: int) -> None:
        self._specs = signature.tensors[1:]
        self.limit = signature.dimensions.get("capacity", Range(1, None)).high
        self.capacity = self._rounded(room)
        self.tensors = self._new(batch, self.capacity)

    def grow(self, room: int) -> None:
        """Make room for more tokens; what is kept stays.

        Args:
            room: tokens that there must be room for.

        Raises:
            InputError: the model has no positions for so many tokens.
        """
        old, before = self.tensors, self.capacity
        if room <= before:
            return
        self.capacity = self._rounded(room)
        batch = next((len(tensor) for tensor in old.values()), 0)
        self.tensors = self._new(batch, self.capacity)
        for name, tensor in old.items():
            self.tensors[name][:, :, :before] = tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _rounded(self, room: int) -> int:
        if self.limit is not None and room > self.limit:
            raise InputError(
                f"generate: there is room for {self.limit} tokens of prompt and answer, since the model has no more positions; "
                f"asked for {room}. Shorten the prompt or lower max_new_tokens."
            )
        rounded = -(-room // STEP) * STEP
        return rounded if self.limit is None else min(rounded, self.limit)

    def _new(self, batch: int, capacity: int) -> dict[str, torch.Tensor]:
        sizes = {"batch": batch, "capacity": capacity}
        made = {}
        for spec in self._specs:
            if spec.name not in INPUTS:
                shape = [n if isinstance(n, int) else sizes[n] for n in spec.shape]
                made[spec.name] = torch.empty(shape, dtype=spec.dtype, device=spec.device)
        return made
