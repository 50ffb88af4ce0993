"""The operations beyond ATen that a program may call. Importing this module defines them.

Each has a schema, a reference in plain PyTorch, a shape rule and a cost; the files under `ops/` say what they compute.
"""

from __future__ import annotations

from .ops.attention import attention
from .ops.block_index import block_index
from .ops.definition import NAMESPACE, Operation, operations
from .ops.glu import ACTIVATIONS, glu
from .ops.kv import kv_append, kv_attention
from .ops.kv_quantized import kv_quantized_append, kv_quantized_attention
from .ops.kv_quantized_sparse import kv_quantized_sparse_attention
from .ops.kv_ring import kv_ring_append, kv_ring_attention, kv_ring_read
from .ops.kv_static import kv_static_attention
from .ops.kv_tiered import kv_tiered_append, kv_tiered_attention, kv_tiered_mass
from .ops.merge import merge, merge_match, merge_metric, merge_plan, merge_rank, unmerge
from .ops.ragged_attention import ragged_attention
from .ops.rms_norm import rms_norm
from .ops.rotary import rotary
from .ops.sparse_attention import kv_sparse_attention, sparse_attention
from .ops.take_rows import take_rows

__all__ = [
    "ACTIVATIONS",
    "NAMESPACE",
    "Operation",
    "attention",
    "block_index",
    "glu",
    "kv_append",
    "kv_attention",
    "kv_quantized_append",
    "kv_quantized_attention",
    "kv_quantized_sparse_attention",
    "kv_ring_append",
    "kv_ring_attention",
    "kv_ring_read",
    "kv_sparse_attention",
    "kv_static_attention",
    "kv_tiered_append",
    "kv_tiered_attention",
    "kv_tiered_mass",
    "merge",
    "merge_match",
    "merge_metric",
    "merge_plan",
    "merge_rank",
    "operations",
    "ragged_attention",
    "rms_norm",
    "rotary",
    "sparse_attention",
    "take_rows",
    "unmerge",
]
