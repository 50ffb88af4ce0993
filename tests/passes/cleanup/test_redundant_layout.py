"""Removal of operations that rearrange values and change nothing."""

from __future__ import annotations

import dataclasses
import operator

import pytest
import torch

aten = torch.ops.aten

RESHAPE, PERMUTE, SLICE, CAT = aten.reshape.default, aten.permute.default, aten.slice.Tensor, aten.cat.default
EXPAND, UNSQUEEZE = aten.expand.default, aten.unsqueeze.default
END = 2**63 - 1


def chain(b, *steps):
    """Return a program that does steps, (target, *arguments), to x [batch, 4, 6]; the argument "batch" is its size."""
    x = node = b.input("x", "batch", 4, 6)
    batch = b.size(x, 0)
    for target, *arguments in steps:
        arguments = [[batch if n == "batch" else n for n in a] if isinstance(a, list) else a for a in arguments]
        node = b.call(target, node, *arguments)
    return b.program(node)


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ([(RESHAPE, ["batch", 24]), (RESHAPE, ["batch", 4, 6])], []),
        ([(RESHAPE, ["batch", 24]), (RESHAPE, ["batch", 8, 3])], [RESHAPE]),
        ([(UNSQUEEZE, 1), (aten.squeeze.dims, [1])], []),
        ([(UNSQUEEZE, 1), (RESHAPE, ["batch", 24])], [RESHAPE]),
        ([(PERMUTE, [0, 2, 1]), (PERMUTE, [0, 2, 1])], []),
        ([(PERMUTE, [0, 2, 1]), (PERMUTE, [2, 0, 1])], [PERMUTE]),
        ([(PERMUTE, [0, -2, -1])], []),
        ([(UNSQUEEZE, 1), (EXPAND, ["batch", 2, 4, 6]), (EXPAND, ["batch", 2, 4, 6])], [UNSQUEEZE, EXPAND]),
        ([(EXPAND, ["batch", 4, 6])], []),
        ([(SLICE, 1, 0, END)], []),
        ([(SLICE, 0, 0, END)], []),
        ([(SLICE, 2, 1, 5), (SLICE, 2, 1, 3)], [SLICE]),
        ([(SLICE, 2, 1, 5), (SLICE, 2, -2, END)], [SLICE]),
        ([(SLICE, 2, 1, 5), (SLICE, 1, 1, 3)], [SLICE, SLICE]),
        ([(SLICE, 2, 0, 6, 2), (SLICE, 2, 0, 2)], [SLICE, SLICE]),
        ([(PERMUTE, [0, 2, 1]), (RESHAPE, ["batch", 24])], [PERMUTE, RESHAPE]),
    ],
)
def test_chains(builder, run, steps, left) -> None:
    """Chains shorten to what they amount to, bitwise."""
    outcome = run("redundant-layout", chain(builder(), *steps))
    assert outcome.operations == [str(target) for target in left]
    outcome.check(torch.randn(5, 4, 6))


def cat_program(b, *bounds, dim=2):
    """Return a program that concatenates slices of x [batch, 4, 6]."""
    x = b.input("x", "batch", 4, 6)
    return b.program(b.call(CAT, [b.call(SLICE, x, dim, low, high) for low, high in bounds], dim))


@pytest.mark.parametrize(
    ("bounds", "left"),
    [
        ([(0, 2), (2, 6)], []),
        ([(0, 2), (2, 4), (4, END)], []),
        ([(0, 3), (6, END)], [SLICE]),
        ([(0, 3), (4, 4), (3, 5)], [SLICE, SLICE, CAT]),
        ([(2, 6), (0, 2)], [SLICE, SLICE, CAT]),
        ([(0, 2), (3, 6)], [SLICE, SLICE, CAT]),
        ([(0, 2), (2, 5)], [SLICE, SLICE, CAT]),
    ],
)
def test_concatenations(builder, run, bounds, left) -> None:
    """What was cut apart is put together again only where all of it comes back in order; empty parts go."""
    outcome = run("redundant-layout", cat_program(builder(), *bounds))
    assert outcome.operations == [str(target) for target in left]
    outcome.check(torch.randn(5, 4, 6))


def test_concatenation_of_all_tokens(builder, run) -> None:
    """A cut at a number through a dimension of any size comes back whole, also where the dimension is shorter."""
    outcome = run("redundant-layout", cat_program(builder(), (0, 3), (3, END), dim=0))
    assert outcome.operations == []
    outcome.check(torch.randn(2, 4, 6))
    outcome.check(torch.randn(9, 4, 6))


def test_linear_reads_rows_as_they_are(builder, run) -> None:
    """Rows made one dimension around a linear layer stay apart."""
    b = builder()
    x = b.input("x", "batch", "tokens", 6)
    batch, tokens = b.size(x, 0), b.size(x, 1)
    rows = b.call(operator.mul, batch, tokens)
    flat = b.call(RESHAPE, x, [rows, 6])
    y = b.call(aten.linear.default, flat, b.weight("w", torch.randn(3, 6)), b.weight("b", torch.randn(3)))
    outcome = run("redundant-layout", b.program(b.call(RESHAPE, y, [batch, tokens, 3])))
    assert "aten.reshape.default" not in outcome.operations
    outcome.check(torch.randn(2, 5, 6))


def test_an_edited_plan_is_obeyed(builder, run) -> None:
    """With its decision taken out, a chain stays."""
    program = chain(builder(), (PERMUTE, [0, 2, 1]), (PERMUTE, [0, 2, 1]))
    outcome = run("redundant-layout", program, lambda plan: dataclasses.replace(plan, decisions=()))
    assert outcome.operations == [str(PERMUTE)] * 2
