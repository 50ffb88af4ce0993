"""`graphwright inspect`: the summary, and each part that can be looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import graphwright
from graphwright.tools import cli


@pytest.fixture(scope="session")
def mlp(factories: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The factory `mlp`, compiled by the command line."""
    path = tmp_path_factory.mktemp("inspected") / "mlp.gw"
    assert cli.main(["compile", f"{factories}:mlp", "-o", str(path), "--json"]) == 0
    return path


def inspected(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command and return what it printed."""
    capsys.readouterr()
    assert cli.main(["inspect", *argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def inspected_json(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(inspected([*argv, "--json"], capsys))
    return data


def test_the_summary(mlp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without options the summary is shown; --changed leaves out the passes that had nothing to do."""
    shown = inspected([str(mlp)], capsys)
    assert "split-bias" in shown
    assert "raise-attention" in shown
    assert "batch 0 to any" in shown
    data = inspected_json([str(mlp), "--changed"], capsys)
    assert set(data) == {"model", "summary"}
    assert [entry["name"] for entry in data["summary"]["passes"]] == ["split-bias"]


def test_the_program_at_each_stage(mlp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--ir prints the final program; with a name the program as captured, and after that pass."""
    final = inspected([str(mlp), "--ir"], capsys)
    assert final.strip() == graphwright.load(mlp).graph.strip()
    captured = inspected([str(mlp), "--ir", "capture"], capsys)
    assert "linear(%input, weights" in captured
    assert "add(" not in captured
    # What changed nothing has the text of what came before.
    assert inspected([str(mlp), "--ir", "fuse-projections"], capsys) == captured
    assert inspected([str(mlp), "--ir", "split-bias"], capsys) == final
    assert inspected([str(mlp), "--ir", "dead-code#1"], capsys) == captured
    assert inspected([str(mlp), "--ir", "dead-code#2"], capsys) == final


def test_what_a_pass_changed(mlp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--changed shows a pass's changes as a diff, empty for a pass that changed nothing; for the final program those of all."""
    diff = inspected([str(mlp), "--ir", "split-bias", "--changed"], capsys)
    assert [line for line in diff.splitlines() if line.startswith("+") and "= add(" in line]
    assert not inspected([str(mlp), "--ir", "dead-code", "--changed"], capsys).strip()
    assert inspected([str(mlp), "--ir", "final", "--changed"], capsys) == diff


def test_kernels(mlp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--kernels gives the sources of all kernels, or of one, each with the steps that launch it."""
    sources = graphwright.load(mlp).kernels
    data = inspected_json([str(mlp), "--kernels"], capsys)
    assert {entry["name"]: entry["source"] for entry in data["kernels"]} == dict(sources)
    assert all(entry["steps"] and entry["steps"][0]["provenance"] for entry in data["kernels"])
    name = next(name for name in sources if "gelu" in name)
    shown = inspected([str(mlp), "--kernels", name], capsys)
    assert sources[name].strip() in shown
    assert "# launched by " in shown
    assert [other for other in sources if other != name and sources[other] in shown] == []


def test_plans(mlp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--plan shows what a pass decided and what it refused."""
    plan = inspected_json([str(mlp), "--plan", "split-bias"], capsys)["plan"]
    assert plan["pass"] == "split-bias"
    assert [set(entry) for entry in plan["decisions"]] == [{"where", "what", "why", "detail"}] * 2
    assert plan["refusals"] == []
    shown = inspected([str(mlp), "--plan", "split-bias"], capsys)
    assert plan["decisions"][0]["where"] in shown


def test_steps(mlp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--steps lists the steps of a call in order, with what they run, read and write."""
    steps = inspected_json([str(mlp), "--steps"], capsys)["steps"]
    assert [step["name"] for step in steps] == [step.name for step in graphwright.load(mlp).schedule.steps]
    assert [step["kind"] for step in steps].count("matmul") == 2
    assert steps[0]["reads"][0] == graphwright.load(mlp).schedule.inputs[0]
    written = {name for step in steps for name in step["writes"]}
    assert all(set(step["reads"]) & written for step in steps[1:])
    assert "matmul" in inspected([str(mlp), "--steps"], capsys)


def test_several_parts_and_a_model_that_is_compiled_on_the_fly(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts can be combined; MODEL need not be compiled before."""
    data = inspected_json([f"{factories}:mlp", "--no-check", "--ir", "--steps", "--plan", "capture"], capsys)
    assert set(data) == {"model", "ir", "steps", "plan"}
    assert data["ir"]["stage"] == "final"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ir", "split-bia"], "Did you mean 'split-bias'?"),
        (["--ir", "dead-code#3"], "dead-code ran 2 times"),
        (["--plan", "split"], "no pass that ran 'split'"),
        (["--kernels", "nothing"], "no kernel 'nothing'"),
        (["--pass", "dead-code"], "--pass has no effect"),
    ],
)
def test_wrong_usage(options: list[str], words: str, mlp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names that are unknown exit with 2, with the nearest one."""
    assert cli.main(["inspect", str(mlp), *options]) == 2
    captured = capsys.readouterr()
    assert words in " ".join(captured.err.split())
    assert not captured.out


def test_a_file_without_texts(factories: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model that was compiled without the passes' texts only the final program can be shown, and that is said."""
    module, sample = __import__(factories).mlp()
    path = tmp_path / "plain.gw"
    graphwright.compile(module, **sample, check=False).save(path)
    assert "linear(" in inspected([str(path), "--ir"], capsys)
    assert cli.main(["inspect", str(path), "--ir", "split-bias"]) == 2
    assert "keep_text=True" in " ".join(capsys.readouterr().err.split())
