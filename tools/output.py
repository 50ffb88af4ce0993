"""What the commands share: how failures are shown, JSON, tables, and files that are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

Function = TypeVar("Function", bound=Callable[..., Any])

WIDTH = 150
"""Columns of a table where there is no terminal."""


class Command(click.Command):
    """A command whose failures are one message on standard error and exit code 1; `--debug` adds the traceback."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the traceback of a failure."))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        debug = ctx.params.pop("debug")
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if debug:
                traceback.print_exception(error, file=sys.stderr)
            raise click.ClickException(message_of(error)) from error


def message_of(error: Exception) -> str:
    """Return what to tell of an error: its message and notes; the type too where it is none that Graphwright words."""
    from graphwright.ir.errors import GraphwrightError

    text = str(error) or "no message"
    if not isinstance(error, GraphwrightError | OSError):
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    return "\n".join([text, *getattr(error, "__notes__", ())])


def json_option(function: Function) -> Function:
    """Add the option `--json`, passed as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")(function)


def print_json(data: Any) -> None:
    """Print plain data as JSON on standard output; a number that is not finite, which JSON has not, is null."""
    click.echo(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def console() -> Console:
    """Return the console of results, standard output."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show on standard error what is being done, while it is; only on a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def spoken_progress(what: str) -> Iterator[Callable[[str], None]]:
    """Show the same, and give a function that says what part of it is being done."""
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(what) as status:
        yield lambda part: status.update(f"{what} {escape(part)}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Show that a file is being written, and say which one where that fails.

    Raises:
        click.ClickException: it cannot be written.
    """
    with progress(f"writing {path}"):
        try:
            yield
        except OSError as error:
            raise click.ClickException(
                f"{path} cannot be written: {error.strerror or error}; what was there before is unchanged"
            ) from error


def check_output(path: Path, suffix: str, option: str) -> None:
    """Check, before any work, that a file can be written there.

    Raises:
        click.BadParameter: its name ends otherwise, its folder is missing or may not be written to, or it is a folder.
    """
    if path.suffix != suffix:
        raise click.BadParameter(f"{path.name!r} should end with {suffix}", param_hint=option)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise click.BadParameter(f"there is no folder {str(path.parent)!r}", param_hint=option)
    if not os.access(folder, os.W_OK):
        raise click.BadParameter(f"the folder {str(path.parent)!r} may not be written to", param_hint=option)


def table(title: str, columns: list[str], rows: list[list[Any]], *, right: tuple[str, ...] = ()) -> Any:
    """Return a table of texts that are shown as they are.

    Args:
        title: above it.
        columns: their headings.
        rows: a cell for each column.
        right: the columns that are set to the right.
    """
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    return made


def write_whole(path: Path, data: bytes) -> None:
    """Write a file in one step: if writing fails or is stopped, what was there before stays.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def size_text(count: int) -> str:
    """Return a number of bytes for people, such as "1.5 MiB"."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def percent_text(ratio: float) -> str:
    """Return a ratio in percent, such as "12.5 %"; what rounds to nothing has no sign."""
    return f"{ratio * 100 + 0.0:.1f} %".replace("-0.0 %", "0.0 %")


def time_text(us: float) -> str:
    """Return a time for people, given in microseconds, such as "1.50 ms"."""
    for limit, divisor, unit in ((1e3, 1.0, "us"), (1e6, 1e3, "ms")):
        if us < limit:
            return f"{us / divisor:.3g} {unit}"
    return f"{us / 1e6:.2f} s"
