"""The axes analysis on real models, on planted token mixers, and rule by rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from graphwright.ir.analyses.axes import Axes, Label, analyse_axes, labels

Exported = Callable[[str], ExportedProgram]
BOTH = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
RESIDUAL = ((Label.BATCH,), (Label.TOKEN,), ())


def trace(model: nn.Module, *inputs: torch.Tensor, shapes: tuple | None = None) -> fx.Graph:
    shapes = shapes or tuple(BOTH for _ in inputs)
    return torch.export.export(model.eval(), inputs, dynamic_shapes=shapes, strict=False).graph


class Local(nn.Module):
    """Wraps a function of activations [B, S, 32] that come from an embedding."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(97, 32)
        self.register_buffer("table", torch.randn(512, 32))
        self.square = nn.Parameter(torch.randn(32, 32))
        self.function = function

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.function(self, self.embedding(ids))


def axes_of(function: Callable[..., torch.Tensor], **options: object) -> Axes:
    return analyse_axes(trace(Local(function), torch.randint(0, 97, (3, 11))), **options)


def output(axes: Axes) -> tuple[tuple[Label, ...], ...]:
    graph = next(iter(axes.roles)).graph
    return axes.roles[graph.output_node().all_input_nodes[0]]


@pytest.mark.parametrize(
    ("name", "attentions"),
    [
        ("llama", 2), ("llama-eager", 2), ("gemma2", 2), ("gemma3", 2), ("opt", 2), ("bloom", 2), ("mixtral", 2), ("bert", 3),
        ("encoder-pre-norm", 3), ("encoder-post-norm", 3),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("qwen3", "mistral", "phi3", "phi", "gpt_neox", "gpt2")),
    ],
)  # fmt: skip
def test_only_attention_mixes_tokens(exported: Exported, name: str, attentions: int) -> None:
    """In a transformer over sequences the mixing operations are the attentions, and the result is [batch, token, feature]."""
    axes = analyse_axes(exported(name).graph)
    assert {str(n): str(m) for n, m in axes.mixing.items() if n not in axes.attention_nodes} == {}
    assert len(axes.attention_nodes) == attentions
    assert output(axes) == RESIDUAL


@pytest.mark.parametrize(("name", "tokens"), [("vit", 10), ("vit-eager", 10), ("dinov2", 10), ("clip", 10), ("siglip", 9)])
def test_tokens_of_vision_encoders_start_after_the_patches(exported: Exported, name: str, tokens: int) -> None:
    """Seeded from attention, only attention and the class token's selection mix; the residual stream has the token axis."""
    axes = analyse_axes(exported(name).graph, seed_from="attention")
    assert axes.token_size == tokens
    assert len(axes.attention_nodes) == 3
    assert {m.kind for n, m in axes.mixing.items() if n not in axes.attention_nodes} <= {"select"}
    norms = [n for n in axes.roles if "layer_norm" in str(n.target) and n.meta["val"].dim() == 3]
    assert len(norms) >= 6
    assert {axes.roles[n] for n in norms} == {RESIDUAL}


def test_seeding_from_attention_finds_the_input_of_a_decoder(exported: Exported) -> None:
    """Where the token axis starts at the input, both ways of seeding agree on every node."""
    graph = exported("llama").graph
    one, other = analyse_axes(graph), analyse_axes(graph, seed_from="attention")
    assert one.roles == other.roles
    assert one.mixing == other.mixing


def test_written_out_attention_is_a_region(exported: Exported) -> None:
    """A region runs from the product of queries and keys to the product with the values, softmax inside."""
    axes = analyse_axes(exported("gemma2").graph)
    assert list(axes.regions) == list(axes.attention_nodes)
    for close, region in axes.regions.items():
        names = [str(n.target) for n in region.nodes]
        assert [str(n.target) for n in region.opening] == ["aten.matmul.default"]
        assert any("softmax" in name for name in names)
        assert any("tanh" in name for name in names)
        assert close not in region.nodes
        assert axes.roles[region.opening[0]] == ((Label.BATCH,), (), (Label.TOKEN,), (Label.KEY,))


NEGATIVES: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "mean": ("reduce", lambda m, x: x + x.mean(1, keepdim=True)),
    "softmax": ("reduce", lambda m, x: x.softmax(1)),
    "norm-over-tokens": ("reduce", lambda m, x: F.layer_norm(x, x.shape[1:])),
    "maximum": ("reduce", lambda m, x: x - x.amax((1, 2), keepdim=True)),
    "cumsum": ("scan", lambda m, x: x + x.cumsum(1)),
    "shift": ("select", lambda m, x: x + F.pad(x[:, :-1], (0, 0, 1, 0))),
    "shift-by-cat": ("select", lambda m, x: x + torch.cat([x[:, 1:], x[:, :1]], 1)),
    "pad": ("move", lambda m, x: F.pad(x, (0, 0, 1, 0))),
    "roll": ("move", lambda m, x: x + torch.roll(x, 1, 1)),
    "flip": ("move", lambda m, x: x + x.flip(1)),
    "scramble": ("view", lambda m, x: x + x.transpose(1, 2).reshape(x.shape)),
    "scramble-with-batch": ("view", lambda m, x: x + x.transpose(0, 1).reshape(x.shape)),
    "windows": ("view", lambda m, x: x.reshape(x.shape[0], 32, -1).transpose(1, 2)),
    "one-over-length": ("length", lambda m, x: x * (1.0 / x.shape[1])),
    "length-through-a-tensor": ("length", lambda m, x: x / torch.full((), x.shape[1])),
    "mean-position": ("length", lambda m, x: x + torch.arange(x.shape[1]).float().mean()),
    "gram": ("reduce", lambda m, x: x @ (x.transpose(1, 2) @ x)),
    "pairs": ("pairs", lambda m, x: (x[:, :, None] - x[:, None]).abs().amax(-1)),
    "scores-leave": ("pairs", lambda m, x: (x @ x.transpose(1, 2)).softmax(-1)),
    "entropy": ("pairs", lambda m, x: (lambda p: p @ x * p.amax(-1, keepdim=True))((x @ x.transpose(1, 2)).softmax(-1))),
    "softmax-over-queries": ("reduce", lambda m, x: (x @ x.transpose(1, 2)).softmax(-2) @ x),
    "convolution": ("window", lambda m, x: F.conv1d(x.transpose(1, 2), m.square[:, :, None].expand(-1, -1, 3), padding=1)),
    "sort": ("sort", lambda m, x: x.sort(1).values),
    "gather": ("gather", lambda m, x: x.gather(1, x.argmax(-1, keepdim=True).expand(-1, -1, 32))),
    "permute-rows": ("gather", lambda m, x: x[:, torch.arange(x.shape[1] - 1, -1, -1)]),
    "last": ("select", lambda m, x: x[:, -1]),
    "batch-mean": ("reduce", lambda m, x: x - x.mean(0)),
    "unknown": ("unknown", lambda m, x: torch.special.bessel_j0(x)),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_planted_mixers_are_found(name: str) -> None:
    """Every way to make a token depend on another, on its count or on the batch is reported with its kind."""
    kind, function = NEGATIVES[name]
    axes = axes_of(function)
    assert kind in {m.kind for m in axes.mixing.values()}, dict(axes.mixing)


LOCAL: dict[str, Callable[..., torch.Tensor]] = {
    "pointwise": lambda m, x: F.gelu(x) * 2 + x.sigmoid(),
    "norm": lambda m, x: F.layer_norm(x, (32,)) + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "flatten-rows": lambda m, x: (x.reshape(-1, 32) @ m.square).view(x.shape),
    "batch-second": lambda m, x: (
        (x.transpose(0, 1).reshape(-1, 32) @ m.square).view(x.shape[1], x.shape[0], 32).transpose(0, 1)
    ),
    "heads": lambda m, x: x.view(*x.shape[:2], 4, 8).transpose(1, 2).flip(-1).transpose(1, 2).reshape(x.shape),
    "rotate-half": lambda m, x: torch.cat([-x[..., 16:], x[..., :16]], -1),
    "interleave": lambda m, x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2),
    "table": lambda m, x: x + m.table[: x.shape[1]],
    "einsum": lambda m, x: torch.einsum("bse,ef->bsf", x, m.square),
    "pointwise-convolution": lambda m, x: F.conv1d(x.transpose(1, 2), m.square[:, :, None]).transpose(1, 2),
    "top-features": lambda m, x: x * (x >= x.topk(4, -1).values[..., -1:]),
    "features-attend": lambda m, x: (lambda h: F.scaled_dot_product_attention(h, h, h).reshape(x.shape))(x.view(-1, 4, 8)),
    "repeat": lambda m, x: x + m.square[0].repeat(x.shape[0], x.shape[1], 1),
}


@pytest.mark.parametrize("name", LOCAL)
def test_local_operations_are_local(name: str) -> None:
    """What keeps tokens apart is not reported, whatever it does to the shape in between."""
    axes = axes_of(LOCAL[name])
    assert {str(n): str(m) for n, m in axes.mixing.items()} == {}
    assert output(axes) == RESIDUAL


def written_softmax(scores: torch.Tensor) -> torch.Tensor:
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


ATTENTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "einsum": lambda m, x: torch.einsum("bqk,bke->bqe", torch.einsum("bqe,bke->bqk", x, x @ m.square).softmax(-1), x),
    "exp-over-sum": lambda m, x: written_softmax(x @ x.mT) @ x,
    "tril": lambda m, x: (x @ x.transpose(1, 2)).tril() @ x,
    "sink": lambda m, x: torch.cat([x @ x.mT, m.square[0, 0].expand(*x.shape[:2], 1)], -1).softmax(-1)[..., :-1] @ x,
    "sum-of-scores": lambda m, x: (x @ x.mT + (x @ m.square) @ x.mT).softmax(-1) @ x,
    "key-bias": lambda m, x: (x @ x.mT + x.sum(-1)[:, None]).softmax(-1) @ x,
    "position-bias": lambda m, x: (
        x @ x.mT + (torch.arange(x.shape[1])[None] - torch.arange(x.shape[1])[:, None]).abs()
    ).softmax(-1) @ x,
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
def test_written_out_forms_of_attention(name: str) -> None:
    """Products of queries and keys, what is done to them, and the product with values are one attention."""
    axes = axes_of(ATTENTIONS[name])
    assert set(axes.mixing) == set(axes.attention_nodes) == set(axes.regions)
    assert len(axes.attention_nodes) == 1
    assert output(axes) == RESIDUAL


def test_sinks_in_front_misalign_the_keys() -> None:
    """A column joined before the scores moves every key by one, which no later slice is trusted to undo."""
    axes = axes_of(lambda m, x: torch.cat([m.square[0, 0].expand(*x.shape[:2], 1), x @ x.mT], -1).softmax(-1)[..., 1:] @ x)
    assert {m.kind for m in axes.mixing.values()} >= {"select"}


def test_attention_to_another_sequence_is_local() -> None:
    """Queries that attend to something without a token axis, such as encoder states, stay apart."""
    axes = axes_of(lambda m, x: F.scaled_dot_product_attention(x, *[m.table.expand(x.shape[0], -1, -1)] * 2))
    assert axes.mixing == {}
    assert output(axes) == ((Label.BATCH,), (Label.TOKEN,), ())


def test_generators_bring_positions_in() -> None:
    """A slice of a table and a range over the tokens are generators; activations are not."""
    axes = axes_of(lambda m, x: x + m.table[: x.shape[1]] + torch.arange(x.shape[1])[:, None])
    assert sorted(str(n.target) for n in axes.generators) == ["aten.arange.default", "aten.slice.Tensor"]
    assert not axes.generators & axes.main


def test_mixing_of_positions_is_reported_on_its_own(exported: Exported) -> None:
    """A running sum that makes positions mixes no activations, yet is not local."""
    axes = analyse_axes(exported("opt").graph)
    (sums,) = [n for n in axes.index_mixing if "cumsum" in str(n.target)]
    assert not axes.local(sums)
    assert sums not in axes.mixing


def test_padding_mask_is_an_index_input() -> None:
    """Inputs that never enter an embedding as they are only say where tokens are, and share the tokens' symbols."""

    class Masked(Local):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids) + self.embedding((mask.cumsum(1) * mask - 1).clamp(0))
            return F.scaled_dot_product_attention(x, x, x, mask.bool()[:, None])

    graph = trace(Masked(lambda m, x: x), torch.randint(0, 97, (3, 11)), torch.ones(3, 11, dtype=torch.long))
    axes = analyse_axes(graph)
    assert [m.kind for m in axes.mixing.values()] == ["attention"]
    assert [m.kind for m in axes.index_mixing.values()] == ["scan"]
    ids, mask = (n for n in graph.nodes if n.name in ("ids", "mask"))
    assert axes.roles[mask] == axes.roles[ids] == ((Label.BATCH,), (Label.TOKEN,))
    assert mask not in axes.main
    given = analyse_axes(graph, tokens={ids: 1, mask: 1}, batch={ids: 0, mask: 0})
    assert "scan" in {m.kind for m in given.mixing.values()}


def test_factors_keep_the_order_of_merged_axes() -> None:
    """A merged axis lists its labels from outer to inner with their sizes."""
    axes = axes_of(lambda m, x: x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2).reshape(-1, x.shape[1], 8))
    node = next(iter(axes.roles)).graph.output_node().all_input_nodes[0]
    (merged, tokens, features) = axes.factors[node]
    assert [(f.label, f.size) for f in merged] == [(Label.BATCH, axes.batch_size), (None, 4)]
    assert labels(tokens) == (Label.TOKEN,)
    assert [f.size for f in features] == [8]
    assert axes.dim(node, Label.TOKEN) == 1
    assert axes.dim(node, Label.KEY) is None


def test_routing_rows_by_expert_is_local(exported: Exported) -> None:
    """Rows sorted by expert, multiplied group by group and put back in order keep tokens apart."""
    axes = analyse_axes(exported("mixtral").graph)
    grouped = [n for n in axes.roles if "grouped_mm" in str(n.target)]
    assert len(grouped) == 4
    assert {axes.roles[n] for n in grouped} == {((Label.ROWS,), ())}


def test_rows_that_stay_sorted_are_mixing() -> None:
    """Rows that leave in the order of a sort tell of other tokens."""
    axes = axes_of(lambda m, x: x.reshape(-1, 32)[x.argmax(-1).reshape(-1).argsort()])
    assert "sort" in {m.kind for m in axes.mixing.values()}
