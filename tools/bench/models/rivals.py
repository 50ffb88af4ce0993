"""Who runs the models: PyTorch in three ways, onnxruntime, and we."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .onnx_files import exported
from .rows import Inputs, Row, first_output

Run = Callable[[], torch.Tensor]
"""Computes the model's first output once."""

if TYPE_CHECKING:
    from graphwright import Compiled

OURS = "graphwright"
EAGER = "eager"


@dataclass(frozen=True)
class Case:
    """What a rival is made for.

    Args:
        row: where model and inputs come from.
        model: the model; rivals share it and leave it as it is.
        inputs: its keyword arguments.
        threads: number of threads; torch's own number is this one while the rival is made and run.
    """

    row: Row
    model: Any
    inputs: Inputs
    threads: int


def _eager(case: Case) -> Run:
    @torch.inference_mode()
    def run() -> torch.Tensor:
        return first_output(case.model(**case.inputs))

    return run


def _compiled(name: str, **settings: Any) -> Callable[[Case], Run]:
    def build(case: Case) -> Run:
        model, inputs = case.model, case.inputs

        def forward() -> torch.Tensor:
            return first_output(model(**inputs))

        # torch.compile keeps what it compiled with the code object, of which all closures share one: several settings
        # for one of them would count as recompilations.
        code = forward.__code__.replace(co_name=f"forward_{name}")
        own = types.FunctionType(code, forward.__globals__, code.co_name, None, forward.__closure__)
        compiled = torch.compile(own, dynamic=False, **settings)

        @torch.no_grad()
        def run() -> torch.Tensor:
            result: torch.Tensor = compiled()
            return result

        return run

    return build


def _onnxruntime(opset: int) -> Callable[[Case], Run]:
    def build(case: Case) -> Run:
        # It carries no types.
        onnxruntime: Any = importlib.import_module("onnxruntime")
        path = exported(case.model, case.inputs, case.row.varying, opset)
        options = onnxruntime.SessionOptions()
        # With 1 it runs in the calling thread.
        options.intra_op_num_threads = case.threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        output = session.get_outputs()[0].name
        feeds = {name: tensor.numpy() for name, tensor in case.inputs.items()}

        def run() -> torch.Tensor:
            return torch.from_numpy(session.run([output], feeds)[0])

        return run

    return build


def _ours(case: Case) -> Run:
    compiled = compile_ours(case)

    def run() -> torch.Tensor:
        return first_output(compiled(**case.inputs))

    return run


def compile_ours(case: Case) -> Compiled:
    """Return the model compiled by Graphwright, without the padding where the sequences have some."""
    import graphwright

    mask = case.inputs.get("attention_mask")
    padded = mask is not None and not bool(mask.all())
    inputs: dict[str, Any] = dict(case.inputs)
    return graphwright.compile(case.model, passes=["pack-tokens"] if padded else [], **inputs)


RIVALS: dict[str, Callable[[Case], Run]] = {
    OURS: _ours,
    EAGER: _eager,
    "compile": _compiled("default"),
    "max-autotune": _compiled("max_autotune", mode="max-autotune"),
    "freezing": _compiled("freezing", options={"freezing": True}),
    "onnx-20": _onnxruntime(20),
    "onnx-23": _onnxruntime(23),
}
"""Name -> what makes a rival ready to run. What it raises is the reason why there is no number."""


def forget_compiled() -> None:
    """Let torch.compile drop what it compiled, so that one row's code is not among another's."""
    torch._dynamo.reset()
