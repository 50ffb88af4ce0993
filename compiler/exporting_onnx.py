"""Exporting to ONNX: from a model to a file that is checked before it takes its place."""

from __future__ import annotations

import collections
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphwright.codegen.onnx.calls import OPSETS
from graphwright.codegen.onnx.emitting import emit, result_names, shapes_for, sizes_for, tensor_results
from graphwright.ir.errors import ExportError
from graphwright.ir.program import Program
from graphwright.passes.base import Context, Pass

from .capturing import capture
from .compiled import Compiled
from .pipeline import DEFAULT_PASSES, run_passes
from .sampling import Dynamic

if TYPE_CHECKING:
    import onnx_ir

KERNEL_PASSES = frozenset({"fuse-projections", "split-bias"})
"""Passes that pay for generated kernels only: onnxruntime is slower for one wide product that is cut up behind."""

EXPORT_PASSES: tuple[str, ...] = tuple(name for name in DEFAULT_PASSES if name not in KERNEL_PASSES)
"""What an export does to every model, in order."""

LARGEST_FILE = 1_900_000_000
"""Bytes of weights that still fit into one file: protocol buffers end at 2 GiB."""

TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Dtype of a result -> how far it may be from the program's, relative to its largest element; 1e-4 for others."""

TRIALS = ({"batch": 1, "tokens": 1}, {"batch": 2, "tokens": 7}, {"batch": 3, "tokens": 63})
"""Sizes that are compared; dimensions of other names take 2, 5 and 9."""


@dataclass(frozen=True)
class Trial:
    """One comparison of the file with the program.

    Args:
        sizes: of the dimensions.
        error: the largest difference of a result, relative to its largest element.
    """

    sizes: Mapping[str, int]
    error: float


@dataclass(frozen=True)
class OnnxReport:
    """What an export wrote.

    Args:
        path: of the file.
        opset: version of ONNX's operators.
        inputs: names and shapes of what the model takes.
        outputs: names and shapes of what it returns.
        operators: how many nodes there are of each operator.
        weight_bytes: bytes of the weights, each counted once.
        file_bytes: bytes of the file, and of the one with the weights beside it.
        notes: what the capture found out.
        trials: the comparisons with the program; none if they were not asked for.
    """

    path: str
    opset: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    operators: Mapping[str, int]
    weight_bytes: int
    file_bytes: int
    notes: tuple[str, ...]
    trials: tuple[Trial, ...]


def export_onnx(
    model: torch.nn.Module | Program,
    path: str | os.PathLike[str],
    *args: Any,
    passes: Iterable[Pass | str] = (),
    dynamic: Dynamic = None,
    opset: int = OPSETS.start,
    external_data: bool | None = None,
    check: bool = True,
    **kwargs: Any,
) -> OnnxReport:
    """Write a model, or a program after passes, as an ONNX file.

    The file appears in one step, after it was checked; if anything fails, what was at `path` before stays.

    Args:
        model: any module, captured with the sample call; or a program, written as it is.
        path: of the file to write, usually ending in ".onnx".
        args: arguments of a sample call, as the model takes them; none for a program.
        passes: what to do to a module beyond recognition and clean-up: passes, or texts such as "fuse-projections:minimum=3".
        dynamic: which sizes may differ from call to call; see `capture`.
        opset: version of ONNX's operators, 23 to 25. onnxruntime has 23 since version 1.23.
        external_data: write the weights to a file of their own beside `path`, its name with ".data" added. None: where they
            are too many for one file.
        check: compare the file, run by onnxruntime, with the program at several sizes, and the capture with the model.
        kwargs: named arguments of the sample call.

    Returns:
        What was written.

    Raises:
        CaptureError: the model cannot be captured.
        ExportError: an operation has no form in ONNX, a package is missing, or the file does not compute what the program does.
        OptionError: a pass, an option or the opset is unknown.
    """
    if isinstance(model, Compiled):
        raise ExportError(
            "a compiled model holds kernels, and its graph no more: export the model or the program it was made of"
        )
    if isinstance(model, Program):
        if args or kwargs or tuple(passes):
            raise ExportError("a program is written as it is: it takes no sample call, and passes run before (run_passes)")
        program = model
    else:
        captured = capture(model, *args, dynamic=dynamic, check=check, **kwargs)
        device = next((w.device.type for w in captured.weights.values()), "cpu")
        program = run_passes(captured, [*EXPORT_PASSES, *passes], Context(target=device))
    made = emit(program, opset=opset)
    return _write(made, program, Path(path), opset, external_data, check)


def _write(
    made: onnx_ir.Model, program: Program, path: Path, opset: int, external_data: bool | None, check: bool
) -> OnnxReport:
    import onnx
    import onnx_ir

    weight_bytes = sum(value.const_value.nbytes for value in made.graph.initializers.values() if value.const_value is not None)
    apart = weight_bytes > LARGEST_FILE if external_data is None else external_data
    if not apart and weight_bytes > LARGEST_FILE:
        raise ExportError(f"{weight_bytes} bytes of weights do not fit into one file: leave external_data=False away")
    # In a folder beside the file: a file is renamed in one step only within a file system.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as folder:
        draft = Path(folder) / path.name
        data = f"{path.name}.data"
        onnx_ir.save(made, draft, external_data=data if apart else None)
        try:
            onnx.checker.check_model(draft, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"{path}: ONNX's checker refuses the model: {error}") from error
        trials = _compare(draft, program) if check else ()
        files = [Path(folder) / data] * apart + [draft]
        file_bytes = sum(file.stat().st_size for file in files)
        for file in files:
            shutil.move(file, path.with_name(file.name))
    return OnnxReport(
        path=str(path),
        opset=opset,
        inputs={str(value.name): _shape(value) for value in made.graph.inputs},
        outputs={str(value.name): _shape(value) for value in made.graph.outputs},
        operators=dict(collections.Counter(node.op_type for node in made.graph).most_common()),
        weight_bytes=weight_bytes,
        file_bytes=file_bytes,
        notes=tuple(program.notes),
        trials=trials,
    )


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)


def _compare(path: Path, program: Program) -> tuple[Trial, ...]:
    """Compare what onnxruntime makes of the file with the program.

    Raises:
        ExportError: they differ, or onnxruntime cannot run the file.
    """
    try:
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ExportError(
            "comparing the file with the program needs onnxruntime: pip install graphwright[onnx], or pass check=False"
        ) from error
    raised = onnxruntime.capi.onnxruntime_pybind11_state
    failures = (raised.Fail, raised.InvalidArgument, raised.InvalidGraph, raised.NotImplemented, raised.RuntimeException)
    options = onnxruntime.SessionOptions()
    # What fails is raised; it need not be printed as well.
    options.log_severity_level = 4
    trials: dict[tuple[int, ...], Trial] = {}
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for wanted, other in zip(TRIALS, (2, 5, 9), strict=True):
            sizes = sizes_for(program, {**dict.fromkeys(program.dimensions, other), **wanted})
            key = tuple(sizes.values())
            if key not in trials:
                trials[key] = Trial(sizes, _error(session, program, sizes))
    except failures as error:
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot run the model: {error}. What to do: pass check=False if another "
            "runtime is to run it."
        ) from error
    return tuple(trials.values())


def _error(session: Any, program: Program, sizes: Mapping[str, int]) -> float:
    """Return the largest relative difference of a result.

    Raises:
        ExportError: it is too large.
    """
    tensors = sample_tensors(program, sizes)
    with torch.no_grad():
        results = program.module()(*tensors)
    found = session.run(None, {spec.name: t.cpu().numpy() for spec, t in zip(program.signature.tensors, tensors, strict=True)})
    worst = 0.0
    for name, at, array in zip(result_names(program), tensor_results(program), found, strict=True):
        expected, value = results[at].cpu(), torch.from_numpy(array)
        if expected.shape != value.shape or expected.dtype != value.dtype:
            raise ExportError(
                f"{name}: the program returns {expected.dtype} {tuple(expected.shape)}, onnxruntime {value.dtype} "
                f"{tuple(value.shape)}, at sizes {dict(sizes)}"
            )
        if not expected.numel():
            continue
        gap = (expected.double() - value.double()).abs()
        # What is infinite or not a number in both is no difference; in one only, it is the largest.
        gap = gap.masked_fill((expected == value) | (expected.isnan() & value.isnan()), 0.0).nan_to_num(nan=torch.inf)
        scale = float(expected.double().nan_to_num(0.0, 0.0, 0.0).abs().max())
        error = float(gap.max()) / (scale or 1.0)
        limit = TOLERANCES.get(expected.dtype, 1e-4)
        if error > limit:
            raise ExportError(
                f"{name}: onnxruntime's result is {error:.3g} of its largest element from the program's at sizes "
                f"{dict(sizes)}, and may be {limit:g}; nothing was written. Pass check=False to write it all the same."
            )
        worst = max(worst, error)
    return worst


def sample_tensors(program: Program, sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """Return random tensors of a call where the dimensions have these sizes.

    Integers are row numbers where they choose rows of a table, and else masks whose later rows end with zeros.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for spec, node, shape in zip(program.signature.tensors, program.inputs, shapes_for(program, sizes), strict=True):
        if spec.dtype.is_floating_point:
            tensor = torch.randn(shape, generator=generator)
        elif rows := _rows(node):
            tensor = torch.randint(0, rows, shape, generator=generator)
        else:
            tensor = torch.ones(shape, dtype=torch.long)
            if tensor.dim() >= 2:
                lengths = tensor.shape[-1] - torch.arange(tensor.shape[0]) * tensor.shape[-1] // (2 * tensor.shape[0])
                lengths = lengths.reshape(-1, *(1 for _ in shape[1:]))
                tensor = (torch.arange(shape[-1]) < lengths).long().expand(shape).clone()
        tensors.append(tensor.to(spec.dtype).to(spec.device))
    return tensors


def _rows(node: fx.Node) -> int:
    """Return the least number of rows of the tables that a value chooses rows of, 0 if it chooses none."""
    found = []
    for user in node.users:
        if user.op != "call_function":
            continue
        if user.target is torch.ops.aten.embedding.default and user.args[1] is node:
            found.append(int(user.args[0].meta["val"].shape[0]))  # type: ignore[union-attr]
        elif user.target in _VIEWS:
            found.append(_rows(user))
    return min((rows for rows in found if rows), default=0)


_VIEWS = frozenset(
    {
        torch.ops.aten.reshape.default,
        torch.ops.aten.view.default,
        torch.ops.aten.expand.default,
        torch.ops.aten.slice.Tensor,
        torch.ops.aten.unsqueeze.default,
        torch.ops.prims.convert_element_type.default,
    }
)
