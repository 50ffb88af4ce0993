"""What there is to say of a compiled model, as plain data and as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from .building import ModelOptions, signature_of
from .costs import CAPACITY, Sizes, Where, cost_data, cost_tables, prediction_data, record_costs, sizes_text, where
from .output import percent_text, size_text, table, time_text

if TYPE_CHECKING:
    from graphwright.compiled import Compiled
    from graphwright.ir.analyses.roofline import Prediction
    from graphwright.ir.records import PassRecord, ProgramCost
    from graphwright.ir.signature import Signature
    from graphwright.runtime.schedule import Schedule

PLAIN, PREFILL, STEP = "plain", "prefill", "step"
PROGRAMS = (PLAIN, PREFILL, STEP)


@dataclass(frozen=True)
class View:
    """One of a compiled model's programs.

    Args:
        name: "plain", "prefill" or "step".
        schedule: the steps of a call.
        signature: how it is called.
        graph: after all passes, printed; "" if it was not kept.
        records: the passes that made it, in order; of a program with caches those after the plain program's.
        lineage: all passes that can be asked for: those of the plain program and of what was derived of it.
        cost: what it costs; None if it was not kept.
    """

    name: str
    schedule: Schedule
    signature: Signature
    graph: str
    records: tuple[PassRecord, ...]
    lineage: tuple[PassRecord, ...]
    cost: ProgramCost | None


def view_of(compiled: Compiled, name: str = PLAIN) -> View:
    """Return one of a compiled model's programs.

    Args:
        compiled: the model.
        name: one of `PROGRAMS`.

    Raises:
        click.UsageError: the model was not compiled to generate, and has no such program.
    """
    report, generator = compiled.report, compiled.generator
    if name == PLAIN:
        schedule, signature = compiled.schedule, signature_of(compiled)
        records, lineage = report.records, report.all_records
    elif generator is None:
        raise click.UsageError(f"a model that was not compiled to generate has no program {name!r}: compile it with --generate")
    else:
        schedule, signature = generator.programs()[name]
        records = report.decoding + (report.prefill if name == PREFILL else ())
        lineage = report.records + records
    return View(name, schedule, signature, compiled.graphs.get(name, ""), records, lineage, report.costs.get(name))


def where_of(view: View, given: list[Sizes], how: ModelOptions) -> Where:
    """Return at which sizes a program's times are predicted.

    Raises:
        click.BadParameter: there is no dimension of a given name, or it cannot be so large.
    """
    costs = [view.cost, *(cost for record in view.records for cost in (record.cost_before, record.cost_after))]
    known = [cost for cost in costs if cost is not None]
    # The passes that made the program for one token ran on the one for any number.
    tokens = 1 if view.name == STEP else how.tokens
    return where(given, view.signature.dimensions, known, batch=how.batch, tokens=tokens)


def summary(compiled: Compiled, view: View, at: Where) -> dict[str, Any]:
    """Return what there is to say of a program, as plain data.

    Keys: `program`, `inputs`, `dimensions` (name -> [low, high], null for no limit), `notes`, `passes` (see `pass_data`),
    `decoding` (the passes that made the programs with caches), `kernels` (their number), `steps` (kind -> number), `times_us`,
    `weight_bytes` (held between calls), `cache` (null for a model that does not generate; `bytes_per_token`,
    `bytes_per_sequence`), `cost` (see `costs.cost_data`; null for a file of an older version), `predicted` (see
    `costs.prediction_data`; a list, one for each set of sizes), `machine` (what predictions rest on).
    """
    report, signature = compiled.report, view.signature
    plain = view.name == PLAIN
    return {
        "program": view.name,
        "inputs": [
            {"name": spec.name, "dtype": str(spec.dtype).removeprefix("torch."), "shape": list(spec.shape)}
            for spec in signature.tensors
        ],
        "dimensions": {name: [found.low, found.high] for name, found in signature.dimensions.items()},
        "notes": list(report.notes),
        "passes": [pass_data(record, at) for record in view.records],
        "decoding": [pass_data(record, _with_caches(at)) for record in report.decoding] if plain else [],
        "cache": _cache(compiled),
        "kernels": len(view.schedule.kernels),
        "steps": _steps(view.schedule),
        "times_us": dict(report.times_us),
        "weight_bytes": compiled.memory.weight_bytes,
        **_costs(view, at),
    }


def _with_caches(at: Where) -> Where:
    """Return sizes for programs with caches too."""
    return Where(tuple({"capacity": CAPACITY, **sizes} for sizes in at.sizes), at.target)


def _costs(view: View, at: Where) -> dict[str, Any]:
    return {
        "cost": None if view.cost is None else cost_data(view.cost),
        "predicted": [prediction_data(found) for found in _predictions(view, at)],
        "machine": asdict(at.target),
    }


def cost_parts(view: View, at: Where) -> list[dict[str, Any]]:
    """Return the predicted times of a program at each set of sizes, with `lines`; see `costs.prediction_data`.

    Raises:
        click.UsageError: the file is of an older version, and has no costs.
    """
    if view.cost is None:
        raise click.UsageError("the file was written by an older version, which kept no costs: compile the model again")
    return [prediction_data(found, lines=True) for found in _predictions(view, at)]


def _predictions(view: View, at: Where) -> list[Prediction]:
    from graphwright.ir.analyses.roofline import predict

    return [] if view.cost is None else [predict(view.cost, sizes, at.target) for sizes in at.sizes]


def pass_data(record: PassRecord, at: Where) -> dict[str, Any]:
    """Return what there is to say of a pass that ran.

    Keys: `name`, `options`, `decisions` and `refusals` (their numbers), `nodes_before`, `nodes_after`, `time_us`, and those of
    `costs.record_costs`.
    """
    return {
        "name": record.pass_name,
        "options": record.options,
        "decisions": len(record.plan.decisions),
        "refusals": len(record.plan.refusals),
        "nodes_before": record.nodes_before,
        "nodes_after": record.nodes_after,
        "time_us": record.time_us,
        **record_costs(record, at),
    }


def _steps(schedule: Schedule) -> dict[str, int]:
    steps: dict[str, int] = {}
    for step in schedule.steps:
        kind = type(step).__name__.removesuffix("Step").lower()
        steps[kind] = steps.get(kind, 0) + 1
    return steps


def _cache(compiled: Compiled) -> dict[str, Any] | None:
    if compiled.generator is None:
        return None
    taken = compiled.generator.cache_bytes
    return {"bytes_per_token": taken.per_token, "bytes_per_sequence": taken.per_sequence}


def summary_tables(data: dict[str, Any]) -> list[Any]:
    """Return a summary as things that rich prints."""
    from rich.text import Text

    inputs = [[i["name"], i["dtype"], f"[{', '.join(map(str, i['shape']))}]"] for i in data["inputs"]]
    ranges = [f"{name} {low} to {'any' if high is None else high}" for name, (low, high) in data["dimensions"].items()]
    steps = ", ".join(f"{count} {kind}" for kind, count in sorted(data["steps"].items()))
    times = ", ".join(f"{name} {time_text(us)}" for name, us in data["times_us"].items())
    lines = [
        f"sizes: {'; '.join(ranges) or 'all fixed'}",
        *(f"note: {note}" for note in data["notes"]),
        f"steps of a call: {steps or 'none'}; different kernels: {data['kernels']}",
        f"weights: {size_text(data['weight_bytes'])}",
        f"time: {times}",
    ]
    if data["cache"] is not None:
        per_token, constant = data["cache"]["bytes_per_token"], data["cache"]["bytes_per_sequence"]
        lines.append(f"cache of a sequence: {per_token:g} bytes per token, and {size_text(constant)} whatever its length")
    costs = cost_tables(data["cost"], data["predicted"], data["machine"]["name"]) if data["cost"] is not None else []
    return [
        table("inputs", ["name", "dtype", "shape"], inputs),
        pass_table("passes", data["passes"]),
        *([pass_table("passes of the program with caches", data["decoding"])] if data["decoding"] else []),
        *costs,
        Text("\n".join(lines)),
    ]


def pass_table(title: str, rows: list[dict[str, Any]]) -> Any:
    """Return passes as a table: how many things each did and refused; predicted times are at the first set of sizes."""
    refused = any(p["refusals"] for p in rows)
    numbers = ("did", *(("refused",) if refused else ()), "nodes", "took", "predicted", "saves")
    cells = []
    for p in rows:
        predicted = p["predicted"][0] if p["predicted"] else {"before_us": None, "after_us": None}
        before, after = predicted["before_us"], predicted["after_us"]
        nodes = f"{p['nodes_before']} -> {p['nodes_after']}"
        saved = "" if before is None or after is None else percent_text(1 - after / before if before else 0.0)
        foreseen = "" if after is None else time_text(after)
        counts = [p["decisions"], *([p["refusals"]] if refused else [])]
        cells.append([p["options"], *counts, nodes, time_text(p["time_us"]), foreseen, saved])
    sizes = next((sizes_text(p["predicted"][0]["sizes"]) for p in rows if p["predicted"]), "")
    return table(f"{title}, predicted at {sizes}" if sizes else title, ["pass", *numbers], cells, right=numbers)
