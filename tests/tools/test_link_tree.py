"""The link tree: each package where its import name says."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def link_tree(root: Path) -> ModuleType:
    """tools/dev is not installed, so its modules are loaded from their files."""
    spec = importlib.util.spec_from_file_location("link_tree", root / "tools" / "dev" / "link_tree.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package_dirs(tmp_path: Path) -> dict[str, Path]:
    """A package whose front door is in front/, with a room in room/."""
    dirs = {"top": tmp_path / "front", "top.room": tmp_path / "room"}
    for folder in dirs.values():
        folder.mkdir()
        (folder / "__init__.py").write_text(f"name = {folder.name!r}\n")
    (dirs["top"] / "__pycache__").mkdir()
    return dirs


def test_links_lead_to_the_folders(link_tree: ModuleType, package_dirs: dict[str, Path], tmp_path: Path) -> None:
    """With the tree alone on the path, both packages are importable under their names."""
    tree = tmp_path / "tree"
    link_tree.write_tree(link_tree.plan_links(package_dirs), tree)
    script = "import top, top.room; print(top.name, top.room.name)"
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["front", "room"]
    assert sorted(path.name for path in (tree / "top").iterdir()) == ["__init__.py", "room"]


def test_a_second_run_follows_changes(link_tree: ModuleType, package_dirs: dict[str, Path], tmp_path: Path) -> None:
    """A new file of the front door is linked, the link of a removed one goes, and right links are left alone."""
    tree = tmp_path / "tree"
    (package_dirs["top"] / "old.py").touch()
    link_tree.write_tree(link_tree.plan_links(package_dirs), tree)
    before = (tree / "top" / "room").lstat()

    (package_dirs["top"] / "old.py").rename(package_dirs["top"] / "new.py")
    link_tree.write_tree(link_tree.plan_links(package_dirs), tree)
    assert sorted(path.name for path in (tree / "top").iterdir()) == ["__init__.py", "new.py", "room"]
    assert (tree / "top" / "room").lstat().st_ino == before.st_ino


def test_two_claims_to_one_place_are_refused(link_tree: ModuleType, package_dirs: dict[str, Path]) -> None:
    """A folder inside front/ with a room's name would hide that room."""
    (package_dirs["top"] / "room").mkdir()
    with pytest.raises(ValueError, match=r"both .*front/room and .*room would be linked"):
        link_tree.plan_links(package_dirs)
