"""The layout of the project: who may import whom, and what is packaged. docs/architecture.md says why."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = {
    "graphwright": "compiler",
    "graphwright.ir": "ir",
    "graphwright.passes": "passes",
    "graphwright.codegen": "codegen",
    "graphwright.runtime": "runtime",
    "graphwright.tools": "tools",
}
"""Import name -> folder."""

NOT_PACKAGED = ROOT / "tools" / "dev"


@dataclass(frozen=True)
class Room:
    """What the modules of one package may import, apart from themselves and the standard library.

    Args:
        inside: packages and modules of Graphwright, each with all below it.
        outside: third-party packages; None for any.
        lazily: third-party packages that may be imported inside functions only.
    """

    inside: tuple[str, ...]
    outside: frozenset[str] | None
    lazily: frozenset[str] = frozenset()


GRAPH = frozenset({"torch", "sympy", "networkx"})

ROOMS = {
    "graphwright.ir": Room((), GRAPH),
    "graphwright.passes": Room(("graphwright.ir",), GRAPH),
    "graphwright.codegen": Room(
        ("graphwright.ir", "graphwright.runtime.schedule"),
        GRAPH | {"triton"},
        lazily=frozenset({"onnx", "onnx_ir", "onnxscript"}),
    ),
    "graphwright.runtime": Room(
        ("graphwright.ir.errors", "graphwright.ir.signature", "graphwright.ir.target"),
        frozenset({"torch", "triton", "numpy", "safetensors"}),
    ),
    "graphwright.runtime.triton_cpu": Room((), frozenset({"triton", "llvmlite", "numpy"}), lazily=frozenset({"torch"})),
    "graphwright": Room(
        ("graphwright.ir", "graphwright.passes", "graphwright.codegen", "graphwright.runtime"),
        GRAPH | {"triton", "numpy", "safetensors"},
        lazily=frozenset({"onnx", "onnx_ir", "onnxruntime"}),
    ),
    "graphwright.tools": Room(("graphwright",), None),
}
"""The table of docs/architecture.md. A module belongs to the longest name that it starts with."""


@dataclass(frozen=True)
class Import:
    """One imported module: where, what, and whether the import runs only when a function is called."""

    line: int
    module: str
    lazy: bool


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def room_of(module: str) -> str:
    return max((room for room in ROOMS if is_inside(module, room)), key=len)


def python_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts and NOT_PACKAGED not in p.parents)


def module_name(package: str, folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])


MODULES = {
    module_name(package, ROOT / folder, path): path
    for package, folder in FOLDERS.items()
    for path in python_files(ROOT / folder)
}
"""Every module of the import package -> its file."""


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Yield the imports of a module of `package`, relative ones resolved.

    `from a import b` counts as importing a.b where that is a module of this project, as a otherwise.
    """

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(node.lineno, full if full in MODULES else base, lazy)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node):
            lazy = True
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    return visit(ast.parse(source), False)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def violations(module: str, imports: Iterator[Import]) -> list[str]:
    """Return what the table forbids, each as 'line: reason'."""
    home = room_of(module)
    room = ROOMS[home]
    found = []
    for entry in imports:
        top = entry.module.split(".")[0]
        if top == "graphwright":
            target = room_of(entry.module)
            # Every name starts with the front door's, so only a true room owns what is below its name.
            own = target == home or (home != "graphwright" and is_inside(target, home))
            allowed = own or any(is_inside(entry.module, name) for name in room.inside)
        elif top in FOLDERS.values():
            found.append(f"{entry.line}: import {entry.module}: write graphwright.{entry.module}")
            continue
        else:
            allowed = (
                room.outside is None
                or top in sys.stdlib_module_names
                or top in room.outside
                or (entry.lazy and top in room.lazily)
            )
        if not allowed:
            found.append(f"{entry.line}: {home} may not import {entry.module}")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_table(module: str) -> None:
    """A module imports only what docs/architecture.md allows its folder."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    assert violations(module, imports_of(path.read_text(), package)) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("graphwright.ir.x", "import graphwright.passes", ["1: graphwright.ir may not import graphwright.passes"]),
        ("graphwright.ir.x", "from graphwright import tools", ["1: graphwright.ir may not import graphwright.tools"]),
        ("graphwright.ir.x", "from .. import codegen", ["1: graphwright.ir may not import graphwright.codegen"]),
        ("graphwright.ir.x", "import graphwright", ["1: graphwright.ir may not import graphwright"]),
        ("graphwright.ir.x", "import rich", ["1: graphwright.ir may not import rich"]),
        ("graphwright.passes.x", "import ir.errors", ["1: import ir.errors: write graphwright.ir.errors"]),
        ("graphwright.passes.x", "import graphwright.ir.errors, torch, os.path", []),
        ("graphwright.runtime.x", "import graphwright.ir.dialect", None),
        ("graphwright.runtime.x", "import graphwright.ir.errors, graphwright.runtime.triton_cpu", []),
        ("graphwright.runtime.triton_cpu.x", "from . import isa", []),
        ("graphwright.runtime.triton_cpu.x", "import graphwright.runtime.launch", None),
        ("graphwright.runtime.triton_cpu.x", "import torch", None),
        ("graphwright.runtime.triton_cpu.x", "def f():\n    import torch", []),
        ("graphwright.runtime.triton_cpu.x", "if TYPE_CHECKING:\n    import torch", []),
        ("graphwright.x", "import graphwright.codegen.y, graphwright.runtime, graphwright.passes", []),
        ("graphwright.x", "import graphwright.tools.cli", ["1: graphwright may not import graphwright.tools.cli"]),
        ("graphwright.tools.x", "import graphwright, graphwright.ir.y, graphwright.codegen, rich", []),
    ],
)
def test_the_import_rules_catch_what_they_should(module: str, source: str, expected: list[str] | None) -> None:
    """A forbidden import is reported with its line, and an allowed one is not; None stands for any report."""
    found = violations(module, imports_of(source, module.rpartition(".")[0]))
    assert (found == expected) if expected is not None else (len(found) == 1)


@pytest.mark.parametrize("path", python_files(ROOT / "tests"), ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_import_by_full_name(path: Path) -> None:
    """A test imports graphwright.x: a bare `import ir` would work from the top folder, and make a second copy."""
    bare = [i for i in imports_of(path.read_text(), "tests") if i.module.split(".")[0] in FOLDERS.values()]
    assert bare == []


def test_packages_match_the_folders() -> None:
    """pyproject.toml lists every folder with an __init__.py and nothing else; an unlisted one is not shipped."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    folders = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert sorted(setuptools["packages"]) == sorted(folders)
    assert setuptools["package-dir"] == FOLDERS


def test_every_folder_with_python_files_is_a_package() -> None:
    """No folder of modules lacks its __init__.py; the wheel would leave it out."""
    lacking = {path.parent for path in MODULES.values() if not (path.parent / "__init__.py").exists()}
    assert lacking == set()


def test_nothing_in_compiler_hides_behind_a_folder() -> None:
    """compiler/ has no `passes.py` or the like: the folder of that name would silently win."""
    rooms = {name.removeprefix("graphwright.") for name in FOLDERS} - {"graphwright"}
    assert {path.stem for path in (ROOT / "compiler").iterdir()} & rooms == set()


@pytest.mark.parametrize("module", ["graphwright", "graphwright.tools.cli"])
def test_import_is_light(module: str, tmp_path: Path) -> None:
    """Importing the front door or the command line loads no heavy library, and nothing under a bare name."""
    script = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    unwanted = {"torch", "triton", "numpy", "llvmlite", "sympy", "networkx", "rich", *FOLDERS.values()}
    assert set(result.stdout.split()) & unwanted == set()


def declared_all(source: str) -> list[str] | None:
    """Return the names in `__all__`, None where a module has none."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


def test_all_is_sorted() -> None:
    """`__all__` is sorted the way ruff sorts it: constants, classes, the rest."""

    def key(name: str) -> tuple[int, str]:
        kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
        return kind, name

    for module, path in MODULES.items():
        names = declared_all(path.read_text()) or []
        assert names == sorted(set(names), key=key), module


def test_wheel_holds_every_file(tmp_path: Path) -> None:
    """The wheel has every file of the six folders under graphwright/, none twice, and nothing else."""
    source, out = tmp_path / "source", tmp_path / "out"
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    expected = {
        "/".join([*package.split("."), *path.relative_to(source / folder).parts])
        for package, folder in FOLDERS.items()
        for path in (source / folder).rglob("*")
        if path.is_file() and source / "tools" / "dev" not in path.parents
    }

    script = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=source, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = out.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(n for n in names if ".dist-info/" not in n) == sorted(expected)
