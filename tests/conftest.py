"""What every test gets: a package that can be imported, a Triton cache of its own, and a loud skip without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

    from graphwright.ir.program import Program

ROOT = Path(__file__).resolve().parents[1]
CACHE_VARIABLE = "TRITON_CACHE_DIR"
UPDATE = "GRAPHWRIGHT_UPDATE_GOLDEN"
"""Set this variable to write the files of tests/golden anew instead of comparing with them."""


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("graphwright") is None:
        pytest.exit(
            "graphwright cannot be imported: run `make test`, or `python tools/dev/link_tree.py` and then "
            "`PYTHONPATH=build/link python -m pytest`.",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )
    # A kernel compiled by an earlier version of the code must not pass for what this one generates. Worker processes
    # inherit the variable, so one run shares one cache.
    if CACHE_VARIABLE not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="graphwright-tests-", ignore_cleanup_errors=True)
        os.environ[CACHE_VARIABLE] = cache.name
        config.add_cleanup(cache.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's top folder."""
    return ROOT


def load(file: str) -> ModuleType:
    """Load a file of tests/: tests are no package, so that it cannot be imported by name."""
    name = f"graphwright_tests_{file}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{file}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def load_families() -> ModuleType:
    """Load tests/families.py."""
    return load("families")


@pytest.fixture(scope="session")
def builder() -> Any:
    """The class that builds programs node by node."""
    return load("builder").Builder


@pytest.fixture(scope="session")
def trials() -> ModuleType:
    """The module tests/trials.py: what passes are tried with."""
    return load("trials")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with the file of the test's name under tests/golden."""

    def compare(text: str) -> None:
        tests = ROOT / "tests"
        folder = tests / "golden" / Path(request.node.path).relative_to(tests).with_suffix("")
        file = folder / f"{request.node.name}.txt"
        if os.environ.get(UPDATE):
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        assert file.exists(), f"{file} is missing: run with {UPDATE}=1, and look at what it writes"
        assert text == file.read_text()

    return compare


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with a parameter `family` once for the name of each; those that take long to capture are marked slow.

    One with a parameter `lossy_pair` runs once for each pair of passes that approximate.
    """
    if "lossy_pair" in metafunc.fixturenames:
        metafunc.parametrize("lossy_pair", pairs := load("trials").pairs(), ids=["-".join(pair) for pair in pairs])
    if "family" in metafunc.fixturenames:
        families = load_families().FAMILIES
        names = [pytest.param(name, marks=[pytest.mark.slow] if family.slow else []) for name, family in families.items()]
        metafunc.parametrize("family", names)


@pytest.fixture(scope="session")
def families() -> dict[str, Any]:
    """The small models of tests/families.py by name."""
    return load_families().FAMILIES


@pytest.fixture(scope="session")
def built() -> Callable[[str], nn.Module]:
    """Return a model by the name of its family; made once, so that tests must leave it as it is."""
    return functools.cache(lambda name: load_families().FAMILIES[name].build())


@pytest.fixture(scope="session")
def captured(built: Callable[[str], nn.Module]) -> Callable[[str], Program]:
    """Return a family's program by name; captured once, so that tests must copy it before they change it."""

    def capture(name: str) -> Program:
        import graphwright

        return graphwright.capture(built(name), **load_families().FAMILIES[name].sample(2, 7, 0))

    return functools.cache(capture)
