"""Results as a table and as JSON."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .measure import Comparison, Measurement


def to_table(threads: Sequence[int]) -> Table:
    """Return the table without rows.

    Args:
        threads: numbers of threads, a column each.
    """
    table = Table(title="time of the rival / time of our kernel: above 1, ours is faster")
    for column in ("kernel", "case", "against"):
        table.add_column(column, no_wrap=column == "kernel")
    for count in threads:
        table.add_column(f"{count} thread{'s' if count > 1 else ''}", justify="right")
    for column in ("bar", "ms", "error", "compile ms"):
        table.add_column(column, justify="right")
    return table


def rows(measurement: Measurement, threads: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """Yield the table's rows for a measurement."""
    head = (measurement.kernel, escape(measurement.case))
    error = f"{measurement.error:.0e}"
    many = f" ({measurement.compilations})" if measurement.compilations > 1 else ""
    # What an earlier case has compiled is not compiled again.
    compile_ms = f"{measurement.compile_ms:.0f}{many}" if measurement.compilations else ""
    if measurement.problem:
        yield (*head, f"[red]{escape(measurement.problem)}[/red]", *[""] * len(threads), "", "", error, compile_ms)
    for k, comparison in enumerate(measurement.comparisons):
        ratios = [_ratio(comparison, count) for count in threads]
        bar = "" if comparison.bar is None else f"{comparison.bar:g}"
        ours = " / ".join(f"{t.our_ms:.3g}" for t in comparison.timings)
        first = (*head, escape(comparison.rival))
        yield (*(first if k == 0 else ("", "", first[2])), *ratios, bar, ours, *((error, compile_ms) if k == 0 else ("", "")))


def _ratio(comparison: Comparison, threads: int) -> str:
    timing = next(t for t in comparison.timings if t.threads == threads)
    text = f"{timing.ratio:.2f}"
    if comparison.bar is None:
        return text
    return f"[green]{text}[/green]" if timing.ratio >= comparison.bar else f"[yellow]{text} *[/yellow]"


def to_markdown(measurements: Sequence[Measurement], threads: Sequence[int]) -> str:
    """Return the table as a page in Markdown, with a description of the machine."""
    found = machine()
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    columns = ["kernel", "case", "against", *(f"{n} thread{'s' if n > 1 else ''}" for n in threads), "bar", "ms", "error"]
    lines = [
        title(found),
        "",
        f"Written by `graphwright bench --markdown PATH` with Python {found['python']}, {packages}.",
        "",
        "A number is the time of the rival divided by the time of our kernel, the median of interleaved pairs: above 1, ours",
        "is faster. `*`: below the bar.",
        "[What a number means](README.md).",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for measurement in measurements:
        for row in rows(measurement, threads):
            cells = [Text.from_markup(cell).plain.strip() for cell in row[: len(columns)]]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """Return a description of this machine and of the packages that take part."""
    from graphwright.tools.doctor import diagnose

    diagnosis = dataclasses.asdict(diagnose())
    del diagnosis["problems"]
    return {**diagnosis, "cores": os.cpu_count(), "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else []}


def title(machine: dict[str, Any]) -> str:
    """Return a machine's name as the heading of a page.

    Args:
        machine: what `machine` returned.
    """
    return f"# {machine['cpu']}, {machine['cores']} cores, {machine['isa']} ({', '.join(machine['isa_features'])})"


def to_json(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return everything measured, with a description of the machine."""
    return {"machine": machine(), "measurements": [dataclasses.asdict(m) for m in measurements]}
