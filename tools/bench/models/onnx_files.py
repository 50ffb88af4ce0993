"""Models as ONNX files, exported once and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .rows import Inputs

_EXPORTERS = ("torch", "onnx", "onnxscript", "transformers")
_EXAMPLE_BATCH, _EXAMPLE_LENGTH = 2, 16


def cache_folder() -> Path:
    """Return the folder for exported models, below XDG_CACHE_HOME or ~/.cache; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "graphwright" / "onnx"


def exported(model: Any, inputs: Inputs, varying: tuple[int, ...], opset: int) -> Path:
    """Return the path of the model's ONNX file, exporting it where the cache has none.

    Args:
        model: module that takes `inputs` as keyword arguments.
        inputs: tensors [B, S] or longer ones; only their names, dtypes and first elements matter.
        varying: dimensions of every input that the file leaves open.
        opset: version of ONNX's operators.
    """
    # A dimension of size 1 would be taken for a constant.
    example = {name: _example(tensor, varying) for name, tensor in inputs.items()}
    dynamic = dict.fromkeys(varying, torch.export.Dim.DYNAMIC)

    def export() -> Any:
        return torch.onnx.export(
            model,
            (),
            kwargs=example,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes={name: dynamic for name in inputs},
            verbose=False,
        )

    signature = [(name, str(tensor.dtype), tensor.ndim) for name, tensor in inputs.items()]
    return kept(model, (signature, varying, opset), f"opset{opset}", export)


def kept(model: Any, settings: tuple[Any, ...], what: str, export: Callable[[], Any]) -> Path:
    """Return the path of a model's ONNX file, exporting it where the cache has none.

    Args:
        model: whose weights it holds.
        settings: what the file depends on beside the model and the exporters' versions.
        what: a word about them for the file's name.
        export: returns the exported program, None if there is none.
    """
    path = cache_folder() / f"{type(model).__name__}-{what}-{_fingerprint(model, settings)}.onnx"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _quiet():
        program = export()
    if program is None:
        raise RuntimeError(f"torch.onnx.export returned nothing for {what}")
    # Another process may be at the same file; whoever is last replaces the same contents.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        program.save(str(draft))
        draft.replace(path)
    return path


def _example(tensor: torch.Tensor, varying: tuple[int, ...]) -> torch.Tensor:
    for dim, size in enumerate((_EXAMPLE_BATCH, _EXAMPLE_LENGTH)[: tensor.ndim]):
        if dim in varying:
            tensor = torch.cat([tensor] * -(-size // tensor.shape[dim]), dim).narrow(dim, 0, size)
    return tensor


def _fingerprint(model: Any, settings: tuple[Any, ...]) -> str:
    """Return a digest of everything that the file depends on."""
    digest = hashlib.sha256()
    versions = [f"{name} {metadata.version(name)}" for name in _EXPORTERS]
    config = getattr(model, "config", None)
    digest.update(repr((versions, *settings, str(model), config.to_json_string() if config is not None else "")).encode())
    for name, tensor in model.state_dict().items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:20]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's advice, which is about itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
