"""The models and texts that every machine has."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from graphwright.ir.errors import InputError
from graphwright.tools import reference


@pytest.fixture(scope="module")
def docstrings() -> list[reference.Docstring]:
    return reference.docstrings()


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library in place of the true one."""
    monkeypatch.setattr(reference.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_minilm_tells_alike_from_unlike() -> None:
    """The encoder's mean embeddings of two sentences of one meaning are closer than those of two meanings."""
    model, tokenizer = reference.load_minilm(), reference.load_minilm_tokenizer()
    assert not model.training
    assert model.dtype == torch.float32
    texts = ["Open a file for reading.", "Read the contents of a document.", "Multiply two large matrices."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        embeddings = functional.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    alike, unlike = embeddings[0] @ embeddings[1], embeddings[0] @ embeddings[2]
    assert alike > unlike + 0.2


def test_minilm_missing_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the error says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install graphwright\[demo\]"):
        reference.minilm_folder()


def test_minilm_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package without the model is an error that names the folder."""
    spec = importlib.util.spec_from_file_location("minilm", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(InputError, match=f"{tmp_path.name}/model has no config.json"):
        reference.minilm_folder()


def test_language_model_predicts_held_out_text() -> None:
    """The language model's loss on text it has not seen is far below that of guessing, 7.6 nats."""
    model = reference.load_language_model()
    assert not model.training
    assert model.dtype == torch.float32
    ids = reference.held_out_ids(1025)[None]
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0]
    assert functional.cross_entropy(logits, ids[0, 1:]) < 3.5


def test_language_model_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRAPHWRIGHT_MODELS names another folder; where the model is not in it, the error names both."""
    monkeypatch.setenv(reference.MODELS_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=rf"not in .*{tmp_path.name}.*GRAPHWRIGHT_MODELS"):
        reference.language_model_folder()
    monkeypatch.delenv(reference.MODELS_VARIABLE)
    shutil.copytree(reference.language_model_folder(), tmp_path / "pystdlib-llama")
    monkeypatch.setenv(reference.MODELS_VARIABLE, str(tmp_path))
    assert reference.language_model_folder() == tmp_path / "pystdlib-llama"


def test_held_out_text_is_what_was_held_out() -> None:
    """In the Python that the model was trained on, the held-out text has the length that training wrote down."""
    files = reference.library_files()
    held_out = [file for file in files if file.held_out]
    assert [file.text for file in held_out] == reference.held_out_text()
    assert 0.01 < len(held_out) / len(files) < 0.06
    trained = json.loads((reference.language_model_folder() / "training.json").read_text())
    if sys.version.split()[0] == trained["python"]:
        assert len(reference.held_out_ids(trained["eval_tokens"])) == trained["eval_tokens"]
        with pytest.raises(InputError, match=f"there are {trained['eval_tokens']}"):
            reference.held_out_ids(trained["eval_tokens"] + 1)


def test_held_out_ids_are_a_prefix() -> None:
    """Fewer tokens are the first of more, and the first is that of a new file."""
    assert reference.held_out_ids(1).tolist() == [0]
    assert torch.equal(reference.held_out_ids(300), reference.held_out_ids(5000)[:300])


def test_docstrings_of_the_library(docstrings: list[reference.Docstring]) -> None:
    """Docstrings of modules, classes and methods are there, as Python itself sees them."""
    import inspect
    from json import JSONDecoder

    texts = dict(docstrings)
    assert texts["json.decoder.JSONDecoder"] == inspect.getdoc(JSONDecoder)
    assert texts["json.decoder.JSONDecoder.decode"] == inspect.getdoc(JSONDecoder.decode)
    assert texts["shutil"].startswith("Utility functions for copying")
    assert len(docstrings) > 5000
    assert all(text.strip() for _, text in docstrings)


def test_docstrings_import_nothing(library: Path) -> None:
    """Reading a module's docstring does not run the module."""
    (library / "careless.py").write_text('"""Careless."""\nraise SystemExit("imported")\n')
    assert reference.docstrings() == [("careless", "Careless.")]
    assert "careless" not in sys.modules


def test_docstring_names_and_order(library: Path) -> None:
    """Names follow the nesting, conditional and local definitions included; files in order, tests and foreign code left out."""
    source = '''"""M."""
class A:
    """A."""
    def f(self):
        def g():
            """G."""
    async def h(self):
        """
        H,

            indented.
        """
if True:
    def k():
        ""
    def l():
        """L \\d."""
'''
    (library / "b").mkdir()
    (library / "b" / "__init__.py").write_text('"""B."""')
    (library / "a.py").write_text(source)
    (library / "c.py").write_text('"""C."""; print "old"')
    (library / "d-e.py").write_text('"""D."""')
    for name in ("test", "site-packages"):
        (library / name).mkdir()
        (library / name / "x.py").write_text('"""X."""')
    assert [tuple(d) for d in reference.docstrings()] == [
        ("a", "M."),
        ("a.A", "A."),
        ("a.A.f.<locals>.g", "G."),
        ("a.A.h", "H,\n\n    indented."),
        ("a.l", "L \\d."),
        ("b", "B."),
    ]


def test_files_that_are_not_utf8(library: Path) -> None:
    """A file that is not UTF-8 counts as empty, and folders that the model was not trained on are left out."""
    (library / "latin.py").write_bytes(b"# \xe9")
    (library / "encodings").mkdir()
    (library / "encodings" / "big.py").write_text("x = 1")
    assert [(file.path, file.text) for file in reference.library_files()] == [("latin.py", "")]
