"""The command line of sweeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graphwright.tools.bench.models.command import ARGUMENTS, KeepingCommand, again, check_picture, is_environment_set
from graphwright.tools.output import console, write_whole

from .frame import SWEEPS

if TYPE_CHECKING:
    from .frame import Outcome, Sweep

REPEAT, QUICK_REPEAT = 15, 5


@click.command("sweep", cls=KeepingCommand)
@click.argument("name", required=False)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Number of threads.")
@click.option("--repeat", type=click.IntRange(1), help=f"Rounds of timing.  [default: {REPEAT}; {QUICK_REPEAT} if quick]")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Also write the results here.")
@click.option("--markdown", "page", type=click.Path(path_type=Path, dir_okay=False), help="Also write the tables here.")
@click.option(
    "--plot", "picture", type=click.Path(path_type=Path, dir_okay=False), callback=check_picture, help="Also draw a picture."
)
@click.option("--quick", is_flag=True, help="Fewer settings.")
@click.pass_context
def sweep(
    context: click.Context,
    name: str | None,
    threads: int,
    repeat: int | None,
    json_path: Path | None,
    page: Path | None,
    picture: Path | None,
    quick: bool,
) -> None:
    """Measure quality against cost over the settings of passes, on real weights.

    Without NAME, the sweeps that there are. Costs are measured with all settings in turns; with one thread, times are CPU
    time, with more, wall time.

    Exits with 1 if a setting has no result.
    """
    from .frame import find_sweep

    if name is None:
        for known in SWEEPS:
            click.echo(f"{known:12} {find_sweep(known).title}")
        return
    if name not in SWEEPS:
        from graphwright.ir.errors import unknown

        raise click.BadParameter(unknown("sweep", name, SWEEPS), param_hint="NAME")
    arguments: list[str] = context.meta[ARGUMENTS]
    if not is_environment_set():
        context.exit(again("sweep", arguments))

    from graphwright.tools.bench.measure import keep_memory

    keep_memory()
    chosen = find_sweep(name)
    words = ["graphwright bench sweep", name, *(["--quick"] if quick else []), f"--threads {threads}"]
    command = " ".join([*words, *([f"--repeat {repeat}"] if repeat else [])])
    outcomes: list[Outcome] = []
    for outcome in chosen.run(chosen.settings(quick), repeat or (QUICK_REPEAT if quick else REPEAT), threads):
        outcomes.append(outcome)
        # Written every time, so that a run that is stopped leaves what it has measured.
        _write(chosen, outcomes, command, json_path, page, picture)
    _show(chosen, outcomes)
    if picture is not None:
        from .plot import plot

        plot(chosen, outcomes, picture)
    context.exit(1 if any(outcome.problem for outcome in outcomes) else 0)


def _show(chosen: Sweep, outcomes: list[Outcome]) -> None:
    from .report import problems, to_table

    shown = console()
    shown.print(to_table(chosen, outcomes))
    for line in problems(outcomes):
        shown.print(f"- {line}", markup=False)


def _write(
    chosen: Sweep, outcomes: list[Outcome], command: str, json_path: Path | None, page: Path | None, picture: Path | None
) -> None:
    from .report import to_json, to_markdown

    if json_path is not None:
        write_whole(json_path, (json.dumps(to_json(chosen, outcomes, command), indent=2) + "\n").encode())
    if page is not None:
        link = Path(os.path.relpath(picture, page.parent)).as_posix() if picture else ""
        write_whole(page, to_markdown(chosen, outcomes, command, link).encode())
