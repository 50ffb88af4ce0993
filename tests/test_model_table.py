"""docs/models.md has a row for every family, and what writes it measures what it says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def table(root: Path) -> ModuleType:
    """The module tools/dev/model_table.py, which is no part of the package."""
    folder = str(root / "tools" / "dev")
    sys.path.insert(0, folder)
    try:
        import model_table
    finally:
        sys.path.remove(folder)
    return model_table


def test_page_lists_exactly_the_families(root: Path, families: dict[str, Any]) -> None:
    """A family that is added, renamed or dropped needs the page to be written anew."""
    page = (root / "docs" / "models.md").read_text().partition("<!-- passes")[0]
    names = re.findall(r"^\| ([\w-]+) \|", page, re.MULTILINE)
    assert names == ["family", "---", *families]


def test_page_has_no_wrong_family(root: Path) -> None:
    """All rows of the page that is kept are right to 1e-4."""
    page = (root / "docs" / "models.md").read_text().partition("<!-- passes")[0]
    rows = [line.split(" | ") for line in page.splitlines() if re.match(r"\| [a-z]", line)][1:]
    assert rows
    assert [row[0] for row in rows if not float(row[4]) <= 1e-4] == []


def test_every_family_has_a_size(table: ModuleType, families: dict[str, Any]) -> None:
    """All families are known by name or kind, and their inputs fit the requested batch."""
    for name, family in families.items():
        row = table.sized(name, family)
        assert row.title
        tensors = [t for t in row.sample(3, 5, 0).values() if isinstance(t, torch.Tensor)]
        assert {len(t) for t in tensors} == {3}
    text = set(table.sized("bert", families["bert"]).sample(2, 64, 0))
    assert text == {"input_ids", "attention_mask"}


def test_a_row_is_measured(table: ModuleType, families: dict[str, Any]) -> None:
    """A measured row counts steps, errors and times of the model it names."""
    row = table.measure("attention-causal", table.sized("attention-causal", families["attention-causal"]))
    assert (row.attentions, row.kernels, row.products) == (1, 3, 2)
    assert 0 < row.error < 1e-5
    assert row.eager_ms > 0
    assert row.ours_ms > 0
    assert dict(row.calls) == {}
    page = table.to_page([row])
    assert "| attention-causal | one small attention, written out |" in page
    assert page.splitlines()[-1].count("|") == page.splitlines()[-2].count("|") == len(table.COLUMNS) + 1


def test_times_are_medians_in_turns(table: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower of two runs is the slower in the result, by about what it does more."""
    clock = [0.0]

    def work(seconds: float) -> Any:
        def run() -> None:
            clock[0] += seconds

        return run

    monkeypatch.setattr(table.time, "thread_time", lambda: clock[0])
    assert table.in_turns(work(0.5), work(0.125)) == pytest.approx([0.5, 0.125])
