"""`--json`: of every command that has it, standard output is one JSON value and nothing else, whatever the command does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from graphwright.tools import cli
from graphwright.tools.output import print_json

PARTS = ["--ir", "--diff", "--kernels", "--steps", "--costs", "--plan", "split-bias"]


@pytest.fixture(scope="module")
def mlp(factories: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The factory `mlp`, compiled."""
    path = tmp_path_factory.mktemp("json") / "mlp.gw"
    assert cli.main(["compile", f"{factories}:mlp", "-o", str(path), "--no-check", "--json"]) == 0
    return path


FREE = {
    "detail", "dimensions", "efficiency", "inputs", "kinds", "operators", "outputs", "packages", "sizes", "steps",
    "time_by_bound_us", "time_by_kind_us", "times_us",
}  # fmt: skip
"""What has names of a model, or of what it was compiled with, as its keys."""

COMMANDS = {
    "passes": (["passes"], list),
    "a pass": (["passes", "drop-layers"], dict),
    "doctor": (["doctor"], dict),
    "compile": (["compile", "{model}", "-o", "{folder}/m.gw", "--no-check", "--measure"], dict),
    "inspect": (["inspect", "{file}"], dict),
    "inspect a model": (["inspect", "{model}", "--no-check", *PARTS], dict),
    "inspect a file": (["inspect", "{file}", *(part for part in PARTS if part != "--diff"), "--changed"], dict),
    "run": (["run", "{file}", "--output", "{folder}/out.safetensors"], dict),
    "export": (["export", "{model}", "{folder}/m.onnx"], dict),
}


def keys_of(data: Any) -> set[str]:
    """Return the keys of data that are the same for every model."""
    if isinstance(data, list):
        return {key for item in data for key in keys_of(item)}
    if not isinstance(data, dict):
        return set()
    return set(data) | {
        key for name, value in data.items() if not (name in FREE and isinstance(value, dict)) for key in keys_of(value)
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_it_is_json(name: str, factories: str, mlp: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is written to standard output, by Python or below it, is one value without NaN."""
    argv, kind = COMMANDS[name]
    given = {"model": f"{factories}:mlp", "file": str(mlp), "folder": str(tmp_path)}
    capfd.readouterr()
    assert cli.main([*(part.format(**given) for part in argv), "--json"]) == 0
    captured = capfd.readouterr()
    found = json.loads(captured.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert isinstance(found, kind)
    assert found
    page = (Path(__file__).resolve().parents[2] / "docs" / "json.md").read_text("utf-8")
    assert sorted(key for key in keys_of(found) if f"`{key}`" not in page) == []


def test_what_is_not_finite_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    """An infinite error stays valid JSON."""
    print_json({"error": math.inf, "all": [1.5, math.nan, {"a": (-math.inf, 2)}]})
    assert json.loads(capsys.readouterr().out) == {"error": None, "all": [1.5, None, {"a": [None, 2]}]}


def test_all_commands_are_here() -> None:
    """A new command needs a case, or a reason: `bench` writes JSON to the file that --json names."""
    assert {argv[0] for argv, _ in COMMANDS.values()} == set(cli.COMMANDS) - {"bench"}
