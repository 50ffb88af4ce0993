"""Graphwright: a compiler-style graph optimization toolkit for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .capturing import capture
    from .compiled import Compiled, load
    from .compiling import compile
    from .exporting_onnx import export_onnx

__version__ = "0.1.0"

__all__ = ["Compiled", "capture", "compile", "export_onnx", "load", "measure"]

_MODULES = {
    "Compiled": "compiled",
    "capture": "capturing",
    "compile": "compiling",
    "export_onnx": "exporting_onnx",
    "load": "compiled",
    "measure": "measuring",
}
"""Name -> the module that defines it, imported when the name is first used: importing Graphwright loads no heavy library."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
