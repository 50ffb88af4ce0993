"""Passes by name and as text."""

from __future__ import annotations

import enum
import sys
import types
from dataclasses import dataclass
from typing import Literal

import pytest

from graphwright.ir.errors import OptionError
from graphwright.passes import registry
from graphwright.passes.base import Fidelity, Pass, Plan
from graphwright.passes.registry import as_passes, format_pass, parse_pass, pass_class, pass_names


class Mode(enum.Enum):
    """An option of named values."""

    FAST = "fast"
    SLOW = "slow"


@dataclass(frozen=True, kw_only=True)
class Sample(Pass):
    """A pass with an option of every kind."""

    name = "sample"
    fidelity = Fidelity.EXACT

    count: int = 1
    ratio: float = 0.5
    active: bool = False
    label: str = "a"
    limit: int | None = None
    layers: tuple[int, ...] = ()
    choice: Literal["left", "right"] = "left"
    mode: Mode = Mode.FAST

    def plan(self, program, context):
        return Plan(self.name)

    def apply(self, program, plan):
        return program


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    module = types.ModuleType("graphwright_tests_sample")
    module.Sample = Sample
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.PASSES, "sample", f"{module.__name__}:Sample")


def test_every_pass_has_its_name() -> None:
    """The table's names are the classes' own."""
    for name in pass_names():
        assert pass_class(name).name == name


@pytest.mark.parametrize("name", pass_names())
def test_default_passes_round_trip(name) -> None:
    """A pass without options is written as its name."""
    assert format_pass(parse_pass(name)) == name
    assert parse_pass(name) == pass_class(name)()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"count": 7, "ratio": 1e-3},
        {"active": True, "label": "b c"},
        {"limit": 3, "layers": (1, 2, 30)},
        {"choice": "right", "mode": Mode.SLOW},
    ],
)
def test_options_round_trip(options) -> None:
    """What is printed is read back as an equal pass."""
    given = Sample(**options)
    assert parse_pass(format_pass(given)) == given


def test_text_forms() -> None:
    """The text is as it is documented."""
    assert format_pass(Sample(count=2, layers=(1, 3), mode=Mode.SLOW)) == "sample:count=2,layers=1+3,mode=slow"
    assert parse_pass(" sample : limit = none , active = true ") == Sample(active=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fuse-projektions", "Did you mean 'fuse-projections'"),
        ("sample:cuont=2", "Did you mean 'count'"),
        ("sample:count=two", "sample: count must be an integer, got 'two'"),
        ("sample:ratio=x", "sample: ratio must be a number"),
        ("sample:active=1", "sample: active must be true or false"),
        ("sample:choice=up", "there is no value 'up'"),
        ("sample:mode=quick", "there is no value 'quick'"),
        ("sample:count", "should be written option=value"),
        ("sample:count=1,count=2", "count is given twice"),
    ],
)
def test_errors(text, message) -> None:
    """Mistakes are named, with what was meant."""
    with pytest.raises(OptionError, match=message):
        parse_pass(text)


def test_what_is_no_pass_is_refused(monkeypatch) -> None:
    """A table entry that is not a pass is an error of its own."""
    monkeypatch.setitem(registry.PASSES, "wrong", "graphwright.passes.base:Context")
    with pytest.raises(OptionError, match="is not a Pass"):
        pass_class("wrong")


def test_passes_and_texts_mix() -> None:
    """A pipeline takes both."""
    assert as_passes([Sample(), "sample:count=2"]) == [Sample(), Sample(count=2)]
    with pytest.raises(OptionError, match=r"pass \['sample'\]"):
        as_passes("sample")


def test_other_packages_add_passes(monkeypatch) -> None:
    """Entry points of the group are found by name."""
    entry = registry.importlib.metadata.EntryPoint("extra", "graphwright_tests_sample:Sample", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [entry])
    assert "extra" in pass_names()
    assert pass_class("extra") is Sample
