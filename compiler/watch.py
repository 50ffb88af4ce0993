"""Noticing that weights which a compiled model shares with the model it was made from were changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphwright.ir.errors import InputError


class Watch:
    """Remembers in what state weights were.

    A compiled model reads some weights where the model has them, and has copies of others: after a change in place it would
    compute with both states at once. Changes that PyTorch does not count, by `weight.data` or in inference mode, are not seen.

    Args:
        weights: by name, those that are shared.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        counted = {name: weight for name, weight in weights.items() if not weight.is_inference()}
        self._names = tuple(counted)
        self._weights = tuple(counted.values())
        self._seen = [weight._version for weight in self._weights]

    def check(self) -> None:
        """Do nothing if no weight was changed.

        Raises:
            InputError: one was.
        """
        if [weight._version for weight in self._weights] != self._seen:
            states = zip(self._names, self._weights, self._seen, strict=True)
            changed = [name for name, weight, seen in states if weight._version != seen]
            raise InputError(
                f"the weight {changed[0]!r} was changed after the model was compiled ({len(changed)} such in all), and the "
                "compiled model has the state before of others. What to do: compile the model again, or compile a "
                "copy.deepcopy of it in the first place."
            )
