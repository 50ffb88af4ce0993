"""Recognition of norms that are written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

aten = torch.ops.aten
CAST = torch.ops.prims.convert_element_type.default
RMS_NORM, LAYER_NORM = "graphwright.rms_norm.default", "aten.layer_norm.default"
F32 = torch.float32


def mean_square(b, x, eps=1e-5, dim=-1):
    """Add mean(x^2) + eps."""
    return b.call(aten.add.Tensor, b.call(aten.mean.dim, b.call(aten.pow.Tensor_Scalar, x, 2), [dim], True), eps)


def llama(b, x, w):
    """The weight is multiplied after the cast to the input's dtype."""
    wide = b.call(CAST, x, F32)
    normed = b.call(aten.mul.Tensor, wide, b.call(aten.rsqrt.default, mean_square(b, wide)))
    return b.call(aten.mul.Tensor, w, b.call(CAST, normed, x.meta["val"].dtype))


def gemma(b, x, w):
    """1 + weight, in float32, then the cast."""
    wide = b.call(CAST, x, F32)
    root = b.call(aten.pow.Tensor_Scalar, mean_square(b, wide), -0.5)
    normed = b.call(aten.mul.Tensor, wide, root)
    factor = b.call(aten.add.Tensor, b.call(CAST, w, F32), 1.0)
    return b.call(CAST, b.call(aten.mul.Tensor, normed, factor), x.meta["val"].dtype)


def t5(b, x, w):
    """The value itself, not its cast, is multiplied by the root."""
    wide = b.call(CAST, x, F32)
    normed = b.call(aten.mul.Tensor, x, b.call(aten.rsqrt.default, mean_square(b, wide)))
    return b.call(aten.mul.Tensor, w, b.call(CAST, normed, x.meta["val"].dtype))


def division(b, x, w):
    """A division by a square root."""
    wide = b.call(CAST, x, F32)
    normed = b.call(aten.div.Tensor, wide, b.call(aten.sqrt.default, mean_square(b, wide)))
    return b.call(CAST, b.call(aten.mul.Tensor, normed, b.call(CAST, w, F32)), x.meta["val"].dtype)


def fused(b, x, w):
    """PyTorch's own operation."""
    return b.call(aten.rms_norm.default, x, [6], w, 1e-5)


def fused_without_eps(b, x, w):
    """PyTorch's own operation with its default for eps."""
    return b.call(aten.rms_norm.default, x, [6], w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spelling", [llama, gemma, t5, division, fused, fused_without_eps])
def test_rms_norm_spellings(builder, run, spelling, dtype) -> None:
    """Every spelling becomes one operation that rounds where the model does."""
    b = builder()
    x = b.input("x", "batch", "tokens", 6, dtype=dtype)
    outcome = run("raise-norms", b.program(spelling(b, x, b.weight("w", torch.randn(6).to(dtype)))))
    assert outcome.operations == [RMS_NORM]
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for tokens in (1, 63):
        outcome.check((torch.randn(2, tokens, 6) * 3).to(dtype), tolerance=tolerance)


@pytest.mark.parametrize("form", ["rsqrt", "variance"])
@pytest.mark.parametrize("parameters", [0, 1, 2])
def test_layer_norm_spellings(builder, run, form, parameters) -> None:
    """With the mean subtracted it is a layer norm, with as many parameters as follow."""
    b = builder()
    x = b.input("x", "batch", 6)
    centred = b.call(aten.sub.Tensor, x, b.call(aten.mean.dim, x, [-1], True))
    if form == "variance":
        spread = b.call(aten.var.correction, x, [-1], correction=0, keepdim=True)
    else:
        spread = b.call(aten.mean.dim, b.call(aten.pow.Tensor_Scalar, centred, 2), [-1], True)
    y = b.call(aten.mul.Tensor, centred, b.call(aten.rsqrt.default, b.call(aten.add.Tensor, spread, 1e-5)))
    for at, target in enumerate((aten.mul.Tensor, aten.add.Tensor)[:parameters]):
        y = b.call(target, y, b.weight(f"p{at}", torch.randn(6)))
    outcome = run("raise-norms", b.program(y))
    assert outcome.operations == [LAYER_NORM]
    outcome.check(torch.randn(7, 6), tolerance=1e-6)


def test_other_dimensions_are_refused(builder, run) -> None:
    """A mean square over another dimension is not a norm of features."""
    b = builder()
    x = b.input("x", 5, 6)
    y = b.call(aten.mul.Tensor, x, b.call(aten.rsqrt.default, mean_square(b, x, dim=0)))
    outcome = run("raise-norms", b.program(y))
    assert outcome.plan.decisions == ()
    assert "does not go over the last dimension" in outcome.reasons[0]


def test_a_mean_square_that_is_used_elsewhere_is_refused(builder, run) -> None:
    """What is needed anyway is not computed twice."""
    b = builder()
    x = b.input("x", 5, 6)
    square = mean_square(b, x)
    outcome = run("raise-norms", b.program(b.call(aten.mul.Tensor, x, b.call(aten.rsqrt.default, square)), square))
    assert outcome.plan.decisions == ()
    assert "is used for something else too" in outcome.reasons[0]


def test_a_factor_per_token_is_not_a_weight(builder, run) -> None:
    """What follows and is not a factor per feature stays outside of the operation."""
    b = builder()
    x, gate = b.input("x", 5, 6), b.input("gate", 5, 1)
    normed = b.call(aten.mul.Tensor, x, b.call(aten.rsqrt.default, mean_square(b, x)))
    outcome = run("raise-norms", b.program(b.call(aten.mul.Tensor, normed, gate)))
    assert outcome.operations == [RMS_NORM, "aten.mul.Tensor"]
    outcome.check(torch.randn(5, 6), torch.randn(5, 1), tolerance=1e-6)


def test_a_rounding_cast_in_front_stays(builder, run) -> None:
    """The norm of a value that was rounded to bfloat16 is not the norm of the value."""
    b = builder()
    x = b.input("x", 5, 6)
    outcome = run("raise-norms", b.program(llama(b, b.call(CAST, x, torch.bfloat16), b.weight("w", torch.ones(6)))))
    assert outcome.operations == [str(CAST), RMS_NORM]
    outcome.check(torch.randn(5, 6), tolerance=8e-3)


def test_an_edited_plan_is_obeyed(builder, run) -> None:
    """The plan's eps is used, not the graph's."""
    b = builder()
    x = b.input("x", 5, 6)
    program = b.program(llama(b, x, b.weight("w", torch.ones(6))))

    def edit(plan):
        (decision,) = plan.decisions
        return dataclasses.replace(plan, decisions=(dataclasses.replace(decision, detail={**decision.detail, "eps": 3.0}),))

    outcome = run("raise-norms", program, edit)
    values = torch.randn(5, 6)
    (result,) = outcome.after.reference(values)
    assert torch.allclose(result, values / (values.pow(2).mean(-1, keepdim=True) + 3.0).sqrt())
