"""The operations beyond ATen: references, shape rules and costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from graphwright.ir import dialect
from graphwright.ir.errors import VerifyError

aten = torch.ops.aten

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def error_ratio(got, expected):
    """Return the largest difference over the largest value."""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 63, 1000])
def test_rms_norm(size, dtype) -> None:
    """It is x / sqrt(mean(x^2) + eps) * (weight + offset), computed in float32 at least."""
    x, weight = (torch.randn(3, size) * 5).to(dtype), torch.randn(size).to(dtype)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 1e-2)
    for offset, cast in ((0.0, True), (1.0, True), (0.0, False), (1.0, False)):
        got = dialect.rms_norm(x, weight, 1e-3, offset, cast_before_weight=cast)
        assert got.dtype == dtype
        assert error_ratio(got, expected * (weight.double() + offset)) < tolerance
    assert error_ratio(dialect.rms_norm(x, None, 1e-3), expected) < tolerance


def test_rms_norm_rounds_where_it_says() -> None:
    """In half precision the two orders of cast and weight give different results, each of its own model."""
    x, weight = torch.randn(64, 128).bfloat16(), torch.randn(128).bfloat16()
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(dialect.rms_norm(x, weight, 1e-6), weight * normed.bfloat16())
    gemma = dialect.rms_norm(x, weight, 1e-6, 1.0, cast_before_weight=False)
    assert torch.equal(gemma, (normed * (1.0 + weight.float())).bfloat16())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [None, 4])
def test_rotary_keeps_lengths(interleaved, rotated) -> None:
    """A rotation by angles keeps the length of every pair, and leaves the other features."""
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    size = 8 if rotated is None else rotated
    angles = torch.randn(5, size // 2, dtype=torch.float64)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    got = dialect.rotary(x, angles.cos(), angles.sin(), interleaved=interleaved, rotated=rotated)
    assert torch.equal(got[..., size:], x[..., size:])
    pairs = (lambda t: (t[..., 0:size:2], t[..., 1:size:2])) if interleaved else (lambda t: t[..., :size].chunk(2, -1))
    before, after = (torch.complex(*pairs(t)) for t in (x, got))
    turn = torch.polar(torch.ones(5, size // 2, dtype=torch.float64), pairs(angles)[0])
    assert torch.allclose(after, before * turn)


@pytest.mark.parametrize("activation", sorted(dialect.ACTIVATIONS))
def test_glu(activation) -> None:
    """It is the activated gate times the values."""
    gate, up = torch.randn(2, 63)
    assert torch.equal(dialect.glu(gate, up, activation), dialect.ACTIVATIONS[activation](gate) * up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 63), (63, 7), (3, 0)])
def test_attention_is_pytorchs(queries, keys, dtype) -> None:
    """Without mask, and causal, it is PyTorch's function; key heads are shared."""
    q, k, v = torch.randn(2, 4, queries, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 5)
    expected = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True, scale=0.7)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 3e-2)
    got = dialect.attention(q.to(dtype), k.to(dtype), v.to(dtype), [], None, scale=0.7)
    assert got.dtype == dtype
    assert got.shape == (2, 4, queries, 5)
    if keys == 0:
        assert torch.equal(got, torch.zeros_like(got))
    else:
        assert error_ratio(got, expected) < tolerance


def test_attention_expressions() -> None:
    """Predicate and bias read operands, positions, heads and sizes."""
    q, k, v = (torch.randn(2, 4, 7, 8, dtype=torch.float64) for _ in range(3))
    seen = torch.rand(2, 7) < 0.7
    slopes = torch.rand(4, dtype=torch.float64)
    predicate = "q - k >= 0 & in0[b, k] & k - key_length + 5 >= 0"
    got = dialect.attention(q, k, v, [seen, slopes], None, predicate=predicate, bias="in1[h]*float(k)", scale=1.0)
    at = torch.arange(7)
    mask = (at[None, :] <= at[:, None]) & seen[:, None, None, :] & (at >= 2)
    scores = q @ k.transpose(-1, -2) + slopes[:, None, None] * at
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1).nan_to_num(0.0)
    assert torch.allclose(got, weights @ v)
    assert torch.equal(got[:, :, :2], torch.zeros(2, 4, 2, 8, dtype=torch.float64))


def test_attention_sink_and_cap() -> None:
    """A sink takes its share of the softmax, a cap bends the scores before the bias."""
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    sink = torch.tensor([0.5, -1.0], dtype=torch.float64)
    got = dialect.attention(q, k, v, [], sink, scale=2.0, softcap=3.0)
    scores = 3.0 * torch.tanh(2.0 * (q @ k.transpose(-1, -2)) / 3.0)
    parts = scores.exp()
    assert torch.allclose(got, parts / (parts.sum(-1, keepdim=True) + sink.exp()[None, :, None, None]) @ v)


@pytest.mark.parametrize(
    ("operation", "shapes", "arguments", "message"),
    [
        (dialect.rms_norm, [(2, 6), (5,)], [1e-6], "the weight has 5, x 6 features"),
        (dialect.rotary, [(2, 6), (2, 4), (2, 4)], [], "the table has 4 features, 6 are rotated"),
        (dialect.rotary, [(2, 5), (2, 5), (2, 5)], [], "an even number of features"),
        (dialect.glu, [(2, 6), (2, 5)], ["silu"], "shapes differ"),
        (dialect.glu, [(2, 6), (2, 6)], ["swish"], "no activation 'swish'"),
        (dialect.attention, [(1, 3, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)], [[], None], "3 query heads cannot share 2"),
        (dialect.attention, [(1, 2, 5, 8), (1, 2, 5, 7), (1, 2, 5, 8)], [[], None], "k has 7 features, q has 8"),
    ],
)
def test_shape_rules(builder, operation, shapes, arguments, message) -> None:
    """Arguments that do not fit are refused when the node is made, with what was found."""
    b = builder()
    inputs = [b.input(f"x{at}", *shape) for at, shape in enumerate(shapes)]
    keywords = {"scale": 1.0} if operation is dialect.attention else {}
    with pytest.raises(VerifyError, match=message):
        b.call(operation, *inputs, *arguments, **keywords)


def test_shapes_with_dimensions(builder) -> None:
    """The shape rules carry dimensions of any size."""
    b = builder()
    q, k = b.input("q", "batch", 4, "tokens", 8), b.input("k", "batch", 2, "tokens", 8)
    node = b.call(dialect.attention, q, k, k, [], None, scale=1.0)
    batch, tokens = (b.built.dimensions[name].symbol for name in ("batch", "tokens"))
    assert b.built.shape(node) == (batch, 4, tokens, 8)


def test_import_is_idempotent() -> None:
    """A fresh process defines the operations once, whichever module comes first."""
    code = (
        "import graphwright.ir.ops.glu, graphwright.ir.dialect as d, torch; print(torch.ops.graphwright.glu.default is d.glu)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "True"
