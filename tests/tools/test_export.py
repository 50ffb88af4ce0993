"""`graphwright export`: what it writes, what it says, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

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
