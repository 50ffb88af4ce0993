"""`graphwright compile`: a model in, a file out, and what was done in between."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .building import build, gather, generate_option, model_options
from .costs import parse_sizes, size_option
from .measured import measure, measure_tables
from .output import Command, check_output, console, json_option, print_json, size_text, spoken_progress, writing
from .summary import summary, summary_tables, view_of, where_of

if TYPE_CHECKING:
    from graphwright.compiled import Compiled

SHOWN_REASONS = 3


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The file to write, NAME.gw."
)
@model_options
@generate_option
@size_option
@click.option(
    "--measure",
    "with_measure",
    is_flag=True,
    help="After every pass that changed something, compile the program, compare its results with the original's - on the "
    "calibration, or the sample - and time it. One pass takes seconds.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of --measure.  [default: PyTorch's]")
@click.option("--strict", is_flag=True, help="Fail if a pass that was asked for changed nothing.")
@json_option
def compile(
    model: str,
    output: Path,
    sizes: tuple[str, ...],
    with_measure: bool,
    threads: int | None,
    strict: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile MODEL and write it to a file that runs without the model's code.

    MODEL is a Hugging Face folder, a hub id such as org/name, package.module:factory - a callable that returns the module, or
    (module, {argument: value}) - or a .pt2 file.
    """
    check_output(output, ".gw", "--output")
    from graphwright.ir.errors import PassError

    wanted = parse_sizes(sizes)
    how = gather(options)
    built = build(model, how)
    compiled = built.compiled
    view = view_of(compiled)
    at = where_of(view, wanted, how)
    idle = idle_passes(compiled)
    if strict and idle:
        raise PassError("; ".join(idle))
    with writing(output):
        compiled.save(output)
    data = {"model": model, "output": str(output), **summary(compiled, view, at), "file_bytes": output.stat().st_size}
    data["idle"] = idle
    if with_measure:
        with spoken_progress("measuring") as tell:
            data["measured"] = measure(built, threads=threads, tell=tell)
    if as_json:
        print_json(data)
        return
    shown = console()
    for part in summary_tables(data):
        shown.print(part)
    if with_measure:
        for part in measure_tables(data["measured"]):
            shown.print(part)
    for note in idle:
        shown.print(f"note: {note}", markup=False)
    shown.print(f"{output}: {size_text(data['file_bytes'])}", markup=False)


def idle_passes(compiled: Compiled) -> list[str]:
    """Return for each pass that was asked for and changed nothing why: what it refused, or that it found no place."""
    from graphwright.passes.registry import format_pass
    from graphwright.recipe import parse_recipe

    wanted = {format_pass(step) for step in parse_recipe(compiled.recipe).passes}
    found = {}
    for record in compiled.report.all_records:
        if record.options in wanted:
            reasons = [f"{refusal.where or 'the program'}: {refusal.reason}" for refusal in record.plan.refusals]
            more = f", and {len(reasons) - SHOWN_REASONS} more" if len(reasons) > SHOWN_REASONS else ""
            why = "; ".join(reasons[:SHOWN_REASONS]) + more or "there is nothing in the model for it to rewrite"
            # It may have run more than once.
            found[record.options] = "" if record.plan.decisions else f"{record.options} changed nothing: {why}"
    return [text for text in found.values() if text]
