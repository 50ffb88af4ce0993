"""Renewing the outputs that the documentation shows."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def readme(root: Path) -> ModuleType:
    """tools/dev is not installed, so its modules are loaded from their files."""
    spec = importlib.util.spec_from_file_location("readme", root / "tools" / "dev" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = """before
<!-- output of: printf 'one  \\n\\ntwo\\n' -->
old
<!-- end of output -->
between
<!-- output of: pwd -->
<!-- end of output -->
after
"""


def test_blocks_are_renewed(readme: ModuleType, tmp_path: Path) -> None:
    """Each block gets its own command's output, without trailing blanks; the rest of the page stays, and a second time changes
    nothing.
    """
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert readme.renew(page, tmp_path)
    assert page.read_text() == (
        "before\n<!-- output of: printf 'one  \\n\\ntwo\\n' -->\n```text\none\n\ntwo\n```\n<!-- end of output -->\nbetween\n"
        f"<!-- output of: pwd -->\n```text\n{tmp_path}\n```\n<!-- end of output -->\nafter\n"
    )
    assert not readme.renew(page, tmp_path)


def test_failing_command_changes_nothing(readme: ModuleType, tmp_path: Path) -> None:
    """Output of a command that failed is never shown."""
    page = tmp_path / "page.md"
    page.write_text(text := "<!-- output of: echo bad; exit 3 -->\n<!-- end of output -->\n")
    with pytest.raises(subprocess.CalledProcessError):
        readme.renew(page, tmp_path)
    assert page.read_text() == text


def test_edits_during_the_commands_stay(readme: ModuleType, tmp_path: Path) -> None:
    """What is written into a page while its commands run is not lost."""
    page = tmp_path / "page.md"
    page.write_text("<!-- output of: echo edited >> page.md; echo one -->\n<!-- end of output -->\n")
    assert readme.renew(page, tmp_path)
    shown = "<!-- output of: echo edited >> page.md; echo one -->\n```text\none\n```\n<!-- end of output -->\nedited\n"
    assert page.read_text() == shown


def test_pages_have_no_block_left_open(readme: ModuleType, root: Path) -> None:
    """Every block of the documentation has its two comments, and an output between them."""
    for page in [root / "README.md", *(root / "docs").rglob("*.md")]:
        text = page.read_text()
        blocks = list(readme.BLOCK.finditer(text))
        assert len(blocks) == text.count("<!-- output of:") == text.count("<!-- end of output -->"), page
        assert all("```text\n" in block[0] for block in blocks), page
