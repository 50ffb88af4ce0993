"""The memory of what a program with caches keeps from call to call: keys and values, in whatever format it has them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.signature import Range, Signature, TensorSpec

from .sizes import evaluate_size

INPUTS = ("past", "last")
"""Inputs of a program with caches beside its tokens and its caches."""

STEP = 256
"""Capacities are multiples of it, so that few different ones occur: each needs a plan of its own."""


@dataclass(frozen=True)
class CacheBytes:
    """What a sequence's caches take.

    Args:
        per_token: bytes for each token that there is room for.
        per_sequence: bytes beside these, however many tokens there are.
    """

    per_token: float
    per_sequence: int


def cache_bytes(signature: Signature) -> CacheBytes:
    """Return what one sequence's caches take: at a capacity C, a multiple of `STEP`, C * per_token + per_sequence bytes.

    Args:
        signature: of a program with caches.
    """
    # Capacities are multiples of the sizes of groups, so that two of them tell the line that all lie on.
    one, two = (sum(_bytes(spec, batch=1, capacity=k * STEP) for spec in _states(signature)) for k in (1, 2))
    return CacheBytes((two - one) / STEP, 2 * one - two)


class KVCache:
    """The states of a batch of sequences.

    Each has the shape that the signature gives it: sizes are numbers, "batch", "capacity" or formulas of these such as
    "capacity//32". A state is all zeros when it is made. When `past` is 0 a program must not depend on what its states hold:
    they are not cleared between calls.

    Args:
        signature: of a program with caches.
        batch: number of sequences.
        room: tokens that there must be room for.

    Attributes:
        capacity: tokens that there is room for: a multiple of `STEP`, or all that the model has positions for.
        tensors: the states by name, in the signature's order.

    Raises:
        InputError: the model has no positions for so many tokens.
    """

    def __init__(self, signature: Signature, batch: int, room: int) -> None:
        self._specs = _states(signature)
        self._batch = batch
        self.limit = signature.dimensions.get("capacity", Range(1, None)).high
        self.capacity = self._rounded(room)
        self.tensors = self._new()

    def grow(self, room: int) -> None:
        """Make room for more tokens; what is kept stays, at the same indices.

        Args:
            room: tokens that there must be room for.

        Raises:
            InputError: the model has no positions for so many tokens.
        """
        if room <= self.capacity:
            return
        old, self.capacity = self.tensors, self._rounded(room)
        self.tensors = self._new()
        for name, tensor in old.items():
            self.tensors[name][tuple(slice(n) for n in tensor.shape)] = tensor

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

    def _new(self) -> dict[str, torch.Tensor]:
        return {
            spec.name: torch.zeros(_shape(spec, self._batch, self.capacity), dtype=spec.dtype, device=spec.device)
            for spec in self._specs
        }


def _states(signature: Signature) -> tuple[TensorSpec, ...]:
    return tuple(spec for spec in signature.tensors[1:] if spec.name not in INPUTS)


def _shape(spec: TensorSpec, batch: int, capacity: int) -> list[int]:
    return [evaluate_size(n, {"batch": batch, "capacity": capacity}) for n in spec.shape]


def _bytes(spec: TensorSpec, *, batch: int, capacity: int) -> int:
    return math.prod(_shape(spec, batch, capacity)) * spec.dtype.itemsize
