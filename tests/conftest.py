"""What every test gets: a package that can be imported, a Triton cache of its own, and a loud skip without a GPU."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CACHE_VARIABLE = "TRITON_CACHE_DIR"


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
