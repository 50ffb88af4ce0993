"""`graphwright inspect`: the inside of a compiled model."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from .building import build_or_load, gather, generate_option, model_options
from .costs import line_table, parse_sizes, size_option
from .inspected import ALL, FINAL, diff_part, ir_part, kernels_part, plan_part, show_parts, steps_part
from .output import Command, console, json_option, print_json
from .summary import PLAIN, PROGRAMS, cost_parts, summary, summary_tables, view_of, where_of


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "--ir",
    "stage",
    is_flag=False,
    flag_value=FINAL,
    metavar="[STAGE]",
    help="Show the program: after the pass STAGE (NAME#2 for its second run), as it was captured (`capture`), or `final`, "
    "which is also what is shown if no STAGE is named.",
)
@click.option(
    "--diff",
    "diff",
    is_flag=False,
    flag_value="",
    metavar="[STAGE]",
    help="Show what the pass STAGE changed: the nodes that it removed, added, or gave other operands. If no STAGE is named, it "
    "is the last --pass, or all passes together if there is none.",
)
@click.option(
    "--kernels",
    "kernel",
    is_flag=False,
    flag_value=ALL,
    metavar="[NAME]",
    help="Show the source of the kernel NAME, or of all, and the steps that launch it.",
)
@click.option("--plan", "plan", metavar="PASS", help="Show what a pass decided and what it refused.")
@click.option("--steps", "with_steps", is_flag=True, help="Show the steps of a call in order.")
@click.option("--costs", "with_costs", is_flag=True, help="Show the predicted time, operation by operation, at each --size.")
@click.option(
    "--changed", is_flag=True, help="Leave out passes that changed nothing; with --ir, show what the pass changed as a diff."
)
@click.option(
    "--program",
    "program",
    type=click.Choice(PROGRAMS),
    default=PLAIN,
    show_default=True,
    help="Which program: the model's own, or, of a model that generates, the one for prompts or the one for a token.",
)
@model_options
@generate_option
@size_option
@json_option
def inspect(
    model: str,
    stage: str | None,
    diff: str | None,
    kernel: str | None,
    plan: str | None,
    with_steps: bool,
    with_costs: bool,
    changed: bool,
    program: str,
    sizes: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Show what MODEL, a .gw file or anything that `graphwright compile` takes, was turned into.

    Without an option that names a part, a summary is shown.
    """
    wanted = parse_sizes(sizes)
    how = gather(options)
    if program != PLAIN and not model.endswith(".gw"):
        how = dataclasses.replace(how, generate=True)
    if diff is not None and model.endswith(".gw"):
        raise click.UsageError(
            f"--diff compares programs, and {model} holds only their texts: give the model that it was compiled from, with the "
            f"same options, or compare the texts with --ir STAGE --changed"
        )
    built = build_or_load(model, how)
    view = view_of(built.compiled, program)
    at = where_of(view, wanted, how)
    data: dict[str, Any] = {"model": model, "program": program}
    parts = len(data)
    if stage is not None:
        data["ir"] = ir_part(view, stage, changed)
    if diff is not None:
        data["diff"] = diff_part(built, view, diff)
    if kernel is not None:
        data["kernels"] = kernels_part(view, kernel)
    if plan is not None:
        data["plan"] = plan_part(view, plan)
    if with_steps:
        data["steps"] = steps_part(view)
    if with_costs:
        data["costs"] = cost_parts(view, at)
    if len(data) == parts:
        data["summary"] = summary(built.compiled, view, at)
        if changed:
            for key in ("passes", "decoding"):
                data["summary"][key] = [p for p in data["summary"][key] if p["decisions"] or p["refusals"]]
    if as_json:
        print_json(data)
        return
    shown = console()
    for part in summary_tables(data["summary"]) if "summary" in data else ():
        shown.print(part)
    for found in data.get("costs", ()):
        shown.print(line_table(found))
    show_parts(data)
