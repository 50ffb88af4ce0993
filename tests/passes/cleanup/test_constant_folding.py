"""Computing at compile time what no input decides."""

from __future__ import annotations

import torch

aten = torch.ops.aten


def test_folds_what_weights_decide(builder, run) -> None:
    """A chain over weights becomes one weight; the original goes where nothing else reads it."""
    b = builder()
    x = b.input("x", "batch", 4)
    factor = b.call(aten.exp.default, b.call(aten.add.Tensor, b.weight("w", torch.randn(4)), 1.0))
    outcome = run("constant-folding", b.program(b.call(aten.mul.Tensor, x, factor)))
    assert outcome.operations == ["aten.mul.Tensor"]
    assert [tuple(w.shape) for w in outcome.after.weights.values()] == [(4,)]
    assert set(outcome.before.weights) == {"w"}
    outcome.check(torch.randn(3, 4))


def test_folds_generators_of_static_size(builder, run) -> None:
    """An arange over a number is folded, one over a dimension is not."""
    b = builder()
    x = b.input("x", "batch", 4)
    fixed = b.call(aten.arange.default, 4, device="cpu")
    open_ended = b.call(aten.arange.default, b.size(x, 0), device="cpu")
    outcome = run("constant-folding", b.program(b.call(aten.add.Tensor, x, fixed), open_ended))
    assert outcome.operations == ["aten.arange.default", "aten.add.Tensor"]


def test_memory_does_not_grow(builder, run) -> None:
    """A value larger than the limit is refused, unless it replaces weights of its size."""
    b = builder()
    x = b.input("x", 8, 8)
    big = b.call(aten.expand.default, b.weight("small", torch.randn(8)), [8, 8])
    turned = b.call(aten.permute.default, b.weight("square", torch.randn(8, 8)), [1, 0])
    program = b.program(b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, big), turned))
    outcome = run("constant-folding:limit_bytes=64", program)
    assert outcome.operations == ["aten.expand.default", "aten.mul.Tensor", "aten.add.Tensor"]
    assert "it takes 256 bytes" in outcome.reasons[0]
    assert outcome.after.weights["folded_permute_default"].is_contiguous()
    outcome.check(torch.randn(8, 8))


def test_a_weight_that_is_read_elsewhere_is_not_doubled(builder, run) -> None:
    """The permutation of a tied weight would keep it in memory twice."""
    b = builder()
    x = b.input("x", 8, 8)
    weight = b.weight("tied", torch.randn(8, 8))
    turned = b.call(aten.permute.default, weight, [1, 0])
    program = b.program(b.call(aten.matmul.default, x, turned), b.call(aten.matmul.default, x, weight))
    outcome = run("constant-folding:limit_bytes=0", program)
    assert outcome.plan.decisions == ()
    assert len(outcome.reasons) == 1


def test_random_and_empty_stay(builder, run) -> None:
    """What differs from run to run is not frozen."""
    b = builder()
    x = b.input("x", 4)
    w = b.weight("w", torch.ones(4))
    noise = b.call(aten.rand_like.default, w)
    outcome = run("constant-folding", b.program(b.call(aten.add.Tensor, x, noise), b.call(aten.empty_like.default, w)))
    assert outcome.plan.decisions == ()
