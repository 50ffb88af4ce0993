"""`graphwright export`: what it writes, what it says, and how it fails."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from graphwright.tools import cli

pytest.importorskip("onnxscript")


def test_the_file_computes_what_the_model_computes(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ONNX file takes the model's arguments by name, and returns what the model returns."""
    import onnxruntime

    path = tmp_path / "two.onnx"
    dynamic = ["--dynamic", "ids:0=batch,1=tokens", "--dynamic", "scale:0=batch,1=tokens"]
    assert cli.main(["export", f"{factories}:two_inputs", str(path), *dynamic, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["inputs"] == {"ids": ["batch", "tokens"], "scale": ["batch", "tokens"]}
    assert data["outputs"] == {"rows": ["batch", "tokens", 8], "sum": ["batch"]}
    assert data["file_bytes"] == path.stat().st_size
    assert len(data["trials"]) == 3
    model, _ = __import__(factories).two_inputs()
    ids, scale = torch.randint(0, 11, (3, 4)), torch.randn(3, 4)
    rows, total = onnxruntime.InferenceSession(path).run(["rows", "sum"], {"ids": ids.numpy(), "scale": scale.numpy()})
    expected = model(ids, scale)
    torch.testing.assert_close(torch.from_numpy(rows), expected["rows"].detach())
    torch.testing.assert_close(torch.from_numpy(total), expected["sum"])


def test_the_tables_say_what_was_written(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json there are tables of the tensors, the operators and the comparisons."""
    path = tmp_path / "mlp.onnx"
    assert cli.main(["export", f"{factories}:mlp", str(path), "--opset", "24"]) == 0
    shown = capsys.readouterr().out
    assert "Gemm" in shown
    assert "opset 24" in shown
    assert "batch 3" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["model.bin"], 2, "should end with .onnx"),
        (["nowhere/model.onnx"], 2, "there is no folder"),
        (["model.onnx", "--opset", "20"], 2, "23<=x<=25"),
        (["model.onnx", "--pass", "nonsense"], 2, "nonsense"),
        (["model.onnx", "--pass", "quantize-cache"], 1, "only with generate=True (--generate)"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str],
    code: int,
    message: str,
    factories: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file of another kind, a missing folder, an old opset and an unknown pass are refused."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", f"{factories}:mlp", *arguments]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_artifact_is_refused_with_what_to_do(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An artifact has no graph; the message says how its passes are used again, and that works."""
    assert cli.main(["export", str(artifact), str(tmp_path / "model.onnx")]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "export the model that it was made of" in shown
    assert f"unzip -p {artifact} recipe.toml" in shown.replace("/ ", "/")
    with zipfile.ZipFile(artifact) as opened:
        assert "recipe.toml" in opened.namelist()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_decoder_is_exported_to_generate(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--generate adds past keys and values, --recipe and --calibration decide what is left out, and all of it is told."""
    from safetensors.torch import save_file

    built("llama").save_pretrained(tmp_path / "llama")
    (tmp_path / "recipe.toml").write_text('[[pass]]\nname = "drop-layers"\ndrop = 1\nunit = "attention"\n')
    ids = torch.randint(3, 97, (2, 40))
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tmp_path / "calls.safetensors")
    argv = ["export", str(tmp_path / "llama"), str(tmp_path / "model.onnx"), "--tokens", "9", "--generate", "--json"]
    argv += ["--recipe", str(tmp_path / "recipe.toml"), "--calibration", str(tmp_path / "calls.safetensors")]
    assert cli.main([*argv, "--pass", "quantize-cache:bits=8"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["operators"]["GroupQueryAttention"] == 1
    assert list(data["inputs"]) == ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
    names = [done["name"] for done in data["passes"]]
    assert names[-1] == "quantize-cache:bits=8"
    assert any(name.startswith("drop-layers") for name in names)
    assert any("on 80 tokens of the calibration" in note for note in data["notes"])
