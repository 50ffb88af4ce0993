"""Calls of ONNX operators in a graph of PyTorch operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

OPSETS = range(23, 26)
"""The versions of ONNX's operators that can be written: 23 is the first with Attention, RMSNormalization, RotaryEmbedding."""


def onnx_call(
    name: str, inputs: Sequence[torch.Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, shape: Sequence[Any]
) -> torch.Tensor:
    """Call an operator of ONNX that has one result, which PyTorch's exporter writes as it stands.

    Args:
        name: of the operator, as of opset 23.
        inputs: what it takes, in order.
        attributes: likewise, by name.
        dtype: of the result.
        shape: of the result; symbolic where sizes vary.
    """
    import torch.onnx.ops

    return torch.onnx.ops.symbolic(f"::{name}", inputs, dict(attributes), dtype=dtype, shape=shape, version=OPSETS.start)
