"""Replacing tables whose entries follow from their index."""

from __future__ import annotations

import pytest
import torch

from graphwright.passes.cleanup.known_tables import linear_form

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("table", "form"),
    [
        (torch.arange(7), (0, 1, 0)),
        (torch.arange(12, 2, -2).reshape(1, 5), (12, -2, 1)),
        (torch.arange(3)[:, None].expand(3, 4), (0, 1, 0)),
        (torch.zeros(1, 512, dtype=torch.long), (0, 0, 1)),
        (torch.full((2, 3), 5, dtype=torch.int8), (5, 0, 0)),
        (torch.tensor([True, True]), (1, 0, 0)),
        (torch.tensor([True, False]), None),
        (torch.tensor([0, 1, 3]), None),
        (torch.arange(6).reshape(2, 3), None),
        (torch.tensor([[0, 1], [0, 2]]), None),
        (torch.tensor([[0, 0], [0, 1]]), None),
    ],
)
def test_linear_forms(table, form) -> None:
    """A table is linear in one index or it is not."""
    assert linear_form(table) == form


def test_tables_are_made_anew(builder, run) -> None:
    """Positions and token types leave the weights; what reads them gets the same values."""
    b = builder()
    x = b.input("x", 1, 6, dtype=torch.int64)
    positions = b.weight("positions", torch.arange(6)[None])
    types = b.weight("types", torch.zeros(1, 6, dtype=torch.int64))
    outcome = run("known-tables", b.program(b.call(aten.add.Tensor, b.call(aten.add.Tensor, x, positions), types)))
    assert not outcome.after.weights
    assert "aten.arange.start_step" in outcome.operations
    assert "aten.full.default" in outcome.operations
    outcome.check(torch.randint(0, 9, (1, 6)))


def test_a_bool_table_keeps_its_dtype(builder, run) -> None:
    """A mask that is true everywhere stays a mask."""
    b = builder()
    x = b.input("x", 4)
    mask = b.weight("mask", torch.ones(4, dtype=torch.bool))
    outcome = run("known-tables", b.program(b.call(aten.where.ScalarOther, mask, x, 0.0)))
    outcome.check(torch.randn(4))


def test_other_tables_stay(builder, run) -> None:
    """Floats are left alone in silence, and integers of another form with the reason."""
    b = builder()
    x = b.input("x", 3)
    floats, odd = b.weight("floats", torch.zeros(3)), b.weight("odd", torch.tensor([3, 1, 4]))
    outcome = run("known-tables", b.program(b.call(aten.add.Tensor, b.call(aten.add.Tensor, x, floats), odd)))
    assert set(outcome.after.weights) == {"floats", "odd"}
    assert outcome.reasons == ["its entries are no linear function of one index"]
