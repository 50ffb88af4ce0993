"""The errors that Graphwright raises.

GraphwrightError
├── CaptureError     a model cannot be captured as a graph
├── VerifyError      a graph breaks a rule
├── PassError        a pass cannot do what it was asked to
│   └── PlanError    a plan does not fit the graph
├── LoweringError    no kernel or call can be made for an operation
├── ExportError      a model cannot be written in another form, such as ONNX
├── InputError       arguments of a compiled model are not what it was compiled for (also a ValueError)
├── ArtifactError    a file is not a whole, fitting artifact
└── OptionError      an option or its value is unknown (also a ValueError)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphwrightError(Exception):
    """Base of all errors."""


class CaptureError(GraphwrightError):
    """A model cannot be captured as a graph."""


class VerifyError(GraphwrightError):
    """A graph breaks a rule."""


class PassError(GraphwrightError):
    """A pass cannot do what it was asked to."""


class PlanError(PassError):
    """A plan does not fit the graph it is applied to."""


class LoweringError(GraphwrightError):
    """No kernel or call can be made for an operation."""


class ExportError(GraphwrightError):
    """A model cannot be written in another form, such as ONNX."""


class InputError(GraphwrightError, ValueError):
    """Arguments of a compiled model are not what it was compiled for."""


class ArtifactError(GraphwrightError):
    """A file is not a whole, fitting artifact."""


class OptionError(GraphwrightError, ValueError):
    """An option or its value is unknown."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return a message for a name that is not known: the nearest one and all that are.

    Args:
        kind: what the name stands for, such as "pass".
        name: the name given.
        known: the names there are.
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"there is no {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}."
