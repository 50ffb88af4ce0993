"""Recipes: the passes of a compilation with their options, as TOML.

    [model]                          # may be left out: then the recipe is for any model
    name = "LlamaForCausalLM"
    weights = "sha256:..."           # of the weights' names, dtypes and shapes

    [[pass]]
    name = "drop-layers"
    drop = 2
    unit = "attention"

The passes run in this order, after those that every model gets.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphwright.ir.errors import OptionError, unknown
from graphwright.ir.program import Program
from graphwright.passes.base import Pass
from graphwright.passes.registry import as_passes, parse_pass

_KEYS = ("model", "pass")


@dataclass(frozen=True)
class Mark:
    """What a model is told by.

    Args:
        name: of its class; "" if it is not known. For people: it is not compared.
        weights: "sha256:" and a hash of the names, dtypes and shapes of its weights; their values do not matter.
    """

    name: str
    weights: str


@dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    Args:
        passes: in order.
        model: the model that it was made for; None for any.
        source: where it was read; "" if it was made.
    """

    passes: tuple[Pass, ...]
    model: Mark | None = None
    source: str = ""

    def to_toml(self) -> str:
        """Return the text that `parse_recipe` reads."""
        parts = []
        if self.model is not None:
            fields = [f"{key} = {_literal(value)}" for key, value in dataclasses.asdict(self.model).items() if value]
            parts.append("\n".join(["[model]", *fields]))
        for step in self.passes:
            options = [
                f"{field.name} = {_literal(getattr(step, field.name))}"
                for field in dataclasses.fields(step)
                if getattr(step, field.name) != _default(field)
            ]
            parts.append("\n".join(["[[pass]]", f"name = {_literal(step.name)}", *options]))
        return "\n\n".join(parts) + "\n" if parts else ""

    def check(self, mark: Mark) -> None:
        """Check that the recipe is for a model.

        Raises:
            OptionError: it was made for another one.
        """
        if self.model is not None and self.model.weights != mark.weights:
            raise OptionError(
                f"{self.source or 'the recipe'} was made for another model: for {self.model.name or 'one'} with weights "
                f"{self.model.weights[:19]}..., and this is {mark.name or 'one'} with {mark.weights[:19]}...: take its [model] "
                f"part out to use it all the same"
            )


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Return the recipe in a file.

    Raises:
        OptionError: it is not TOML, or names a pass, an option or a value that there is not.
        OSError: the file cannot be read.
    """
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{os.fspath(path)} is not text: {error}") from error
    return parse_recipe(text, os.fspath(path))


def parse_recipe(text: str, source: str = "recipe") -> Recipe:
    """Return the recipe that a text describes.

    Args:
        text: TOML.
        source: what errors call it.

    Raises:
        OptionError: it is not TOML, or names a pass, an option or a value that there is not.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{source} is not TOML: {error}") from error
    for key in data:
        if key not in _KEYS:
            raise OptionError(f"{source}: {unknown('part', key, _KEYS)} A pass is written [[pass]], with its name under it.")
    entries = data.get("pass", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise OptionError(f"{source}: passes are written [[pass]], in double brackets, one after the other")
    passes = tuple(_pass(entry, f"{source}, pass {number}") for number, entry in enumerate(entries, 1))
    return Recipe(passes, _mark(data["model"], source) if "model" in data else None, source)


def recipe_of(given: Recipe | str | os.PathLike[str] | None, passes: Iterable[Pass | str]) -> Recipe:
    """Return one recipe for a recipe, or the path of one, and passes that come after its own.

    Raises:
        OptionError: a pass or an option is unknown.
        OSError: the file cannot be read.
    """
    first = given if isinstance(given, Recipe) else Recipe(()) if given is None else read_recipe(given)
    return dataclasses.replace(first, passes=(*first.passes, *as_passes(passes)))


def mark_of(program: Program, name: str = "") -> Mark:
    """Return what a model is told by.

    Args:
        program: the model as it was captured.
        name: of its class.
    """
    lines = [f"{key} {weight.dtype} {list(weight.shape)}" for key, weight in sorted(program.weights.items())]
    return Mark(name, "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest())


def _pass(entry: Mapping[str, Any], what: str) -> Pass:
    if not isinstance(entry.get("name"), str):
        raise OptionError(f'{what} has no name: write name = "..." under [[pass]]')
    options = ",".join(f"{key}={_text(value, f'{what}: {key}')}" for key, value in entry.items() if key != "name")
    try:
        return parse_pass(f"{entry['name']}:{options}")
    except OptionError as error:
        raise OptionError(f"{what}: {error}") from error


def _text(value: Any, what: str) -> str:
    """Return a value as the text of a pass has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "+".join(_text(item, what) for item in value)
    if not isinstance(value, int | float | str):
        raise OptionError(f"{what} must be a number, true or false, text or a list of these, and is a {type(value).__name__}")
    if "," in str(value):
        raise OptionError(f"{what} is {value!r}: there is no comma in any value")
    return str(value)


def _mark(data: Any, source: str) -> Mark:
    fields = [field.name for field in dataclasses.fields(Mark)]
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise OptionError(f"{source}: [model] has {' and '.join(fields)}, both text")
    for key in data:
        if key not in fields:
            raise OptionError(f"{source}: [model]: {unknown('key', key, fields)}")
    if "weights" not in data:
        raise OptionError(f"{source}: [model] has no weights, which a model is told by")
    return Mark(data.get("name", ""), data["weights"])


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _literal(value: Any) -> str:
    """Return a value as TOML."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(_literal(item) for item in value)}]"
    # What JSON writes between quotes, TOML reads as the same.
    return json.dumps("none" if value is None else str(value), ensure_ascii=False)
