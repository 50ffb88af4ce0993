"""The parts that `graphwright inspect` shows, as plain data and on the console."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import TYPE_CHECKING, Any

import click

from .output import console, table

if TYPE_CHECKING:
    from graphwright.ir.records import PassRecord
    from graphwright.runtime.schedule import Step

    from .building import Built
    from .summary import View

ALL = "all"
FINAL = "final"


def find_record(records: tuple[PassRecord, ...], name: str, option: str) -> int:
    """Return the place in records of the pass called `name`, or of its k-th run for `name#k`.

    Of several runs it is the last that changed something.

    Raises:
        click.BadParameter: no such pass ran.
    """
    from graphwright.ir.errors import unknown

    base, _, number = name.partition("#")
    places = [k for k, record in enumerate(records) if base in (record.pass_name, record.options)]
    if not places:
        known = {record.pass_name for record in records} | ({FINAL} if option == "--ir" else set())
        raise click.BadParameter(unknown("pass that ran", name, known), param_hint=option)
    if number:
        if not number.isdecimal() or not 1 <= int(number) <= len(places):
            raise click.BadParameter(f"{base} ran {len(places)} times, and {name} is none of them", param_hint=option)
        return places[int(number) - 1]
    return next((k for k in reversed(places) if records[k].plan.decisions), places[-1])


def ir_part(view: View, stage: str, changed: bool) -> dict[str, Any]:
    """Return the text of a stage: `stage`, `text`, and `diff` to the stage before if only changes are wanted."""
    records = view.lineage
    place = len(records) - 1 if stage == FINAL else find_record(records, stage, "--ir")
    text: str | None
    if stage == FINAL:
        text, before = view.graph, _text_before(records, 1)
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


def diff_part(built: Built, view: View, stage: str) -> dict[str, Any]:
    """Return what a pass changed, by structure.

    Keys: `stage`, `removed`, `added` and `changed` (numbers of nodes), `differences` (for each of these nodes `change`,
    `before`, `after`, `where` - the user's line - and the nodes' names `old` and `new`), `text` (all in one, with some nodes
    around), `refusals` (of the pass, where it changed nothing).

    Args:
        built: the model, made anew.
        view: the program to look at.
        stage: a pass that ran; "" for the last one that was asked for, or for all together where none was.
    """
    from graphwright.ir.diff import diff_programs, unified
    from graphwright.pipeline import replay
    from graphwright.recipe import parse_recipe

    assert built.program is not None
    records = view.lineage
    asked = parse_recipe(built.compiled.recipe).passes
    if not stage and asked:
        names = {step.name for step in asked}
        stage = next(record.options for record in reversed(records) if record.pass_name in names)
    if stage:
        first = find_record(records, stage, "--diff")
        last = first + 1
    else:
        # A plain program's lineage goes on to what was derived of it.
        first, last = 0, len(view.records) if view.name == "plain" else len(records)
    before = after = built.program
    for record, program in replay(built.program, records[:last]):
        after = program
        if any(record is earlier for earlier in records[:first]):
            before = program
    differences = diff_programs(before, after)
    counts = {change: sum(d.change == change for d in differences) for change in ("removed", "added", "changed")}
    refusals = [] if any(counts.values()) or not stage else records[first].plan.refusals
    return {
        "stage": stage or "all passes",
        **counts,
        "differences": [dataclasses.asdict(d) for d in differences if d.change != "same"],
        "text": unified(differences),
        "refusals": [dataclasses.asdict(refusal) for refusal in refusals],
    }


def kernels_part(view: View, name: str) -> list[dict[str, Any]]:
    """Return kernels: `name`, `source`, and `steps` that launch it, each with `name` and `provenance`."""
    from graphwright.ir.errors import unknown
    from graphwright.runtime.schedule import KernelStep

    known = view.schedule.kernels
    if name != ALL and name not in known:
        raise click.BadParameter(unknown("kernel", name, known), param_hint="--kernels")
    steps = [step for step in view.schedule.steps if isinstance(step, KernelStep)]
    return [
        {
            "name": kernel,
            "source": source,
            "steps": [{"name": s.name, "provenance": s.provenance} for s in steps if s.kernel == kernel],
        }
        for kernel, source in known.items()
        if name in (ALL, kernel)
    ]


def plan_part(view: View, name: str) -> dict[str, Any]:
    """Return the plan of a pass: `pass`, `decisions` (`where`, `what`, `why`, `detail`), `refusals` (`where`, `reason`)."""
    record = view.lineage[find_record(view.lineage, name, "--plan")]
    plan = dataclasses.asdict(record.plan)
    return {"pass": record.options, "decisions": list(plan["decisions"]), "refusals": list(plan["refusals"])}


def steps_part(view: View) -> list[dict[str, Any]]:
    """Return the steps of a call in order, see `step_row`."""
    return [step_row(step) for step in view.schedule.steps]


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


def show_parts(data: dict[str, Any]) -> None:
    """Print the parts that are there."""
    shown = console()
    if "ir" in data:
        # Text that other programs may read: no line is broken.
        click.echo(data["ir"].get("diff", data["ir"]["text"]))
    if "diff" in data:
        _show_diff(data["diff"])
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


def _show_diff(found: dict[str, Any]) -> None:
    if not found["text"]:
        click.echo(f"{found['stage']} changed nothing")
        for refusal in found["refusals"]:
            click.echo(f"{refusal['where'] or 'the program'}: {refusal['reason']}")
        return
    counts = ", ".join(f"{found[change]} {change}" for change in ("removed", "added", "changed") if found[change])
    click.echo(f"{found['stage']}: nodes {counts}")
    click.echo(found["text"])


def _places(provenance: str) -> str:
    return re.sub(r"\s+", " ", provenance)
