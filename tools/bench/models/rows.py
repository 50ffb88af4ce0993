"""What is measured: models with inputs of one size each, and how much faster than the best competitor we want to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.tools import reference

Inputs = dict[str, torch.Tensor]
"""A model's keyword arguments."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model with inputs of one size.

    Args:
        name: as given to `--row`.
        load: returns the model, in evaluation mode; its first output is what is compared.
        inputs: returns its inputs, given whether sequences shall differ in length and be padded.
        varying: dimensions of every input that vary between the rows of this model.
        bar: ratio of the best competitor's time to ours that we want at least.
        quick: whether the row is part of a quick run.
    """

    name: str
    load: Callable[[], Any]
    inputs: Callable[[bool], Inputs]
    varying: tuple[int, ...]
    bar: float
    quick: bool


def first_output(output: Any) -> torch.Tensor:
    """Return the first tensor of what a model returned: a tensor, a tuple, or a mapping such as a ModelOutput."""
    if isinstance(output, torch.Tensor):
        return output
    first: torch.Tensor = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return first


def real_positions(inputs: Inputs) -> torch.Tensor | None:
    """Return which positions are not padding, bool [B, S]; None where all are real."""
    mask = inputs.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


def _encoder_inputs(batch: int, length: int) -> Callable[[bool], Inputs]:
    """Docstrings: one after the other, cut to full sequences, or, if ragged, one a sequence, as they come."""

    def build(ragged: bool) -> Inputs:
        tokenizer = reference.load_minilm_tokenizer()
        if ragged:
            documents = reference.docstrings()
            # Spread over the library, so that the lengths are those of all of it.
            texts = [document.text for document in documents[:: len(documents) // batch][:batch]]
            encoded = tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
            return {name: encoded[name] for name in ("input_ids", "attention_mask")}
        ids: list[int] = []
        for document in reference.each_docstring():
            ids += tokenizer(document.text, truncation=True, max_length=length)["input_ids"]
            if len(ids) >= batch * length:
                break
        input_ids = torch.tensor(ids[: batch * length]).view(batch, length)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    return build


def _load_decoder() -> Any:
    model = reference.load_language_model()
    # A benchmark of the plain forward: nobody reads the cache.
    model.config.use_cache = False
    return model


def _encoder_row(batch: int, length: int, bar: float, quick: bool) -> Row:
    return Row(
        name=f"minilm-{batch}x{length}",
        load=reference.load_minilm,
        inputs=_encoder_inputs(batch, length),
        varying=(0, 1),
        bar=bar,
        quick=quick,
    )


def _decoder_row(length: int, bar: float, quick: bool) -> Row:
    return Row(
        name=f"prefill-{length}",
        load=_load_decoder,
        inputs=lambda ragged: {"input_ids": reference.held_out_ids(length)[None]},
        varying=(1,),
        bar=bar,
        quick=quick,
    )


def _by_name(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


ROWS = _by_name(
    [
        _encoder_row(1, 32, 1.25, True),
        _encoder_row(1, 128, 1.3, True),
        _encoder_row(8, 128, 1.15, True),
        _encoder_row(32, 128, 1.1, False),
        _encoder_row(8, 384, 1.0, False),
        _decoder_row(256, 1.2, True),
        _decoder_row(1024, 1.2, True),
        _decoder_row(4096, 1.3, False),
    ]
)
"""Name -> row."""
