"""Computing equal values once."""

from __future__ import annotations

import dataclasses

import torch

aten = torch.ops.aten


def test_equal_calls_share_a_value(builder, run) -> None:
    """Chains of equal calls become one, sizes included."""
    b = builder()
    x = b.input("x", "batch", 4)
    parts = []
    for _ in range(2):
        flat = b.call(aten.reshape.default, x, [b.size(x, 0), 2, 2])
        parts.append(b.call(aten.exp.default, flat))
    outcome = run("common-subexpressions", b.program(b.call(aten.add.Tensor, *parts)))
    assert outcome.operations == ["aten.reshape.default", "aten.exp.default", "aten.add.Tensor"]
    outcome.check(torch.randn(3, 4))


def test_numbers_of_other_types_are_not_equal(builder, run) -> None:
    """Adding 1 and adding 1.0 differ in the result's dtype."""
    b = builder()
    x = b.input("x", 4, dtype=torch.int64)
    program = b.program(b.call(aten.add.Tensor, x, 1), b.call(aten.add.Tensor, x, 1.0), b.call(aten.add.Tensor, x, True))
    assert run("common-subexpressions", program).plan.decisions == ()


def test_random_values_are_not_equal(builder, run) -> None:
    """Two draws stay two."""
    b = builder()
    x = b.input("x", 4)
    program = b.program(b.call(aten.rand_like.default, x), b.call(aten.rand_like.default, x))
    assert run("common-subexpressions", program).plan.decisions == ()


def test_an_edited_plan_is_obeyed(builder, run) -> None:
    """A decision taken out leaves its node."""
    b = builder()
    x = b.input("x", 4)
    program = b.program(*(b.call(aten.exp.default, x) for _ in range(3)))
    outcome = run("common-subexpressions", program, lambda p: dataclasses.replace(p, decisions=p.decisions[:1]))
    assert outcome.operations == ["aten.exp.default"] * 2
