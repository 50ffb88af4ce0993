"""From a program to an ONNX model in memory."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphwright.ir.containers import Constant, Leaf, Structure
from graphwright.ir.diagnostics import at_node
from graphwright.ir.errors import ExportError, GraphwrightError, OptionError
from graphwright.ir.program import Program, calls
from graphwright.ir.signature import evaluate

from .calls import OPSETS
from .weights import share_transposed
from .writer import Writer, refuse_unknown

if TYPE_CHECKING:
    import onnx_ir

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')
_OWN_FOLDER = str(Path(__file__).parent)


def emit(program: Program, *, opset: int = OPSETS.start) -> onnx_ir.Model:
    """Return the ONNX model of a program; its weights are the program's own tensors.

    Inputs have the names of the model's arguments, results those of the fields that the model returns ("output" for one
    tensor), sizes that vary those of the program's dimensions. Plain values that the model returns are no results in ONNX.

    Args:
        program: after all passes.
        opset: version of ONNX's operators, one of `OPSETS`.

    Raises:
        ExportError: an operation has no form in ONNX, or a package is missing.
        OptionError: there is no such opset.
    """
    if opset not in OPSETS:
        raise OptionError(f"opset must be {OPSETS.start} to {OPSETS.stop - 1}, and is {opset}")
    if program.signature.packing is not None:
        raise ExportError(
            "a program of packed tokens takes tensors that are worked out of the mask before each call, and attention over "
            "sequences without padding, which ONNX both has no form for: export the model without the pass pack-tokens"
        )
    refuse_unknown(program)
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ExportError(f"exporting to ONNX needs the package {package}: pip install graphwright[onnx]")
    exported, symbols = _trace(program)
    with _quiet():
        try:
            made: Any = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in program.signature.tensors],
                output_names=result_names(program),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise _with_line(
                ExportError(f"PyTorch's ONNX exporter cannot write the program: {_innermost(error)}"), program
            ) from error
        made.rename_axes(symbols)
    model: onnx_ir.Model = made.model
    share_transposed(model)
    _tidy(model)
    return model


def sizes_for(program: Program, wanted: Mapping[str, int]) -> dict[str, int]:
    """Return a size for each dimension: the one wanted, or the nearest that the dimension may have.

    Args:
        program: whose dimensions.
        wanted: dimension -> size; 4, 5, ... for those that are not in it.
    """
    sizes = {}
    for at, (name, dimension) in enumerate(program.dimensions.items()):
        size = max(wanted.get(name, 4 + at), dimension.low)
        sizes[name] = size if dimension.high is None else min(size, dimension.high)
    return sizes


def shapes_for(program: Program, sizes: Mapping[str, int]) -> list[list[int]]:
    """Return the shapes of a call's tensors where the dimensions have these sizes."""
    return [[n if isinstance(n, int) else evaluate(n, sizes) for n in spec.shape] for spec in program.signature.tensors]


def result_names(program: Program) -> list[str]:
    """Return the names of the results that are tensors, in flat order."""
    names: dict[int, str] = {}

    def visit(structure: Structure, path: str) -> None:
        if isinstance(structure, Leaf):
            names.setdefault(structure.index, path or "output")
        elif not isinstance(structure, Constant):
            for key, child in zip(structure.keys or range(len(structure.children)), structure.children, strict=True):
                visit(child, f"{path}.{key}" if path else str(key) if structure.keys else f"output.{key}")

    visit(program.signature.results, "")
    taken = {spec.name for spec in program.signature.tensors}
    found = [names.get(at, f"output.{at}") for at in tensor_results(program)]
    return [f"{name}.result" if name in taken else name for name in found]


def tensor_results(program: Program) -> list[int]:
    """Return which of the program's results, in flat order, are tensors."""
    values = [getattr(result, "meta", {}).get("val") for result in program.results]
    return [at for at, value in enumerate(values) if isinstance(value, torch.Tensor)]


def _trace(program: Program) -> tuple[Any, dict[str, str]]:
    """Return torch.export's graph of the program, and the names of its symbols."""
    shapes = shapes_for(program, sizes_for(program, {}))
    # Values play no part: only shapes and dtypes are looked at.
    tensors = tuple(
        torch.zeros(shape, dtype=spec.dtype, device=spec.device)
        for spec, shape in zip(program.signature.tensors, shapes, strict=True)
    )
    varying = tuple(
        {dim: torch.export.Dim.DYNAMIC for dim, n in enumerate(spec.shape) if not isinstance(n, int)}
        for spec in program.signature.tensors
    )
    with _quiet(), torch.no_grad():
        try:
            exported: Any = torch.export.export(Writer(program), tensors, dynamic_shapes=(varying,), strict=False)
        except GraphwrightError:
            raise
        except Exception as error:
            raise ExportError(f"the program cannot be traced for ONNX: {_innermost(error)}") from error
    symbols: dict[str, str] = {}
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"][-len(tensors) :]
    for node, spec in zip(placeholders, program.signature.tensors, strict=True):
        for size, name in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(size, torch.SymInt):
                symbols.setdefault(str(size), str(name))
    return exported, symbols


def _tidy(model: onnx_ir.Model) -> None:
    """Name weights as the program does, and keep of where nodes come from only the line and module of the user's model."""
    model.graph.name = model.producer_name = "graphwright"
    model.producer_version = None
    model.graph.metadata_props.clear()
    for value in list(model.graph.initializers.values()):
        value.name = str(value.name).removeprefix(f"{Writer.WEIGHTS}.")
    for node in model.graph:
        frames = _FRAME.findall(node.metadata_props.get("pkg.torch.onnx.stack_trace", ""))
        modules = re.findall(r"'([^']+)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))[:-1]
        node.metadata_props.clear()
        if frames and not frames[-1][0].startswith(_OWN_FOLDER):
            file, line = frames[-1]
            node.metadata_props["source"] = f"{'/'.join(Path(file).parts[-2:])}:{line}"
            if modules:
                node.metadata_props["module"] = modules[-1]
        for result in node.outputs:
            result.metadata_props.clear()


def _with_line(error: ExportError, program: Program) -> ExportError:
    """Return the error with the first node that calls the operation that its message names, if it names one."""
    found = re.search(r"OpOverload\(op='([^']+)', overload='([^']+)'\)", str(error))
    name = f"{found[1]}.{found[2]}" if found else ""
    node = next((node for node in calls(program.graph) if str(node.target) == name), None)
    if node is not None:
        at_node(error, program, node)
    return error


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from warning of what is no concern of the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
