"""One matrix product for linear layers that read the same value."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from graphwright.ir.errors import PlanError

aten = torch.ops.aten
LINEAR = aten.linear.default


def projections(b, *sizes, biased=()):
    """Return x, and linear layers of it with these many results."""
    x = b.input("x", "batch", "tokens", 6)
    layers = []
    for at, size in enumerate(sizes):
        arguments = [b.weight(f"block.{at}.weight", torch.randn(size, 6))]
        if at in biased:
            arguments.append(b.weight(f"block.{at}.bias", torch.randn(size)))
        layers.append(b.call(LINEAR, x, *arguments))
    return x, layers


@pytest.mark.parametrize("biased", [(), (0, 1, 2), (0, 2)])
def test_three_become_one(builder, run, biased) -> None:
    """Linear layers of one value become one and slices; the originals' weights leave the program."""
    b = builder()
    _, layers = projections(b, 6, 2, 3, biased=biased)
    outcome = run("fuse-projections", b.program(*layers))
    assert outcome.operations == ["aten.linear.default"] + ["aten.slice.Tensor"] * 3
    assert tuple(outcome.after.weights["block.0+1+2.weight"].shape) == (11, 6)
    assert len(outcome.after.weights) == 1 + bool(biased)
    outcome.check(torch.randn(2, 5, 6), tolerance=1e-6)


def test_tied_weights_are_not_stored_twice(builder, run) -> None:
    """A layer whose weight is read elsewhere too stays, with the reason."""
    b = builder()
    _, layers = projections(b, 6, 2, 3)
    tied = layers[1].args[1]
    outcome = run("fuse-projections", b.program(*layers, b.call(aten.neg.default, tied)))
    assert outcome.operations.count("aten.linear.default") == 2
    assert outcome.reasons == ["the weight 'block.1.weight' is used elsewhere too"]
    outcome.check(torch.randn(2, 5, 6), tolerance=1e-6)


def test_other_products_part_the_layers(builder, run) -> None:
    """Results do not wait in memory while another matrix product runs."""
    b = builder()
    x, (first,) = projections(b, 6)
    between = b.call(LINEAR, first, b.weight("between", torch.randn(6, 6)))
    second = b.call(LINEAR, x, b.weight("second", torch.randn(6, 6)))
    assert run("fuse-projections", b.program(between, second)).plan.decisions == ()


def test_dtypes_are_kept_apart(builder, run) -> None:
    """Weights that are computed are refused."""
    b = builder()
    x, layers = projections(b, 6, 6)
    computed = b.call(aten.neg.default, b.weight("w", torch.randn(6, 6)))
    outcome = run("fuse-projections", b.program(*layers, b.call(LINEAR, x, computed)))
    assert "its weight is computed" in outcome.reasons
    assert len(outcome.plan.decisions) == 1


def test_minimum(builder, run) -> None:
    """Fewer layers than the minimum stay."""
    b = builder()
    _, layers = projections(b, 6, 2)
    assert run("fuse-projections:minimum=3", b.program(*layers)).plan.decisions == ()


def test_an_edited_plan_is_obeyed(builder, run) -> None:
    """A member taken out of the plan stays; members that read different values are an error."""
    b = builder()
    x, layers = projections(b, 6, 2, 3)
    other = b.call(LINEAR, b.call(aten.neg.default, x), b.weight("other", torch.randn(2, 6)))
    program = b.program(*layers, other)

    def members(names):
        def edit(plan):
            decision = dataclasses.replace(plan.decisions[0], detail={"members": names})
            return dataclasses.replace(plan, decisions=(decision,))

        return edit

    outcome = run("fuse-projections", program, members([layers[0].name, layers[2].name]))
    assert "block.0+2.weight" in outcome.after.weights
    with pytest.raises(PlanError, match="are not linear layers of one value"):
        run("fuse-projections", program, members([layers[0].name, other.name]))
