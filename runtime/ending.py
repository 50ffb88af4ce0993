"""When generated sequences are at their end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from graphwright.ir.errors import ArtifactError


@dataclass(frozen=True)
class Ending:
    """When a sequence is at its end.

    Args:
        tokens: each of them ends it.
        sequences: each of them ends it, as the last tokens generated.
        padding: what follows an end where other sequences of the batch go on.
    """

    tokens: tuple[int, ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()
    padding: int = 0

    def changed(
        self,
        tokens: int | Sequence[int] | None = None,
        sequences: Sequence[Sequence[int]] = (),
        padding: int | None = None,
    ) -> Ending:
        """Return what ends the sequences of one call.

        Args:
            tokens: one or several that end a sequence, none if empty; None for those of this.
            sequences: besides, each of them ends it.
            padding: None for that of this.
        """
        ends = self.tokens if tokens is None else (tokens,) if isinstance(tokens, int) else tuple(tokens)
        more = tuple(tuple(int(token) for token in sequence) for sequence in sequences if len(sequence))
        return Ending(ends, self.sequences + more, self.padding if padding is None else padding)

    def to_json(self) -> str:
        """Return it as JSON text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Ending:
        """Return what `to_json` wrote.

        Raises:
            ArtifactError: the text is something else.
        """
        try:
            data = json.loads(text)
            sequences = tuple(tuple(int(token) for token in sequence) for sequence in data["sequences"])
            return cls(tuple(int(token) for token in data["tokens"]), sequences, int(data["padding"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"not what ends sequences: {error}") from error
