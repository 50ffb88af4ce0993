"""The `graphwright` command: its exit codes, its list of commands, and the doctor."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest

import graphwright
from graphwright.tools import cli, doctor

HEALTHY = doctor.Diagnosis(
    graphwright="1.2.3",
    python="3.11.7",
    packages={"torch": "2.13.0", "triton": "3.7.1"},
    cpu="A CPU",
    isa="avx2",
    vector_bits=256,
    isa_features=["vnni"],
    threads=4,
    backend_registered=True,
    problems=[],
)
SICK = dataclasses.replace(
    HEALTHY, packages={"torch": "2.13.0", "triton": None}, backend_registered=False, problems=["triton is [gone]"]
)


def render(table: Any) -> str:
    """Return what rich prints."""
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as shown:
        console.print(table)
    return shown.get()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the package's version and exits with 0."""
    assert cli.main(["--version"]) == 0
    assert graphwright.__version__ in capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """--help names each command, which also shows that each can be imported."""
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in cli.COMMANDS if f"  {name} " not in shown] == []


@pytest.mark.parametrize("argv", [["no-such-command"], ["--no-such-option"], ["doctor", "--no-such-option"], []])
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A command line that makes no sense exits with 2, with the message on standard error."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err
    assert not captured.out


@pytest.mark.parametrize(("diagnosis", "code"), [(HEALTHY, 0), (SICK, 1)], ids=["healthy", "sick"])
def test_doctor_json(
    diagnosis: doctor.Diagnosis, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Doctor --json prints the diagnosis, and exits with 1 exactly when there is a problem."""
    monkeypatch.setattr(doctor, "diagnose", lambda: diagnosis)
    assert cli.main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(diagnosis)


def test_doctor_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The table shows what is there, what is missing, and each problem as it was worded."""
    monkeypatch.setattr(doctor, "diagnose", lambda: SICK)
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    for part in ("1.2.3", "2.13.0", "missing", "A CPU", "avx2 (256 bits), vnni", "not registered", "triton is [gone]"):
        assert part in shown


def test_diagnosis_of_this_machine() -> None:
    """Where the tests run, everything that Graphwright needs is there, and Triton has loaded its backend."""
    found = doctor.diagnose()
    assert found.problems == []
    assert found.backend_registered
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert all(found.packages.values())
    assert found.cpu
    assert found.isa
    assert found.threads >= 1
    assert found.machine is not None
    assert found.machine["measured"] is True
    assert "GFLOP/s" in render(doctor.to_table(found))


def test_diagnosis_names_a_wrong_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instruction set that does not exist is a problem, not a crash."""
    monkeypatch.setenv("TRITON_CPU_ISA", "sse9")
    found = doctor.diagnose()
    assert found.isa == ""
    assert any("sse9" in problem for problem in found.problems)


def test_diagnosis_says_when_the_backend_was_not_looked_for() -> None:
    """With TRITON_BACKENDS_IN_TREE=1 Triton finds no out-of-tree backend, and doctor names the variable."""
    result = subprocess.run(
        [sys.executable, "-m", "graphwright.tools.cli", "doctor", "--json"],
        env={**os.environ, "TRITON_BACKENDS_IN_TREE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    found = json.loads(result.stdout)
    assert result.returncode == 1
    assert not found["backend_registered"]
    assert any("TRITON_BACKENDS_IN_TREE" in problem for problem in found["problems"])
