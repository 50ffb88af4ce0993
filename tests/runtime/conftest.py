"""A small program written by hand: two kernels, two products, one call of PyTorch, sizes that vary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from graphwright.ir.containers import Container, Leaf
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec
from graphwright.runtime.executable import Executable
from graphwright.runtime.schedule import Buffer, CallStep, KernelStep, MatmulStep, Schedule, View

BIAS_RELU = '''"""Adds a bias and cuts off what is negative. NaN stays."""

import triton
import triton.language as tl


@triton.jit
def positive(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def bias_relu(x, bias, out, rows, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < width
    value = tl.load(x + row * width + column, mask=mask) + tl.load(bias + column, mask=mask)
    tl.store(out + row * width + column, positive(value), mask=mask)
'''

SCALE = """import triton
import triton.language as tl


@triton.jit
def scale(x, out, count, factor, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = k < count
    tl.store(out + k, tl.load(x + k, mask=mask) * factor, mask=mask)
"""

WIDTH, HIDDEN, CLASSES = 24, 40, 10
ROWS = "batch*tokens"


def rows(buffer: str, width: int) -> View:
    return View(buffer, (ROWS, width), (width, 1))


def two_layers() -> Schedule:
    """softmax(relu(x W1^T + b) W2^T), and x * 0.5."""
    buffers = [
        Buffer("x", "float32", ("batch", "tokens", WIDTH), (f"tokens*{WIDTH}", WIDTH, 1), "input", "0"),
        Buffer("w1", "float32", (HIDDEN, WIDTH), (WIDTH, 1), "weight", "first.weight"),
        Buffer("b1", "float32", (HIDDEN,), (1,), "weight", "first.bias"),
        Buffer("w2", "float32", (CLASSES, HIDDEN), (HIDDEN, 1), "weight", "second.weight"),
        Buffer("t1", "float32", (ROWS, HIDDEN), (HIDDEN, 1), "temporary"),
        Buffer("t2", "float32", (ROWS, HIDDEN), (HIDDEN, 1), "temporary"),
        Buffer("t3", "float32", (ROWS, CLASSES), (CLASSES, 1), "temporary"),
        Buffer("y", "float32", ("batch", "tokens", CLASSES), (f"tokens*{CLASSES}", CLASSES, 1), "output"),
        Buffer("z", "float32", ("batch", "tokens", WIDTH), (f"tokens*{WIDTH}", WIDTH, 1), "output"),
    ]
    whole = {b.name: View(b.name, b.shape, b.strides) for b in buffers}
    count = f"{ROWS}*{WIDTH}"
    steps = (
        MatmulStep("first", rows("x", WIDTH), "w1", rows("t1", HIDDEN), provenance="line 1 of the model"),
        KernelStep(
            "bias_relu",
            "bias_relu",
            (ROWS,),
            (whole["t1"], whole["b1"], whole["t2"], ROWS, HIDDEN),
            {"BLOCK": 64},
            ("t1", "b1"),
            ("t2",),
        ),
        MatmulStep("second", rows("t2", HIDDEN), "w2", rows("t3", CLASSES)),
        CallStep("softmax", "aten::_softmax.default", (rows("t3", CLASSES), 1, False), {}, ("t4",)),
        CallStep("reshape", "aten::mul.Tensor", (View("t4", whole["y"].shape, whole["y"].strides), 1.0), {}, ("y",), into=True),
        KernelStep(
            "scale", "scale", (f"({count}+63)//64",), (whole["x"], whole["z"], count, 0.5), {"BLOCK": 64}, ("x",), ("z",)
        ),
    )
    t4 = Buffer("t4", "float32", (ROWS, CLASSES), (CLASSES, 1), "temporary")
    return Schedule(
        {"batch": (0, None), "tokens": (1, 512)},
        ("x",),
        (whole["y"], whole["z"]),
        {b.name: b for b in (*buffers, t4)},
        steps,
        {"bias_relu": BIAS_RELU, "scale": SCALE},
    )


def two_layers_signature() -> Signature:
    return Signature(
        (Parameter("x", "positional_or_keyword"),),
        {"x": Leaf(0)},
        (TensorSpec("x", torch.float32, "cpu", ("batch", "tokens", WIDTH)),),
        {"batch": Range(0, None), "tokens": Range(1, 512)},
        Container("tuple", "", (), (Leaf(0), Leaf(1))),
    )


@dataclass(frozen=True)
class Example:
    """A program and what it should compute."""

    schedule: Schedule
    signature: Signature
    weights: Mapping[str, torch.Tensor]

    def executable(self, **changes: Any) -> Executable:
        return Executable(replace(self.schedule, **changes), self.weights, self.signature)

    def reference(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w = {name: weight.double() for name, weight in self.weights.items()}
        hidden = torch.relu(x.double() @ w["first.weight"].T + w["first.bias"])
        return torch.softmax(hidden @ w["second.weight"].T, -1), x.double() * 0.5


@pytest.fixture
def example() -> Example:
    """The program of this file, with fresh weights."""
    weights = {
        "first.weight": torch.randn(HIDDEN, WIDTH) / WIDTH**0.5,
        "first.bias": torch.randn(HIDDEN),
        "second.weight": torch.randn(CLASSES, HIDDEN) / HIDDEN**0.5,
    }
    return Example(two_layers(), two_layers_signature(), weights)


@pytest.fixture(scope="session")
def make_program() -> Callable[..., tuple[Schedule, Signature]]:
    """Make a program of one input `x`, float32 [n], and steps over buffers of that shape."""

    def make(steps: Any, buffers: Mapping[str, str], outputs: Any, kernels: Mapping[str, str]) -> tuple[Schedule, Signature]:
        table = {name: Buffer(name, "float32", ("n",), (1,), kind) for name, kind in buffers.items()}
        table["x"] = Buffer("x", "float32", ("n",), (1,), "input", "0")
        schedule = Schedule({"n": (0, None)}, ("x",), tuple(outputs), table, tuple(steps), kernels)
        results = Container("tuple", "", (), tuple(Leaf(k) for k in range(len(outputs))))
        signature = Signature(
            (Parameter("x", "positional_or_keyword"),),
            {"x": Leaf(0)},
            (TensorSpec("x", torch.float32, "cpu", ("n",)),),
            {"n": Range(0, None)},
            results,
        )
        return schedule, signature

    return make
