"""Lowering as a whole: the same schedule for the same program, its size, its text, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphwright
from graphwright.codegen.lower import lower
from graphwright.ir.errors import LoweringError
from graphwright.ir.program import Program
from graphwright.passes.base import Context
from graphwright.pipeline import DEFAULT_PASSES, run_passes
from graphwright.runtime.schedule import KernelStep
from graphwright.runtime.validate import check_schedule

aten = torch.ops.aten


def prepared(module: nn.Module, *args: torch.Tensor, **options: Any) -> Program:
    """Return a module's program after the default passes."""
    program = graphwright.capture(module.eval(), *args, check=False, **options)
    return run_passes(program, list(DEFAULT_PASSES), Context(target="cpu"), keep_text=False)


class Block(nn.Module):
    """A residual block, times the number of layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)]) for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, up, down in self.layers:
            x = x + down(F.gelu(up(norm(x))))
        return x


def test_schedules_are_the_same_every_time() -> None:
    """Two captures of a model give equal schedules, byte for byte in their kernels."""
    first, second = (lower(prepared(Block(2), torch.randn(2, 5, 16))) for _ in range(2))
    assert first.kernels == second.kernels
    assert list(first.kernels) == list(second.kernels)
    assert first == second


def test_schedules_are_whole() -> None:
    """Every buffer that a step names is there, and no step reads what no earlier one wrote."""
    program = prepared(Block(2), torch.randn(2, 5, 16))
    schedule = lower(program)
    check_schedule(schedule, program.weights)
    known = {name for name, buffer in schedule.buffers.items() if buffer.kind in ("input", "weight")}
    for step in schedule.steps:
        if isinstance(step, KernelStep):
            assert set(step.reads) - set(step.writes) <= known
            known |= set(step.writes)
        elif hasattr(step, "out"):
            assert step.x.buffer in known
            known.add(step.out.buffer)


def test_more_layers_add_steps_and_no_kernels() -> None:
    """Layers alike share their kernels, so that only steps are added."""
    small, large = (lower(prepared(Block(n), torch.randn(2, 5, 16))) for n in (2, 5))
    assert small.kernels.keys() == large.kernels.keys()
    assert [k.split("\n\n", 1)[1] for k in small.kernels.values()] == [k.split("\n\n", 1)[1] for k in large.kernels.values()]
    assert len(large.steps) > len(small.steps)


def test_the_program_is_left_as_it_was() -> None:
    """Lowering changes nothing in the program."""
    program = prepared(Block(1), torch.randn(2, 5, 16))
    before = str(program.graph)
    lower(program)
    assert str(program.graph) == before


def test_steps_say_where_they_come_from() -> None:
    """Steps name nodes of the graph, and the file and line of the model's code."""
    schedule = lower(prepared(Block(1), torch.randn(2, 5, 16)))
    assert all("codegen/test_lower.py:" in step.provenance for step in schedule.steps)


def test_a_device_of_its_own() -> None:
    """For a GPU a program takes one row or 1024 elements; on a CPU as many as hide the cost of handing it out."""
    program = prepared(nn.GELU(), torch.randn(2, 5, 16))
    cpu, cuda = lower(program), lower(program, device="cuda")
    assert cuda.device == "cuda"

    def elements(schedule: Any) -> int:
        return max(s.constants.get("BLOCK", s.constants.get("ROWS", 0)) for s in schedule.steps if isinstance(s, KernelStep))

    assert elements(cuda) <= 1024 < elements(cpu)


def test_dtypes_that_kernels_do_not_have(builder: Any) -> None:
    """What Triton has no dtype for is called, and what is around it is generated."""
    build = builder()
    x = build.input("x", "batch", 4)
    turned = build.call(aten.mul.Tensor, build.call(aten.add.Tensor, x, 1.0), 1j)
    schedule = lower(build.program(build.call(aten.exp.default, build.call(aten.abs.default, turned))))
    assert [type(step).__name__ for step in schedule.steps] == ["KernelStep", "CallStep", "CallStep", "KernelStep"]


def test_sizes_with_no_text_are_refused() -> None:
    """A size that is no arithmetic of integers is refused."""
    import sympy

    from graphwright.codegen.indexing import size_text

    with pytest.raises(LoweringError, match="cannot be computed when the model runs"):
        size_text(sympy.sqrt(sympy.Symbol("n", integer=True)))
