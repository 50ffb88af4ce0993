"""`--calibration` and `--recipe`: sample calls and passes from files."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

import graphwright
from graphwright.ir.errors import InputError
from graphwright.tools import cli
from graphwright.tools.calibration import read_calibration
from graphwright.tools.models import Model
from graphwright.tools.reference import language_model_folder

LAYERS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True) for _ in range(3)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def net():
    torch.manual_seed(0)
    return Net(), {"x": torch.randn(2, 5, 16)}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model's factory, sample calls and a recipe."""
    (tmp_path / "graphwright_test_layers.py").write_text(LAYERS)
    save_file({"x": torch.randn(4, 20, 16)}, tmp_path / "calls.safetensors")
    (tmp_path / "one.toml").write_text('[[pass]]\nname = "drop-layers"\ndrop = 1\n')
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("graphwright_test_layers", None)


def test_a_recipe_with_calibration(folder, capsys) -> None:
    """The command follows the recipe with the calls of the file; the artifact carries the recipe."""
    out = folder / "net.gw"
    argv = ["compile", "graphwright_test_layers:net", "-o", str(out), "--recipe", str(folder / "one.toml")]
    assert cli.main([*argv, "--calibration", str(folder / "calls.safetensors"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passes"][-1]["options"] == "drop-layers:drop=1"
    assert (data["passes"][-1]["decisions"], data["passes"][-1]["refusals"]) == (1, 2)
    assert '[[pass]]\nname = "drop-layers"\ndrop = 1\n' in graphwright.load(out).recipe
    assert cli.main(argv) == 1
    assert "scores rest on sample calls, and there are none" in capsys.readouterr().err


def test_a_wrong_recipe_is_a_usage_error(folder, capsys) -> None:
    """Mistakes in the file are told before the model is loaded."""
    (folder / "one.toml").write_text('[[pass]]\nname = "drop-layers"\ndorp = 1\n')
    argv = ["compile", "graphwright_test_layers:net", "-o", str(folder / "net.gw"), "--recipe", str(folder / "one.toml")]
    assert cli.main(argv) == 2
    assert "Did you mean 'drop'" in " ".join(capsys.readouterr().err.split())
    assert "graphwright_test_layers" not in sys.modules


def test_text_is_cut_into_rows(tmp_path) -> None:
    """Every token of a text is in one of the calls, in order, and a call has what the model's sample has."""
    path = tmp_path / "some.txt"
    path.write_text("import os\n\n\ndef main(argv):\n    return os.path.join(*argv)\n" * 9)
    model = Model(torch.nn.Identity(), "folder", (), {"input_ids": None}, str(language_model_folder()))
    whole = read_calibration([path], model, 10**6)
    assert [list(call) for call in whole] == [["input_ids"]]
    calls = read_calibration([path], model, 16)
    assert torch.equal(torch.cat([call["input_ids"] for call in calls], 1), whole[0]["input_ids"])
    assert {call["input_ids"].shape[1] for call in calls[:-1]} == {16}
    assert 1 <= calls[-1]["input_ids"].shape[1] <= 16


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("calls.npy", b"", r"should end with \.txt or \.safetensors"),
        ("calls.txt", b"", "there is no token in"),
        ("calls.txt", b"\xff\xfe", "is not text"),
        ("calls.safetensors", b"123", "no whole safetensors file"),
    ],
)
def test_files_that_do_not_fit(tmp_path, name, content, message) -> None:
    """Files of another kind, empty or damaged ones are named."""
    path = tmp_path / name
    path.write_bytes(content)
    model = Model(torch.nn.Identity(), "folder", (), {"input_ids": None}, str(language_model_folder()))
    with pytest.raises(InputError, match=message):
        read_calibration([path], model, 16)


def test_models_that_take_no_text(tmp_path) -> None:
    """Without a tokenizer, or without ids among the arguments, text is refused."""
    path = tmp_path / "some.txt"
    path.write_text("import os")
    with pytest.raises(InputError, match="no tokenizer is known"):
        read_calibration([path], Model(torch.nn.Identity(), "factory", (), {"x": None}), 16)
    with pytest.raises(InputError, match="takes no input_ids"):
        read_calibration([path], Model(torch.nn.Identity(), "factory", (), {"x": None}), 16, str(language_model_folder()))
