"""Comparing an ONNX file, run by onnxruntime, with the program it was made of."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphwright.codegen.onnx.emitting import result_names, shapes_for, sizes_for, tensor_results
from graphwright.codegen.onnx.past_inputs import MASK, PAST
from graphwright.codegen.onnx.windows import long_sizes
from graphwright.ir.errors import ExportError
from graphwright.ir.program import Program

TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Dtype of a result -> how far it may be from the program's, relative to its largest element; 1e-4 for others."""

TRIALS = ({"batch": 1, "tokens": 1}, {"batch": 2, "tokens": 7}, {"batch": 3, "tokens": 63})
"""Sizes that are compared; dimensions of other names take 2, 5 and 9."""


CACHED_TRIALS = (
    {"batch": 1, "tokens": 1, PAST: 5},
    {"batch": 2, "tokens": 7, PAST: 0},
    {"batch": 3, "tokens": 4, PAST: 63},
)
"""Those of a program that takes past keys and values: a step, a prompt, a part of one."""


CODED_TRIALS = (*CACHED_TRIALS[:2], {"batch": 3, "tokens": 1, PAST: 63}, {"batch": 1, "tokens": 4, PAST: 9})
"""Those of a program with codes in its caches: onnxruntime takes a part of a prompt for one sequence alone."""

CODED_TOLERANCE = 2e-2
"""How far scores may be apart where they are computed from codes: what is rounded to another code counts."""

FLIPPED = 1e-3
"""The share of codes that may differ, by one."""

LONGEST_TRIAL = 2048
"""Tokens that are compared at most."""


@dataclass(frozen=True)
class Trial:
    """One comparison of the file with the program.

    Args:
        sizes: of the dimensions.
        error: the largest difference of a result, relative to its largest element.
    """

    sizes: Mapping[str, int]
    error: float


def compare(path: Path, program: Program) -> tuple[Trial, ...]:
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
        for wanted, other in _trials(program):
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


def _trials(program: Program) -> list[tuple[Mapping[str, int], int]]:
    """Return the sizes to compare at, each with the size of dimensions that it does not name."""
    found: list[tuple[Mapping[str, int], int]] = []
    coded = any(spec.dtype in _CODES for spec in program.signature.tensors)
    wanted = CODED_TRIALS if coded else CACHED_TRIALS if PAST in program.dimensions else TRIALS
    found += zip(wanted, (2, 5, 9, 11), strict=False)
    long = long_sizes(program)
    # What is written in blocks is compared where there are several, unless that takes minutes.
    return [*found, ({"batch": 2, **long}, 3)] if long and not not_compared(program) else found


def not_compared(program: Program) -> str:
    """Return what of a program's file is not compared with it, for people; "" if all is."""
    longest = max(long_sizes(program).values(), default=0)
    if longest <= LONGEST_TRIAL:
        return ""
    why = f"that takes {longest} tokens, and {LONGEST_TRIAL} are the most"
    return f"attention over windows in several blocks is not compared: {why}"


def _error(session: Any, program: Program, sizes: Mapping[str, int]) -> float:
    """Return the largest relative difference of a result.

    Raises:
        ExportError: it is too large.
    """
    tensors = sample_tensors(program, sizes)
    with torch.no_grad():
        results = program.module()(*tensors)
    found = session.run(None, {spec.name: t.cpu().numpy() for spec, t in zip(program.signature.tensors, tensors, strict=True)})
    worst, coded = 0.0, any(spec.dtype in _CODES for spec in program.signature.tensors)
    for name, at, array in zip(result_names(program), tensor_results(program), found, strict=True):
        expected, value = results[at].cpu(), torch.from_numpy(array)
        if expected.shape != value.shape or expected.dtype != value.dtype:
            raise ExportError(
                f"{name}: the program returns {expected.dtype} {tuple(expected.shape)}, onnxruntime {value.dtype} "
                f"{tuple(value.shape)}, at sizes {dict(sizes)}"
            )
        if not expected.numel():
            continue
        if expected.dtype in _CODES:
            _compare_codes(name, expected, value, sizes)
            continue
        gap = (expected.double() - value.double()).abs()
        # What is infinite or not a number in both is no difference; in one only, it is the largest.
        gap = gap.masked_fill((expected == value) | (expected.isnan() & value.isnan()), 0.0).nan_to_num(nan=torch.inf)
        scale = float(expected.double().nan_to_num(0.0, 0.0, 0.0).abs().max())
        error = float(gap.max()) / (scale or 1.0)
        limit = CODED_TOLERANCE if coded else TOLERANCES.get(expected.dtype, 1e-4)
        if error > limit:
            raise ExportError(
                f"{name}: onnxruntime's result is {error:.3g} of its largest element from the program's at sizes "
                f"{dict(sizes)}, and may be {limit:g}; nothing was written. Pass check=False to write it all the same."
            )
        worst = max(worst, error)
    return worst


def _compare_codes(name: str, expected: torch.Tensor, found: torch.Tensor, sizes: Mapping[str, int]) -> None:
    """Raise if codes differ by more than what is rounded to the other side.

    Raises:
        ExportError: they do.
    """
    if expected.dtype == torch.uint8:
        expected, found = (torch.stack((codes & 15, codes >> 4)) for codes in (expected, found))
    gap = (expected.int() - found.int()).abs()
    share, most = float((gap > 0).float().mean()), int(gap.max())
    if most > 1 or share > FLIPPED:
        raise ExportError(
            f"{name}: {share:.2%} of onnxruntime's codes are not the program's, by {most} at most, at sizes {dict(sizes)}; "
            f"{FLIPPED:.2%} may be, by 1; nothing was written. Pass check=False to write it all the same."
        )


def sample_tensors(program: Program, sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """Return random tensors of a call where the dimensions have these sizes.

    Integers are row numbers where they choose rows of a table, and else masks whose later rows end with zeros; where there are
    past keys and values they begin with them, so that what is new is there.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for spec, node, shape in zip(program.signature.tensors, program.inputs, shapes_for(program, sizes), strict=True):
        if spec.dtype in _CODES:
            tensor = torch.randint(*_CODES[spec.dtype], shape, generator=generator)
        elif spec.dtype.is_floating_point:
            tensor = torch.randn(shape, generator=generator)
        elif rows := _rows(node):
            tensor = torch.randint(0, rows, shape, generator=generator)
        else:
            tensor = torch.ones(shape, dtype=torch.long)
            if tensor.dim() >= 2:
                lengths = tensor.shape[-1] - torch.arange(tensor.shape[0]) * tensor.shape[-1] // (2 * tensor.shape[0])
                lengths = lengths.reshape(-1, *(1 for _ in shape[1:]))
                tensor = (torch.arange(shape[-1]) < lengths).long().expand(shape).clone()
                if spec.name == MASK and PAST in program.dimensions:
                    tensor = tensor.flip(-1)
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


_CODES = {torch.int8: (-127, 128), torch.uint8: (0, 256)}
"""Dtypes of keys and values in codes -> the codes."""

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
