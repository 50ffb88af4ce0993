"""Leaving out the padding of a batch."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphwright
from graphwright.ir.errors import InputError, OptionError, PlanError
from graphwright.ir.printer import print_program
from graphwright.ir.verifier import verify
from graphwright.passes.base import Context
from graphwright.passes.packing.pack_tokens import PackTokens
from graphwright.pipeline import run_passes

WIDTH, HEADS, WORDS, LONGEST = 32, 4, 50, 80


class Block(nn.Module):
    """Attention that a mask limits, and a feed-forward."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, mask):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Embeddings, blocks, and a function of the tokens and the mask at the end.

    Args:
        head: what is returned for x [B, S, E] and the mask [B, S].
        seen: the attention's mask for the mask.
        stem: what is done to the embeddings.
        extra: modules that these call.
        blocks: number of blocks.
    """

    def __init__(self, head=None, seen=None, stem=None, extra=(), blocks=1):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.extra = nn.ModuleList(extra)
        self.head = head or (lambda x, mask: x)
        self.seen = seen or (lambda mask: mask[:, None, None, :] != 0)
        self.stem = stem or (lambda x, ids, mask: x)

    def forward(self, ids, mask):
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        x = self.stem(x, ids, mask)
        for block in self.blocks:
            x = block(x, self.seen(mask))
        return self.head(x, mask)


def batch(lengths, size, dtype=torch.int64):
    """Return ids and a mask of sequences of these lengths, padded on the right to a size."""
    mask = torch.arange(size) < torch.tensor(lengths)[:, None]
    return torch.randint(0, WORDS, mask.shape), mask.to(dtype)


def program_of(model, dtype=torch.int64):
    program = graphwright.capture(model.eval(), *batch([5, 7, 2], 7, dtype), check=False)
    return run_passes(program)


def packed(model, dtype=torch.int64):
    program = program_of(model, dtype)
    plan = PackTokens().plan(program, Context())
    assert plan.refusals == ()
    assert len(plan.decisions) == 1
    result = PackTokens().apply(program, plan)
    verify(result)
    return result


def reason(model):
    plan = PackTokens().plan(program_of(model), Context())
    assert plan.decisions == ()
    (refusal,) = plan.refusals
    return refusal.reason


def compare(result, model, ids, mask, *, tolerance=1e-5):
    """Compare a program or compiled model with eager, at real tokens; padding must be 0."""
    call = result.reference if hasattr(result, "reference") else result
    with torch.no_grad():
        expected, found = model(ids, mask), call(ids, mask)
    assert (found[mask == 0] == 0).all()
    expected, found = expected[mask != 0], found[mask != 0]
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert not found.isnan().any()
    if expected.numel():
        assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-6)


RAGGED = [([3, 1, 9], 9), ([1, 1], 1), ([4, 4], 4), ([2, 0, 5], 6), ([0, 0], 3), (list(range(1, 34)), 63)]


@pytest.fixture(scope="module")
def encoder():
    return Encoder(blocks=2).eval()


@pytest.fixture(scope="module")
def captured(encoder):
    return program_of(encoder)


@pytest.fixture(scope="module")
def program(captured):
    return PackTokens().apply(captured, PackTokens().plan(captured, Context()))


@pytest.fixture(scope="module")
def compiled(encoder):
    return graphwright.compile(encoder, *batch([5, 7, 2], 7), passes=["pack-tokens"], check=False)


@pytest.mark.parametrize(("lengths", "size"), RAGGED)
def test_values(encoder, program, compiled, lengths, size):
    """Real tokens get what eager computes, padding and sequences without tokens get 0."""
    inputs = batch(lengths, size)
    compare(program, encoder, *inputs)
    compare(compiled, encoder, *inputs)


def test_tokens_may_be_anywhere(encoder, program, compiled):
    """Padding may be on the left, or between tokens."""
    ids, mask = batch([5, 3, 8, 1], 8)
    for given in (mask.flip(1), (torch.rand(4, 8) < 0.5).long()):
        compare(program, encoder, ids, given)
        compare(compiled, encoder, ids, given)


def test_empty_batch(compiled):
    """A batch without sequences gives a result without sequences."""
    assert compiled(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, WIDTH)


def test_everything_on_tokens_is_packed(program):
    """No operation on activations is left that has padding, but for the last that makes the padded result."""
    lines = [line for line in print_program(program, locations=False).splitlines() if ": f32[" in line]
    (padded,) = [line for line in lines if "[batch, tokens" in line or "[batch, 4, tokens" in line]
    assert "take_rows" in padded
    assert sum("graphwright.ragged_attention" in line for line in lines) == 2
    assert not any("graphwright.attention" in line for line in lines)


@pytest.mark.parametrize("multiple", [1, 64])
def test_multiple_of_rows(encoder, captured, multiple):
    """The number of rows is a multiple of what is asked for, and nothing else changes."""
    step = PackTokens(multiple=multiple)
    result = step.apply(captured, step.plan(captured, Context()))
    ids, mask = batch([3, 1, 9, 70], 70)
    compare(result, encoder, ids, mask)
    rows = result.signature.flatten((ids, mask), {})[2]
    assert rows.numel() == -(-83 // multiple) * multiple


def pooled(x, mask):
    """Return what is taken over tokens that the mask keeps, or at the first, in several ways."""
    weights = mask[..., None].to(x.dtype)
    mean = F.normalize((x * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=-1)
    largest = x.masked_fill(mask[..., None] == 0, -1e4).amax(1)
    gated = (x * torch.sigmoid((x * weights).sum(1, keepdim=True)) * weights).sum(1)
    return mean, largest, gated, x[:, 0], x[:, :1].tanh()


def test_pooling():
    """What is taken over the tokens that the mask keeps, or at the first, is as in eager; of no tokens too."""
    model = Encoder(pooled).eval()
    result = packed(model)
    for lengths, size in RAGGED[:4]:
        ids, mask = batch(lengths, size)
        with torch.no_grad():
            expected, found = model(ids, mask), result.reference(ids, mask)
        for k, (old, new) in enumerate(zip(expected, found, strict=True)):
            # Where the first position holds no token, eager gives what it computes for padding.
            rows = mask.sum(1) >= (0 if k in (0, 1) else 1)
            assert torch.allclose(old[rows], new[rows], atol=1e-5)


def test_several_results():
    """Results with tokens are padded, each for itself."""
    model = Encoder(lambda x, mask: (x, x.sum(-1))).eval()
    result = packed(model)
    ids, mask = batch([3, 1, 9], 9)
    with torch.no_grad():
        expected, found = model(ids, mask), result.reference(ids, mask)
    for old, new in zip(expected, found, strict=True):
        assert torch.allclose(old[mask != 0], new[mask != 0], atol=1e-5)
        assert (new[mask == 0] == 0).all()


@pytest.mark.parametrize(
    ("seen", "dtype"),
    [
        (lambda mask: (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min, torch.int64),
        (lambda mask: mask[:, None, None, :], torch.bool),
        (lambda mask: mask[:, None, None, :] > 0.5, torch.float32),
    ],
)
def test_masks_however_written(seen, dtype):
    """Additive masks, and masks of booleans and floats, say the same."""
    model = Encoder(seen=seen).eval()
    compare(packed(model, dtype), model, *batch([3, 1, 9], 9, dtype))


def test_masks_that_mark_padding():
    """A mask may be 1 where there is no token."""
    model = Encoder(seen=lambda mask: ~mask[:, None, None, :]).eval()
    result = packed(model, torch.bool)
    assert result.signature.packing.inverted
    ids, mask = batch([3, 1, 9], 9, torch.bool)
    with torch.no_grad():
        assert torch.allclose(result.reference(ids, ~mask)[mask], model(ids, ~mask)[mask], atol=1e-5)


def test_anything_before_the_first_attention():
    """A convolution over tokens, or positions counted from ids, are computed with padding, and then packed."""
    convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def stem(x, ids, mask):
        return x + convolution(x.transpose(1, 2)).transpose(1, 2) + ids.ne(1).cumsum(1)[..., None] * 0.01

    model = Encoder(stem=stem, extra=[convolution]).eval()
    compare(packed(model), model, *batch([3, 1, 9], 9))


def test_values_of_sequences():
    """What belongs to a sequence as a whole is brought to its tokens."""
    model = Encoder(stem=lambda x, ids, mask: x + mask.sum(1)[:, None, None] * 0.1).eval()
    compare(packed(model), model, *batch([3, 1, 9], 9))


BIAS = torch.randn(HEADS, 1, 1)
DECLINED = {
    "no input says which": Encoder(seen=lambda mask: None),
    "more than padding": Encoder(
        seen=lambda mask: (mask[:, None, None, :] != 0) & torch.ones(mask.shape[1:] * 2).tril().bool()
    ),
    "has a bias": Encoder(seen=lambda mask: BIAS * torch.arange(mask.shape[1]) + mask[:, None, None, :].log()),
    "mean": Encoder(lambda x, mask: x.mean(1)),
    "running": Encoder(lambda x, mask: x.cumsum(1)),
    "roll": Encoder(lambda x, mask: x.roll(1, 1)),
    "length": Encoder(lambda x, mask: x * x.shape[1]),
    "pairs": Encoder(lambda x, mask: x @ x.transpose(1, 2)),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no input says which", "which tokens are there"),
        ("more than padding", "more than hide padding.*q"),
        ("has a bias", "more than hide padding.*scores"),
        ("mean", "padding included"),
        ("running", "padding included"),
        ("roll", "padding included"),
        ("length", "number of tokens|takes a size"),
        ("pairs", "padding included"),
    ],
)
def test_declines(name, expected):
    """What would read padding, or hides more than padding, is refused with the reason."""
    assert re.search(expected, reason(DECLINED[name]))


def test_declines_fixed_sizes(encoder):
    """A program for one number of tokens has nothing to pack by."""
    program = run_passes(graphwright.capture(encoder, *batch([5, 7], 7), dynamic=False, check=False))
    (refusal,) = PackTokens().plan(program, Context()).refusals
    assert "is not a dimension" in refusal.reason


def test_without_attention_there_is_nothing_to_do():
    """A program without attention is refused: nothing says what is padding."""
    program = run_passes(graphwright.capture(nn.Linear(3, 3), torch.randn(4, 3), check=False))
    plan = PackTokens().plan(program, Context())
    assert plan.decisions == ()
    assert [refusal.where for refusal in plan.refusals] == [""]


def test_packs_once(program):
    """A packed program is left as it is."""
    assert PackTokens().plan(program, Context()).decisions == ()


@pytest.mark.parametrize("multiple", [0, 65])
def test_options(multiple):
    """The multiple is 1 to 64."""
    with pytest.raises(OptionError, match="multiple"):
        PackTokens(multiple=multiple)


def edited(program, change):
    plan = PackTokens().plan(program, Context())
    (decision,) = plan.decisions
    return dataclasses.replace(plan, decisions=(dataclasses.replace(decision, **change(decision)),))


def test_plans_are_obeyed(encoder, captured):
    """Nodes that are taken out of a plan are computed for padding, where that changes nothing."""
    program = captured
    first = next(node.name for node in program.graph.nodes if "layer_norm" in node.name)
    plan = edited(program, lambda d: {"detail": d.detail | {"nodes": [n for n in d.detail["nodes"] if n != first]}})
    result = PackTokens().apply(program, plan)
    verify(result)
    assert "f32[batch, tokens, 32] = layer_norm" in print_program(result)
    compare(result, encoder, *batch([3, 1, 9], 9))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: {"where": "ids"},
        lambda d: {"detail": {"multiple": 16}},
        lambda d: {"detail": d.detail | {"nodes": [*d.detail["nodes"], "gone"]}},
        lambda d: {"detail": d.detail | {"nodes": [*d.detail["nodes"], "ids"]}},
        lambda d: {"detail": d.detail | {"nodes": d.detail["nodes"][:-9]}},
    ],
)
def test_plans_that_do_not_fit(captured, change):
    """A plan with another mask, without its nodes, or that would change values is refused."""
    with pytest.raises(PlanError):
        PackTokens().apply(captured, edited(captured, change))


def test_files(encoder, compiled, tmp_path):
    """A file gives back a model that packs."""
    compiled.save(tmp_path / "encoder.gw")
    loaded = graphwright.load(tmp_path / "encoder.gw")
    for lengths, size in RAGGED[:3]:
        compare(loaded, encoder, *batch(lengths, size))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Weights in half precision give results within their rounding."""
    model = Encoder().eval().to(dtype)
    compiled = graphwright.compile(model, *batch([5, 7, 2], 7), passes=["pack-tokens"], check=False)
    for lengths, size in RAGGED[:3]:
        compare(compiled, model, *batch(lengths, size), tolerance=0.04 if dtype is torch.bfloat16 else 0.005)


def test_what_the_mask_must_be(compiled):
    """A mask of another dtype, rank or size than the model was compiled for is refused as any argument is."""
    ids, mask = batch([3, 1], 4)
    for wrong, message in ((mask.bool(), "wrong dtype"), (mask[0], "wrong rank"), (mask[:, :3], "must be equal")):
        with pytest.raises(InputError, match=message):
            compiled(ids, wrong)


def minilm():
    from graphwright.tools.reference import load_minilm

    try:
        return load_minilm()
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_minilm():
    """A real encoder gives its embeddings on ragged batches."""
    model = minilm()

    def inputs(lengths, size):
        mask = (torch.arange(size) < torch.tensor(lengths)[:, None]).long()
        return {"input_ids": torch.randint(1000, 2000, mask.shape), "attention_mask": mask}

    compiled = graphwright.compile(model, passes=["pack-tokens"], **inputs([9, 4], 9))
    for lengths, size in RAGGED:
        given = inputs(lengths, size)
        kept = given["attention_mask"] != 0
        with torch.no_grad():
            expected, found = model(**given)[0][kept], compiled(**given)[0][kept]
        assert torch.allclose(found, expected, atol=2e-5)
