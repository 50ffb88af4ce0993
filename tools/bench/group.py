"""The benchmarks as one command."""

from __future__ import annotations

import click

from .command import kernels
from .decode.command import decode
from .models.command import models
from .sweeps.command import sweep


class _DefaultGroup(click.Group):
    """A group whose command `kernels` may be left out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command before arguments that name neither a command nor ask for help."""
        if not args or (args[0] not in self.commands and args[0] not in self.get_help_option_names(ctx)):
            args = [kernels.name or "", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_DefaultGroup, commands=[kernels, models, decode, sweep])
def bench() -> None:
    """Compare the speed of Triton kernels or whole models on this CPU with that of others; quality with cost.

    Without a command it is `kernels`.
    """
