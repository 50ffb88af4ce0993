"""Decoding by onnxruntime: the unmodified model with its cache as inputs and outputs, as it is exported usually."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from graphwright.tools.bench.models.onnx_files import kept

from .case import Case, Run, looped

OPSET = 23


class Cached(torch.nn.Module):
    """A model with the keys and values of earlier tokens as tensors.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, states: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the scores of what follows the last token, then keys and values of each layer.

        Args:
            input_ids: [B, S], int64.
            states: keys and values of each layer in turn, [B, Hk, past, D].
        """
        from transformers import DynamicCache

        from .rivals import cache_parameter

        cache: Any = DynamicCache()
        for layer in range(len(states) // 2):
            cache.update(states[2 * layer], states[2 * layer + 1], layer)
        name, (batch, tokens) = cache_parameter(self.model), input_ids.shape
        # A row for each sequence: onnxruntime's RotaryEmbedding does not broadcast angles over the batch.
        positions = (states[0].shape[2] + torch.arange(tokens)).expand(batch, tokens)
        output = self.model(input_ids=input_ids, position_ids=positions, use_cache=True, logits_to_keep=1, **{name: cache})
        return (output.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def exported_decoder(model: Any) -> Path:
    """Return the path of a model's ONNX file, exporting it where there is none yet."""

    def export() -> Any:
        # Any sizes unlike each other and unlike 1, which would be taken for constants.
        ids, states = torch.zeros(2, 5, dtype=torch.int64), [torch.zeros(shape) for shape in _shapes(model, 2, 7)]
        varies = torch.export.Dim.DYNAMIC
        return torch.onnx.export(
            Cached(model).eval(),
            (ids, states),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: varies, 1: varies}, [{0: varies, 2: varies}] * len(states)),
            input_names=["input_ids", *_names(model, "past")],
            output_names=["logits", *_names(model, "present")],
            verbose=False,
        )

    return kept(model, ("with cache and positions", OPSET), f"decode-opset{OPSET}", export)


def onnx_decoder(case: Case) -> Run:
    """Return what runs the exported model token by token, its states handed back without a copy."""
    # It carries no types.
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    # With 1 it runs in the calling thread.
    options.intra_op_num_threads = case.threads
    options.log_severity_level = 3
    path = exported_decoder(case.model)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    outputs, inputs = (["logits", *_names(case.model, "present")], _names(case.model, "past"))
    empty = [value(torch.zeros(shape).numpy()) for shape in _shapes(case.model, len(case.prompts), 0)]
    states = list(empty)

    def following(tokens: torch.Tensor) -> torch.Tensor:
        feeds = {"input_ids": value(tokens.numpy()), **dict(zip(inputs, states, strict=True))}
        scores, *states[:] = session.run_with_ort_values(outputs, feeds)
        return torch.from_numpy(scores.numpy())[:, -1].argmax(-1, keepdim=True)

    def first() -> torch.Tensor:
        states[:] = empty
        return following(case.prompts)

    return looped(case, first, following)


def _names(model: Any, when: str) -> list[str]:
    return [f"{when}.{layer}.{what}" for layer in range(model.config.num_hidden_layers) for what in ("key", "value")]


def _shapes(model: Any, batch: int, past: int) -> list[tuple[int, ...]]:
    config = model.config
    return [(batch, config.num_key_value_heads, past, config.head_dim)] * (2 * config.num_hidden_layers)
