"""The tables of passes in docs/models.md and docs/passes/README.md say what the passes do."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from graphwright.passes.registry import PASSES


@pytest.fixture(scope="module")
def tools(root: Path) -> dict[str, ModuleType]:
    """The modules of tools/dev that write the tables, which are no part of the package."""
    folder = str(root / "tools" / "dev")
    sys.path.insert(0, folder)
    try:
        import pass_index
        import pass_table
    finally:
        sys.path.remove(folder)
    return {"index": pass_index, "table": pass_table}


@pytest.fixture(scope="module")
def rows(root: Path) -> dict[str, list[str]]:
    """The table of docs/models.md: pass -> how it is tried, where it is applied, where it is refused."""
    page = (root / "docs" / "models.md").read_text().partition("<!-- passes")[2]
    found = [
        [cell.strip() for cell in line.strip("|").split(" |")] for line in re.findall(r"^\| [a-z].*\|$", page, re.MULTILINE)
    ]
    return {row[0]: row[1:] for row in found[1:]}


def test_every_pass_has_a_row(rows: dict[str, list[str]], root: Path, tools: dict[str, ModuleType]) -> None:
    """A pass that is added, renamed or dropped needs both pages to be written anew; so does another option."""
    assert list(rows) == list(PASSES), "run python tools/dev/pass_table.py"
    page = (root / "docs" / "passes" / "README.md").read_text()
    start, end = tools["index"].INDEX
    # Pages of passes come one by one, and links to them when the index is next written.
    texts = (page.partition(start)[2], tools["index"].index_text())
    kept, made = (re.sub(r"\[([^]]+)\]\(.*?\)", r"\1", text) for text in texts)
    assert kept.partition(end)[0].strip() == made.strip(), "run python tools/dev/pass_index.py"


@pytest.mark.parametrize("name", ["attention-causal", "convnet"])
def test_the_table_says_what_passes_do(
    name: str, rows: dict[str, list[str]], families: dict[str, Any], trials: ModuleType, tools: dict[str, ModuleType]
) -> None:
    """Places and reasons of a family are those of the page."""
    found = {name: tools["table"].try_all(families[name], trials)}
    for step, (tried, applied, refused) in rows.items():
        cell = found[name][step]
        assert tried == (f"`{trials.TEXTS[step].partition(':')[2]}`" if step in trials.TEXTS else "")
        assert (name in names(applied)) == (cell.places > 0)
        assert not cell.places or name in names(re.search(rf"(?:^|; ){cell.places} \([^)]*\)", applied)[0])
        assert (name in names(refused)) == bool(cell.reason and not cell.places)


def names(text: str) -> set[str]:
    """Return the names of families in a cell."""
    return {name for group in re.findall(r"\(([a-z0-9, -]+)\)", text) for name in group.split(", ")}


def test_table_of_two(tools: dict[str, ModuleType]) -> None:
    """Families with the same outcome stand together, reasons without names and numbers of one model."""
    table = tools["table"]
    blank = {name: table.Cell(0) for name in PASSES}
    one, other = (f"add_tensor_{k}: %linear_default_{k} has {k} / 1 | 0, from /home/x.py:{k}: return y" for k in (5, 6))
    found = {
        "a": {**blank, "drop-layers": table.Cell(2), "pack-tokens": table.Cell(0, one)},
        "b": {**blank, "drop-layers": table.Cell(2), "pack-tokens": table.Cell(0, other)},
        "c": {**blank, "drop-layers": table.Cell(3)},
    }
    text = table.to_text(found, {"drop-layers": "drop-layers:drop=1"})
    assert "| drop-layers | `drop=1` | 3 (c); 2 (a, b) |  |" in text
    assert "| pack-tokens |  |  | a value has N / 1 / 0 (a, b) |" in text
    assert table.with_table("# Page\n", "one").count("one") == 1
    assert table.with_table(table.with_table("# Page\n\nrest\n", "one"), "two").count("two") == 1
    assert "one" not in table.with_table(table.with_table("# Page\n", "one"), "two")
