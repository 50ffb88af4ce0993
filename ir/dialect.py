"""The operations beyond ATen that a program may call. Importing this module defines them.

Each has a schema, a reference in plain PyTorch, a shape rule and a cost; the files under `ops/` say what they compute.
"""

from __future__ import annotations

from .ops.attention import attention
from .ops.definition import NAMESPACE, Operation, operations
from .ops.glu import ACTIVATIONS, glu
from .ops.rms_norm import rms_norm
from .ops.rotary import rotary

__all__ = ["ACTIVATIONS", "NAMESPACE", "Operation", "attention", "glu", "operations", "rms_norm", "rotary"]
