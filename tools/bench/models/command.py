"""The command line of the benchmark of models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphwright.ir.errors import unknown
from graphwright.tools.bench.command import parse_threads

if TYPE_CHECKING:
    from rich.console import Console

    from .measure import Result
    from .rows import Row
    from .startup import Startup

REPEAT, QUICK_REPEAT = 15, 5

ARGUMENTS = __name__
"""Under this key a context's `meta` has the arguments as they were given."""

ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""What must be set before torch is loaded: waiting threads that spin hold up the others where cores are shared."""


class KeepingCommand(click.Command):
    """A command that keeps its arguments as they were given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments, then parse them."""
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


def check_picture(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse before the work what could not be drawn after it."""
    if path is None:
        return None
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise click.BadParameter("matplotlib is not installed: pip install graphwright[bench]") from None
    endings = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:] not in endings:
        raise click.BadParameter(f"{path.name!r} should end with one of {', '.join(endings)}")
    return path


@click.command("models", cls=KeepingCommand)
@click.option("--row", "row_names", multiple=True, metavar="NAME", help="Measure this row only; may be repeated.")
@click.option("--rival", "rival_names", multiple=True, metavar="NAME", help="Compare these only; may be repeated.")
@click.option("--threads", default="1,2", show_default=True, callback=parse_threads, help="Numbers of threads, with commas.")
@click.option("--repeat", type=click.IntRange(1), help=f"Samples per rival.  [default: {REPEAT}; {QUICK_REPEAT} if quick]")
@click.option(
    "--ragged", is_flag=True, help="Give the encoder padded sequences of different lengths; ours leaves the padding out."
)
@click.option("--startup", "with_startup", is_flag=True, help="Also measure compile times and memory; takes minutes.")
@click.option("--profile", "with_profile", is_flag=True, help="Also show where our time goes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Also write the results here.")
@click.option("--markdown", "page", type=click.Path(path_type=Path, dir_okay=False), help="Also write the tables here.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=check_picture,
    help="Also draw the speeds here.",
)
@click.option("--quick", is_flag=True, help="Measure the small rows only.")
@click.pass_context
def models(
    context: click.Context,
    row_names: tuple[str, ...],
    rival_names: tuple[str, ...],
    threads: list[int],
    repeat: int | None,
    ragged: bool,
    with_startup: bool,
    with_profile: bool,
    json_path: Path | None,
    page: Path | None,
    picture: Path | None,
    quick: bool,
) -> None:
    """Compare compiled models on this CPU with PyTorch, torch.compile and onnxruntime.

    The ratio is the best competitor's time divided by ours, the median over rounds in which all run in turns; with one thread
    it is CPU time, with more wall time. Results are checked first. A ratio below its bar is marked with an asterisk, a
    competitor that cannot run shown as a dash.

    Exits with 1 if our result is wrong or missing.
    """
    arguments: list[str] = context.meta[ARGUMENTS]
    if not is_environment_set():
        context.exit(again("models", arguments))

    from rich.console import Console

    from graphwright.tools.bench.measure import keep_memory

    from .rivals import OURS, RIVALS
    from .rows import ROWS

    chosen = [ROWS[name] for name in chosen_names(row_names, ROWS, "--row")]
    rows = [row for row in chosen if row_names or row.quick or not quick]
    names = chosen_names(rival_names, RIVALS, "--rival")
    # Where there is no terminal, rich would take 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    keep_memory()
    command = _command(row_names, rival_names, threads, repeat, ragged=ragged, quick=quick)
    run = _Run(console, names, threads, json_path, page, command)
    run.measure(rows, repeat or (QUICK_REPEAT if quick else REPEAT), ragged)
    if with_startup:
        run.measure_startups([row.name for row in rows])
    run.show()
    if with_profile:
        ours = {result.row for result in run.results if OURS in result.timings}
        for row in rows:
            if row.name in ours:
                _show_profile(console, row, max(threads), ragged)
    if picture is not None:
        from .report import plot

        plot(run.results, names, picture)
    failed = any(OURS in result.failures for result in run.results)
    failed |= any(startup.rival == OURS and startup.failure for startup in run.startups)
    context.exit(1 if failed else 0)


class _Run:
    """What has been measured so far, written to files after every step: a run that is stopped leaves what it has."""

    def __init__(
        self, console: Console, names: list[str], threads: list[int], json_path: Path | None, page: Path | None, command: str
    ) -> None:
        self.console, self.names, self.threads = console, names, threads
        self.json_path, self.page, self.command = json_path, page, command
        self.results: list[Result] = []
        self.startups: list[Startup] = []

    def measure(self, rows: Sequence[Row], repeat: int, ragged: bool) -> None:
        from .measure import measure

        with progress() as tell:
            for row in rows:
                for count in self.threads:
                    about = f"{row.name}, {count} thread{'s' if count > 1 else ''}"
                    found = measure(row, count, self.names, repeat, ragged=ragged, tell=partial(_tell_about, tell, about))
                    self.results.append(found)
                    self._write()

    def measure_startups(self, rows: Sequence[str]) -> None:
        from .rivals import EAGER, OURS
        from .startup import measure_startup

        with progress() as tell:
            for row in rows:
                for name in (n for n in self.names if n in (OURS, EAGER, "compile")):
                    tell(f"{row}: {name} in a process of its own")
                    self.startups.append(measure_startup(row, name, max(self.threads)))
                    self._write()

    def show(self) -> None:
        from rich.markup import escape

        from .report import failures, startup_table, to_table

        for count in self.threads:
            self.console.print(to_table(self.results, self.names, count))
        for line in failures(self.results):
            self.console.print(f"[red]-[/red] {escape(line)}", highlight=False)
        if self.startups:
            self.console.print(startup_table(self.startups))

    def _write(self) -> None:
        from .report import to_json, to_markdown

        if self.json_path is not None:
            self.json_path.write_text(json.dumps(to_json(self.results, self.startups, self.command), indent=2) + "\n")
        if self.page is not None:
            self.page.write_text(to_markdown(self.results, self.names, self.threads, self.startups, self.command))


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows on stderr what is being done now."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: click.echo(text, err=True)
        return
    # No refreshing by a thread, which would take time from what is measured.
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda text: live.update(text, refresh=True)


def _tell_about(tell: Callable[[str], None], about: str, text: str) -> None:
    tell(f"{about}: {text}")


def _show_profile(console: Console, row: Row, threads: int, ragged: bool) -> None:
    import torch

    from .profile import kinds_table, steps_table
    from .rivals import Case, compile_ours

    torch.set_num_threads(threads)
    case = Case(row, row.load(), row.inputs(ragged), threads)
    inputs: dict[str, Any] = dict(case.inputs)
    profile = compile_ours(case).profile(**inputs)
    steps = [(step.name, step.kind, step.us) for step in profile.rows]
    steps.append(("between steps", "gap", profile.overhead_us))
    console.print(f"{row.name}, {threads} thread{'s' if threads > 1 else ''}", highlight=False)
    console.print(kinds_table(steps))
    console.print(steps_table(steps))


def _command(
    rows: Sequence[str], rivals: Sequence[str], threads: Sequence[int], repeat: int | None, *, ragged: bool, quick: bool
) -> str:
    """Return the command line that measures the same, without the files that it writes."""
    words = ["graphwright bench models", *(f"--row {name}" for name in rows), *(f"--rival {name}" for name in rivals)]
    words += [f"--threads {','.join(map(str, threads))}", *([f"--repeat {repeat}"] if repeat else [])]
    return " ".join([*words, *(["--ragged"] if ragged else []), *(["--quick"] if quick else [])])


def is_environment_set() -> bool:
    """Return whether this process has the environment that a benchmark needs: OpenMP reads it once, when torch is loaded."""
    return all(os.environ.get(name, "").upper() == value for name, value in ENVIRONMENT.items())


def again(name: str, arguments: Sequence[str]) -> int:
    """Run a benchmark in a fresh process with the environment that it needs, and return its exit code."""
    command = [sys.executable, "-m", "graphwright.tools.cli", "bench", name, *arguments]
    return subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=False).returncode


def chosen_names(names: Sequence[str], known: Collection[str], option: str) -> list[str]:
    """Return the names, each once; all known ones where none is given."""
    for name in names:
        if name not in known:
            raise click.BadParameter(unknown(option.lstrip("-"), name, known), param_hint=option)
    return list(dict.fromkeys(names) or known)
