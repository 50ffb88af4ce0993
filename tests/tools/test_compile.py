"""`graphwright compile`: what it writes, what it says, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graphwright
from graphwright.generating import ending_of
from graphwright.tools import cli


def compiled_json(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run the command with --json and return what it printed."""
    assert cli.main([*argv, "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


def test_the_file_computes_what_the_model_computes(factories: str, tmp_path: Path) -> None:
    """The file that is written loads as a compiled model with the values of the original."""
    path = tmp_path / "mlp.gw"
    assert cli.main(["compile", f"{factories}:mlp", "-o", str(path)]) == 0
    module, _ = __import__(factories).mlp()
    x = torch.randn(7, 8)
    torch.testing.assert_close(graphwright.load(path)(x), module(x), rtol=1e-4, atol=1e-5)


def test_the_tables_tell_what_was_done(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tables show the inputs, their sizes, the passes, the steps and the comparison."""
    path = tmp_path / "mlp.gw"
    assert cli.main(["compile", f"{factories}:mlp", "-o", str(path), "--measure"]) == 0
    shown = capsys.readouterr().out
    for part in ("[batch, 8]", "batch 0 to any", "split-bias", "2 matmul", "against the original", "times as fast", "mlp.gw"):
        assert part in shown


def test_json(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints the summary and the comparison as data, and nothing else."""
    path = tmp_path / "mlp.gw"
    data = compiled_json(["compile", f"{factories}:mlp", "-o", str(path), "--measure", "--threads", "1"], capsys)
    assert set(data) == {
        "model", "output", "inputs", "dimensions", "notes", "passes", "kernels", "steps", "times_us", "weight_bytes",
        "file_bytes", "measured", "decoding", "cache", "program", "cost", "predicted", "machine", "idle",
    }  # fmt: skip
    assert data["inputs"] == [{"name": "input", "dtype": "float32", "shape": ["batch", 8]}]
    assert data["dimensions"] == {"batch": [0, None]}
    assert data["file_bytes"] == path.stat().st_size
    assert data["passes"][0]["name"] == "capture"
    assert data["passes"][0]["nodes_after"] == data["passes"][1]["nodes_before"] == 3
    split = next(entry for entry in data["passes"] if entry["name"] == "split-bias")
    assert (split["decisions"], split["nodes_before"], split["nodes_after"]) == (2, 3, 5)
    (output,) = data["measured"]["outputs"]
    assert output["name"] == "output"
    assert output["relative_error"] < 1e-5
    assert data["measured"]["ratio"] > 0
    assert [stage["name"] for stage in data["measured"]["stages"]] == ["capture", "split-bias"]
    stage = data["measured"]["stages"][1]
    assert set(stage) == {
        "name", "quality", "time_us", "original_us", "ratio", "saved_ratio", "saved_ratio_predicted", "compile_us", "predicted",
    }  # fmt: skip
    assert stage["quality"]["relative_error"] < 1e-5
    assert stage["quality"]["cosine"] == pytest.approx(1)
    assert stage["predicted"]["sizes"] == data["measured"]["sizes"] == {"batch": 3}
    assert data["measured"]["threads"] == 1
    assert data["measured"]["decoding"] is None
    assert set(data["measured"]["kinds"]) == {"product", "rest"}
    assert all(time_us > 0 for kind in data["measured"]["kinds"].values() for time_us in kind.values())
    assert (data["decoding"], data["cache"]) == ([], None)


def test_a_decoder_is_compiled_to_generate(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--generate adds the programs with caches: their passes and the caches' bytes are told, and stay in the file."""
    model, path = built("llama"), tmp_path / "llama.gw"
    model.save_pretrained(tmp_path / "llama")
    argv = ["compile", str(tmp_path / "llama"), "-o", str(path), "--tokens", "9", "--generate", "--no-check"]
    data = compiled_json(argv, capsys)
    assert data["decoding"][0]["name"] == "cached-decode"
    config = model.config
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    expected = 4 * 2 * layers * heads * config.hidden_size // config.num_attention_heads
    assert data["cache"] == {"bytes_per_token": expected, "bytes_per_sequence": 0}
    loaded = graphwright.load(path)
    assert loaded.report.decoding[0].text
    assert loaded.generator is not None
    assert loaded.generator.ending.padding == ending_of(model).padding
    assert cli.main(["inspect", str(path), "--plan", "cached-decode"]) == 0
    assert "read keys and values from a cache" in capsys.readouterr().out
    assert cli.main(["inspect", str(path), "--ir", "cached-decode", "--changed"]) == 0
    assert "graphwright.kv_append" in capsys.readouterr().out


@pytest.mark.slow
def test_passes_on_caches_are_measured(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--measure --generate has stages of the program with caches too, with their bytes, and tables of them."""
    built("llama").save_pretrained(tmp_path / "llama")
    argv = ["compile", str(tmp_path / "llama"), "-o", str(tmp_path / "m.gw"), "--tokens", "60", "--generate", "--no-check"]
    argv += ["--pass", "quantize-cache:residual=0", "--measure", "--threads", "1"]
    stages = compiled_json(argv, capsys)["measured"]["decoding"]
    assert [stage["name"] for stage in stages[:2]] == ["cached-decode", "quantize-cache:residual=0"]
    assert stages[0]["quality"]["relative_error"] == 0
    assert stages[1]["quality"]["kl"] > 0
    assert stages[1]["predicted"]["state_bytes"] < stages[0]["predicted"]["state_bytes"]
    assert cli.main(argv) == 0
    assert "one token, batch=1, capacity=1024" in capsys.readouterr().out


def test_options_reach_the_compiler(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--dynamic none fixes all sizes, --pass adds a pass with its options, and --dtype converts the model."""
    path = tmp_path / "mlp.gw"
    argv = ["compile", f"{factories}:mlp", "-o", str(path), "--dynamic", "none", "--dtype", "bf16"]
    data = compiled_json([*argv, "--pass", "fuse-projections:minimum=3", "--no-check"], capsys)
    assert data["inputs"] == [{"name": "input", "dtype": "bfloat16", "shape": [3, 8]}]
    assert data["dimensions"] == {}
    assert data["passes"][-1]["options"] == "fuse-projections:minimum=3"


def test_hugging_face_folder(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder is loaded with the class that its configuration names, and called with random token ids."""
    model = built("bert")
    model.save_pretrained(tmp_path / "bert")
    capsys.readouterr()
    path = tmp_path / "bert.gw"
    data = compiled_json(["compile", str(tmp_path / "bert"), "-o", str(path), "--tokens", "9", "--batch", "2"], capsys)
    assert [entry["name"] for entry in data["inputs"]] == ["input_ids", "attention_mask"]
    assert data["inputs"][0]["shape"] == ["batch", "tokens"]
    assert next(entry for entry in data["passes"] if entry["name"] == "raise-attention")["decisions"] == 2
    ids = torch.randint(3, model.config.vocab_size, (1, 13))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)[0]
    torch.testing.assert_close(graphwright.load(path)(input_ids=ids, attention_mask=mask)[0], expected, rtol=1e-3, atol=1e-4)


def test_exported_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A .pt2 file is captured through its module, with its example inputs as the sample, and called by the same names."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()).eval()
    exported = torch.export.export(model, (torch.randn(3, 8),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.export.save(exported, tmp_path / "model.pt2")
    path = tmp_path / "model.gw"
    data = compiled_json(["compile", str(tmp_path / "model.pt2"), "-o", str(path)], capsys)
    assert data["inputs"] == [{"name": "input", "dtype": "float32", "shape": ["batch", 8]}]
    x = torch.randn(6, 8)
    torch.testing.assert_close(graphwright.load(path)(input=x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("no-such-model", ["'no-such-model'", "hub id such as org/name", "nothing of that name here"]),
        ("{factories}:mpl", ["no factory 'mpl'", "Did you mean 'mlp'"]),
        ("no_such_module:mlp", ["no_such_module cannot be imported"]),
        ("{factories}:number", ["expected a torch.nn.Module", "returned int"]),
        ("{factories}:broken", ["calling it failed: RuntimeError: the wheel came off"]),
        ("{factories}:without_inputs", ["no sample call is known", "(module, {argument: value})"]),
        ("missing.pt2", ["missing.pt2", "cannot load it"]),
        ("{folder}", ["no config.json"]),
        ("{folder}/old.gw", ["a file that is none of these"]),
    ],
)
def test_a_model_that_cannot_be_had(
    model: str, words: list[str], factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure exits with 1 and says on standard error what was asked for and found; the old file stays."""
    path = tmp_path / "old.gw"
    path.write_bytes(b"old")
    assert cli.main(["compile", model.format(factories=factories, folder=tmp_path), "-o", str(path)]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert [word for word in words if word not in captured.err] == []
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["old.gw"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pass", "fuse-projection"], ["no pass 'fuse-projection'", "Did you mean 'fuse-projections'"]),
        (["--pass", "fuse-projections:minimal=3"], ["no option 'minimal'", "Did you mean 'minimum'"]),
        (["--pass", "fuse-projections:minimum=x"], ["minimum must be an integer, got 'x'"]),
        (["--dynamic", "input"], ["expected TENSOR:DIM=NAME,..., got 'input'"]),
        (["--dynamic", "none", "--dynamic", "input:0=batch"], ["`none` stands alone"]),
        (["--dtype", "fp8"], ["'fp8' is not one of"]),
        (["--batch", "0"], ["0 is not in the range"]),
    ],
)
def test_wrong_usage(
    options: list[str], words: list[str], factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options that make no sense exit with 2 before any work, with the nearest name that there is."""
    path = tmp_path / "mlp.gw"
    assert cli.main(["compile", f"{factories}:broken", "-o", str(path), *options]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert [word for word in words if word not in shown] == []


def test_output_is_looked_at_before_the_work(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that does not end with .gw, and a folder that is not there, exit with 2 at once."""
    for output, words in (("model.bin", "should end with .gw"), ("nowhere/model.gw", "there is no folder")):
        assert cli.main(["compile", f"{factories}:broken", "-o", str(tmp_path / output)]) == 2
        assert words in capsys.readouterr().err


def test_debug_shows_the_traceback(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback is shown if and only if --debug is given; the exit code is the same."""
    argv = ["compile", f"{factories}:broken", "-o", str(tmp_path / "m.gw")]
    assert cli.main(argv) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main([*argv, "--debug"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert 'raise RuntimeError("the wheel came off")' in shown


def test_an_interrupt_leaves_nothing_behind(
    factories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the file is written exits with 1 and leaves no part of a file."""
    import os

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert cli.main(["compile", f"{factories}:mlp", "-o", str(tmp_path / "m.gw"), "--no-check"]) == 1
    assert "Aborted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
