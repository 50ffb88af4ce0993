"""`graphwright inspect`: the inside of a compiled model."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import TYPE_CHECKING, Any

import click

from .building import build_or_load, gather, generate_option, model_options
from .compile import summary, summary_tables
from .output import Command, console, json_option, print_json, table

if TYPE_CHECKING:
    from graphwright.compiled import Compiled
    from graphwright.ir.records import PassRecord
    from graphwright.runtime.schedule import Step

ALL = "all"
FINAL = "final"


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
    "--kernels",
    "kernel",
    is_flag=False,
    flag_value=ALL,
    metavar="[NAME]",
    help="Show the source of the kernel NAME, or of all, and the steps that launch it.",
)
@click.option("--plan", "plan", metavar="PASS", help="Show what a pass decided and what it refused.")
@click.option("--steps", "with_steps", is_flag=True, help="Show the steps of a call in order.")
@click.option(
    "--changed", is_flag=True, help="Leave out passes that changed nothing; with --ir, show what the pass changed as a diff."
)
@model_options
@generate_option
@json_option
def inspect(
    model: str,
    stage: str | None,
    kernel: str | None,
    plan: str | None,
    with_steps: bool,
    changed: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what MODEL, a .gw file or anything that `graphwright compile` takes, was turned into.

    Without an option that names a part, a summary is shown.
    """
    compiled, _ = build_or_load(model, gather(options))
    data: dict[str, Any] = {"model": model}
    if stage is not None:
        data["ir"] = _ir(compiled, stage, changed)
    if kernel is not None:
        data["kernels"] = _kernels(compiled, kernel)
    if plan is not None:
        data["plan"] = _plan(compiled, plan)
    if with_steps:
        data["steps"] = [step_row(step) for step in compiled.schedule.steps]
    if len(data) == 1:
        data["summary"] = summary(compiled)
        if changed:
            for key in ("passes", "decoding"):
                data["summary"][key] = [p for p in data["summary"][key] if p["decisions"] or p["refusals"]]
    if as_json:
        print_json(data)
    else:
        _show(data)


def find_record(compiled: Compiled, name: str, option: str) -> int:
    """Return the place in the report of the pass called `name`, or of its k-th run for `name#k`.

    Of several runs it is the last that changed something.

    Raises:
        click.BadParameter: no such pass ran.
    """
    from graphwright.ir.errors import unknown

    base, _, number = name.partition("#")
    records = compiled.report.all_records
    places = [k for k, record in enumerate(records) if base in (record.pass_name, record.options)]
    if not places:
        known = {record.pass_name for record in records} | ({FINAL} if option == "--ir" else set())
        raise click.BadParameter(unknown("pass that ran", name, known), param_hint=option)
    if number:
        if not number.isdecimal() or not 1 <= int(number) <= len(places):
            raise click.BadParameter(f"{base} ran {len(places)} times, and {name} is none of them", param_hint=option)
        return places[int(number) - 1]
    return next((k for k in reversed(places) if records[k].plan.decisions), places[-1])


def _ir(compiled: Compiled, stage: str, changed: bool) -> dict[str, Any]:
    """Return the text of a stage: `stage`, `text`, and `diff` to the stage before if only changes are wanted."""
    records = compiled.report.all_records
    place = len(compiled.report.records) - 1 if stage == FINAL else find_record(compiled, stage, "--ir")
    text: str | None
    if stage == FINAL:
        text, before = compiled.graph, _text_before(records, 1)
    else:
        text, before = _text_before(records, place + 1), _text_before(records, place)
    if text is None or (changed and before is None and place > 0):
        raise click.UsageError(
            "the model was compiled without the text of every pass: compile it with `graphwright compile`, or with "
            "keep_text=True"
        )
    found: dict[str, Any] = {"stage": stage, "text": text}
    if changed:
        lines = difflib.unified_diff((before or "").splitlines(), text.splitlines(), "before", "after", lineterm="", n=1)
        found["diff"] = "\n".join(lines)
    return found


def _text_before(records: tuple[PassRecord, ...], place: int) -> str | None:
    """Return the program's text before the pass at `place`; None if it was not kept."""
    for record in reversed(records[:place]):
        if record.text:
            return record.text
        if record.plan.decisions:
            return None
    return None


def _kernels(compiled: Compiled, name: str) -> list[dict[str, Any]]:
    from graphwright.ir.errors import unknown
    from graphwright.runtime.schedule import KernelStep

    known = compiled.kernels
    if name != ALL and name not in known:
        raise click.BadParameter(unknown("kernel", name, known), param_hint="--kernels")
    steps = [step for step in compiled.schedule.steps if isinstance(step, KernelStep)]
    return [
        {
            "name": kernel,
            "source": source,
            "steps": [{"name": s.name, "provenance": s.provenance} for s in steps if s.kernel == kernel],
        }
        for kernel, source in known.items()
        if name in (ALL, kernel)
    ]


def _plan(compiled: Compiled, name: str) -> dict[str, Any]:
    record = compiled.report.all_records[find_record(compiled, name, "--plan")]
    plan = dataclasses.asdict(record.plan)
    return {"pass": record.options, "decisions": list(plan["decisions"]), "refusals": list(plan["refusals"])}


def step_row(step: Step) -> dict[str, Any]:
    """Return a step of a call as plain data.

    Keys: `name`, `kind` ("kernel", "matmul" or "call"), `runs` (the kernel, the weight or the operation), `reads` and `writes`
    (buffers), `provenance`.
    """
    from graphwright.runtime.schedule import KernelStep, MatmulStep

    row = {"name": step.name, "kind": type(step).__name__.removesuffix("Step").lower()}
    if isinstance(step, KernelStep):
        used = {"runs": step.kernel, "reads": list(step.reads), "writes": list(step.writes)}
    elif isinstance(step, MatmulStep):
        used = {"runs": step.weight, "reads": [step.x.buffer, step.weight], "writes": [step.out.buffer]}
    else:
        used = {"runs": step.operation, "reads": _buffers(step), "writes": [name for name in step.outs if name]}
    return {**row, **used, "provenance": step.provenance}


def _buffers(step: Any) -> list[str]:
    from graphwright.runtime.memory import views_in

    return [view.buffer for view in views_in((step.arguments, step.keywords))]


def _show(data: dict[str, Any]) -> None:
    shown = console()
    for part in summary_tables(data["summary"]) if "summary" in data else ():
        shown.print(part)
    if "ir" in data:
        # Text that other programs may read: no line is broken.
        click.echo(data["ir"].get("diff", data["ir"]["text"]))
    for kernel in data.get("kernels", ()):
        shown.rule(kernel["name"], align="left")
        for step in kernel["steps"]:
            shown.print(f"# launched by {step['name']}: {_places(step['provenance'])}", markup=False, soft_wrap=True)
        click.echo(kernel["source"])
    if "plan" in data:
        decisions = [[d["where"], d["what"], d["why"]] for d in data["plan"]["decisions"]]
        refusals = [[r["where"] or "the program", r["reason"]] for r in data["plan"]["refusals"]]
        shown.print(table(f"{data['plan']['pass']}: decisions", ["where", "what", "why"], decisions))
        shown.print(table(f"{data['plan']['pass']}: refusals", ["where", "reason"], refusals))
    if "steps" in data:
        rows = [
            [k, s["name"], s["kind"], s["runs"], " ".join(s["reads"]), " ".join(s["writes"])]
            for k, s in enumerate(data["steps"], 1)
        ]
        columns = ["", "step", "kind", "runs", "reads", "writes"]
        shown.print(table("steps of a call", columns, rows, right=("",)))


def _places(provenance: str) -> str:
    return re.sub(r"\s+", " ", provenance)
