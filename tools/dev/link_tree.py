"""Write build/link/graphwright: the import package as a tree of symbolic links.

`graphwright.passes` lives in `passes/`, which the editable install explains to Python but not to type checkers. With
`build/link` on their path (or on PYTHONPATH, with nothing installed at all) every tool finds the package where its name
says. Run it again after adding a file to `compiler/`; the other folders are linked whole.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = ROOT / "build" / "link"


def read_package_dirs(root: Path = ROOT) -> dict[str, Path]:
    """Return package name -> folder, from `package-dir` in pyproject.toml."""
    with (root / "pyproject.toml").open("rb") as file:
        table: dict[str, str] = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    return {name: root / folder for name, folder in table.items()}


def plan_links(package_dirs: dict[str, Path]) -> dict[Path, Path]:
    """Return link (relative to the tree) -> target.

    Raises:
        ValueError: two packages claim the same place.
    """
    links: dict[Path, Path] = {}
    for name, folder in package_dirs.items():
        place = Path(*name.split("."))
        holds_others = any(other.startswith(name + ".") for other in package_dirs)
        new = {place / entry.name: entry for entry in folder.iterdir()} if holds_others else {place: folder}
        for link, target in new.items():
            if target.name == "__pycache__":
                continue
            if link in links:
                raise ValueError(f"{link}: both {links[link]} and {target} would be linked there")
            links[link] = target
    return links


def write_tree(links: dict[Path, Path], tree: Path = LINK) -> None:
    """Make `tree` hold exactly `links`; links that are right already are left alone."""
    for link, target in links.items():
        path = tree / link
        path.parent.mkdir(parents=True, exist_ok=True)
        text = os.path.relpath(target, path.parent)
        if path.is_symlink() and os.readlink(path) == text:
            continue
        # Replaced in one step, because another process may be reading the tree.
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.symlink_to(text)
        new.replace(path)
    for folder in {tree / link.parent for link in links}:
        for path in folder.iterdir():
            if path.is_symlink() and path.relative_to(tree) not in links:
                path.unlink(missing_ok=True)


def main() -> None:
    """Write the tree of this checkout."""
    write_tree(plan_links(read_package_dirs()))


if __name__ == "__main__":
    main()
