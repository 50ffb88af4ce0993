"""Models that the command line can name, in a folder of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FACTORIES = '''
import torch
from torch import nn


class TwoInputs(nn.Module):
    """Rows of a table, scaled, and how many there are."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)

    def forward(self, ids, scale):
        return {"rows": self.table(ids) * scale[:, :, None], "sum": scale.sum(1)}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), {"input": torch.randn(3, 8)}


def two_inputs():
    torch.manual_seed(0)
    return TwoInputs(), {"ids": torch.randint(0, 11, (2, 5)), "scale": torch.randn(2, 5)}


def without_inputs():
    return nn.Linear(8, 4)


def number():
    return 3


def broken():
    raise RuntimeError("the wheel came off")
'''

MODULE = "graphwright_test_factories"


@pytest.fixture(scope="session")
def factories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of an importable module with factories of small models."""
    folder = tmp_path_factory.mktemp("factories")
    (folder / f"{MODULE}.py").write_text(FACTORIES)
    sys.path.insert(0, str(folder))
    yield MODULE
    sys.path.remove(str(folder))
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="session")
def artifact(factories: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The factory `two_inputs`, compiled by the command line."""
    from graphwright.tools import cli

    path = tmp_path_factory.mktemp("artifacts") / "two.gw"
    dynamic = ["--dynamic", "ids:0=batch,1=tokens", "--dynamic", "scale:0=batch,1=tokens"]
    assert cli.main(["compile", f"{factories}:two_inputs", "-o", str(path), *dynamic, "--json"]) == 0
    return path
