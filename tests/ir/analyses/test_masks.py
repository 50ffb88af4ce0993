"""The masks analysis: the form of a mask says what the mask that the graph computes says, and it is recognised."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.masks import MaskError, MaskForm, analyse_mask

SIZES = ((2, 7), (1, 1), (3, 2), (2, 19))
"""Batch and length that forms are compared at; graphs are exported at the first."""

HEADS = 4


@pytest.fixture(autouse=True)
def quiet_export() -> Iterator[None]:
    """Leave out what torch.export logs."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(previous)


class Values(fx.Interpreter):
    """Runs a graph, checks of exported sizes left out, and keeps the values of the nodes wanted."""

    def __init__(self, program: ExportedProgram, wanted: set[fx.Node]) -> None:
        super().__init__(program.graph_module)
        self.wanted, self.found = wanted, dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        if "_assert_tensor_metadata" in str(n.target) or n.op == "output":
            return None
        value = super().run_node(n)
        if n in self.wanted:
            self.found[n] = value
        return value


def node_values(program: ExportedProgram, wanted: set[fx.Node], inputs: Mapping[str, Any]) -> dict[fx.Node, Any]:
    arguments = []
    for spec in program.graph_signature.input_specs:
        target = spec.target or ""
        if target in program.state_dict:
            arguments.append(program.state_dict[target])
        elif target in program.constants:
            arguments.append(program.constants[target])
        else:
            arguments.append(inputs.get(spec.arg.name))
    interpreter = Values(program, wanted)
    with torch.no_grad():
        interpreter.run(*arguments)
    return interpreter.found


def check(
    program: ExportedProgram, mask: fx.Node, forms: list[MaskForm], inputs: Mapping[str, Any], query: fx.Node, key: fx.Node
) -> None:
    """Assert that the forms evaluate to the mask that the graph computes."""
    found = node_values(program, {mask, query, key, *(node for form in forms for node in form.loads)}, inputs)
    shape = (found[query].shape[0], HEADS, found[query].shape[-2], found[key].shape[-2])
    variables = {
        name: torch.arange(n).view([-1 if at == d else 1 for d in range(4)])
        for at, (name, n) in enumerate(zip("bhqk", shape, strict=True))
    }
    expected = found[mask].expand(shape)
    for form in forms:
        assert form.predicate.free <= variables.keys()
        loads = {f"in{i}": found[node] for i, node in enumerate(form.loads)}
        predicate = ix.evaluate(form.predicate, variables, loads).expand(shape)
        if expected.dtype == torch.bool:
            assert form.bias is None
            assert torch.equal(predicate, expected)
            continue
        assert torch.equal(predicate, expected > max(-1e30, torch.finfo(expected.dtype).min))
        bias = ix.evaluate(form.bias, variables, loads).expand(shape) if form.bias is not None else torch.zeros(shape)
        torch.testing.assert_close(bias[predicate], expected.float()[predicate], rtol=1e-6, atol=1e-6)


def attention_masks(graph: fx.Graph) -> Iterator[tuple[fx.Node | None, fx.Node, fx.Node, bool]]:
    """Yield mask, query, key and is_causal of every attention."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
            arguments.update(node.kwargs)
            yield arguments.get("attn_mask"), arguments["query"], arguments["key"], arguments.get("is_causal", False)


# ---- real models

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
DECODER: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
GEMMA: dict[str, Any] = {
    **DECODER,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
GPT2: dict[str, Any] = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": HEADS}
OPT: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1}
OPT |= {"num_attention_heads": HEADS, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
T5: dict[str, Any] = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": HEADS}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DECODER),
    "qwen3": ("Qwen3", {**DECODER, "head_dim": 8}),
    "mistral": ("Mistral", {**DECODER, "sliding_window": 5}),
    "gemma3": ("Gemma3Text", {**GEMMA, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", DECODER),
    "gpt2": ("GPT2", GPT2),
    "opt": ("OPT", OPT),
    "bert": ("Bert", COMMON),
    "t5": ("T5", {**T5, "decoder_start_token_id": 0}),
}


def batch_of(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    return {"input_ids": torch.randint(3, 97, (batch, length), generator=generator), "attention_mask": mask}


@cache
def export_model(name: str, with_mask: bool) -> ExportedProgram:
    import transformers

    stem, options = MODELS[name]
    suffix = "ForMaskedLM" if name == "bert" else "ForConditionalGeneration" if name == "t5" else "ForCausalLM"
    if name in ("gpt2",):
        suffix = "LMHeadModel"
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**options)
    model = getattr(transformers, f"{stem.removesuffix('Text')}{suffix}")(config).eval()
    arguments: dict[str, Any] = batch_of(*SIZES[0])
    if not with_mask:
        del arguments["attention_mask"]
    if name == "t5":
        arguments["decoder_input_ids"] = arguments["input_ids"][:, :5]
    shapes: dict[str, Any] = {key: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for key in arguments}
    if name != "bert":
        arguments["use_cache"], shapes["use_cache"] = False, None
    return torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=False)


def case(name: str, with_mask: bool, *more: Any) -> Any:
    """Return a case of a real model: an export takes a second or more, so most of them are for the long run."""
    quick = (name, with_mask) in {("llama", True), ("bert", True)}
    return pytest.param(name, with_mask, *more, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "with_mask"), [case(name, with_mask) for name in MODELS for with_mask in (False, True)])
def test_forms_of_real_models(name: str, with_mask: bool) -> None:
    """Every mask of every family has a form that evaluates to the mask, at lengths it was not exported at."""
    program = export_model(name, with_mask)
    sites = list(attention_masks(program.graph))
    assert sites
    for batch, length in SIZES:
        inputs: dict[str, Any] = batch_of(batch, length)
        inputs["decoder_input_ids"] = inputs["input_ids"][:, : max(1, length // 2)]
        for mask, query, key, is_causal in sites:
            if mask is None:
                continue
            lengths = {"query_length": query.meta["val"].shape[2], "key_length": key.meta["val"].shape[2]}
            forms = [analyse_mask(mask, is_causal=is_causal, for_kernels=choice, **lengths) for choice in (False, True)]
            assert not ix.contains(forms[1].predicate, "sum")
            check(program, mask, forms, inputs, query, key)


@pytest.mark.parametrize(
    ("name", "with_mask", "expected"),
    [
        case("llama", False, ["q - k >= 0"]),
        case("llama", True, ["q - k >= 0 & not (in0[b, k] == 0)"]),
        case("qwen3", False, ["q - k >= 0"]),
        case("mistral", False, ["k - q + 4 >= 0 & q - k >= 0"]),
        case("gemma3", False, ["k - q + 4 >= 0 & q - k >= 0", "q - k >= 0"]),
        case("phi3", False, ["q - k >= 0"]),
        case("gpt2", False, ["q - k >= 0"]),
        case("opt", False, ["q - k >= 0"]),
        case("bert", True, ["not (in0[b, k] == 0)"]),
    ],
)
def test_what_real_models_masks_are(name: str, with_mask: bool, expected: list[str]) -> None:
    """The packed-sequence detection and the gathered positions of the library's masks fold away."""
    masks = {mask: (q, k) for mask, q, k, _ in attention_masks(export_model(name, with_mask).graph)}
    forms = [
        analyse_mask(mask, query_length=q.meta["val"].shape[2], key_length=k.meta["val"].shape[2])
        for mask, (q, k) in masks.items()
    ]
    assert [str(form) for form in dict.fromkeys(map(str, forms))] == expected
    assert all(form.causal == (name != "bert") for form in forms)
    assert forms[0].window == (5 if name in ("mistral", "gemma3") else None)
    assert [form.residual for form in forms] == [ix.and_(*form.padding) for form in forms]
    assert all(len(form.padding) == with_mask for form in forms)


@pytest.mark.slow
def test_the_position_bias_of_t5() -> None:
    """The encoder's bias is a function of the distance and hides padding; the decoder's is causal as well."""
    sites = list(attention_masks(export_model("t5", True).graph))
    encoder, decoder, cross = (analyse_mask(mask, query_length=50, key_length=50) for mask, *_ in sites)
    assert (encoder.bias_kind, encoder.causal, len(encoder.padding)) == ("relative", False, 1)
    assert (decoder.bias_kind, decoder.causal, decoder.residual) == ("relative", True, ix.TRUE)
    assert (cross.bias, len(cross.padding)) == (None, 1)
    assert not decoder.exact


# ---- masks written by hand


def grid(x: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(x.shape[1])
    return positions[:, None], positions[None, :]


def tril(x: Tensor, segments: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


def triu(x: Tensor, segments: Tensor) -> Tensor:
    return torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)


def inverted(x: Tensor, segments: Tensor) -> Tensor:
    keep = torch.tril(torch.ones((x.shape[1], x.shape[1])))
    return (1.0 - keep[None, None]) * torch.finfo(torch.float32).min


def window(x: Tensor, segments: Tensor) -> Tensor:
    q, k = grid(x)
    return (k <= q) & (q - k < 3)


def symmetric(x: Tensor, segments: Tensor) -> Tensor:
    q, k = grid(x)
    return (q - k).abs() <= 2


def sinks(x: Tensor, segments: Tensor) -> Tensor:
    q, k = grid(x)
    return (k <= q) & ((k < 2) | (k > q - 3))


def prefix(x: Tensor, segments: Tensor) -> Tensor:
    q, k = grid(x)
    return (k <= q) | (k < 4)


def prefix_of_each(x: Tensor, segments: Tensor) -> Tensor:
    q, k = grid(x)
    return ((k <= q)[None] | (k[None] < segments[:, :1, None]))[:, None]


def packed(x: Tensor, segments: Tensor) -> Tensor:
    q, k = grid(x)
    return ((segments[:, :, None] == segments[:, None, :]) & (k <= q))[:, None]


def starts(x: Tensor, segments: Tensor) -> Tensor:
    number = (segments == 0).cumsum(1)
    return (number[:, :, None] == number[:, None, :])[:, None]


def detected(x: Tensor, segments: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
    number = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = number[:, :, None] == number[:, None, :]
    return (same & (positions[:, None, :] <= positions[:, :, None]))[:, None]


def float16(x: Tensor, segments: Tensor) -> Tensor:
    q, k = grid(x)
    return torch.where(k <= q, 0.0, torch.finfo(torch.float16).min).to(torch.float16)


def chunked(x: Tensor, segments: Tensor) -> Tensor:
    q, k = grid(x)
    return (q // 4 == k // 4) & (k <= q)


def alibi(x: Tensor, segments: Tensor) -> Tensor:
    q, k = grid(x)
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    return torch.where(k <= q, slopes[:, None, None] * (k - q), float("-inf"))


def buckets(x: Tensor, segments: Tensor) -> Tensor:
    q, k = grid(x)
    distance = (q - k).clamp(min=0)
    far = 4 + (torch.log(distance.float() / 4) / math.log(4) * 4).to(torch.long).clamp(max=3)
    table = torch.arange(8.0)[:, None] * torch.arange(1, HEADS + 1)
    return table[torch.where(distance < 4, distance, far)].permute(2, 0, 1)[None]


def strict(x: Tensor, segments: Tensor) -> Tensor:
    q, k = grid(x)
    return k < q


def padded_3d(x: Tensor, segments: Tensor) -> Tensor:
    keep = segments[:1, None, :] > 0
    return torch.zeros(1, x.shape[1], x.shape[1]).masked_fill(~keep, float("-inf"))


def arbitrary(x: Tensor, segments: Tensor) -> Tensor:
    scores = x @ x.transpose(1, 2)
    return torch.where(scores > 0, scores, float("-inf"))[:, None]


def roll(x: Tensor, segments: Tensor) -> Tensor:
    return torch.roll(segments, 1, 1)[:, None, None] > 0


def joined(x: Tensor, segments: Tensor) -> Tensor:
    keep = torch.cat([torch.ones_like(segments[:, :1]), segments[:, 1:]], 1).to(torch.bool)
    left, right = torch.stack([keep, keep], 1).split(1, 1)
    return (left & right).reshape(x.shape[0], 1, 1, -1).expand(-1, HEADS, x.shape[1], -1)


def half_precision(x: Tensor, segments: Tensor) -> Tensor:
    q, k = grid(x)
    bias = ((k - q) * 0.3).to(torch.bfloat16) + 1
    return torch.where(k <= q, bias, torch.finfo(torch.bfloat16).min)


def overlapping(x: Tensor, segments: Tensor) -> Tensor:
    low = torch.finfo(torch.float32).min
    q, k = grid(x)
    causal = torch.where(k <= q, 0.0, low)[None, None]
    return causal + torch.where(segments > 0, 0.0, low)[:, None, None]


HAND: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], dict[str, Any]]] = {
    "tril": (tril, {"causal": True, "residual": ix.TRUE}),
    "triu": (triu, {"causal": True, "residual": ix.TRUE, "bias": None, "exact": True}),
    "inverted": (inverted, {"causal": True, "residual": ix.TRUE, "bias": None, "exact": False}),
    "window": (window, {"causal": True, "window": 3, "residual": ix.TRUE}),
    "symmetric": (symmetric, {"causal": False, "window": 3, "right_window": 3, "residual": ix.TRUE}),
    "sinks": (sinks, {"causal": True, "window": None, "sinks": 2, "sink_window": 3}),
    "prefix": (prefix, {"causal": False, "prefix": ix.const(4)}),
    "prefix_of_each": (prefix_of_each, {"causal": False, "prefix": ix.parse("in0[b, 0]")}),
    "packed": (packed, {"causal": True, "packed": (ix.parse("in0[b, k] == in0[b, q]"),)}),
    "starts": (starts, {"causal": False}),
    "detected": (detected, {"causal": True, "residual": ix.TRUE, "loads": ()}),
    "float16": (float16, {"causal": True, "residual": ix.TRUE, "bias": None, "exact": False}),
    "chunked": (chunked, {"causal": True, "chunk": 4}),
    "alibi": (alibi, {"causal": True, "bias_kind": "alibi", "residual": ix.TRUE}),
    "buckets": (buckets, {"causal": False, "bias_kind": "relative"}),
    "strict": (strict, {"causal": True}),
    "padded_3d": (padded_3d, {"causal": False, "padding": (ix.parse("in0[0, k] - 1 >= 0"),)}),
    "arbitrary": (arbitrary, {"causal": False, "bias_kind": "other"}),
    "roll": (roll, {"causal": False, "padding": (ix.parse("in0[b, k] - 1 >= 0"),)}),
    "joined": (joined, {"causal": False}),
    "half_precision": (half_precision, {"causal": True, "bias_kind": "relative"}),
    "overlapping": (overlapping, {"causal": True, "padding": (ix.parse("in0[b, k] - 1 >= 0"),), "bias": None}),
}


class Masked(nn.Module):
    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor, segments: Tensor) -> Tensor:
        mask = self.mask(x, segments)
        heads = x[:, None].expand(-1, HEADS, -1, -1).to(x.dtype if mask.dtype == torch.bool else mask.dtype)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, mask)


def hand_inputs(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    segments = torch.randint(0, 3, (batch, length), generator=generator)
    return {"x": torch.randn(batch, length, 8, generator=generator), "segments": segments}


@cache
def export_hand(name: str) -> tuple[ExportedProgram, fx.Node, MaskForm]:
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    module, inputs = Masked(HAND[name][0]), hand_inputs(*SIZES[0])
    shapes = {"x": free, "segments": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    program = torch.export.export(module, (), inputs, dynamic_shapes=shapes, strict=False)
    ((mask, query, _, _),) = attention_masks(program.graph)
    assert mask is not None
    length = query.meta["val"].shape[2]
    return program, mask, analyse_mask(mask, query_length=length, key_length=length)


@pytest.mark.parametrize("name", HAND)
def test_forms_of_written_masks(name: str) -> None:
    """The form evaluates to the mask at lengths it was not exported at."""
    program, mask, form = export_hand(name)
    ((_, query, key, _),) = attention_masks(program.graph)
    size = query.meta["val"].shape[2]
    for_kernels = analyse_mask(mask, query_length=size, key_length=size, for_kernels=True)
    assert not ix.contains(for_kernels.predicate, "sum")
    for batch, length in SIZES:
        check(program, mask, [form, for_kernels], hand_inputs(batch, length), query, key)


@pytest.mark.parametrize("name", HAND)
def test_written_masks_are_recognised(name: str) -> None:
    """Causality, windows, sinks, prefixes, packed sequences, chunks, padding and biases are told apart."""
    form = export_hand(name)[2]
    assert {field: getattr(form, field) for field in HAND[name][1]} == HAND[name][1]


@pytest.mark.parametrize("name", HAND)
def test_the_recognised_and_the_rest_make_the_predicate(name: str) -> None:
    """Causality, the windows and the residual together say exactly what the predicate says."""
    program, _, form = export_hand(name)
    batch, length = SIZES[0]
    found = node_values(program, set(form.loads), hand_inputs(batch, length))
    loads = {f"in{i}": found[node] for i, node in enumerate(form.loads)}
    b, q, k = torch.arange(batch)[:, None, None], torch.arange(length)[:, None], torch.arange(length)
    variables = {"b": b, "q": q, "k": k, "h": torch.tensor(0)}
    rebuilt = ix.evaluate(form.residual, variables, loads).expand(batch, length, length)
    if form.causal:
        rebuilt = rebuilt & (k <= q)
    if form.window is not None:
        rebuilt = rebuilt & (k > q - form.window)
    if form.right_window is not None:
        rebuilt = rebuilt & (k < q + form.right_window)
    assert torch.equal(rebuilt, ix.evaluate(form.predicate, variables, loads).expand(batch, length, length))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_decomposed_graph_has_the_same_form() -> None:
    """The operators that torch takes others apart into are understood as well."""
    program, _, form = export_hand("detected")
    table = torch.export.default_decompositions()
    table.pop(torch.ops.aten.scaled_dot_product_attention.default, None)
    ((mask, query, _, _),) = attention_masks(program.run_decompositions(table).graph)
    assert mask is not None
    assert not any(node.target is torch.ops.aten.diff.default for node in mask.graph.nodes)
    length = query.meta["val"].shape[2]
    assert str(analyse_mask(mask, query_length=length, key_length=length)) == str(form) == "q - k >= 0"


# ---- tables, flags and errors


class Table(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        return nn.functional.scaled_dot_product_attention(x, x, x, self.get_buffer("table")[:length, :length])


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (torch.ones(32, 32, dtype=torch.bool).tril(), "q - k >= 0"),
        (torch.ones(32, 32, dtype=torch.bool).tril(-1), "q - k - 1 >= 0"),
        (torch.full((32, 32), -math.inf).triu(1), "q - k >= 0"),
        (torch.ones(32, 32, dtype=torch.bool), "True"),
        (torch.zeros(32, 32), "True"),
    ],
)
def test_tables_of_known_value(table: Tensor, expected: str) -> None:
    """A buffer that holds a causal table is seen for what it is where its value is given, and read where not."""
    free = {"x": {1: Dim.DYNAMIC}}
    program = torch.export.export(Table(table), (torch.randn(2, 7, 8),), dynamic_shapes=free, strict=False)
    ((mask, query, _, _),) = attention_masks(program.graph)
    assert mask is not None
    buffer = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name == "b_table")
    lengths = {"query_length": query.meta["val"].shape[1], "key_length": query.meta["val"].shape[1], "query_rank": 3}
    known = analyse_mask(mask, constants={buffer: table}, **lengths)
    assert str(known) == str(ix.parse(expected))
    unknown = analyse_mask(mask, **lengths)
    assert unknown.loads == (buffer,)
    assert "in0[q, k]" in str(unknown)


def test_is_causal_counts_from_the_top_left() -> None:
    """Without a mask the operator's own causality is the form."""
    form = analyse_mask(None, is_causal=True, query_length=3, key_length=9)
    assert (str(form), form.causal, form.offset, form.residual) == ("q - k >= 0", True, ix.ZERO, ix.TRUE)
    assert analyse_mask(None, query_length=3, key_length=9).predicate is ix.TRUE


def test_causality_behind_earlier_keys() -> None:
    """Queries that stand behind earlier keys are causal at an offset, which windows count from too."""

    class Cached(nn.Module):
        def forward(self, x: Tensor, past: Tensor) -> Tensor:
            before = past.shape[1]
            keys = torch.cat([past, x], 1)
            q, k = torch.arange(before, before + x.shape[1])[:, None], torch.arange(keys.shape[1])[None]
            return nn.functional.scaled_dot_product_attention(x, keys, keys, (k <= q) & (k > q - 4))

    free = {"x": {1: Dim.DYNAMIC}, "past": {1: Dim.DYNAMIC}}
    inputs = (torch.randn(2, 7, 8), torch.randn(2, 5, 8))
    program = torch.export.export(Cached(), inputs, dynamic_shapes=free, strict=False)
    ((mask, query, key, _),) = attention_masks(program.graph)
    lengths = {"query_length": query.meta["val"].shape[1], "key_length": key.meta["val"].shape[1], "query_rank": 3}
    form = analyse_mask(mask, **lengths)
    past = next(node for node in program.graph.nodes if node.name == "past").meta["val"].shape[1]
    assert (form.causal, str(form.offset), form.window) == (True, str(past.node.expr), 4)
    assert form.residual is ix.TRUE


def test_errors_name_the_node() -> None:
    """A mask of too many dimensions and one that is not a mask are refused by name."""
    graph = fx.Graph()
    wide, whole, odd = (graph.placeholder(name) for name in ("wide", "whole", "odd"))
    wide.meta["val"] = torch.empty(1, 1, 1, 3, 3)
    whole.meta["val"] = torch.empty(3, 3, dtype=torch.int64)
    odd.meta["val"] = torch.empty(3, 3, dtype=torch.complex64)
    for node, message in ((wide, "up to 4 dimensions.*wide"), (whole, "whole.* is torch.int64"), (odd, "odd.*complex64")):
        with pytest.raises(MaskError, match=message):
            analyse_mask(node, query_length=3, key_length=3)


def test_a_mask_that_is_an_input_is_read() -> None:
    """A bool input is the predicate and a float input the bias, broadcast dimensions at 0."""
    graph = fx.Graph()
    seen, added = graph.placeholder("seen"), graph.placeholder("added")
    seen.meta["val"] = torch.empty(2, 1, 5, 5, dtype=torch.bool)
    added.meta["val"] = torch.empty(HEADS, 5, 5)
    form = analyse_mask(seen, query_length=5, key_length=5)
    assert (str(form), form.loads, form.causal) == ("in0[b, 0, q, k]", (seen,), False)
    assert str(analyse_mask(added, query_length=5, key_length=5)) == "True; bias in0[h, q, k]"
