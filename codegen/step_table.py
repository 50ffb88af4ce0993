"""The operations that have steps of their own."""

from __future__ import annotations

from typing import Any

from torch import fx

from . import (
    attention_step,
    embedding_step,
    kv_quantized_sparse_step,
    kv_quantized_step,
    kv_ring_step,
    kv_step,
    kv_tiered_step,
    merge_step,
    packing_step,
    sparse_step,
)
from .steps import StepMaker

STEP_MAKERS: dict[Any, StepMaker] = {
    **attention_step.MAKERS,
    **embedding_step.MAKERS,
    **packing_step.MAKERS,
    **kv_step.MAKERS,
    **kv_quantized_step.MAKERS,
    **kv_quantized_sparse_step.MAKERS,
    **kv_ring_step.MAKERS,
    **kv_tiered_step.MAKERS,
    **merge_step.MAKERS,
    **sparse_step.MAKERS,
}
"""Operation -> what makes its steps. An operation outside loops that is not here is a call of PyTorch.

Other packages add those of their own operations.
"""


def step_maker(node: fx.Node) -> StepMaker | None:
    """Return what makes the steps of a node, None if it is a call of PyTorch or computed in loops."""
    maker = STEP_MAKERS.get(node.target)
    return maker if maker is not None and maker.applies(node) else None
