"""Exporting models to ONNX: the file that appears, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright import exporting_onnx
from graphwright.ir.errors import ExportError
from graphwright.recipe import parse_recipe

onnx: Any = pytest.importorskip("onnx")
onnxruntime: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXPORTED = {
    "llama": 2,
    "llama-mask": 2,
    "qwen3": 2,
    "mistral": 2,
    "gemma3": 2,
    "phi3": 2,
    "gpt2": 2,
    "opt": 2,
    "bert": 2,
    "vit": 2,
    "clip-vision": 2,
    "encoder-post-norm": 2,
    "encoder-pre-norm": 2,
    "convnet": 0,
    "attention-causal": 1,
    "attention-window": 1,
    "attention-bias": 1,
    "attention-lengths": 1,
    "deberta-v2": 2,
    "dinov2": 2,
    "swin": 4,
    "t5": 6,
    "whisper": 6,
}
"""The families that are exported -> how many attentions each has."""

SHARP = {"t5"}
"""Random weights make these so sensitive that eager itself is far from float64."""


class Tied(nn.Module):
    """A table of rows that is the last projection too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(31, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.table(ids)) @ self.table.weight.T


@pytest.mark.parametrize("apart", [False, True])
def test_the_file_holds_each_weight_once_and_replaces_what_was_there(apart: bool, tmp_path: Path) -> None:
    """A tied table is one weight; the file takes the place of an old one, and nothing else is left in the folder."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    ids = torch.randint(0, 31, (2, 5))
    model = Tied()
    report = graphwright.export_onnx(model, path, ids, external_data=apart, check=False)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, *(["model.onnx.data"] if apart else [])}
    assert report.weight_bytes == model.table.weight.nbytes
    assert report.file_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    made = onnx.load(path)
    assert [weight.name for weight in made.graph.initializer] == ["table.weight"]
    assert [size.dim_param for size in made.graph.input[0].type.tensor_type.shape.dim] == ["batch", "tokens"]
    assert not any("writer.py" in str(node.metadata_props) for node in made.graph.node)
    found = onnxruntime.InferenceSession(path).run(None, {"ids": ids[:1, :3].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(ids[:1, :3]).detach())


def test_a_file_that_computes_something_else_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the tolerance nothing is written, and the old file stays."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def scaled(*args: Any, **kwargs: Any) -> Any:
        program = args[0].copy()
        program.weights["weight"] = program.weights["weight"] * 1.01
        return emit(program, **kwargs)

    emit = exporting_onnx.emit
    monkeypatch.setattr(exporting_onnx, "emit", scaled)
    program = graphwright.capture(nn.Linear(4, 4), torch.randn(3, 4))
    with pytest.raises(ExportError, match=r"output: onnxruntime's result is 0\.00\d+ of its largest element .* nothing was"):
        graphwright.export_onnx(program, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"old"


def test_a_compiled_model_and_passes_for_a_program_are_refused(tmp_path: Path) -> None:
    """What has no graph cannot be exported, and a program is written as it is."""
    program = graphwright.capture(nn.ReLU(), torch.randn(3, 4))
    with pytest.raises(ExportError, match="holds kernels"):
        graphwright.export_onnx(graphwright.compile(program), tmp_path / "model.onnx")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="a program is written as it is"):
        graphwright.export_onnx(program, tmp_path / "model.onnx", passes=["dead-code"])


def test_the_file_says_what_was_done(built: Any, families: Any, tmp_path: Path) -> None:
    """A recipe's passes are carried out with the calibration, and the file's metadata says what each decided."""
    recipe = parse_recipe('[[pass]]\nname = "drop-layers"\ndrop = 1\nunit = "attention"\n')
    sample = families["gpt2"].sample
    calls = [sample(2, 40, 5)]
    path = tmp_path / "model.onnx"
    report = graphwright.export_onnx(built("gpt2"), path, **sample(2, 7, 0), recipe=recipe, calibration=calls, check=False)
    assert report.operators["Attention"] == 1
    (entry,) = [prop for prop in onnx.load(path).metadata_props if prop.key == exporting_onnx.RECORDS]
    told = {done["name"]: done for done in json.loads(entry.value)}
    assert told == {done.name: json.loads(json.dumps(dataclasses.asdict(done))) for done in report.passes}
    (dropped,) = [done for name, done in told.items() if name.startswith("drop-layers")]
    assert len(dropped["decisions"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_a_family_computes_the_same_in_onnxruntime(name: str, built: Any, families: Any, tmp_path: Path) -> None:
    """Every attention is one node, and every result is the model's at every size."""
    family = families[name]
    report = graphwright.export_onnx(built(name), tmp_path / "model.onnx", **family.sample(2, 7, 0))
    assert max(trial.error for trial in report.trials) < (1e-4 if name in SHARP else 1e-5)
    assert report.operators.get("Attention", 0) == EXPORTED[name]
    assert "Softmax" not in report.operators
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    sample = family.sample(1, 20, 3)
    given = {value.name: sample[value.name].numpy() for value in session.get_inputs()}
    with torch.no_grad():
        expected = built(name)(**sample)
    first = expected if isinstance(expected, torch.Tensor) else expected[0]
    found = torch.from_numpy(session.run(None, given)[0])
    # Rows of padding see other keys in eager mode than a mask says: they are compared with the program above.
    seen = sample["attention_mask"].bool() if "attention_mask" in sample else torch.ones(first.shape[:1], dtype=torch.bool)
    if name not in SHARP:
        torch.testing.assert_close(found[seen], first[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_mixture_of_experts_is_refused_with_its_line(built: Any, families: Any, tmp_path: Path) -> None:
    """An operation of another library is refused by its name, with the line of the model."""
    with pytest.raises(ExportError, match="transformers::grouped_mm_fallback has no form in ONNX") as raised:
        graphwright.export_onnx(built("qwen3-moe"), tmp_path / "model.onnx", **families["qwen3-moe"].sample(2, 7, 0))
    assert any("moe.py" in note for note in raised.value.__notes__)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sentence_encoder_with_real_weights(tmp_path: Path) -> None:
    """MiniLM's file has the values of the model, and fewer nodes than its layers have operations."""
    from graphwright.tools.reference import load_minilm

    model = load_minilm().eval()
    ids = torch.randint(1000, 3000, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    report = graphwright.export_onnx(model, tmp_path / "model.onnx", input_ids=ids, attention_mask=mask)
    assert (report.operators["Attention"], report.operators["LayerNormalization"]) == (6, 13)
    assert sum(report.operators.values()) < 140
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(
        None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    )[0]
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)[0]
    torch.testing.assert_close(torch.from_numpy(found)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
