"""Lookups of rows by numbers that only the call knows: the kernel compared with PyTorch, and numbers out of range."""

from __future__ import annotations

import pytest
import torch

from graphwright.codegen.lower import lower
from graphwright.ir.containers import Leaf
from graphwright.ir.errors import GraphwrightError
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec
from graphwright.runtime.executable import Executable
from graphwright.runtime.schedule import CallStep, KernelStep

aten = torch.ops.aten


def program_of(builder, table: torch.Tensor, numbers=torch.int64):
    """Return a program that looks rows up."""
    made = builder()
    given = made.input("numbers", "batch", "tokens", dtype=numbers)
    program = made.program(made.call(aten.embedding.default, made.weight("table", table), given))
    spec = TensorSpec("numbers", numbers, "cpu", tuple(str(n) for n in program.shape(given)))
    ranges = {name: Range(0, None) for name in program.dimensions}
    parameter = Parameter("numbers", "positional_or_keyword")
    program.signature = Signature((parameter,), {"numbers": Leaf(0)}, (spec,), ranges, Leaf(0))
    return program


def looked_up(program, numbers: torch.Tensor) -> torch.Tensor:
    schedule = lower(program)
    assert [type(step) for step in schedule.steps] == [KernelStep]
    return Executable(schedule, program.weights, program.signature)(numbers)


@pytest.mark.parametrize("columns", [1, 63, 1000, 1100])
@pytest.mark.parametrize("shape", [(1, 1), (3, 21), (2, 500)])
def test_rows_are_those_of_the_table(builder, columns, shape) -> None:
    """Few rows and more than a program copies, short ones and ones of more than a block."""
    table = torch.randn(40, columns)
    numbers = torch.randint(0, 40, shape)
    numbers.view(-1)[-1] = 39
    assert torch.equal(looked_up(program_of(builder, table), numbers), table[numbers])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8])
def test_tables_of_other_types(builder, dtype) -> None:
    """Every element is copied as it is; numbers may be int32."""
    table = (torch.randn(9, 5) * 50).abs().to(dtype)
    numbers = torch.tensor([[0, 8, 3]], dtype=torch.int32)
    assert torch.equal(looked_up(program_of(builder, table, torch.int32), numbers), table[numbers.long()])


def test_a_table_that_lies_in_another_order(builder) -> None:
    """Its rows are read where they lie; no numbers at all give no rows."""
    table = torch.randn(5, 9).t()
    program = program_of(builder, table)
    assert torch.equal(looked_up(program, torch.tensor([[8, 0]])), table[torch.tensor([[8, 0]])])
    assert looked_up(program, torch.empty(3, 0, dtype=torch.int64)).shape == (3, 0, 5)


@pytest.mark.parametrize("wrong", [40, -1, 1 << 40])
def test_a_number_that_is_not_in_the_table_is_an_error(builder, wrong) -> None:
    """It is never read beyond the table; the next call is as right as ever."""
    table = torch.randn(40, 8)
    program = program_of(builder, table)
    executable = Executable(lower(program), program.weights, program.signature)
    numbers = torch.randint(0, 40, (2, 50))
    bad = numbers.clone()
    bad[1, 30] = wrong
    with pytest.raises(GraphwrightError, match=r"step .embedding_default. failed.*out of range: the table has no"):
        executable(bad)
    assert torch.equal(executable(numbers), table[numbers])


def test_complex_rows_are_left_to_pytorch(builder) -> None:
    """There is no kernel for them."""
    program = program_of(builder, torch.randn(4, 3, dtype=torch.complex64))
    assert [type(step) for step in lower(program).steps] == [CallStep]
