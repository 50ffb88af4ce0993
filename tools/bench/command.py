"""The command line of the benchmark of kernels."""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from .measure import Measurement

QUICK_REPEAT = 5


def parse_threads(context: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    """Return numbers of threads from a text such as "1,2", each once."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise click.BadParameter(f"expected numbers of threads such as 1,2, got {text!r}")
    return list(dict.fromkeys(counts))


@click.command("kernels")
@click.option("--kernel", "names", multiple=True, metavar="NAME", help="Measure this kernel only; may be repeated.")
@click.option("--threads", default="1,2", show_default=True, callback=parse_threads, help="Numbers of threads, with commas.")
@click.option("--repeat", type=click.IntRange(1), help="Pairs of measurements per comparison.  [default: 11; 5 if quick]")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Also write the results here.")
@click.option("--markdown", "page", type=click.Path(path_type=Path, dir_okay=False), help="Also write the table here.")
@click.option("--quick", is_flag=True, help="Measure the small cases only.")
@click.pass_context
def kernels(
    context: click.Context,
    names: tuple[str, ...],
    threads: list[int],
    repeat: int | None,
    json_path: Path | None,
    page: Path | None,
    quick: bool,
) -> None:
    """Compare Triton kernels on this CPU with PyTorch.

    A ratio is PyTorch's time divided by ours, the median over pairs of runs that alternate; with one thread it is CPU time,
    with more wall time. Results are checked first. A ratio below its bar is marked with an asterisk.

    Exits with 1 if a result is wrong or a kernel fails.
    """
    import torch
    from rich.console import Console
    from rich.live import Live

    from .cases import KERNELS
    from .measure import keep_memory, measure
    from .report import rows, to_json, to_markdown, to_table

    for name in names:
        if name not in KERNELS:
            raise click.BadParameter(_unknown(name, list(KERNELS)), param_hint="--kernel")
    # Where there is no terminal, rich would take 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = to_table(threads)
    measurements: list[Measurement] = []
    keep_memory()
    with Live(table, console=console, refresh_per_second=1) as live:
        for name in dict.fromkeys(names) or KERNELS:
            for build in KERNELS[name]():
                torch.manual_seed(0)
                case = build()
                if quick and not case.quick:
                    continue
                measurement = measure(name, case, threads, repeat or (QUICK_REPEAT if quick else 11))
                measurements.append(measurement)
                # Written every time, so that a run that is stopped leaves what it has measured.
                if json_path is not None:
                    json_path.write_text(json.dumps(to_json(measurements), indent=2) + "\n")
                if page is not None:
                    page.write_text(to_markdown(measurements, threads))
                for row in rows(measurement, threads):
                    table.add_row(*row)
                live.refresh()
    context.exit(1 if any(m.problem for m in measurements) else 0)


def _unknown(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)
    return f"there is no kernel {name!r}; did you mean {nearest[0]!r}? Known: {', '.join(known)}"
