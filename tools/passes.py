"""`graphwright passes`: what can be done to a model."""

from __future__ import annotations

import dataclasses
import enum
import inspect
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
        keys = ("name", "fidelity", "summary", "default")
        print_json([{key: entry[key] for key in keys} for entry in found])
        return
    rows = [[f["name"], f["fidelity"], "yes" if f["default"] else "", f["summary"]] for f in found]
    console().print(table("passes", ["name", "fidelity", "by default", "what it does"], rows))


def explain(cls: type[Pass]) -> dict[str, Any]:
    """Return what there is to know of a pass, as plain data.

    Keys: `name`, `fidelity`, `source` (the paper, "" if there is none), `summary` (the first line), `doc` (all of the
    docstring), `default` (whether every compilation runs it), `options` (each with `name`, `type`, `default` as text).
    """
    from graphwright.pipeline import DEFAULT_PASSES

    doc = inspect.getdoc(cls) or ""
    return {
        "name": cls.name,
        "fidelity": cls.fidelity.value,
        "source": cls.source,
        "summary": " ".join(doc.partition("\n\n")[0].split()),
        "doc": doc,
        "default": cls.name in {text.partition(":")[0] for text in DEFAULT_PASSES},
        "options": [_option(cls, field) for field in dataclasses.fields(cls)],
    }


def _option(cls: type[Pass], field: dataclasses.Field[Any]) -> dict[str, str]:
    kind = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
    if field.default is not dataclasses.MISSING:
        default = _as_written(field.default)
    elif field.default_factory is not dataclasses.MISSING:
        default = _as_written(field.default_factory())
    else:
        default = "required"
    return {"name": field.name, "type": kind, "default": default}


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
    shown.print(f"{data['name']} ({data['fidelity']}; {state})", style="bold", markup=False)
    shown.print(data["doc"], markup=False)
    if data["source"]:
        shown.print(f"\nSource: {data['source']}", markup=False)
    if data["options"]:
        rows = [[option["name"], option["type"], option["default"]] for option in data["options"]]
        shown.print(table("options", ["name", "type", "default"], rows))
