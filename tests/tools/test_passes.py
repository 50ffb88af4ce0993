"""`graphwright passes`: the list, and one pass."""

from __future__ import annotations

import json

import pytest

from graphwright.passes.registry import pass_class, pass_names
from graphwright.tools import cli
from graphwright.tools.passes import explain


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
    (option,) = data["options"]
    assert (option["name"], option["type"], option["default"]) == ("minimum", "int", "2")
    assert "at least" in option["meaning"]
    assert set(data) == {
        "name", "fidelity", "stage", "source", "page", "summary", "before", "after", "cost", "doc", "default", "options",
    }  # fmt: skip
    assert data["before"].startswith("`%")
    assert data["stage"] == "program"


def test_options_are_explained_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Choices are listed, a list is marked as one, and every option of every pass has its meaning, ranges in it."""
    assert cli.main(["passes", "drop-layers", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    options = {option["name"]: option for option in data["options"]}
    assert options["unit"]["type"] == "block | attention | feed-forward"
    assert options["keep_ratio"]["type"] == "float | none"
    assert "(0, 1]" in options["keep_ratio"]["meaning"]
    assert options["greedy"]["type"] == "true | false"
    assert data["page"] == "docs/passes/drop-layers.md"
    for name in pass_names():
        found = explain(pass_class(name))
        assert [option["name"] for option in found["options"] if not option["meaning"]] == []
        assert found["before"]
        assert found["after"]


def test_passes_on_caches_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    """A pass that rewrites the program with caches is marked, with the option that it needs."""
    assert cli.main(["passes", "quantize-cache"]) == 0
    shown = capsys.readouterr().out
    assert "--pass quantize-cache --generate" in shown
    assert "int | int+..." in shown


def test_an_unknown_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is unknown exits with 2 and suggests the nearest."""
    assert cli.main(["passes", "dead-cod"]) == 2
    captured = capsys.readouterr()
    assert "Did you mean 'dead-code'?" in captured.err
    assert not captured.out
