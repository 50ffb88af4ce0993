"""Outcomes of a sweep as a table, a page and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from graphwright.tools.bench.models.report import machine_with_packages
from graphwright.tools.bench.report import title
from graphwright.tools.output import table

from .frame import UNITS, Outcome, Sweep


def columns(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the headings of a table: the setting, its quality and its cost, and "predicted" behind what is predicted."""
    keys = ["setting"]
    for part in ("quality", "cost"):
        for key in dict.fromkeys(key for outcome in outcomes for key in getattr(outcome, part)):
            keys.append(key)
            if part == "cost" and any(key in outcome.predicted for outcome in outcomes):
                keys.append(f"{key} predicted")
    return keys


def cells(outcome: Outcome, keys: Sequence[str]) -> list[str]:
    """Return a row of texts, one for each heading; "-" where there is no number."""
    numbers: dict[str, float] = {**outcome.quality, **outcome.cost}
    numbers.update({f"{key} predicted": value for key, value in outcome.predicted.items()})
    return [outcome.setting.name, *(_text(key, numbers[key]) if key in numbers else "-" for key in keys[1:])]


def _text(key: str, value: float) -> str:
    if value.is_integer() and abs(value) < 1e6:
        return str(int(value))
    if "ratio" in key or abs(value) < 10:
        return f"{value + 0.0:.3f}" if abs(value) >= 5e-4 or value == 0 else f"{value:.0e}"
    return f"{value:.3g}" if abs(value) >= 1e6 else f"{value:.0f}"


def problems(outcomes: Sequence[Outcome]) -> list[str]:
    """Return why numbers are missing, a line each."""
    return [f"{outcome.setting.name}: {outcome.problem}" for outcome in outcomes if outcome.problem]


def to_table(sweep: Sweep, outcomes: Sequence[Outcome]) -> Table:
    """Return the outcomes as a table for a terminal."""
    keys = columns(outcomes)
    made: Table = table(sweep.title, keys, [cells(outcome, keys) for outcome in outcomes], right=tuple(keys[1:]))
    return made


def to_json(sweep: Sweep, outcomes: Sequence[Outcome], command: str) -> dict[str, Any]:
    """Return everything measured, with a description of the machine and the command that measured."""
    return {
        "command": command,
        "sweep": {"name": sweep.name, "title": sweep.title, "x": sweep.x, "y": sweep.y},
        "machine": machine_with_packages(),
        "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
    }


def to_markdown(sweep: Sweep, outcomes: Sequence[Outcome], command: str, picture: str = "") -> str:
    """Return the outcomes as a page in Markdown.

    Args:
        sweep: what was swept.
        outcomes: what was found.
        command: the command line that measured.
        picture: the picture's path relative to the page; "" for none.
    """
    found = machine_with_packages()
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items())
    keys = columns(outcomes)
    lines = [
        f"# {sweep.title[0].upper()}{sweep.title[1:]}",
        "",
        f"Written by `{command}` on{title(found).removeprefix('#')}, with Python {found['python']}, {packages}.",
        "",
        *([f"![{sweep.y} against {sweep.x}]({picture})", ""] if picture else []),
        *(f"- `{key}`: {UNITS[key]}" for key in keys if key in UNITS),
        "",
        "| " + " | ".join(keys) + " |",
        "|---|" + "---:|" * (len(keys) - 1),
        *("| " + " | ".join(cells(outcome, keys)) + " |" for outcome in outcomes),
    ]
    passes = [outcome.setting for outcome in outcomes if outcome.setting.passes]
    lines += ["", *(f"- {setting.name}: `{' '.join(setting.passes)}`" for setting in passes)]
    if missing := problems(outcomes):
        lines += ["", "No number:", "", *(f"- {line}" for line in missing)]
    return "\n".join(lines) + "\n"
