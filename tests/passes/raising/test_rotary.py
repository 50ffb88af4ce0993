"""Recognition of rotary position embeddings."""

from __future__ import annotations

import dataclasses

import pytest
import torch

aten = torch.ops.aten
SLICE, CAT, MUL, ADD = aten.slice.Tensor, aten.cat.default, aten.mul.Tensor, aten.add.Tensor
ROTARY = "graphwright.rotary.default"
END = 2**63 - 1


def rotate(b, x, cos, sin, *, interleaved=False):
    """Add x * cos + partner(x) * sin."""
    size = x.meta["val"].shape[-1]
    if interleaved:
        odd, even = b.call(SLICE, x, -1, 1, END, 2), b.call(SLICE, x, -1, 0, END, 2)
        stacked = b.call(aten.stack.default, [b.call(aten.neg.default, odd), even], -1)
        partner = b.call(aten.reshape.default, stacked, [b.size(x, 0), 2, b.size(x, 2), size])
    else:
        upper, lower = b.call(SLICE, x, 3, size // 2, END), b.call(SLICE, x, 3, 0, size // 2)
        partner = b.call(CAT, [b.call(aten.neg.default, upper), lower], -1)
    return b.call(ADD, b.call(MUL, x, cos), b.call(MUL, partner, sin))


def inputs(b, features, size, dtype=torch.float32):
    """Add x [batch, 2, tokens, features] and tables [1, 1, tokens, size]."""
    x = b.input("x", "batch", 2, "tokens", features, dtype=dtype)
    return x, b.input("cos", 1, 1, "tokens", size, dtype=dtype), b.input("sin", 1, 1, "tokens", size, dtype=dtype)


def sample(features, size, dtype=torch.float32):
    """Return values for `inputs`."""
    return tuple(torch.randn(*shape).to(dtype) for shape in ((3, 2, 5, features), (1, 1, 5, size), (1, 1, 5, size)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_all_features(builder, run, interleaved, dtype) -> None:
    """Halves (Llama) and pairs (Cohere) become one operation, bitwise."""
    b = builder()
    x, cos, sin = inputs(b, 8, 8, dtype)
    outcome = run("raise-rotary", b.program(rotate(b, x, cos, sin, interleaved=interleaved)))
    assert outcome.operations == [ROTARY]
    outcome.check(*sample(8, 8, dtype))


@pytest.mark.parametrize("interleaved", [False, True])
def test_first_features(builder, run, interleaved) -> None:
    """The features that are not rotated, concatenated behind, are taken in (GPT-NeoX, GPT-J)."""
    b = builder()
    x, cos, sin = inputs(b, 10, 4)
    turned = rotate(b, b.call(SLICE, x, 3, 0, 4), cos, sin, interleaved=interleaved)
    outcome = run("raise-rotary", b.program(b.call(CAT, [turned, b.call(SLICE, x, 3, 4, END)], -1)))
    assert outcome.operations == [ROTARY]
    outcome.check(*sample(10, 4))


def test_part_of_a_joint_projection(builder, run) -> None:
    """Slices that were merged with the cutting out of queries and keys are seen through."""
    b = builder()
    x, cos, sin = inputs(b, 12, 4)
    lower, upper = b.call(SLICE, x, 3, 6, 8), b.call(SLICE, x, 3, 8, 10)
    partner = b.call(CAT, [b.call(aten.neg.default, upper), lower], -1)
    turned = b.call(ADD, b.call(MUL, b.call(SLICE, x, 3, 6, 10), cos), b.call(MUL, partner, sin))
    outcome = run("raise-rotary", b.program(b.call(CAT, [turned, b.call(SLICE, x, 3, 10, END)], -1)))
    assert outcome.operations == [str(SLICE), ROTARY]
    outcome.check(*sample(12, 4))


def test_halves_apart(builder, run) -> None:
    """Halves that are computed apart, with one number for a pair, are one rotation (GPT-OSS)."""
    b = builder()
    x, cos, sin = inputs(b, 8, 4)
    lower, upper = b.call(SLICE, x, 3, 0, 4), b.call(SLICE, x, 3, 4, END)
    first = b.call(aten.sub.Tensor, b.call(MUL, lower, cos), b.call(MUL, upper, sin))
    second = b.call(ADD, b.call(MUL, upper, cos), b.call(MUL, lower, sin))
    outcome = run("raise-rotary", b.program(b.call(CAT, [first, second], -1)))
    assert outcome.operations == [str(CAT), str(CAT), ROTARY]
    outcome.check(*sample(8, 4))


def test_declines(builder, run) -> None:
    """Tables with one number for all features are refused; halves in the other order are no rotation."""
    b = builder()
    x, cos, sin = inputs(b, 8, 1)
    outcome = run("raise-rotary", b.program(rotate(b, x, cos, sin)))
    assert outcome.plan.decisions == ()
    assert "%cos does not have one number for each of 8 features" in outcome.reasons
    b = builder()
    x, cos, sin = inputs(b, 8, 8)
    upper, lower = b.call(SLICE, x, 3, 4, END), b.call(SLICE, x, 3, 0, 4)
    partner = b.call(CAT, [upper, b.call(aten.neg.default, lower)], -1)
    program = b.program(b.call(ADD, b.call(MUL, x, cos), b.call(MUL, partner, sin)))
    assert run("raise-rotary", program).plan.decisions == ()


def test_an_edited_plan_is_obeyed(builder, run) -> None:
    """The plan's tables are used, not the graph's."""
    b = builder()
    x, cos, sin = inputs(b, 8, 8)

    def edit(plan):
        (decision,) = plan.decisions
        detail = {**decision.detail, "sin": decision.detail["cos"]}
        return dataclasses.replace(plan, decisions=(dataclasses.replace(decision, detail=detail),))

    program = b.program(rotate(b, x, cos, sin), b.call(aten.neg.default, sin))
    outcome = run("raise-rotary", program, edit)
    values = sample(8, 8)
    same_tables = program.reference(values[0], values[1], values[1])
    assert torch.equal(outcome.after.reference(*values)[0], same_tables[0])
