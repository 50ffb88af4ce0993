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
    assert set(data) == {"model", "program", "summary"}
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
    assert set(data) == {"model", "program", "ir", "steps", "plan"}
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


def test_costs_are_expressions_and_numbers(mlp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary has the cost as expressions of the sizes, and predicted times at each --size; a pass has what it saves."""
    data = inspected_json([str(mlp), "--size", "batch=4", "--size", "batch=400"], capsys)["summary"]
    assert data["cost"]["kinds"]["product"] == {"operations": 2, "flops": "384*batch", "moved_bytes": "176*batch + 768"}
    assert data["cost"]["weight_bytes"] == 4 * (8 * 16 + 16 + 16 * 4 + 4)
    few, many = data["predicted"]
    assert (few["sizes"], many["sizes"]) == ({"batch": 4}, {"batch": 400})
    assert many["flops"] == 100 * few["flops"]
    assert many["time_us"] > few["time_us"] > 0
    assert sum(many["time_by_bound_us"].values()) == pytest.approx(many["time_us"])
    assert data["machine"]["measured"] is True
    split = next(entry for entry in data["passes"] if entry["name"] == "split-bias")
    assert split["cost_before"]["weight_bytes"] == split["cost_after"]["weight_bytes"]
    assert [at["sizes"] for at in split["predicted"]] == [{"batch": 4}, {"batch": 400}]
    assert next(entry for entry in data["passes"] if entry["name"] == "dead-code")["predicted"] == []
    shown = inspected([str(mlp), "--size", "batch=4"], capsys)
    for part in ("cost of a call", "384*batch", "predicted for this machine", "batch=4", "memory bound"):
        assert part in shown


def test_operation_by_operation(mlp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--costs shows each operation with what bounds it; the times add up."""
    (found,) = inspected_json([str(mlp), "--costs", "--size", "batch=64"], capsys)["costs"]
    assert sum(line["time_us"] for line in found["lines"]) == pytest.approx(found["time_us"])
    assert {line["bound"] for line in found["lines"]} <= {"compute", "memory", "call"}
    assert sum(line["count"] for line in found["lines"] if line["operation"] == "linear") == 2
    assert "bound by" in inspected([str(mlp), "--costs"], capsys)


def test_structural_diff(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--diff shows the nodes that a pass changed; of one that changed nothing it says so; without a name those of all."""
    model = f"{factories}:mlp"
    found = inspected_json([model, "--no-check", "--diff", "split-bias"], capsys)["diff"]
    assert (found["stage"], found["removed"], found["added"], found["changed"]) == ("split-bias", 2, 4, 0)
    assert len(found["differences"]) == 6
    assert {entry["change"] for entry in found["differences"]} == {"removed", "added"}
    assert sum(line.startswith("+ ") for line in found["text"].splitlines()) == 4
    everything = inspected_json([model, "--no-check", "--diff"], capsys)["diff"]
    assert everything["stage"] == "all passes"
    assert everything["differences"] == found["differences"]
    shown = inspected([model, "--no-check", "--diff", "raise-attention"], capsys)
    assert shown.startswith("raise-attention changed nothing")


def test_diff_of_a_pass_that_is_asked_for(factories: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--pass NAME --diff runs the pass and shows what it did, with what it refused where it did nothing."""
    argv = [f"{factories}:mlp", "--no-check", "--pass", "fuse-projections:minimum=3", "--diff"]
    found = inspected_json(argv, capsys)["diff"]
    assert found["stage"] == "fuse-projections:minimum=3"
    assert found["text"] == ""


def test_programs_of_a_model_that_generates(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--program shows the programs with caches: their graphs, steps, kernels, passes and costs; of a file too."""
    path = tmp_path / "llama.gw"
    built("llama").save_pretrained(tmp_path / "llama")
    argv = ["compile", str(tmp_path / "llama"), "-o", str(path), "--tokens", "9", "--generate", "--no-check", "--json"]
    assert cli.main(argv) == 0
    step = inspected_json([str(path), "--program", "step", "--size", "capacity=2048"], capsys)["summary"]
    assert step["program"] == "step"
    assert step["passes"][0]["name"] == "cached-decode"
    assert step["predicted"][0]["sizes"] == {"batch": 1, "capacity": 2048, "tokens": 1}
    assert step["predicted"][0]["state_bytes"] == 2048 * step["cache"]["bytes_per_token"]
    prefill = inspected_json([str(path), "--program", "prefill", "--ir", "--kernels", "--steps"], capsys)
    assert "graphwright.kv_attention" in prefill["ir"]["text"]
    assert "tokens" in prefill["ir"]["text"]
    assert any("kv" in entry["name"] or "attention" in entry["name"] for entry in prefill["kernels"])
    steps = inspected_json([str(path), "--program", "step", "--steps", "--ir"], capsys)
    assert steps["steps"] != prefill["steps"]
    assert steps["ir"]["text"] == graphwright.load(path).graphs["step"]


def test_diff_of_a_pass_on_caches(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a pass changes of the program with caches is shown as of any other: states go, states come."""
    built("llama").save_pretrained(tmp_path / "llama")
    argv = [str(tmp_path / "llama"), "--no-check", "--tokens", "9", "--program", "step", "--pass", "quantize-cache", "--diff"]
    found = inspected_json(argv, capsys)["diff"]
    assert found["stage"] == "quantize-cache"
    assert any("kv_append" in entry["before"] for entry in found["differences"] if entry["change"] == "removed")
    assert any("kv_quantized_append" in entry["after"] for entry in found["differences"] if entry["change"] == "added")


def test_what_a_file_cannot_show(mlp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file holds texts, not programs: --diff says so, and how to go on; --program asks for --generate."""
    assert cli.main(["inspect", str(mlp), "--diff"]) == 2
    assert "--ir STAGE --changed" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["inspect", str(mlp), "--program", "step"]) == 2
    assert "--generate" in capsys.readouterr().err
