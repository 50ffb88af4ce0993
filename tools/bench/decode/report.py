"""Results of decoding as tables, a page and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from graphwright.tools.bench.models.report import machine_with_packages
from graphwright.tools.bench.report import title

from .measure import Result, Timing

_NONE = "-"


def speed_table(results: Sequence[Result], names: Sequence[str], threads: int) -> Table:
    """Return new tokens a second at one number of threads.

    Args:
        results: all results.
        names: rivals, a column each.
        threads: the number of threads.
    """
    table = Table(title=f"{_threads(threads)}: new tokens a second, medians by {_clock(threads)}")
    return _filled(table, _speed_columns(names), [_speeds(r, names) for r in results if r.threads == threads])


def first_table(results: Sequence[Result], names: Sequence[str], threads: int) -> Table:
    """Return the time until the first new token, at one number of threads; the arguments are those of `speed_table`."""
    table = Table(title=f"{_threads(threads)}: ms until the first new token, medians")
    return _filled(table, ["batch x context", *names], [_firsts(r, names) for r in results if r.threads == threads])


def failures(results: Sequence[Result]) -> Iterator[str]:
    """Yield why numbers are missing, each reason once with the cases that it holds for."""
    places: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, reason in result.failures.items():
            places.setdefault((name, reason), []).append(f"{result.name}, {_threads(result.threads)}")
    for (name, reason), where in places.items():
        yield f"{name} ({'; '.join(where)}): {reason}"


def to_json(results: Sequence[Result], command: str) -> dict[str, Any]:
    """Return everything measured, with a description of the machine and the command that measured."""
    return {
        "command": command,
        "machine": machine_with_packages(),
        "results": [dataclasses.asdict(result) for result in results],
    }


def to_markdown(results: Sequence[Result], names: Sequence[str], threads: Sequence[int], command: str) -> str:
    """Return the tables as a page in Markdown, with a description of the machine.

    Args:
        results: all results.
        names: rivals, a column each.
        threads: numbers of threads, two tables each.
        command: the command line that measured.
    """
    found = machine_with_packages()
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items())
    lines = [
        title(found),
        "",
        f"Written by `{command}` with Python {found['python']}, {packages}.",
        "",
        "New tokens of all sequences in a second, medians; the best competitor in bold. The ratio is its time from token to",
        "token divided by ours, the median over interleaved rounds (p20: that of their 20th percentiles): above 1, ours is",
        "faster. `*`: below the bar. The tokens of all are the same. [What a number means](README.md).",
    ]
    for count in threads:
        chosen = [result for result in results if result.threads == count]
        lines += ["", f"## {_threads(count)}, {_clock(count)}", ""]
        lines += _markdown(_speed_columns(names), [_speeds(result, names) for result in chosen])
        lines += ["", "Milliseconds until the first new token:", ""]
        lines += _markdown(["batch x context", *names], [_firsts(result, names) for result in chosen])
    if reasons := list(failures(results)):
        lines += ["", "No number:", "", *(f"- {reason}" for reason in reasons)]
    return "\n".join(lines) + "\n"


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _clock(threads: int) -> str:
    return "CPU time" if threads == 1 else "wall time"


def _speed_columns(names: Sequence[str]) -> list[str]:
    return ["batch x context", *names, "ratio", "p20", "bar"]


def _speeds(result: Result, names: Sequence[str]) -> list[str]:
    """Return a row: the best competitor in bold, a dash where there is no number."""
    cells = [result.name]
    for name in names:
        text = _number(result.timings.get(name), "tokens_per_s")
        cells.append(f"[bold]{text}[/bold]" if name == result.best else text)
    ratio = _NONE if result.ratio is None else f"{result.ratio:.2f}"
    if result.ratio is not None and result.bar is not None:
        ratio = f"[yellow]{ratio} *[/yellow]" if result.below_bar else f"[green]{ratio}[/green]"
    p20 = _NONE if result.ratio_p20 is None else f"{result.ratio_p20:.2f}"
    return [*cells, ratio, p20, "" if result.bar is None else f"{result.bar:g}"]


def _firsts(result: Result, names: Sequence[str]) -> list[str]:
    return [result.name, *(_number(result.timings.get(name), "first_ms") for name in names)]


def _number(timing: Timing | None, which: str) -> str:
    if timing is None:
        return _NONE
    value: float = getattr(timing, which)
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _filled(table: Table, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        bold = [cell.replace("[bold]", "**").replace("[/bold]", "**") for cell in row]
        lines.append("| " + " | ".join(Text.from_markup(cell).plain for cell in bold) + " |")
    return lines
