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


def onnx_call_of_several(
    name: str,
    inputs: Sequence[torch.Tensor | None],
    attributes: Mapping[str, Any],
    results: Sequence[tuple[torch.dtype, Sequence[Any]]],
) -> tuple[torch.Tensor, ...]:
    """Call an operator that has several results.

    Args:
        name: of an operator of ONNX as of opset 23; "domain::name" for one of another domain.
        inputs: what it takes, in order; None for one that is left out.
        attributes: likewise, by name.
        results: dtype and shape of each.
    """
    import torch.onnx.ops

    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            name if "::" in name else f"::{name}",
            list(inputs),
            dict(attributes),
            dtypes=[dtype for dtype, _ in results],
            shapes=[shape for _, shape in results],
            version=1 if "::" in name else OPSETS.start,
        )
    )
