"""`graphwright run`: inputs from everywhere, results in numbers and files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from graphwright.tools import cli


def run_json(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run the command with --json and return what it printed."""
    capsys.readouterr()
    assert cli.main(["run", *argv, "--json"]) == 0, capsys.readouterr().err
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


def test_random_inputs(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Inputs that are not given have the sizes asked for, and token ids that the table has rows for."""
    data = run_json([str(artifact), "--batch", "4", "--tokens", "63", "--repeat", "3"], capsys)
    assert data["inputs"] == {
        "ids": {"dtype": "int64", "shape": [4, 63]},
        "scale": {"dtype": "float32", "shape": [4, 63]},
    }
    assert data["outputs"]["rows"]["shape"] == [4, 63, 8]
    assert data["outputs"]["rows"]["not_finite"] == 0
    assert data["first_call_us"] > 0
    assert data["call_us"] > 0
    assert data["repeat"] == 3


def test_inputs_from_files(artifact: Path, factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """.npy and .safetensors files are taken as inputs, sizes follow them, and results are written under their names."""
    model, _ = __import__(factories).two_inputs()
    ids, scale = torch.randint(0, 11, (3, 7)), torch.randn(3, 7)
    np.save(tmp_path / "ids.npy", ids.numpy())
    safetensors.torch.save_file({"scale": scale}, tmp_path / "more.safetensors")
    output = tmp_path / "out.safetensors"
    files = ["--input", f"ids={tmp_path / 'ids.npy'}", "--input", str(tmp_path / "more.safetensors")]
    data = run_json([str(artifact), *files, "--output", str(output)], capsys)
    with torch.no_grad():
        expected = model(ids, scale)
    found = safetensors.torch.load_file(output)
    assert set(found) == {"rows", "sum"} == set(data["outputs"])
    torch.testing.assert_close(found["rows"], expected["rows"])
    torch.testing.assert_close(found["sum"], expected["sum"])
    for key in ("mean", "min", "max"):
        assert data["outputs"]["rows"][key] == pytest.approx(float(getattr(expected["rows"], key)()), abs=1e-5)
    assert data["outputs"]["rows"]["std"] == pytest.approx(float(expected["rows"].std(correction=0)), abs=1e-5)


def test_the_rest_is_random_at_the_sizes_of_what_is_given(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An input that is not given takes its sizes from those that are."""
    np.save(tmp_path / "ids.npy", np.zeros((2, 9), dtype=np.int64))
    data = run_json([str(artifact), "--input", f"ids={tmp_path / 'ids.npy'}"], capsys)
    assert data["inputs"]["scale"]["shape"] == [2, 9]


def test_a_model_is_compiled_on_the_fly(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    """MODEL need not be compiled before; its own sample is the input."""
    data = run_json([f"{factories}:mlp", "--no-check"], capsys)
    assert data["inputs"] == {"input": {"dtype": "float32", "shape": [3, 8]}}
    module, sample = __import__(factories).mlp()
    with torch.no_grad():
        expected = float(module(**sample).mean())
    assert data["outputs"]["output"]["mean"] == pytest.approx(expected, abs=1e-5)


def test_the_table(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tables show inputs, results with statistics, and times."""
    assert cli.main(["run", str(artifact)]) == 0
    shown = capsys.readouterr().out
    for part in ("scale", "rows", "[1, 64, 8]", "std", "not finite", "first call", "median of 1"):
        assert part in shown


def test_text(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--text is tokenised by the tokenizer of the folder that --tokenizer names, and padded to the longest."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = root / "tests" / "models" / "pystdlib-llama"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    path = tmp_path / "llama.gw"
    assert cli.main(["compile", str(tmp_path / "llama"), "-o", str(path), "--tokens", "8", "--json"]) == 0
    texts = ["import os", "def read(path): return open(path).read()"]
    options = [word for text in texts for word in ("--text", text)]
    data = run_json([str(path), *options, "--tokenizer", str(folder)], capsys)
    longest = max(len(tokenizer(text)["input_ids"]) for text in texts)
    assert data["inputs"]["input_ids"]["shape"] == [2, longest]
    assert data["outputs"]["logits"]["shape"] == [2, longest, len(tokenizer)]
    assert cli.main(["run", str(path), *options]) == 1
    assert "name its folder with --tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--input", "ids={folder}/pickle.npy"], ["pickle.npy is no whole .npy file of numbers"]),
        (["--input", "ids={folder}/ids.pt"], ["should end with .npy or .safetensors"]),
        (["--input", "{folder}/fine.npy"], ["write NAME="]),
        (["--input", "idz={folder}/fine.npy"], ["no tensor argument 'idz'", "Did you mean 'ids'?"]),
        (["--input", "ids={folder}/fine.npy", "--input", "ids={folder}/fine.npy"], ["'ids' is given twice"]),
        (["--input", "ids={folder}/floats.npy"], ["ids: wrong dtype"]),
        (["--input", "ids={folder}/cut.safetensors"], ["no whole safetensors file"]),
        (["--input", "ids={folder}/two.safetensors"], ["should hold one tensor, and holds a, b"]),
        (["--input", "ids={folder}/none.npy"], ["none.npy"]),
        (["--size", "tokenz=3"], ["no dimension 'tokenz'", "Did you mean 'tokens'?"]),
        (["--text", "words"], ["takes no input_ids, but ids, scale"]),
    ],
)
def test_inputs_that_do_not_fit(
    options: list[str], words: list[str], artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inputs that cannot be read or do not fit exit with 1 and say what is wrong; nothing is unpickled or written."""
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps([1, 2]))
    np.save(tmp_path / "fine.npy", np.zeros((2, 5), dtype=np.int64))
    np.save(tmp_path / "floats.npy", np.zeros((2, 5), dtype=np.float64))
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    safetensors.torch.save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    output = tmp_path / "out.safetensors"
    capsys.readouterr()
    argv = [option.format(folder=tmp_path) for option in options]
    assert cli.main(["run", str(artifact), *argv, "--output", str(output)]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert [word for word in words if word not in captured.err] == []
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pass", "dead-code"], "--pass has no effect"),
        (["--dtype", "bf16"], "--dtype has no effect"),
        (["--size", "tokens"], "expected NAME=N"),
        (["--output", "out.pt"], "should end with .safetensors"),
        (["--repeat", "0"], "0 is not in the range"),
    ],
)
def test_wrong_usage(options: list[str], words: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that make no sense, such as a pass for what is compiled already, exit with 2."""
    assert cli.main(["run", str(artifact), *options]) == 2
    assert words in capsys.readouterr().err


def test_an_artifact_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing and a damaged file exit with 1, with the name of the file."""
    (tmp_path / "bad.gw").write_bytes(b"no zip")
    for name in ("bad.gw", "missing.gw"):
        assert cli.main(["run", str(tmp_path / name)]) == 1
        assert name in capsys.readouterr().err
