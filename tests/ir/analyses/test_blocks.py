"""The blocks analysis on real models and on small ones made for one form each."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from graphwright.ir.analyses.blocks import Block, find_blocks
from graphwright.ir.analyses.reach import Reach

Exported = Callable[[str], ExportedProgram]
BOTH = ("attention", "feed_forward")
SLOW_DECODERS = ("opt", "gpt2", "phi", "qwen3", "mistral", "phi3", "gemma2", "bloom", "llama-eager")
SLOW_ENCODERS = ("siglip", "clip", "dinov2", "vit-eager", "encoder-pre-norm")


def blocks_of(model: nn.Module, width: int = 32) -> tuple[Block, ...]:
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    program = torch.export.export(model.eval(), (torch.randn(3, 11, width),), dynamic_shapes=shapes, strict=False)
    return find_blocks(program.graph)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama", 2), ("gemma3", 2), ("gpt_neox", 2), ("mixtral", 2), ("bert", 3), ("vit", 3), ("encoder-post-norm", 3),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in SLOW_DECODERS),
        *(pytest.param(name, 3, marks=pytest.mark.slow) for name in SLOW_ENCODERS),
    ],
)  # fmt: skip
def test_blocks_of_models(exported: Exported, name: str, count: int) -> None:
    """Every layer is one block with an attention and a feed-forward branch, alike in form, and they hand the stream on."""
    graph = exported(name).graph
    blocks = find_blocks(graph)
    assert [block.kinds for block in blocks] == [BOTH] * count
    assert len({block.form for block in blocks}) == 1
    assert len({len(block.weights) for block in blocks}) == 1
    for before, after in itertools.pairwise(blocks):
        assert after.input is before.output
        assert not set(before.nodes) & set(after.nodes)
    reach = Reach(graph)
    for block in blocks:
        assert block.output.meta["val"].shape[-1] == 32
        for branch in block.branches:
            assert branch.contribution in branch.add.all_input_nodes or any(
                reach.leads(branch.contribution, n) for n in branch.add.all_input_nodes
            )
            assert set(branch.nodes) <= set(block.nodes)
            assert branch.nodes[-1] is branch.contribution


@pytest.mark.parametrize("name", ["llama", "bert", "encoder-post-norm"])
def test_a_block_can_be_skipped(exported: Exported, name: str) -> None:
    """With the uses of a block's output replaced by its input the rest of the model still runs, and its weights are unused."""
    program = exported(name)
    graph, copies = fx.Graph(), {}
    graph.output(graph.graph_copy(program.graph, copies))
    block = find_blocks(program.graph)[1]
    copies[block.output].replace_all_uses_with(copies[block.input])
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    graph.lint()
    assert block.weights
    assert not [n for n in block.weights if copies[n].users]
    assert not {copies[n] for n in block.nodes} & set(graph.nodes)


def test_parallel_branches_read_the_same_stream(exported: Exported) -> None:
    """Attention and feed-forward side by side are two branches with one input."""
    for block in find_blocks(exported("gpt_neox").graph):
        attention, feed_forward = block.branches
        assert attention.input is feed_forward.input is block.input
        shared = set(attention.nodes) & set(feed_forward.nodes)
        assert {str(node.target) for node in shared} <= {"aten.dropout.default"}
        assert attention.add is feed_forward.add


class Layer(nn.Module):
    """One layer over [B, S, E]; `form` says how its branches are put together."""

    def __init__(self, form: str, width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.form = form
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.scale = nn.Parameter(torch.randn(width))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))

    def rms(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.norms
        if self.form == "pre":
            x = x + self.attend(first(x))
            return x + self.feed(second(x))
        if self.form == "post-rms":
            x = self.rms(x + self.attend(x))
            return self.rms(x + self.feed(x))
        if self.form == "parallel-in-turn":
            return (x + self.attend(first(x))) + self.feed(second(x))
        if self.form == "scaled":
            x = x + self.scale * self.attend(first(x))
            return self.scale * self.feed(second(x)) + x
        if self.form == "mixer":
            x = x + self.out(first(x).cumsum(1))
            return x + self.feed(second(x))
        if self.form == "nested":
            hidden = self.up(second(x + self.attend(first(x))))
            return x + self.down(hidden + F.linear(F.gelu(hidden), self.up.weight @ self.down.weight))
        raise ValueError(self.form)


@pytest.mark.parametrize("form", ["pre", "post-rms", "parallel-in-turn", "scaled"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_forms_of_layers(form: str, count: int) -> None:
    """Norms before or on the stream, written out or not, scales and branches added in turn all give one block a layer."""
    blocks = blocks_of(nn.Sequential(*(Layer(form) for _ in range(count)), nn.LayerNorm(32)))
    assert [block.kinds for block in blocks] == [BOTH] * count
    assert len({block.form for block in blocks}) == 1
    if form == "parallel-in-turn":
        assert all(branch.input is block.input for block in blocks for branch in block.branches)


def test_leaving_norm_on_the_stream_is_found() -> None:
    """Where norms lie on the stream, the last block ends with its norm as the others do, written out as it is."""
    blocks = blocks_of(nn.Sequential(Layer("post-rms"), Layer("post-rms"), nn.Linear(32, 7)))
    assert [str(block.output.target) for block in blocks] == ["aten.mul.Tensor"] * 2
    assert all(len(block.weights) == 9 for block in blocks)


def test_mixers_that_are_not_attention_are_other() -> None:
    """A branch that mixes tokens by a running sum is neither attention nor feed-forward."""
    blocks = blocks_of(nn.Sequential(Layer("mixer"), Layer("mixer")))
    assert [block.kinds for block in blocks] == [("other", "feed_forward")] * 2


def test_forms_tell_sizes_apart_and_nothing_else() -> None:
    """Blocks of one structure with another hidden size have another form; other weights' values do not matter."""
    blocks = blocks_of(nn.Sequential(Layer("pre"), Layer("pre", hidden=40), Layer("pre")))
    assert [block.kinds for block in blocks] == [BOTH] * 3
    assert blocks[0].form == blocks[2].form != blocks[1].form


def test_no_residual_stream_has_no_blocks() -> None:
    """Models without additions of branches have no blocks; sums of two projections and activations are not branches."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.one(x) + self.two(x)
            return y + y.tanh() * 0.5 + 0.044 * y**3

    assert blocks_of(Plain()) == ()


def test_a_skip_around_the_model_is_no_block() -> None:
    """Where the input is added to the result of the whole model, the blocks in between are found all the same."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(32, 32), Layer("pre"), Layer("pre"), nn.Linear(32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.body(x)

    assert [block.kinds for block in blocks_of(Around())] == [BOTH] * 2


def test_additions_inside_a_branch_are_not_blocks() -> None:
    """A residual connection inside of a branch belongs to the branch."""
    blocks = blocks_of(nn.Sequential(Layer("nested"), Layer("nested"), Layer("nested")))
    assert len(blocks) == 3
    assert all(len(block.branches) == 1 for block in blocks)


def test_shared_nodes_stay_outside(exported: Exported) -> None:
    """What all blocks share, such as rotary tables, is in none of them."""
    graph = exported("llama").graph
    inside = {node for block in find_blocks(graph) for node in block.nodes}
    assert not any("cos" in str(node.target) or "arange" in str(node.target) for node in inside)
