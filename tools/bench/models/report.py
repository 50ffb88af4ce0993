"""Results of models as tables, a page, JSON and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from graphwright.tools.bench.report import machine, title

from .measure import Result
from .rivals import OURS
from .startup import Startup

_PACKAGES = ("transformers", "onnxruntime", "onnxscript")
_NONE = "-"


def to_table(results: Sequence[Result], names: Sequence[str], threads: int) -> Table:
    """Return the results at one number of threads.

    Args:
        results: all results.
        names: rivals, a column each.
        threads: the number of threads.
    """
    clock = "CPU time" if threads == 1 else "wall time"
    table = Table(title=f"{threads} thread{'s' if threads > 1 else ''}: median {clock} in ms")
    for name, column in zip(_columns(names), _columns(names), strict=True):
        table.add_column(column, justify="left" if name == "row" else "right", no_wrap=True)
    for result in results:
        if result.threads == threads:
            table.add_row(*_cells(result, names))
    return table


def _columns(names: Sequence[str]) -> list[str]:
    return ["row", *names, "ratio", "p20", "bar", "error"]


def _cells(result: Result, names: Sequence[str]) -> list[str]:
    """Return a row: the best competitor in bold, a dash where there is no number."""
    cells = [escape(result.row)]
    for name in names:
        timing = result.timings.get(name)
        text = _NONE if timing is None else _ms(timing.median_ms)
        cells.append(f"[bold]{text}[/bold]" if name == result.best else text)
    ratio = _NONE if result.ratio is None else f"{result.ratio:.2f}"
    if result.ratio is not None:
        ratio = f"[yellow]{ratio} *[/yellow]" if result.below_bar else f"[green]{ratio}[/green]"
    ours = result.timings.get(OURS)
    p20 = _NONE if result.ratio_p20 is None else f"{result.ratio_p20:.2f}"
    return [*cells, ratio, p20, f"{result.bar:g}", _NONE if ours is None else f"{ours.error:.0e}"]


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"


def failures(results: Sequence[Result]) -> Iterator[str]:
    """Yield why numbers are missing, each reason once with the rows that it holds for."""
    rows: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, reason in result.failures.items():
            places = rows.setdefault((name, reason), [])
            if result.row not in places:
                places.append(result.row)
    for (name, reason), places in rows.items():
        yield f"{name} ({', '.join(places)}): {reason}"


def startup_table(startups: Sequence[Startup]) -> Table:
    """Return compile times and memory, a line per row and rival."""
    table = Table(title="first result in s, highest resident memory in MiB; each in a process of its own")
    for column in _STARTUP_COLUMNS:
        table.add_column(column, justify="left" if column in ("row", "rival") else "right")
    for startup in startups:
        table.add_row(*_startup_cells(startup))
    return table


_STARTUP_COLUMNS = ("row", "rival", "cold", "warm", "memory until then", "memory of a call")


def _startup_cells(startup: Startup) -> list[str]:
    head = [escape(startup.row), escape(startup.rival)]
    if startup.failure:
        return [*head, f"[red]{escape(startup.failure)}[/red]", "", "", ""]
    memory = (startup.ready_peak_bytes, startup.call_peak_bytes)
    return [*head, f"{startup.cold_s:.1f}", f"{startup.warm_s:.1f}", *(f"{size / 2**20:.0f}" for size in memory)]


def to_json(results: Sequence[Result], startups: Sequence[Startup], command: str) -> dict[str, Any]:
    """Return everything measured, with a description of the machine and the command that measured."""
    return {
        "command": command,
        "machine": machine_with_packages(),
        "results": [dataclasses.asdict(result) for result in results],
        "startups": [dataclasses.asdict(startup) for startup in startups],
    }


def machine_with_packages() -> dict[str, Any]:
    """Return a description of this machine and of the packages of all who take part."""
    found = machine()
    for name in _PACKAGES:
        try:
            found["packages"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found["packages"][name] = None
    return found


def to_markdown(
    results: Sequence[Result], names: Sequence[str], threads: Sequence[int], startups: Sequence[Startup], command: str
) -> str:
    """Return the tables as a page in Markdown, with a description of the machine.

    Args:
        results: all results.
        names: rivals, a column each.
        threads: numbers of threads, a table each.
        startups: compile times and memory; a table of their own where there are any.
        command: the command line that measured.
    """
    found = machine_with_packages()
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items())
    lines = [
        title(found),
        "",
        f"Written by `{command}` with Python {found['python']}, {packages}.",
        "",
        "Milliseconds per call, medians; the best competitor in bold. The ratio is its time divided by ours, the median over",
        "interleaved rounds (p20: that of their 20th percentiles): above 1, ours is faster. `*`: below the bar. The error is",
        "our largest absolute difference from eager. [What a number means](README.md).",
    ]
    for count in threads:
        clock = "CPU time" if count == 1 else "wall time"
        lines += ["", f"## {count} thread{'s' if count > 1 else ''}, {clock}", "", *_header(_columns(names))]
        lines += [_line(_cells(result, names)) for result in results if result.threads == count]
    if reasons := list(failures(results)):
        lines += ["", "No number:", "", *(f"- {reason}" for reason in reasons)]
    if startups:
        lines += ["", "## First result (s) and highest resident memory (MiB)", "", *_header(_STARTUP_COLUMNS)]
        lines += [_line(_startup_cells(startup)) for startup in startups]
    return "\n".join(lines) + "\n"


def _header(columns: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def _line(cells: Sequence[str]) -> str:
    bold = [cell.replace("[bold]", "**").replace("[/bold]", "**") for cell in cells]
    return "| " + " | ".join(Text.from_markup(cell).plain.strip().replace("|", "\\|") for cell in bold) + " |"


def plot(results: Sequence[Result], names: Sequence[str], path: Path) -> None:
    """Draw each rival's speed relative to the best competitor, a panel per number of threads.

    Args:
        results: all results.
        names: rivals, a colour each.
        path: where the picture goes; its ending decides the format.

    Raises:
        ValueError: matplotlib does not know the ending.
    """
    from matplotlib.figure import Figure

    counts = sorted({result.threads for result in results})
    figure = Figure(figsize=(12, 3.5 * len(counts)), layout="constrained")
    width = 0.8 / len(names)
    for number, count in enumerate(counts, start=1):
        axes = figure.add_subplot(len(counts), 1, number)
        shown = [result for result in results if result.threads == count and result.best]
        for k, name in enumerate(names):
            places = [x + (k - (len(names) - 1) / 2) * width for x, result in enumerate(shown) if name in result.timings]
            speeds = [r.timings[r.best].median_ms / r.timings[name].median_ms for r in shown if name in r.timings]
            axes.bar(places, speeds, width, label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(shown)), [result.row for result in shown])
        axes.set_ylabel("speed / best competitor's")
        axes.set_title(f"{count} thread{'s' if count > 1 else ''}")
        axes.legend(ncols=len(names), fontsize="small")
    figure.savefig(path)
