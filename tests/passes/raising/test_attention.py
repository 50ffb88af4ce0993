"""Recognition of attention, called and written out."""

from __future__ import annotations

import dataclasses
import math
import operator

import pytest
import torch

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
MATMUL, PERMUTE, RESHAPE, EXPAND = aten.matmul.default, aten.permute.default, aten.reshape.default, aten.expand.default
ATTENTION = "graphwright.attention.default"
LOW = torch.finfo(torch.float32).min


def heads(b, heads=4, key_heads=4, dtype=torch.float32):
    """Add q [batch, heads, tokens, 8], and k and v with `key_heads` heads."""
    shapes = {"q": heads, "k": key_heads, "v": key_heads}
    return [b.input(name, "batch", count, "tokens", 8, dtype=dtype) for name, count in shapes.items()]


def sample(heads=4, key_heads=4, batch=2, tokens=7, dtype=torch.float32):
    """Return values for `heads`."""
    return [torch.randn(batch, count, tokens, 8).to(dtype) for count in (heads, key_heads, key_heads)]


def causal_mask(b, like):
    """Add arange(tokens)[None, :] <= arange(tokens)[:, None]."""
    tokens = b.size(like, 2)
    keys, queries = (b.call(aten.arange.default, tokens, device="cpu") for _ in range(2))
    return b.call(aten.le.Tensor, b.call(aten.unsqueeze.default, keys, 0), b.call(aten.unsqueeze.default, queries, 1))


def repeated(b, x, times):
    """Add the keys' heads repeated as Hugging Face models do."""
    batch, key_heads, tokens = b.size(x, 0), x.meta["val"].shape[1], b.size(x, 2)
    wide = b.call(EXPAND, b.call(aten.unsqueeze.default, x, 2), [batch, key_heads, times, tokens, 8])
    return b.call(RESHAPE, wide, [batch, key_heads * times, tokens, 8])


def written(b, q, k, v, *, scale=0.3, after=lambda scores: scores):
    """Add softmax(after(scale * q k^T)) v."""
    scores = b.call(aten.mul.Tensor, b.call(MATMUL, q, b.call(PERMUTE, k, [0, 1, 3, 2])), scale)
    return b.call(MATMUL, b.call(aten.softmax.int, after(scores), -1), v)


def only_attention(outcome):
    """Return the plan's one decision's detail, after checking that nothing of the old form is left."""
    assert outcome.operations.count(ATTENTION) == 1
    assert not {str(SDPA), str(MATMUL), "aten.softmax.int", "aten.bmm.default"} & set(outcome.operations)
    return outcome.plan.decisions[0].detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["plain", "is_causal", "causal", "scale"])
def test_calls(builder, run, form, dtype) -> None:
    """PyTorch's function with its defaults, its causal flag, a mask and a scale."""
    b = builder()
    q, k, v = heads(b, dtype=dtype)
    mask = [causal_mask(b, q)] if form == "causal" else [None, 0.0, True] if form == "is_causal" else []
    keywords = {"scale": 0.7} if form == "scale" else {}
    outcome = run("raise-attention", b.program(b.call(SDPA, q, k, v, *mask, **keywords)))
    detail = only_attention(outcome)
    assert detail["predicate"] == ("q - k >= 0" if "causal" in form else "")
    assert detail["scale"] == (0.7 if form == "scale" else 8**-0.5)
    tolerance = 1e-6 if dtype == torch.float32 else 1.6e-2
    for batch, tokens in ((1, 1), (2, 63)):
        outcome.check(*sample(batch=batch, tokens=tokens, dtype=dtype), tolerance=tolerance)


@pytest.mark.parametrize("form", ["called", "written", "grouped", "interleaved"])
def test_repeated_heads(builder, run, form) -> None:
    """Keys and values repeated for the query heads are read unrepeated."""
    b = builder()
    q, k, v = heads(b, 4, 2)
    if form == "grouped":
        y = b.call(SDPA, q, k, v, enable_gqa=True)
    elif form == "interleaved":
        y = b.call(SDPA, q, *(b.call(aten.repeat_interleave.self_int, x, 2, 1) for x in (k, v)))
    else:
        make = written if form == "written" else (lambda b, *heads: b.call(SDPA, *heads))
        y = make(b, q, repeated(b, k, 2), repeated(b, v, 2))
    outcome = run("raise-attention", b.program(y))
    assert only_attention(outcome)["k"] == "k"
    assert outcome.operations == [ATTENTION]
    outcome.check(*sample(4, 2), tolerance=1e-6)


def test_heads_in_another_order_stay_repeated(builder, run) -> None:
    """Heads 0 1 0 1 are not heads 0 0 1 1."""
    b = builder()
    q, k, v = heads(b, 4, 2)
    tiled = [b.call(aten.repeat.default, x, [1, 2, 1, 1]) for x in (k, v)]
    outcome = run("raise-attention", b.program(b.call(SDPA, q, *tiled)))
    assert outcome.operations.count("aten.repeat.default") == 2
    outcome.check(*sample(4, 2), tolerance=1e-6)


@pytest.mark.parametrize("fill", [-math.inf, LOW])
@pytest.mark.parametrize("form", ["where", "masked_fill", "add"])
def test_written_masks(builder, run, form, fill) -> None:
    """A mask that chooses, fills or adds is an expression afterwards."""
    b = builder()
    q, k, v = heads(b)
    mask = causal_mask(b, q)

    def after(scores):
        if form == "where":
            return b.call(aten.where.ScalarOther, mask, scores, fill)
        if form == "masked_fill":
            return b.call(aten.masked_fill.Scalar, scores, b.call(aten.logical_not.default, mask), fill)
        return b.call(aten.add.Tensor, scores, b.call(aten.where.Scalar, mask, 0.0, fill))

    outcome = run("raise-attention", b.program(written(b, q, k, v, after=after)))
    detail = only_attention(outcome)
    assert (detail["predicate"], detail["bias"], detail["operands"]) == ("q - k >= 0", "", [])
    assert detail["scale"] == 0.3
    outcome.check(*sample(), tolerance=1e-6)


def padded(b, fill):
    """Return a program of causal attention with padding: keys whose `seen` is 0 get the score `fill`."""
    q, k, v = heads(b)
    seen = b.input("seen", "batch", "tokens", dtype=torch.int64)
    visible = b.call(aten.ne.Scalar, seen, 0)
    for _ in range(2):
        visible = b.call(aten.unsqueeze.default, visible, 1)
    mask = b.call(aten.logical_and.default, visible, causal_mask(b, q))
    return b.program(written(b, q, k, v, after=lambda s: b.call(aten.where.ScalarOther, mask, s, fill)))


@pytest.mark.parametrize(("text", "average"), [("raise-attention", True), ("raise-attention:blind=zero", False)])
def test_queries_that_see_no_key(builder, run, text, average) -> None:
    """A query hidden from all keys by a large negative number averages them, unless it is asked to give 0."""
    outcome = run(text, padded(builder(), LOW))
    assert only_attention(outcome)["operands"] == ["seen"]
    seen = torch.ones(2, 7, dtype=torch.int64)
    outcome.check(*sample(), seen, tolerance=1e-6)
    seen[1, :3] = 0
    if average:
        outcome.check(*sample(), seen, tolerance=1e-6)
    else:
        q, k, v = sample()
        (result,) = outcome.after.reference(q, k, v, seen)
        (expected,) = outcome.before.reference(q, k, v, seen)
        assert torch.equal(result[1, :, :3], torch.zeros(4, 3, 8))
        assert torch.allclose(result[1, :, 3:], expected[1, :, 3:], atol=1e-6)


def test_softcap(builder, run) -> None:
    """Scores bent by a tanh before the mask."""
    b = builder()
    q, k, v = heads(b)
    mask = causal_mask(b, q)

    def after(scores):
        bent = b.call(aten.mul.Tensor, b.call(aten.tanh.default, b.call(aten.div.Tensor, scores, 2.0)), 2.0)
        return b.call(aten.where.ScalarOther, mask, bent, -math.inf)

    outcome = run("raise-attention", b.program(written(b, q, k, v, scale=3.0, after=after)))
    detail = only_attention(outcome)
    assert (detail["softcap"], detail["scale"]) == (2.0, 3.0)
    outcome.check(*sample(), tolerance=1e-6)


def test_sinks(builder, run) -> None:
    """A column of scores per head joins the softmax and is cut off, with the largest score taken off before."""
    b = builder()
    q, k, v = heads(b)
    sink = b.weight("sink", torch.randn(4))
    k_turned = b.call(PERMUTE, k, [0, 1, 3, 2])
    scores = b.call(MATMUL, q, k_turned)
    column = b.call(EXPAND, b.call(RESHAPE, sink, [1, 4, 1, 1]), [b.size(q, 0), 4, b.size(q, 2), 1])
    joined = b.call(aten.cat.default, [scores, column], -1)
    joined = b.call(aten.sub.Tensor, joined, b.call(aten.amax.default, joined, [-1], True))
    weights = b.call(aten.slice.Tensor, b.call(aten.softmax.int, joined, -1), 3, 0, -1)
    outcome = run("raise-attention", b.program(b.call(MATMUL, weights, v)))
    assert only_attention(outcome)["sink"] == "sink"
    outcome.check(*sample(), tolerance=1e-6)


def test_position_bias(builder, run) -> None:
    """A bias that is computed is read, element by element."""
    b = builder()
    q, k, v = heads(b)
    bias = b.input("bias", 1, 4, "tokens", "tokens")
    program = b.program(written(b, q, k, v, after=lambda s: b.call(aten.add.Tensor, s, bias)))
    outcome = run("raise-attention", program)
    assert only_attention(outcome)["bias"] == "in0[0, h, q, k]"
    outcome.check(*sample(), torch.randn(1, 4, 7, 7), tolerance=1e-6)


def flattened(b):
    """Return a program whose products have batch and heads as one dimension (Bloom)."""
    q, k, v = heads(b)
    batch, tokens = b.size(q, 0), b.size(q, 2)
    rows = b.call(operator.mul, batch, 4)
    q3, k3, v3 = (b.call(RESHAPE, x, [rows, tokens, 8]) for x in (q, k, v))
    slopes = b.weight("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]))
    distance = b.call(aten.arange.default, tokens, device="cpu")
    alibi = b.call(aten.mul.Tensor, b.call(RESHAPE, slopes, [4, 1, 1]), distance)
    alibi = b.call(aten.repeat.default, alibi, [batch, 1, 1])
    scores = b.call(aten.baddbmm.default, alibi, q3, b.call(PERMUTE, k3, [0, 2, 1]), alpha=0.3)
    scores = b.call(RESHAPE, scores, [batch, 4, tokens, tokens])
    scores = b.call(aten.where.ScalarOther, causal_mask(b, q), scores, LOW)
    weights = b.call(RESHAPE, b.call(aten.softmax.int, scores, -1), [rows, tokens, tokens])
    y = b.call(RESHAPE, b.call(aten.bmm.default, weights, v3), [batch, 4, tokens, 8])
    return b.program(y)


def test_flattened_heads(builder, run) -> None:
    """Batch and heads that are one dimension in the products are taken apart, in the bias too."""
    outcome = run("raise-attention", flattened(builder()))
    detail = only_attention(outcome)
    assert (detail["q"], detail["k"], detail["v"]) == ("q", "k", "v")
    assert detail["bias"] == "float(k)*in0[h]"
    outcome.check(*sample(), tolerance=1e-6)


def test_three_dimensions(builder, run) -> None:
    """Attention without heads gets one."""
    b = builder()
    q, k, v = (b.input(name, "batch", "tokens", 8) for name in "qkv")
    scores = b.call(aten.bmm.default, q, b.call(PERMUTE, k, [0, 2, 1]))
    y = b.call(aten.bmm.default, b.call(aten.softmax.int, scores, -1), v)
    outcome = run("raise-attention", b.program(y))
    only_attention(outcome)
    outcome.check(*(torch.randn(2, 7, 8) for _ in range(3)), tolerance=1e-6)


def test_other_softmaxes_are_not_looked_at(builder, run) -> None:
    """A router's softmax is no attention."""
    b = builder()
    x = b.input("x", "batch", "tokens", 8)
    y = b.call(aten.softmax.int, b.call(aten.linear.default, x, b.weight("w", torch.randn(4, 8))), -1)
    plan = run("raise-attention", b.program(y)).plan
    assert (plan.decisions, plan.refusals) == ((), ())


def test_declines(builder, run) -> None:
    """Dropout, attention weights or scores that are results, and unknown steps are refused with the reason."""
    b = builder()
    q, k, v = heads(b)
    gate = b.input("gate", 1)
    scores = b.call(MATMUL, q, b.call(PERMUTE, k, [0, 1, 3, 2]))
    shown = b.call(aten.softmax.int, scores, -1)
    kept = b.call(MATMUL, q, b.call(PERMUTE, k, [0, 1, 3, 2]))
    odd = b.call(aten.mul.Tensor, b.call(MATMUL, q, b.call(PERMUTE, k, [0, 1, 3, 2])), gate)
    results = [
        b.call(SDPA, q, k, v, None, 0.1),
        b.call(MATMUL, shown, v),
        shown,
        b.call(MATMUL, b.call(aten.softmax.int, kept, -1), v),
        kept,
        b.call(MATMUL, b.call(aten.softmax.int, odd, -1), v),
    ]
    outcome = run("raise-attention", b.program(*results))
    assert outcome.plan.decisions == ()
    assert set(outcome.reasons) == {
        "dropout is active",
        "the attention weights are used elsewhere",
        "the scores are used elsewhere",
        f"%{odd.name}, mul of scores, is not understood",
    }


def test_an_edited_plan_is_obeyed(builder, run) -> None:
    """A predicate put into the plan decides what is visible."""
    b = builder()
    q, k, v = heads(b)

    def edit(plan):
        (decision,) = plan.decisions
        detail = {**decision.detail, "predicate": "q - k >= 0"}
        return dataclasses.replace(plan, decisions=(dataclasses.replace(decision, detail=detail),))

    outcome = run("raise-attention", b.program(b.call(SDPA, q, k, v)), edit)
    values = sample()
    expected = torch.nn.functional.scaled_dot_product_attention(*values, is_causal=True)
    assert torch.allclose(outcome.after.reference(*values)[0], expected, atol=1e-6)
