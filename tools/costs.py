"""What programs cost, and how long they take by prediction, as plain data and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from .output import percent_text, size_text, table, time_text

if TYPE_CHECKING:
    from graphwright.ir.analyses.roofline import Prediction
    from graphwright.ir.records import PassRecord, ProgramCost
    from graphwright.ir.signature import Range
    from graphwright.ir.target import Target

Sizes = dict[str, int]

CAPACITY = 1024
"""Tokens that there is room for in caches, where nothing else is said."""

size_option = click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="NAME=N,...",
    help="Sizes to predict times at, such as batch=1,tokens=128; may be repeated.",
)


@dataclass(frozen=True)
class Where:
    """At which sizes, and for which machine, times are predicted.

    Args:
        sizes: sets of sizes by the dimensions' names.
        target: the machine.
    """

    sizes: tuple[Sizes, ...]
    target: Target


def parse_sizes(texts: Sequence[str]) -> list[Sizes]:
    """Return what `--size` says, a set of sizes for each text.

    Raises:
        click.BadParameter: a text is not of the form.
    """
    found = []
    for text in texts:
        pairs = [tuple(part.strip() for part in item.partition("=")) for item in text.split(",")]
        wrong = [item for item in pairs if not item[0].isidentifier() or not item[2].isdecimal()]
        if wrong:
            raise click.BadParameter(f"expected NAME=N,..., got {text!r}", param_hint="--size")
        found.append({name: int(number) for name, _, number in pairs})
    return found


def where(
    given: Sequence[Sizes], ranges: Mapping[str, Range], costs: Sequence[ProgramCost], *, batch: int, tokens: int
) -> Where:
    """Return at which sizes to predict: the given ones, each with what is missing filled in.

    Args:
        given: sets of sizes; none for one set of what is filled in.
        ranges: what each dimension may be.
        costs: what will be predicted; what they depend on has a size.
        batch: filled in for the batch.
        tokens: filled in for numbers of tokens.

    Raises:
        click.BadParameter: there is no such dimension, or it cannot be so large.
    """
    from graphwright.ir.analyses.roofline import dimensions_of
    from graphwright.ir.errors import unknown
    from graphwright.runtime.machine import this_machine

    needed = frozenset().union(*(dimensions_of(cost) for cost in costs))
    found = []
    for sizes in given or [{}]:
        for name, number in sizes.items():
            if name not in needed | ranges.keys():
                known = sorted(needed | ranges.keys())
                message = unknown("dimension", name, known) if known else f"no dimension {name!r}: all sizes are fixed"
                raise click.BadParameter(message, param_hint="--size")
            limits = ranges.get(name)
            if limits is not None and not limits.low <= number <= (number if limits.high is None else limits.high):
                most = "any" if limits.high is None else limits.high
                raise click.BadParameter(f"{name} must be {limits.low} to {most}, got {number}", param_hint="--size")
        filled = {name: _usual(name, ranges.get(name), batch, tokens) for name in needed | ranges.keys()} | sizes
        if "packed" in filled and "packed" not in sizes:
            # As if nothing were padding.
            filled["packed"] = filled.get("batch", batch) * filled.get("tokens", tokens)
        found.append({name: filled[name] for name in sorted(filled)})
    return Where(tuple(found), this_machine())


def _usual(name: str, limits: Range | None, batch: int, tokens: int) -> int:
    size = tokens if "tokens" in name else CAPACITY if name == "capacity" else batch if name == "batch" else 1
    if limits is None:
        return size
    return max(size, limits.low) if limits.high is None else min(max(size, limits.low), limits.high)


def cost_data(cost: ProgramCost) -> dict[str, Any]:
    """Return what a program costs, as expressions of its dimensions.

    Keys: `flops` and `moved_bytes` of all operations, `kinds` (kind -> `operations` (their number), `flops`, `moved_bytes`),
    `weight_bytes` (a number), `state_bytes` (of caches). Expressions are texts such as "2*batch*tokens**2".
    """
    from graphwright.ir.analyses.cost_lines import KINDS
    from graphwright.ir.analyses.roofline import total

    kinds = {}
    for kind in (kind for kind in KINDS if any(line.kind == kind for line in cost.lines)):
        lines = [line for line in cost.lines if line.kind == kind]
        flops, moved = total(lines)
        kinds[kind] = {"operations": sum(line.count for line in lines), "flops": str(flops), "moved_bytes": str(moved)}
    flops, moved = total(cost.lines)
    return {
        "flops": str(flops),
        "moved_bytes": str(moved),
        "kinds": kinds,
        "weight_bytes": cost.weight_bytes,
        "state_bytes": cost.state_bytes,
    }


def prediction_data(found: Prediction, *, lines: bool = False) -> dict[str, Any]:
    """Return a prediction.

    Keys: `sizes`, `time_us`, `time_by_kind_us`, `time_by_bound_us` ("compute", "memory", "call"), `flops`, `moved_bytes`,
    `weight_bytes`, `state_bytes`; with lines also `lines`: for operations that are alike `kind`, `operation`, `count`, `flops`,
    `moved_bytes`, `time_us`, `bound`.
    """
    by_kind: dict[str, float] = {}
    by_bound: dict[str, float] = {}
    for line in found.lines:
        by_kind[line.kind] = by_kind.get(line.kind, 0.0) + line.time_us
        by_bound[line.bound] = by_bound.get(line.bound, 0.0) + line.time_us
    data = {
        "sizes": dict(found.sizes),
        "time_us": found.time_us,
        "time_by_kind_us": by_kind,
        "time_by_bound_us": by_bound,
        "flops": found.flops,
        "moved_bytes": found.moved_bytes,
        "weight_bytes": found.weight_bytes,
        "state_bytes": found.state_bytes,
    }
    return data | ({"lines": [asdict(line) for line in found.lines]} if lines else {})


def record_costs(record: PassRecord, at: Where) -> dict[str, Any]:
    """Return what a pass changed of the cost.

    Keys: `cost_before` and `cost_after` (as `cost_data` returns them, null where nothing changed), `predicted`: for each set of
    sizes `sizes`, `before_us` (null for a capture, and where the pass made a program with caches, which does other work),
    `after_us`.
    """
    from graphwright.ir.analyses.roofline import predict

    before, after = record.cost_before, record.cost_after
    is_new = before is None or after is None or (before.state_bytes == "0" != after.state_bytes)
    predicted = []
    for sizes in at.sizes if after is not None else ():
        times = [
            None if cost is None else predict(cost, sizes, at.target).time_us for cost in (None if is_new else before, after)
        ]
        predicted.append({"sizes": sizes, "before_us": times[0], "after_us": times[1]})
    return {
        "cost_before": None if before is None else cost_data(before),
        "cost_after": None if after is None else cost_data(after),
        "predicted": predicted,
    }


def cost_tables(cost: Mapping[str, Any], predicted: Sequence[Mapping[str, Any]], machine: str) -> list[Any]:
    """Return a cost and its predictions as things that rich prints.

    Args:
        cost: as `cost_data` returns it.
        predicted: each as `prediction_data` returns it.
        machine: whose times are predicted.
    """
    rows = [[kind, d["operations"], _spaced(d["flops"]), _spaced(d["moved_bytes"])] for kind, d in cost["kinds"].items()]
    parts = [table("cost of a call", ["kind", "operations", "flops", "bytes moved"], rows, right=("operations",))]
    if predicted:
        kinds, names = list(cost["kinds"]), list(predicted[0]["sizes"])
        has_caches = cost["state_bytes"] != "0"
        times = [
            [
                *p["sizes"].values(),
                time_text(p["time_us"]),
                *(time_text(p["time_by_kind_us"].get(kind, 0.0)) for kind in kinds),
                percent_text(p["time_by_bound_us"].get("memory", 0.0) / p["time_us"] if p["time_us"] else 0.0),
                count_text(p["flops"]),
                *([size_text(p["state_bytes"])] if has_caches else []),
            ]
            for p in predicted
        ]
        columns = [*names, "time", *kinds, "memory bound", "flops", *(["caches"] if has_caches else [])]
        parts.append(table(f"predicted for {machine}", columns, times, right=tuple(columns)))
    return parts


def line_table(predicted: Mapping[str, Any]) -> Any:
    """Return a prediction, operation by operation, as a table."""
    rows = [
        [
            line["operation"].removeprefix("graphwright."),
            line["count"],
            count_text(line["flops"]),
            size_text(line["moved_bytes"]),
            f"{line['flops'] / line['moved_bytes']:.3g}" if line["moved_bytes"] else "-",
            line["bound"],
            time_text(line["time_us"]),
        ]
        for line in predicted["lines"]
    ]
    columns = ["operation", "count", "flops", "moved", "flops/byte", "bound by", "time"]
    title = f"operations at {sizes_text(predicted['sizes'])}: {time_text(predicted['time_us'])}"
    return table(title, columns, rows, right=("count", "flops", "moved", "flops/byte", "time"))


def sizes_text(sizes: Mapping[str, int]) -> str:
    """Return sizes for people."""
    return ", ".join(f"{name}={number}" for name, number in sizes.items()) or "fixed"


def count_text(count: float) -> str:
    """Return a large number for people, such as "1.02 G"."""
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.3g}"


def _spaced(expression: str) -> str:
    """Return an expression that a narrow column can break between its terms only."""
    return expression.replace("**", "^")
