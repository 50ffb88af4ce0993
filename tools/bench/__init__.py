"""`graphwright bench`: how fast Triton kernels run on this CPU, compared with PyTorch."""

from __future__ import annotations

from .command import bench

__all__ = ["bench"]
