"""Programs as ONNX models: what each operation of the dialect becomes, and what the runtime makes of it."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.codegen.onnx.emitting import emit
from graphwright.ir import dialect
from graphwright.ir.errors import ExportError, OptionError
from graphwright.ir.program import Program, replace

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

aten = torch.ops.aten


class Zoo(nn.Module):
    """A module of placeholders for calls of the dialect: `sub` marks where they go."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": x * 2.0, "count": mask.sum(-1)}


HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def program_of(calls: Any) -> Program:
    """Return a program that takes x [batch, tokens, 32] and mask [batch, tokens], with calls in the place of x * 2."""
    x = torch.randn(2, 7, HEADS * WIDTH, generator=torch.Generator().manual_seed(0))
    names = {"x": {0: "batch", 1: "tokens"}, "mask": {0: "batch", 1: "tokens"}}
    program = graphwright.capture(Zoo(), x, torch.ones(2, 7, dtype=torch.long), dynamic=names, check=False)
    node = next(n for n in program.graph.nodes if n.target is aten.mul.Tensor)
    with program.graph.inserting_before(node):
        replace(node, calls(program, *program.inputs))
    program.drop_unused()
    return program


def by_head(program: Program, x: Any, heads: int) -> Any:
    batch, tokens = (program.call(aten.sym_size.int, x, at) for at in (0, 1))
    return program.call(aten.permute.default, program.call(aten.reshape.default, x, [batch, tokens, heads, -1]), [0, 2, 1, 3])


def tables(program: Program, x: Any) -> list[Any]:
    """Return cosines and sines [1, 1, tokens, WIDTH] whose halves are alike."""
    tokens = program.call(aten.sym_size.int, x, 1)
    at = program.call(aten.arange.default, tokens, dtype=torch.float32, device=torch.device("cpu"))
    at = program.call(aten.reshape.default, at, [1, 1, tokens, 1])
    angle = program.call(aten.mul.Tensor, at, program.weight("freq", torch.rand(WIDTH // 2)))
    angle = program.call(aten.cat.default, [angle, angle], -1)
    return [program.call(function, angle) for function in (aten.cos.default, aten.sin.default)]


def attention(**options: Any) -> Any:
    """Return a function that adds attention over the heads of x, whose keys and values are halves of x."""

    def calls(program: Program, x: Any, mask: Any) -> Any:
        q = by_head(program, x, HEADS)
        half = program.call(aten.slice.Tensor, x, 2, 0, KEY_HEADS * WIDTH)
        k, v = by_head(program, half, KEY_HEADS), by_head(program, half, KEY_HEADS)
        given = {"predicate": "", "scale": 0.3, **options}
        if given.pop("rotate", False):
            q, k = (program.call(dialect.rotary, tensor, *tables(program, x)) for tensor in (q, k))
        sink = program.weight("sink", torch.randn(HEADS)) if given.pop("sink", False) else None
        table = program.weight("table", torch.randn(HEADS, 70, 70))
        return program.call(dialect.attention, q, k, v, [mask, table], sink, **given)

    return calls


def norm(**options: Any) -> Any:
    def calls(program: Program, x: Any, mask: Any) -> Any:
        weight = program.weight("norm", torch.randn(HEADS * WIDTH))
        return program.call(dialect.rms_norm, x, options.pop("weight", weight), 1e-6, options.pop("offset", 0.0), **options)

    return calls


def gated(activation: str) -> Any:
    def calls(program: Program, x: Any, mask: Any) -> Any:
        return program.call(dialect.glu, x, program.call(aten.mul.Tensor, x, 0.5), activation)

    return calls


def interleaved(program: Program, x: Any, mask: Any) -> Any:
    return program.call(dialect.rotary, by_head(program, x, HEADS), *tables(program, x), interleaved=True)


def rows(program: Program, x: Any, mask: Any) -> Any:
    return program.call(dialect.take_rows, program.weight("rows", torch.randn(2, 3)), program.call(aten.sub.Tensor, mask, 1))


CASES: dict[str, tuple[Any, dict[str, int]]] = {
    "unmasked": (attention(), {"Attention": 1}),
    "causal": (attention(predicate="q - k >= 0"), {"Attention": 1, "GreaterOrEqual": 0, "Transpose": 1}),
    "rotated": (attention(predicate="q - k >= 0", rotate=True), {"Attention": 1, "RotaryEmbedding": 2, "Transpose": 1}),
    "window-softcap": (attention(predicate="k - q + 4 >= 0 & q - k >= 0", softcap=2.0), {"Attention": 1, "Tanh": 0}),
    "padding": (attention(predicate="not (in0[b, k] == 0) & q - k >= 0"), {"Attention": 1}),
    "bias": (attention(predicate="not (in0[b, k] == 0)", bias="in1[h, q, k]"), {"Attention": 1, "Where": 1}),
    "hidden-alike": (attention(bias="where(in0[b, k]*in0[b, q] == 0, -3.4028234663852886e+38, 0.0)"), {"Attention": 1}),
    "sink": (attention(predicate="q - k >= 0", sink=True), {"Attention": 1}),
    "norm": (norm(), {"RMSNormalization": 1}),
    "norm-offset": (norm(offset=1.0, cast_before_weight=False), {"RMSNormalization": 1, "Cast": 0}),
    "norm-weightless": (norm(weight=None), {"RMSNormalization": 1}),
    "gelu": (gated("gelu"), {"Gelu": 1}),
    "gelu-tanh": (gated("gelu_tanh"), {"Gelu": 1}),
    "silu": (gated("silu"), {"Sigmoid": 1}),
    "rotary-interleaved": (interleaved, {"RotaryEmbedding": 0}),
    "rows": (rows, {"Where": 1}),
}
TOGETHER = ("rotated", "padding", "bias", "sink", "norm-offset", "gelu-tanh")
"""Exported as one program by the quick test."""


def together(program: Program, x: Any, mask: Any) -> Any:
    total = by_head(program, x, HEADS)
    for case in TOGETHER:
        value = CASES[case][0](program, x, mask)
        added = value if value.meta["val"].dim() == 4 else by_head(program, value, HEADS)
        total = program.call(aten.add.Tensor, total, added)
    return total


def test_operations_of_the_dialect_become_operators(tmp_path: Path) -> None:
    """Operations of the dialect become the operators that the runtime runs well; its results are the program's."""
    report = graphwright.export_onnx(program_of(together), tmp_path / "model.onnx")
    expected = {"Attention": 4, "RotaryEmbedding": 2, "RMSNormalization": 1, "Gelu": 1}
    assert {name: report.operators.get(name, 0) for name in expected} == expected
    assert len(report.trials) == 3
    assert max(trial.error for trial in report.trials) < 1e-5
    assert report.inputs == {"x": ("batch", "tokens", 32), "mask": ("batch", "tokens")}
    assert report.outputs == {"out": ("batch", HEADS, "tokens", WIDTH), "count": ("batch",)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_operation_of_the_dialect_becomes_its_operator(case: str, tmp_path: Path) -> None:
    """The model has the operator that the runtime runs well, and the runtime's results are the program's."""
    make, expected = CASES[case]
    report = graphwright.export_onnx(program_of(make), tmp_path / "model.onnx")
    assert {name: report.operators.get(name, 0) for name in expected} == expected
    assert [trial.sizes for trial in report.trials[:3]] == [
        {"batch": 1, "tokens": 1},
        {"batch": 2, "tokens": 7},
        {"batch": 3, "tokens": 63},
    ]
    assert max(trial.error for trial in report.trials) < 1e-5


@pytest.mark.slow
def test_a_query_without_keys_gives_zero(tmp_path: Path) -> None:
    """Where the mask hides every key of a sequence, the runtime's result is 0, as the reference says."""
    import onnxruntime

    program = program_of(attention(predicate="not (in0[b, k] == 0)"))
    graphwright.export_onnx(program, tmp_path / "model.onnx", check=False)
    x, mask = torch.randn(2, 3, HEADS * WIDTH), torch.tensor([[0, 0, 0], [1, 0, 1]])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(["out"], {"x": x.numpy(), "mask": mask.numpy()})[0]
    assert (found[0] == 0).all()
    torch.testing.assert_close(torch.from_numpy(found), program.module()(x, mask)[0])


@pytest.mark.slow
def test_layers_share_a_mask() -> None:
    """Attentions with one mask share what makes it."""

    def twice(program: Program, x: Any, mask: Any) -> Any:
        first, second = (attention(predicate="k - q + 4 >= 0", scale=scale) for scale in (0.3, 0.4))
        return program.call(aten.add.Tensor, first(program, x, mask), second(program, x, mask))

    operators = collections.Counter(node.op_type for node in emit(program_of(twice)).graph)
    assert (operators["Attention"], operators["GreaterOrEqual"]) == (2, 1)


def test_what_has_no_form_is_refused_by_name() -> None:
    """An operation without a lowering, and a mask without a form, are refused with the node."""

    def caches(program: Program, x: Any, mask: Any) -> Any:
        by_heads = by_head(program, x, HEADS)
        past = program.call(aten.sum.dim_IntList, mask, [-1])
        return program.call(dialect.kv_append, by_heads, by_heads, past)

    with pytest.raises(ExportError, match=r"graphwright::kv_append has no form in ONNX") as raised:
        emit(program_of(caches))
    assert any("kv_append" in note for note in raised.value.__notes__)
    with pytest.raises(ExportError, match="sums up to"):
        emit(program_of(attention(predicate="sum(j <= q - k, in0[b, j]) >= 1")))


def test_an_unknown_opset_is_refused() -> None:
    """Opsets before attention was an operator are refused."""
    with pytest.raises(OptionError, match="opset must be 23 to 25, and is 20"):
        emit(program_of(gated("silu")), opset=20)
