"""Graphwright: a compiler-style graph optimization toolkit for PyTorch."""

__version__ = "0.1.0"
