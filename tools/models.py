"""MODEL on the command line: from a name to a module and the arguments of a sample call."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphwright.ir.errors import InputError, unknown

from .reference import _quiet_loading

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

KINDS = "a Hugging Face folder, a hub id such as org/name, package.module:factory, a .pt2 file or a .gw file"

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PICTURE, _SOUND = 224, 16000


@dataclass(frozen=True)
class Model:
    """A model, and how to call it.

    Args:
        module: in evaluation mode.
        kind: "folder", "hub", "factory" or "export".
        args: positional arguments of the sample call.
        kwargs: named ones.
        tokenizer: the folder or hub id to load a tokenizer from; "" if none is known.
        notes: what a user should know of how it was loaded.
    """

    module: nn.Module
    kind: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = ""
    notes: tuple[str, ...] = ()


def load_model(
    name: str,
    *,
    batch: int = 1,
    tokens: int = 64,
    dtype: str | None = None,
    texts: Sequence[str] = (),
    tokenizer: str = "",
) -> Model:
    """Return the model that `name` stands for.

    Args:
        name: a Hugging Face folder, a hub id, `package.module:factory` or a `.pt2` file.
        batch: rows of the random sample of a Hugging Face model.
        tokens: its tokens.
        dtype: "fp32", "bf16" or "fp16"; None leaves the model as it is.
        texts: take these as the sample, tokenised.
        tokenizer: folder or hub id of the tokenizer; "" for the model's own.

    Raises:
        InputError: there is no such model, or it cannot be loaded or called.
    """
    path = Path(name)
    if path.is_dir():
        model = _hugging_face(name, "folder", batch, tokens, dtype)
    elif path.suffix == ".pt2":
        model = _exported(path)
    elif _FACTORY.fullmatch(name):
        model = _made(name, batch, tokens)
    elif path.exists() or not _HUB_ID.fullmatch(name):
        found = "a file that is none of these" if path.exists() else "nothing of that name here"
        raise InputError(f"MODEL {name!r}: expected {KINDS}, and found {found}")
    else:
        model = _hugging_face(name, "hub", batch, tokens, dtype)
    if dtype is not None:
        model = _cast(model, DTYPES[dtype])
    if texts:
        model = replace(model, args=(), kwargs=tokenised(tokenizer or model.tokenizer, texts))
        accepted = inspect.signature(model.module.forward).parameters
        model = replace(model, kwargs={key: value for key, value in model.kwargs.items() if key in accepted})
    if not model.args and not model.kwargs:
        raise InputError(f"MODEL {name!r}: no sample call is known: let the factory return (module, {{argument: value}})")
    if model.kind != "export":
        # An exported module is in the mode that it was exported in, and refuses to be asked.
        model.module.eval()
    return model


def tokenised(
    tokenizer: str, texts: Sequence[str], *, longest: int | None = None, exactly: int | None = None
) -> dict[str, Any]:
    """Return the tensors of texts: `input_ids`, `attention_mask` and whatever else the tokenizer makes.

    Args:
        tokenizer: a folder or hub id.
        texts: one for each row, padded to the longest.
        longest: cut what is longer, in tokens.
        exactly: pad to so many tokens, and cut what is longer.

    Raises:
        InputError: there is no tokenizer, or it cannot pad.
    """
    if not tokenizer:
        raise InputError("--text: no tokenizer is known for this model: name its folder with --tokenizer")
    transformers = _transformers("--text")
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"no tokenizer can be loaded from {tokenizer!r}: {error}") from error
    if loaded.pad_token is None:
        # Decoders often come without one. What stands there is masked.
        loaded.pad_token = loaded.eos_token or loaded.unk_token
    if loaded.pad_token is None and (len(texts) > 1 or exactly is not None):
        raise InputError(f"the tokenizer in {tokenizer!r} has no token to pad with: give texts one at a time")
    limit = exactly if exactly is not None else longest
    padding = "max_length" if exactly is not None else len(texts) > 1
    return dict(loaded(list(texts), return_tensors="pt", padding=padding, truncation=limit is not None, max_length=limit))


def _transformers(what: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(f"{what}: the package transformers is not installed: pip install graphwright[models]") from error


def _hugging_face(name: str, kind: str, batch: int, tokens: int, dtype: str | None) -> Model:
    if kind == "folder" and not (Path(name) / "config.json").is_file():
        raise InputError(f"MODEL {name!r}: the folder has no config.json, so that it is no Hugging Face model")
    transformers = _transformers(f"MODEL {name!r}")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = next(iter(config.architectures or ()), "AutoModel")
        cls = getattr(transformers, architecture, transformers.AutoModel)
        with _quiet_loading():
            module, loading = cls.from_pretrained(name, dtype=DTYPES[dtype] if dtype else "auto", output_loading_info=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(f"MODEL {name!r}: transformers cannot load it: {error}") from error
    missing = sorted(loading["missing_keys"])
    notes = [f"made at random, for {name} does not hold them: {', '.join(missing)}"] if missing else []
    return Model(module, kind, (), hugging_face_sample(module, batch, tokens), name, tuple(notes))


def hugging_face_sample(module: Any, batch: int, tokens: int) -> dict[str, Any]:
    """Return random arguments for a Hugging Face model, by what its forward takes.

    Args:
        module: with a `config` and a `main_input_name`.
        batch: number of rows.
        tokens: length of texts; sounds are a second, or what the configuration says.
    """
    config, accepted = module.config, inspect.signature(module.forward).parameters
    text = getattr(config, "text_config", config)
    generator = torch.Generator().manual_seed(0)

    def ids() -> torch.Tensor:
        return torch.randint(min(3, text.vocab_size - 1), text.vocab_size, (batch, tokens), generator=generator)

    sample: dict[str, Any] = {}
    if "input_ids" in accepted:
        sample["input_ids"] = ids()
        if "attention_mask" in accepted:
            sample["attention_mask"] = torch.ones(batch, tokens, dtype=torch.int64)
    if "pixel_values" in accepted:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or _PICTURE
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        sample["pixel_values"] = torch.randn(
            batch, getattr(vision, "num_channels", 3), height, width, generator=generator, dtype=torch.float32
        )
    if "input_values" in accepted:
        sample["input_values"] = torch.randn(batch, _SOUND, generator=generator)
    if "input_features" in accepted:
        frames = 2 * getattr(config, "max_source_positions", _SOUND // 160)
        sample["input_features"] = torch.randn(batch, getattr(config, "num_mel_bins", 80), frames, generator=generator)
    if "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False):
        sample["decoder_input_ids"] = ids()
    return {key: value.to(module.dtype) if value.is_floating_point() else value for key, value in sample.items()}


def _made(name: str, batch: int, tokens: int) -> Model:
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        # As `python -m` does: the factory usually stands in the project that is worked on.
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"MODEL {name!r}: the module {module_name} cannot be imported: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise InputError(f"MODEL {name!r}: in {module_name} {unknown('factory', part, names)}")
        found = getattr(found, part)
    return _unpacked(name, _called(name, found), batch, tokens)


def _called(name: str, factory: Callable[[], Any]) -> Any:
    if isinstance(factory, nn.Module):
        return factory
    try:
        return factory()
    except Exception as error:
        raise InputError(f"MODEL {name!r}: calling it failed: {type(error).__name__}: {error}") from error


def _unpacked(name: str, made: Any, batch: int, tokens: int) -> Model:
    match made:
        case nn.Module():
            known = hasattr(made, "config") and hasattr(made, "main_input_name")
            return Model(made, "factory", (), hugging_face_sample(made, batch, tokens) if known else {})
        case (nn.Module() as module, Mapping() as kwargs):
            return Model(module, "factory", (), dict(kwargs))
        case (nn.Module() as module, tuple() | list() as args):
            return Model(module, "factory", tuple(args))
    raise InputError(
        f"MODEL {name!r}: expected a torch.nn.Module, or (module, {{argument: value}}), and the factory returned "
        f"{type(made).__name__}"
    )


def _exported(path: Path) -> Model:
    try:
        program = torch.export.load(path)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"MODEL {str(path)!r}: torch.export cannot load it: {error}") from error
    if program.example_inputs is None:
        raise InputError(f"MODEL {str(path)!r}: it was saved without example inputs, which are needed as a sample call")
    args, kwargs = program.example_inputs
    return Model(_called_by_position(program.module(), len(args)), "export", tuple(args), dict(kwargs))


def _called_by_position(exported: nn.Module, count: int) -> nn.Module:
    """Return a module that takes by name too what an exported one takes by position only: its first `count` arguments."""
    signature = inspect.signature(exported.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = list(bound.arguments.items())
        return self.exported(*(value for _, value in given[:count]), **dict(given[count:]))

    myself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = inspect.Signature([myself, *signature.parameters.values()])  # type: ignore[attr-defined]
    made: nn.Module = type("ExportedModule", (nn.Module,), {"forward": forward})()
    made.exported = exported
    made.training = False
    return made


def _cast(model: Model, dtype: torch.dtype) -> Model:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return replace(
        model,
        module=model.module.to(dtype),
        args=tuple(cast(value) for value in model.args),
        kwargs={key: cast(value) for key, value in model.kwargs.items()},
    )
