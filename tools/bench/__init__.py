"""`graphwright bench`: how fast Triton kernels and compiled models run on this CPU, compared with others."""

from __future__ import annotations

from .group import bench

__all__ = ["bench"]
