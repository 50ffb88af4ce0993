"""Sample calls of a model, from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import InputError

from .inputs import read_inputs

if TYPE_CHECKING:
    from .models import Model


def read_calibration(paths: Sequence[Path], model: Model, tokens: int, tokenizer: str = "") -> list[dict[str, Any]]:
    """Return the calls that files hold, as named arguments.

    Args:
        paths: each a `.txt` file, whose text is cut into calls of one row, or a `.safetensors` file of one call's tensors.
        model: what is called; it takes those of a tokenizer's tensors that its own sample has.
        tokens: the most tokens of a row, at least 1; the last one of a file may have fewer.
        tokenizer: folder or hub id of the tokenizer; "" for the model's own.

    Raises:
        InputError: a file is of another kind or empty, or there is no tokenizer that can cut texts.
        OSError: a file cannot be read.
    """
    calls: list[dict[str, Any]] = []
    for path in paths:
        if path.suffix == ".safetensors":
            calls.append(dict(read_inputs([str(path)])))
        elif path.suffix == ".txt":
            calls += _rows(path, model, tokens, tokenizer or model.tokenizer)
        else:
            raise InputError(f"--calibration: {path} should end with .txt or .safetensors")
    return calls


def _rows(path: Path, model: Model, tokens: int, tokenizer: str) -> list[dict[str, Any]]:
    import torch

    from .models import tokenised

    if not tokenizer:
        raise InputError("--calibration: no tokenizer is known for this model: name its folder with --tokenizer")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--calibration: {path} is not text: {error}") from error
    whole = tokenised(tokenizer, [text])
    ids = whole["input_ids"][0]
    if not len(ids):
        raise InputError(f"--calibration: there is no token in {path}")
    taken = [name for name in whole if name in model.kwargs]
    if "input_ids" not in taken:
        raise InputError("--calibration: the model takes no input_ids, so that it cannot be calibrated with text")
    pieces = range(0, len(ids), tokens)
    return [{name: torch.clone(whole[name][:, start : start + tokens]) for name in taken} for start in pieces]
