"""Exporting to ONNX: from a model to a file that is checked before it takes its place."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphwright.codegen.onnx.calls import OPSETS
from graphwright.codegen.onnx.emitting import emit
from graphwright.ir.errors import ExportError, OptionError
from graphwright.ir.program import Program
from graphwright.ir.records import PassRecord
from graphwright.passes.base import Context, Pass, Stage

from .capturing import capture
from .comparing_onnx import Trial, compare, not_compared
from .compiled import Compiled
from .exporting_cached import with_caches
from .pipeline import DEFAULT_PASSES, run_passes
from .recipe import Recipe, mark_of, recipe_of
from .sampling import Dynamic

if TYPE_CHECKING:
    import onnx_ir

KERNEL_PASSES = frozenset({"fuse-projections", "split-bias"})
"""Passes that pay for generated kernels only: onnxruntime is slower for one wide product that is cut up behind."""

EXPORT_PASSES: tuple[str, ...] = tuple(name for name in DEFAULT_PASSES if name not in KERNEL_PASSES)
"""What an export does to every model, in order."""

LARGEST_FILE = 1_900_000_000
"""Bytes of weights that still fit into one file: protocol buffers end at 2 GiB."""

RECORDS = "graphwright.passes"
"""The entry of the file's metadata that says what was done to the model: a list, in JSON."""


@dataclass(frozen=True)
class Done:
    """What a pass did to the model.

    Args:
        name: the pass with its options.
        decisions: what it changed: "where: what".
        refusals: what it left alone, and why: "where: reason".
    """

    name: str
    decisions: tuple[str, ...]
    refusals: tuple[str, ...]


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
        passes: those that did or refused something, in order; the file says the same of itself.
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
    passes: tuple[Done, ...]
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
    calibration: Sequence[Any] = (),
    recipe: Recipe | str | os.PathLike[str] | None = None,
    generate: bool = False,
    **kwargs: Any,
) -> OnnxReport:
    """Write a model, or a program after passes, as an ONNX file.

    The file appears in one step, after it was checked; if anything fails, what was at `path` before stays.

    Args:
        model: any module, captured with the sample call; or a program, which is written as it is, but for the caches that
            `generate` asks for.
        path: of the file to write, usually ending in ".onnx".
        args: arguments of a sample call, as the model takes them; none for a program.
        passes: what to do to a module beyond recognition and clean-up: passes, or texts such as "fuse-projections:minimum=3".
        dynamic: which sizes may differ from call to call; see `capture`.
        opset: version of ONNX's operators, 23 to 25. onnxruntime has 23 since version 1.23.
        external_data: write the weights to a file of their own beside `path`, its name with ".data" added. None: where they
            are too many for one file.
        check: compare the file, run by onnxruntime, with the program at several sizes, and the capture with the model.
        calibration: further sample calls, for passes that decide by what a model computes; see `compile`.
        recipe: passes with their options, or the path of a file of them; those of `passes` run after them.
        generate: write a causal decoder so that it continues sequences: it takes `attention_mask` [batch, past + tokens] and
            the keys and values of the tokens before, `past_key_values.N.key` and `.value` [batch, heads, past, features], and
            returns `logits` for the new tokens and all keys and values as `present.N.key` and `.value`. `past` is 0 for a
            prompt. Sequences may be padded anywhere.
        kwargs: named arguments of the sample call.

    Returns:
        What was written.

    Raises:
        CaptureError: the model cannot be captured.
        ExportError: an operation has no form in ONNX, a package is missing, or the file does not compute what the program does.
        OptionError: a pass, an option or the opset is unknown, a pass rewrites caches and `generate` does not ask for any, or
            the recipe was made for another model.
        PassError: a pass cannot do what it was asked to, or the model cannot be run token by token.
    """
    if isinstance(model, Compiled):
        raise ExportError(
            "a compiled model holds kernels, and its graph no more: export what it was made of, with the passes in its recipe: "
            "export_onnx(model, path, *sample_args, recipe=parse_recipe(compiled.recipe))"
        )
    wanted = recipe_of(recipe, passes)
    cached = [step for step in wanted.passes if step.stage is Stage.DECODE]
    if cached and not generate:
        names = ", ".join(dict.fromkeys(step.name for step in cached))
        raise OptionError(f"{names}: the caches that it rewrites are there only with generate=True (--generate)")
    if isinstance(model, Program):
        if args or kwargs or len(wanted.passes) > len(cached):
            raise ExportError("a program is written as it is: it takes no sample call, and passes run before (run_passes)")
        program = model
    else:
        program = capture(model, *args, dynamic=dynamic, check=check, **kwargs)
    wanted.check(mark_of(program, "" if isinstance(model, Program) else type(model).__name__))
    device = next((w.device.type for w in program.weights.values()), "cpu")
    context = Context(tuple(calibration), device)
    if not isinstance(model, Program):
        program = run_passes(program, [*EXPORT_PASSES, *(step for step in wanted.passes if step not in cached)], context)
    if generate:
        program = with_caches(program, cached, context, check=check)
    made = emit(program, opset=opset)
    return _write(made, program, Path(path), opset, external_data, check)


def _write(
    made: onnx_ir.Model, program: Program, path: Path, opset: int, external_data: bool | None, check: bool
) -> OnnxReport:
    import onnx
    import onnx_ir

    weight_bytes = sum(value.const_value.nbytes for value in made.graph.initializers.values() if value.const_value is not None)
    done = tuple(_done(record) for record in program.records if record.plan.decisions or record.plan.refusals)
    made.metadata_props[RECORDS] = json.dumps([dataclasses.asdict(entry) for entry in done])
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
        trials = compare(draft, program) if check else ()
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
        notes=(*program.notes, *filter(None, [not_compared(program)] if check else [])),
        passes=done,
        trials=trials,
    )


def _shape(value: Any) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)


def _done(record: PassRecord) -> Done:
    return Done(
        record.options,
        tuple(f"{decision.where}: {decision.what}" for decision in record.plan.decisions),
        tuple(f"{refusal.where}: {refusal.reason}" for refusal in record.plan.refusals),
    )
