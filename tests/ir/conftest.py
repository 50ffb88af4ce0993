"""Programs built by hand, and texts kept in files."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]

UPDATE = "GRAPHWRIGHT_UPDATE_GOLDEN"
"""Set this variable to write the files anew instead of comparing with them."""


@pytest.fixture(scope="session")
def builder() -> Any:
    """The class that builds programs node by node."""
    name = "graphwright_tests_builder"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / "builder.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].Builder


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with the file of the test's name under tests/golden."""

    def compare(text: str) -> None:
        folder = TESTS / "golden" / Path(request.node.path).relative_to(TESTS).with_suffix("")
        file = folder / f"{request.node.name}.txt"
        if os.environ.get(UPDATE):
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        assert file.exists(), f"{file} is missing: run with {UPDATE}=1, and look at what it writes"
        assert text == file.read_text()

    return compare
