"""From a program to ONNX.

`emit` turns a program into an ONNX model: every operation of the dialect is written out by its lowering in `ops`, attention by
`attention` with its mask from `masks`, and PyTorch's own exporter writes the ATen operations that are left.
"""

from __future__ import annotations
