"""`graphwright passes`: the list, and one pass."""

from __future__ import annotations

import json

import pytest

from graphwright.passes.registry import pass_names
from graphwright.tools import cli


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    """The table names every pass with its fidelity."""
    assert cli.main(["passes"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in pass_names() if name not in shown] == []
    assert "close" in shown
    assert "exact" in shown


def test_the_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """--json gives name, fidelity, summary and whether a pass runs by default, for each pass in order."""
    assert cli.main(["passes", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in data] == pass_names()
    dead_code = next(entry for entry in data if entry["name"] == "dead-code")
    assert dead_code["fidelity"] == "exact"
    assert dead_code["default"] is True
    assert dead_code["summary"].startswith("Remove nodes whose values no result depends on")


def test_one_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """One pass is shown with its docstring, and its options with types and defaults."""
    assert cli.main(["passes", "fuse-projections"]) == 0
    shown = capsys.readouterr().out
    for part in ("fuse-projections (close;", "Before: ", "After: ", "Declines when: ", "minimum", "int"):
        assert part in shown
    assert cli.main(["passes", "fuse-projections", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["options"] == [{"name": "minimum", "type": "int", "default": "2"}]
    assert set(data) == {"name", "fidelity", "source", "summary", "doc", "default", "options"}


def test_an_unknown_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is unknown exits with 2 and suggests the nearest."""
    assert cli.main(["passes", "dead-cod"]) == 2
    captured = capsys.readouterr()
    assert "Did you mean 'dead-code'?" in captured.err
    assert not captured.out
