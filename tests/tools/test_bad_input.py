"""What a user may get wrong: each is one message that says what was found and what to do, and leaves nothing half-written.

Exit code 2 is a command line that makes no sense, found before any work; 1 is a run that failed.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import graphwright
from graphwright.ir.errors import InputError
from graphwright.tools import cli


@pytest.fixture(scope="module")
def mlp(factories: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The factory `mlp`, compiled."""
    path = tmp_path_factory.mktemp("bad_input") / "mlp.gw"
    assert cli.main(["compile", f"{factories}:mlp", "-o", str(path), "--no-check", "--json"]) == 0
    return path


@pytest.fixture(scope="module")
def llama(built: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny language model without a tokenizer."""
    folder = tmp_path_factory.mktemp("bad_input") / "llama"
    built("llama").save_pretrained(folder)
    return folder


def refused(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that has to fail, and return its message on one line; nothing may be on standard output."""
    capsys.readouterr()
    assert cli.main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("drop-layers:drop=-1", "drop must be at least 0, got -1"),
        ("drop-layers:budget=0", "budget must be above 0 and finite, got 0.0"),
        ("drop-layers:budget=nan", "budget must be above 0 and finite, got nan"),
        ("drop-layers:keep_ratio=1.5", "keep_ratio must be"),
        ("drop-layers:drop=1,keep_ratio=0.5", "drop"),
        ("drop-layers:unit=blok", "Did you mean 'block'?"),
        ("drop-layers:drop=one", "drop must be an integer, got 'one'"),
        ("drop-layers:dropp=1", "no option 'dropp'. Did you mean 'drop'?"),
        ("drop-layers:drop", "'drop' should be written option=value"),
        ("drop-layer:drop=1", "no pass 'drop-layer'. Did you mean 'drop-layers'?"),
        ("quantize-cache:bits=3", "bits must be 2, 4, 8 or 16, got 3"),
        ("quantize-cache:bits=4", "quantize-cache rewrites caches, which only a model that generates has: add --generate"),
    ],
)
def test_passes(spec: str, words: str, factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pass, an option or a value that there is not is refused before the model is loaded, with the nearest that there is."""
    argv = ["compile", f"{factories}:broken", "-o", str(tmp_path / "m.gw"), "--pass", spec]
    assert words in refused(argv, 2, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x =", "is not TOML"),
        ('[[pass]]\nname = "drop-layers"\ndrop = "one"', "pass 1: drop-layers: drop must be an integer, got 'one'"),
        ('[[pass]]\nname = "drop-layers"\ndrop = [1, 2]', "drop must be an integer, got '1+2'"),
        ('[[pass]]\nname = "drop-layers"\ndrop = {a = 1}', "must be a number, true or false, text or a list of these"),
        ("[[pass]]\nname = 3", 'pass 1 has no name: write name = "..."'),
        ('[pass]\nname = "drop-layers"', "passes are written [[pass]]"),
        ('[[passes]]\nname = "drop-layers"', "Did you mean 'pass'?"),
        ('[model]\nname = 3\nweights = "x"', "[model] has name and weights, both text"),
        ('[[pass]]\nname = "quantize-cache"', "add --generate"),
    ],
)
def test_recipes(text: str, words: str, factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe that cannot be read is refused before the model is loaded, with the place in it."""
    path = tmp_path / "r.toml"
    path.write_text(text)
    argv = ["compile", f"{factories}:broken", "-o", str(tmp_path / "m.gw"), "--recipe", str(path)]
    assert words in refused(argv, 2, capsys)
    assert list(tmp_path.iterdir()) == [path]


def test_a_recipe_of_another_model(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe that was made for other weights is refused, with how to use it all the same."""
    path = tmp_path / "r.toml"
    path.write_text('[model]\nname = "Other"\nweights = "sha256:00"\n')
    argv = ["compile", f"{factories}:mlp", "-o", str(tmp_path / "m.gw"), "--no-check", "--recipe", str(path)]
    message = refused(argv, 1, capsys)
    assert "was made for another model: for Other" in message
    assert "take its [model] part out" in message
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_to_rewrite(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pass that finds no place is told of, with the reason, and is an error only if that was asked for."""
    path = tmp_path / "m.gw"
    argv = ["compile", f"{factories}:mlp", "-o", str(path), "--no-check", "--pass", "window-attention:window=4"]
    words = "window-attention:window=4 changed nothing: "
    assert words in refused([*argv, "--strict"], 1, capsys)
    assert not path.exists()
    assert cli.main(argv) == 0
    assert f"note: {words}" in capsys.readouterr().out
    assert cli.main([*argv, "--json"]) == 0
    (idle,) = json.loads(capsys.readouterr().out)["idle"]
    assert idle.startswith(words)
    assert len(idle) > len(words)


def test_calibration(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sample calls that are missing, too few, of other names, of another kind or not there say what is wanted."""
    target = tmp_path / "m.gw"
    argv = ["compile", str(llama), "-o", str(target), "--no-check", "--tokens", "9", "--pass", "drop-layers:drop=1"]
    assert "--calibration FILE" in refused(argv, 1, capsys)
    few = tmp_path / "few.safetensors"
    tensors = {name: torch.ones(1, 5, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    safetensors.torch.save_file(tensors, few)
    message = refused([*argv, "--calibration", str(few)], 1, capsys)
    assert "minimum_tokens" in message
    assert "64" in message
    assert "5" in message
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"ids": tensors["input_ids"]}, other)
    assert "is not what the model takes" in refused([*argv, "--calibration", str(other)], 1, capsys)
    picture = tmp_path / "a.png"
    picture.write_bytes(b"x")
    assert "should end with .txt or .safetensors" in refused([*argv, "--calibration", str(picture)], 1, capsys)
    assert "does not exist" in refused([*argv, "--calibration", str(tmp_path / "none.txt")], 2, capsys)
    assert not target.exists()


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_file(kept: float, mlp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not whole is refused by name by every command that reads one."""
    path, whole = tmp_path / "cut.gw", mlp.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    for command in ("inspect", "run"):
        assert "cut.gw is not a whole compiled model" in refused([command, str(path)], 1, capsys)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("bacth=3", "no dimension 'bacth'. Did you mean 'batch'?"),
        ("batch=x", "expected NAME=N,..., got 'batch=x'"),
        ("batch=-1", "expected NAME=N,..., got 'batch=-1'"),
        ("batch", "expected NAME=N,..., got 'batch'"),
        ("", "expected NAME=N,..., got ''"),
    ],
)
def test_sizes(size: str, words: str, mlp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes that are no sizes, or of a dimension that there is not, are refused."""
    assert words in refused(["inspect", str(mlp), "--size", size], 2, capsys)


def test_sizes_of_a_model_without_any(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where all sizes are fixed this is said."""
    argv = ["inspect", f"{factories}:mlp", "--no-check", "--dynamic", "none", "--size", "batch=3"]
    assert "no dimension 'batch': all sizes are fixed" in refused(argv, 2, capsys)


@pytest.mark.parametrize("command", ["compile", "run", "export"])
def test_places_that_cannot_be_written_to(
    command: str, factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is missing, and one that is a file, are refused before any work."""
    (tmp_path / "file").write_text("")
    suffix = {"compile": ".gw", "run": ".safetensors", "export": ".onnx"}[command]
    for folder in ("nowhere", "file"):
        output = str(tmp_path / folder / f"m{suffix}")
        argv = [command, f"{factories}:broken", *([output] if command == "export" else ["--output", output])]
        message = refused(argv, 2, capsys)
        assert "there is no folder" in message
        assert folder in message


def test_a_full_disk(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where writing fails the file is named with the reason, what was there before stays, and no part of the new one."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "out.safetensors"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    message = refused(["run", str(mlp), "--output", str(path)], 1, capsys)
    assert "out.safetensors cannot be written: No space left on device" in message
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_while_a_model_is_written(
    factories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same for a compiled model."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "m.gw"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    message = refused(["compile", f"{factories}:mlp", "-o", str(path), "--no-check"], 1, capsys)
    assert "m.gw cannot be written: No space left on device" in message
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_names(mlp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands, models and passes that there are not, with the nearest that there is."""
    assert "no command 'inspct'. Did you mean 'inspect'?" in refused(["inspct", str(mlp)], 2, capsys)
    assert "there is no such file" in refused(["run", str(tmp_path / "none.gw")], 1, capsys)
    assert "nothing of that name here" in refused(["compile", "no-such-model", "-o", str(tmp_path / "m.gw")], 1, capsys)
    assert "Did you mean 'drop-layers'?" in refused(["passes", "drop-layer"], 2, capsys)


def test_a_prompt_that_is_longer_than_the_positions(built: Any) -> None:
    """A model of a table of positions says how many there are; nothing is generated."""
    compiled = graphwright.compile(built("gpt2"), torch.ones(2, 9, dtype=torch.int64), generate=True, check=False)
    most = built("gpt2").config.n_positions
    for tokens, new in ((most + 1, 1), (most, 2)):
        with pytest.raises(InputError, match=str(most)):
            compiled.generate(torch.ones(1, tokens, dtype=torch.int64), max_new_tokens=new)
    assert compiled.generate(torch.ones(1, most - 1, dtype=torch.int64), max_new_tokens=1).shape == (1, most)
