"""Caches of a batch of sequences, and the call that adds a token to each."""

from __future__ import annotations

from typing import Any

import torch

from .bound import BoundCall
from .executable import Executable
from .kv_cache import KVCache


class Session:
    """A batch of sequences that grow by a token at a time.

    Args:
        step: the program with caches for one token.
        batch: number of sequences.
        room: tokens that there must be room for.

    Attributes:
        cache: keys and values.
        past: int64 [batch], tokens of each sequence whose keys and values are in the caches.
        ids: int64 [batch, 1], the tokens to add.

    Raises:
        InputError: the model has no positions for so many tokens.
    """

    def __init__(self, step: Executable, batch: int, room: int) -> None:
        self.batch = batch
        self.cache = KVCache(step.signature, batch, room)
        device = step.signature.tensors[0].device
        self.past = torch.zeros(batch, dtype=torch.int64, device=device)
        self.ids = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        # Between the steps there is little else to do, and numpy does it in a fraction of the time that torch's dispatch takes.
        on_cpu = self.past.device.type == "cpu"
        self._counts: Any = self.past.numpy() if on_cpu else self.past
        self._numbers: Any = self.ids.numpy() if on_cpu else self.ids
        self._step = step
        self._call: BoundCall | None = None

    def put(self, tokens: torch.Tensor) -> None:
        """Set the tokens to add, int64 [batch]."""
        self._numbers[:, 0] = tokens if self._numbers is self.ids else tokens.numpy()

    def advance(self, room: int, most: int) -> Any:
        """Add the tokens to their sequences and return the scores of what may follow, [batch, 1, words].

        The scores lie where those of the next call will.

        Args:
            room: tokens that there must be room for with these.
            most: tokens that there may be in the end.

        Raises:
            InputError: the model has no positions for so many tokens.
        """
        if room > self.cache.capacity:
            limit = most if self.cache.limit is None else min(most, self.cache.limit)
            self.cache.grow(max(room, min(2 * self.cache.capacity, limit)))
            self._call = None
        if self._call is None:
            self._call = self._step.bind(self.ids, self.past, *self.cache.tensors.values())
        self._call.run()
        self._counts += 1
        return self._call.results
