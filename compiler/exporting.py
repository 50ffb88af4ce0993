"""From a model and a sample call to torch.export's graph, with errors that name the line of the model."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import traceback
import warnings
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from graphwright.ir.containers import PLAIN, Constant, Leaf, Structure, describe, open_container, type_name
from graphwright.ir.errors import CaptureError

from .sampling import Call, Names

TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep
OWN_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep

PREFIX = "model."
"""What stands before every weight's and module's name: the module around the model."""

LOGGERS = ("torch.export", "torch._export", "torch.fx", "torch._dynamo", "torch._subclasses")

CONSTANTS = (*PLAIN, torch.dtype, torch.device)


@dataclass
class Exported:
    """What torch.export made of a model.

    Args:
        program: its graph takes the weights and the flat tensors, and returns flat results.
        results: the structure that the model returned, of flat results.
        notes: what a user should know.
    """

    program: ExportedProgram
    results: Structure
    notes: list[str] = field(default_factory=list)

    @property
    def guards(self) -> list[str]:
        """What torch assumed of the sizes when it traced, as Python conditions; its graph is right where they hold."""
        return list(getattr(self.program, "_guards_code", None) or ())


class Returned:
    """What the model returned while it was traced: an object of its own, for export puts a module's attributes back."""

    def __init__(self) -> None:
        self.structure: Structure = Constant(None)
        self.notes: list[str] = []
        self.problem: CaptureError | None = None


class Flat(torch.nn.Module):
    """A model that takes flat tensors and returns flat results; what these were is kept in `returned`."""

    def __init__(self, model: torch.nn.Module, call: Call, returned: Returned) -> None:
        super().__init__()
        self.model = model
        self.call = call
        self.returned = returned

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Call the model, and flatten what it returns."""
        leaves: list[Any] = []
        result = self.call(self.model, tensors)
        try:
            self.returned.structure = describe(result, lambda path, value: self._leaf(path, value, leaves))
        except CaptureError as error:
            self.returned.problem = error
            raise
        return tuple(leaves)

    def _leaf(self, path: str, value: Any, leaves: list[Any]) -> Structure | None:
        if isinstance(value, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
            leaves.append(value)
            return Leaf(len(leaves) - 1)
        if isinstance(value, CONSTANTS) or open_container(value) is not None:
            return None
        if is_cache(value):
            note = f"{path} is left out of the results (None): a {type(value).__name__} is no tensor"
            if note not in self.returned.notes:
                self.returned.notes.append(note)
            return Constant(None)
        raise CaptureError(
            f"the model returns a {type_name(type(value)).replace(':', '.')} as {path or 'its result'}: only tensors, plain "
            f"values, and lists, tuples, dicts and dataclasses of these can be returned"
        )


def is_cache(value: Any) -> bool:
    """Return whether a value is a Hugging Face cache, which is left out of results."""
    return any(kind.__module__ == "transformers.cache_utils" for kind in type(value).__mro__)


def export(
    model: torch.nn.Module, call: Call, tensors: Sequence[torch.Tensor], names: Names, asked: Container[str] = ()
) -> Exported:
    """Return the graph of a model in evaluation mode.

    Args:
        model: it must be in evaluation mode.
        call: how it is called.
        tensors: the sample, in flat order; no size that may vary is 0 or 1.
        names: which sizes may vary.
        asked: the paths of tensors whose sizes must be able to vary.

    Raises:
        CaptureError: the model cannot be captured.
    """
    returned = Returned()
    flat = Flat(model, call, returned)
    flat.training = False
    dims = tuple(
        {dim: Dim.DYNAMIC if path in asked else Dim.AUTO for dim in sorted(named)}
        for path, named in zip(call.names, names, strict=True)
    )
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(flat, tuple(tensors), dynamic_shapes=(dims,), strict=False)
    except Exception as error:
        if returned.problem is not None:
            raise returned.problem from None
        raise explained(error, model, call, tensors) from error
    return Exported(program, returned.structure, returned.notes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and torch's log lines about export away, and torch's fused encoder layer, which hides what it does."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def evaluation(model: torch.nn.Module) -> Iterator[bool]:
    """Put a model in evaluation mode, and every module back into its own after; yield whether any was in training mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield bool(training)
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def without_cache(model: torch.nn.Module) -> Iterator[bool]:
    """Let a Hugging Face model not return a cache by default; yield whether it would have."""
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", None) is not True:
        yield False
        return
    config.use_cache = False  # type: ignore[union-attr]
    try:
        yield True
    finally:
        config.use_cache = True  # type: ignore[union-attr]


def place_of(node: fx.Node) -> dict[str, Any]:
    """Return the metadata that says where in the model a node came from: frames in torch itself are left out."""
    meta: dict[str, Any] = {}
    trace = node.meta.get("stack_trace")
    if trace:
        meta["stack_trace"] = _model_frames(trace)
    stack = node.meta.get("nn_module_stack")
    if stack:
        meta["nn_module_stack"] = {
            key: (path.removeprefix("model").removeprefix("."), kind) for key, (path, kind) in stack.items() if path
        }
    return meta


@functools.lru_cache(maxsize=4096)
def _model_frames(trace: str) -> str:
    frames = re.findall(r'File "[^"]+", line \d+[^\n]*\n(?:(?!\s*File ")[^\n]*\n?)*', trace)
    kept = [f for f in frames if not f[6:].startswith(OWN_FOLDER)]
    inside = [f for f in kept if not f[6:].startswith(TORCH_FOLDER)]
    return "  ".join(inside or kept)


# -- errors

ADVICE = (
    (
        r"data-dependent|GuardOnDataDependent|is_nonzero|_local_scalar_dense|\.item\(\)|Boolean value of Tensor",
        "its Python code decides by the value of a tensor, which a graph cannot hold: use torch.where or a mask, or "
        "compute the decision outside and pass it as a plain argument",
    ),
    (
        r"Cannot call numel|\.numpy\(\)|numpy\(\)|to_numpy",
        "it leaves torch in the middle: keep the computation in torch",
    ),
    (
        r"Constraints violated|specialized|ConstraintViolation",
        "a size that was to vary is fixed by the code: pass `dynamic=` without it, or `dynamic=False`",
    ),
    (
        r"uninitialized parameter",
        "call the model once before, so that its lazy modules get their sizes",
    ),
    (
        r"DeviceMismatch|two devices",
        "move the model and the arguments to one device",
    ),
)


def explained(
    error: BaseException, model: torch.nn.Module, call: Call | None = None, tensors: Sequence[torch.Tensor] = ()
) -> CaptureError:
    """Return the error that says where a model cannot be captured, why, and what to do.

    Args:
        error: what was raised.
        model: which.
        call: how it was called.
        tensors: of the call. With them the model is called once more, to learn whether it takes them at all.
    """
    text = _cleaned(str(error), call)
    place = _place(error)
    advice = next((words for pattern, words in ADVICE if re.search(pattern, f"{type(error).__name__}: {error}")), None)
    if advice is None and call is not None and (refused := _refusal(model, call, tensors)):
        advice = f"check the arguments: called in PyTorch the model itself raises {refused}"
    lines = [f"{type(model).__name__} cannot be captured" + (f": {place}" if place else "")]
    lines.append(f"{type(error).__name__}: {text}")
    if advice:
        lines.append(f"What to do: {advice}.")
    return CaptureError("\n".join(lines))


def _refusal(model: torch.nn.Module, call: Call, tensors: Sequence[torch.Tensor]) -> str:
    """Return what a model raises in PyTorch, "" for nothing."""
    if not tensors:
        return ""
    try:
        with quiet(), torch.no_grad():
            call(model, [tensor.clone() for tensor in tensors])
    except Exception as error:  # noqa: BLE001 - models may raise anything
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    return ""


def _place(error: BaseException) -> str:
    """Return the innermost line of the user's or the model's code, as "file:line: source"."""
    frames: list[traceback.FrameSummary] = []
    seen: BaseException | None = error
    while seen is not None:
        inside = [f for f in traceback.extract_tb(seen.__traceback__) if _is_model_code(f.filename)]
        frames = inside or frames
        seen = seen.__cause__ or seen.__context__
    if frames:
        last = frames[-1]
        return f"{last.filename}:{last.lineno}: {last.line}"
    quoted = [m for m in re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', str(error)) if _is_model_code(m[0])]
    return f"{quoted[-1][0]}:{quoted[-1][1]}: {quoted[-1][2].strip()}" if quoted else ""


def _is_model_code(file: str) -> bool:
    return not file.startswith((TORCH_FOLDER, OWN_FOLDER, "<")) and os.path.basename(file) not in (
        "contextlib.py",
        "functools.py",
    )


def _cleaned(text: str, call: Call | None) -> str:
    """Return torch's message without the advice that is about torch's own options, and with the tensors' own names."""
    for end in (
        "\nFor more information",
        "\n\nThe error above occurred",
        "\nUser Stack",
        "\nFor C++ stack trace",
        "\n\nTo fix",
    ):
        text = text.partition(end)[0]
    if call is not None:

        def named(match: re.Match[str]) -> str:
            index = int(match.group(1))
            return call.names[index] if index < len(call.names) else match.group(0)

        text = re.sub(r"L\['tensors'\]\[(\d+)\]", named, text)
        text = re.sub(r"inputs\['tensors'\]\[(\d+)\]", named, text)
    text = text.strip()
    return text if len(text) < 1500 else text[:1500] + " ..."
