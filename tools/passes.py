"""`graphwright passes`: what can be done to a model."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .output import Command, console, json_option, print_json, table

if TYPE_CHECKING:
    from graphwright.passes.base import Pass


@click.command(cls=Command)
@click.argument("name", required=False)
@json_option
def passes(name: str | None, as_json: bool) -> None:
    """List the passes, or explain the one called NAME."""
    from graphwright.ir.errors import OptionError
    from graphwright.passes.registry import pass_class, pass_names

    if name is not None:
        try:
            data = explain(pass_class(name))
        except OptionError as error:
            raise click.BadParameter(str(error), param_hint="NAME") from error
        if as_json:
            print_json(data)
        else:
            _show(data)
        return
    found = [explain(pass_class(known)) for known in pass_names()]
    if as_json:
        keys = ("name", "fidelity", "stage", "default", "source", "summary", "page")
        print_json([{key: entry[key] for key in keys} for entry in found])
        return
    rows = [[f["name"], f["fidelity"], f["stage"], "yes" if f["default"] else "", f["summary"]] for f in found]
    shown = console()
    shown.print(table("passes", ["name", "fidelity", "rewrites", "by default", "what it does"], rows))
    shown.print("graphwright passes NAME explains one.", markup=False)


def explain(cls: type[Pass]) -> dict[str, Any]:
    """Return what there is to know of a pass, as plain data.

    Keys: `name`, `fidelity` ("exact", "close" or "lossy"), `stage` ("program", or "decode" for one that rewrites the program
    with caches), `source` (the paper, "" if there is none), `page` (its documentation, "" if there is none), `summary` (the
    first line), `before`, `after`, `cost`, `doc` (all of the docstring), `default` (whether every compilation runs it),
    `options` (each with `name`, `type`, `default` as text and `meaning`).
    """
    from graphwright.pipeline import DEFAULT_PASSES

    doc = inspect.getdoc(cls) or ""
    parts = _sections(doc)
    meanings = _meanings(doc)
    hints = typing.get_type_hints(cls)
    return {
        "name": cls.name,
        "fidelity": cls.fidelity.value,
        "stage": cls.stage.value,
        "source": cls.source,
        "page": _page(cls.name),
        "summary": " ".join(doc.partition("\n\n")[0].split()),
        "before": parts.get("Before", ""),
        "after": parts.get("After", ""),
        "cost": parts.get("Cost", ""),
        "doc": doc,
        "default": cls.name in {text.partition(":")[0] for text in DEFAULT_PASSES},
        "options": [
            _option(field, hints[field.name]) | {"meaning": meanings.get(field.name, "")} for field in dataclasses.fields(cls)
        ],
    }


def _sections(doc: str) -> dict[str, str]:
    """Return the paragraphs of a docstring that start with a word and a colon, by the word."""
    found = re.findall(r"^(\w+): (.*(?:\n[ ]+.*)*)", doc, re.MULTILINE)
    return {word: " ".join(text.split()) for word, text in found}


def _meanings(doc: str) -> dict[str, str]:
    """Return what a docstring says of each argument."""
    arguments = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", doc, re.MULTILINE)
    entries = re.findall(r"^[ ]{4}(\w+): (.*(?:\n[ ]{5,}.*)*)", arguments[1], re.MULTILINE) if arguments else []
    return {name: " ".join(text.split()) for name, text in entries}


def _page(name: str) -> str:
    """Return the path of a pass's documentation in the checkout; "" if there is none."""
    page = f"docs/passes/{name}.md"
    return page if (Path(__file__).resolve().parents[1] / page).is_file() else ""


def _option(field: dataclasses.Field[Any], hint: Any) -> dict[str, str]:
    if field.default is not dataclasses.MISSING:
        default = _as_written(field.default)
    elif field.default_factory is not dataclasses.MISSING:
        default = _as_written(field.default_factory())
    else:
        default = "required"
    return {"name": field.name, "type": _type_text(hint), "default": default}


def _type_text(hint: Any) -> str:
    """Return a type in the words of the command line."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if typing.get_origin(hint) is tuple:
        return f"{_type_text(arguments[0])}+..."
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " | ".join(str(member.value) for member in hint)
    if arguments:
        return " | ".join(_type_text(argument) for argument in arguments)
    return {bool: "true | false", type(None): "none", str: "text"}.get(hint, getattr(hint, "__name__", str(hint)))


def _as_written(value: Any) -> str:
    """Return the value of an option in the form that `--pass` takes."""
    if isinstance(value, tuple):
        return "+".join(_as_written(item) for item in value)
    if isinstance(value, enum.Enum):
        return str(value.value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _show(data: dict[str, Any]) -> None:
    shown = console()
    state = "run by default" if data["default"] else f"add it with --pass {data['name']}"
    if data["stage"] == "decode" and not data["default"]:
        state += " --generate"
    shown.print(f"{data['name']} ({data['fidelity']}; {state})", style="bold", markup=False)
    # The options follow as a table.
    shown.print(re.split(r"^(?:Args|Raises):", data["doc"], maxsplit=1, flags=re.MULTILINE)[0].rstrip(), markup=False)
    if data["page"]:
        shown.print(f"\nPage: {data['page']}", markup=False)
    if data["options"]:
        rows = [[option["name"], option["type"], option["default"], option["meaning"]] for option in data["options"]]
        shown.print()
        shown.print(table("options", ["name", "type", "default", "meaning"], rows))
