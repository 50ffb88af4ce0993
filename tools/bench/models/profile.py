"""Where the time of one call of a compiled model goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

Step = tuple[str, str, float]
"""A step's name, its kind ("kernel", "matmul", "call" or "gap"), and its microseconds."""

DEFAULT_LINES = 20


def kinds_table(steps: Sequence[Step]) -> Table:
    """Return the time per kind of step, longest first, with a line for the sum.

    Args:
        steps: every step of one call, in order.
    """
    table = Table(title="time per kind of step")
    _add_columns(table, "kind")
    kinds: dict[str, list[float]] = defaultdict(list)
    for _, kind, microseconds in steps:
        kinds[kind].append(microseconds)
    whole = sum(microseconds for _, _, microseconds in steps)
    for kind, times in sorted(kinds.items(), key=lambda item: -sum(item[1])):
        _add(table, (kind,), times, whole)
    table.add_section()
    _add(table, ("all",), [microseconds for _, _, microseconds in steps], whole)
    return table


def steps_table(steps: Sequence[Step], lines: int = DEFAULT_LINES) -> Table:
    """Return the time per step, longest first; steps of one name and kind are one line.

    Args:
        steps: every step of one call, in order.
        lines: number of lines; the others are left out, and the title says how many.
    """
    names: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, kind, microseconds in steps:
        names[name, kind].append(microseconds)
    left_out = max(0, len(names) - lines)
    table = Table(title="time per step" + (f" ({left_out} shorter ones left out)" if left_out else ""))
    _add_columns(table, "step", "kind")
    whole = sum(microseconds for _, _, microseconds in steps)
    for head, times in sorted(names.items(), key=lambda item: -sum(item[1]))[:lines]:
        _add(table, head, times, whole)
    return table


def _add_columns(table: Table, *head: str) -> None:
    for column in head:
        table.add_column(column)
    for column in ("times", "us", "share"):
        table.add_column(column, justify="right")


def _add(table: Table, head: Sequence[str], times: Sequence[float], whole: float) -> None:
    share = sum(times) / whole if whole else 0.0
    table.add_row(*map(escape, head), str(len(times)), f"{sum(times):.1f}", f"{share:.1%}")
