"""A real sentence encoder, compiled, against the original: how fast, how much memory, and whether it finds the same.

Then the encoder and a small language model with passes that make them do less work.

python -m graphwright.tools.demo
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

from .output import Command, console, json_option, print_json

ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""What must be set before torch is loaded: waiting threads that spin hold up the others where cores are shared."""

LOWEST_COSINE, LARGEST_DIFFERENCE = 0.99999, 1e-4
"""What the embeddings have to keep to."""


@click.command(cls=Command)
@click.option("--quick", is_flag=True, help="Take 200 docstrings only, and fewer timings.")
@json_option
@click.pass_context
def demo(context: click.Context, quick: bool, as_json: bool) -> None:
    """Embed every docstring of Python's standard library with all-MiniLM-L6-v2, by PyTorch and compiled, and compare.

    Then run it, and a small language model, with passes that make them do less work, one by one and together.

    Exits with 1 if the embeddings differ by more than rounding.
    """
    with _progress() as tell:
        tell("loading torch")
        from . import demo_less
        from .demo_outcome import stages, tables
        from .demo_run import run

        outcome = run(quick=quick, tell=tell)
        less = demo_less.run(quick=quick, tell=tell)
    agree = outcome.cosine_min >= LOWEST_COSINE and outcome.largest_difference <= LARGEST_DIFFERENCE
    if as_json:
        from .bench.report import machine

        print_json({"machine": machine(), "agree": agree, **dataclasses.asdict(outcome), "less": dataclasses.asdict(less)})
    else:
        shown = console()
        shown.print(_machine(), markup=False)
        for line in stages(outcome):
            shown.print(line, markup=False)
        for part in (*tables(outcome), *demo_less.tables(less)):
            shown.print(part)
        if not agree:
            shown.print(f"The embeddings differ: allowed are {LARGEST_DIFFERENCE:.0e} and a cosine of {LOWEST_COSINE}.")
    context.exit(0 if agree else 1)


def _machine() -> str:
    import platform

    import torch

    from .doctor import diagnose

    found = diagnose()
    python = platform.python_version()
    return f"{found.cpu}, {torch.get_num_threads()} threads, Python {python}, torch {torch.__version__}"


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows on standard error what is being done now."""
    from rich.console import Console
    from rich.live import Live

    errors = Console(stderr=True)
    if not errors.is_terminal:
        told = ""

        def tell(text: str) -> None:
            nonlocal told
            # What only counts on is told once.
            words = re.sub(r"\d+", "", text)
            if words != told:
                told = words
                click.echo(f"{text} ...", err=True)

        yield tell
        return
    # No refreshing by a thread, which would take time from what is measured.
    with Live(console=errors, auto_refresh=False, transient=True) as live:
        yield lambda text: live.update(f"{text} ...", refresh=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo as the command line `argv` says (default: the process's own), and return the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if ENVIRONMENT.keys() - os.environ.keys():
        command = [sys.executable, "-m", "graphwright.tools.demo", *arguments]
        return subprocess.run(command, env={**ENVIRONMENT, **os.environ}, check=False).returncode
    try:
        demo.main(args=arguments, prog_name="python -m graphwright.tools.demo")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


if __name__ == "__main__":
    sys.exit(main())
