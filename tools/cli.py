"""The `graphwright` command.

Exit codes: 0 done, 1 the run failed, 2 the command line was wrong.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

import graphwright

COMMANDS = {
    "bench": "graphwright.tools.bench:bench",
    "compile": "graphwright.tools.compile:compile",
    "doctor": "graphwright.tools.doctor:doctor",
    "export": "graphwright.tools.export:export",
    "inspect": "graphwright.tools.inspect:inspect",
    "passes": "graphwright.tools.passes:passes",
    "run": "graphwright.tools.run:run",
}
"""Command name -> 'module:attribute' of its click command. Such a module imports torch only when the command runs."""


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command, or the list of all, is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the named command, or None where there is no such one."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that arguments start with; of a name that there is not, the nearest is suggested."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            from graphwright.ir.errors import unknown

            ctx.fail(unknown("command", args[0], COMMANDS))
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(graphwright.__version__, prog_name="graphwright")
def cli() -> None:
    """Optimize PyTorch models as graphs, and run Triton kernels on a plain CPU."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code."""
    try:
        cli.main(args=None if argv is None else list(argv), prog_name="graphwright")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


if __name__ == "__main__":
    sys.exit(main())
