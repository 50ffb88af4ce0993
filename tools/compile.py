"""`graphwright compile`: a model in, a file out, and what was done in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from .building import build, gather, generate_option, model_options, signature_of
from .output import Command, console, json_option, print_json, progress, size_text, table, time_text

if TYPE_CHECKING:
    from graphwright.compiled import Compiled
    from graphwright.ir.records import PassRecord

    from .models import Model

PAIRS = 11
"""Pairs of runs that a time ratio is the median of."""


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The file to write, NAME.gw."
)
@model_options
@generate_option
@click.option("--measure", "with_measure", is_flag=True, help="Compare values and time with the original.")
@json_option
def compile(model: str, output: Path, with_measure: bool, as_json: bool, **options: Any) -> None:
    """Compile MODEL and write it to a file that runs without the model's code.

    MODEL is a Hugging Face folder, a hub id such as org/name, package.module:factory - a callable that returns the module, or
    (module, {argument: value}) - or a .pt2 file.
    """
    if output.suffix != ".gw":
        raise click.BadParameter(f"{output.name!r} should end with .gw", param_hint="--output")
    if not output.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(output.parent)!r}", param_hint="--output")
    compiled, original = build(model, gather(options))
    with progress(f"writing {output}"):
        compiled.save(output)
    data = {"model": model, "output": str(output), **summary(compiled), "file_bytes": output.stat().st_size}
    if with_measure:
        with progress("measuring"):
            data["measured"] = measure(compiled, original)
    if as_json:
        print_json(data)
        return
    shown = console()
    for part in summary_tables(data):
        shown.print(part)
    if with_measure:
        for part in measure_tables(data["measured"]):
            shown.print(part)
    shown.print(f"{output}: {size_text(data['file_bytes'])}", markup=False)


def summary(compiled: Compiled) -> dict[str, Any]:
    """Return what there is to say of a compiled model, as plain data.

    Keys: `inputs`, `dimensions` (name -> [low, high], null for no limit), `notes`, `passes`, `kernels` (their number), `steps`
    (kind -> number), `times_us`, `weight_bytes`, `decoding` (passes of the program with caches), `cache` (None without one;
    `bytes_per_token` and `bytes_per_sequence`).
    """
    signature, report = signature_of(compiled), compiled.report
    return {
        "inputs": [
            {"name": spec.name, "dtype": str(spec.dtype).removeprefix("torch."), "shape": list(spec.shape)}
            for spec in signature.tensors
        ],
        "dimensions": {name: [found.low, found.high] for name, found in signature.dimensions.items()},
        "notes": list(report.notes),
        "passes": [_pass_row(record) for record in report.records],
        "decoding": [_pass_row(record) for record in report.decoding],
        "cache": _cache(compiled),
        "kernels": report.kernels,
        "steps": dict(report.steps),
        "times_us": dict(report.times_us),
        "weight_bytes": compiled.memory.weight_bytes,
    }


def _pass_row(record: PassRecord) -> dict[str, Any]:
    return {
        "name": record.pass_name,
        "options": record.options,
        "decisions": len(record.plan.decisions),
        "refusals": len(record.plan.refusals),
        "nodes_before": record.nodes_before,
        "nodes_after": record.nodes_after,
        "time_us": record.time_us,
    }


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
    return [
        table("inputs", ["name", "dtype", "shape"], inputs),
        _pass_table("passes", data["passes"]),
        *([_pass_table("passes of the program with caches", data["decoding"])] if data["decoding"] else []),
        Text("\n".join(lines)),
    ]


def _pass_table(title: str, rows: list[dict[str, Any]]) -> Any:
    numbers = ("decisions", "refusals", "nodes", "time")
    cells = [
        [p["options"], p["decisions"], p["refusals"], f"{p['nodes_before']} -> {p['nodes_after']}", time_text(p["time_us"])]
        for p in rows
    ]
    return table(title, ["pass", *numbers], cells, right=numbers)


def measure(compiled: Compiled, model: Model) -> dict[str, Any]:
    """Return how far a compiled model's results are from the original's, and how long both take.

    Returns:
        `outputs`: for each tensor its `name`, the largest difference `max_abs_error`, and `relative_error`, that over the
        largest value of the original; for tensors of integers the number of elements that differ is `different`, and the
        errors are null. `original_us`, `compiled_us` and `ratio`, the first over the second: medians of pairs in turn, wall
        time, on `threads` threads.
    """
    import torch

    from graphwright.exporting import quiet, without_cache

    def original() -> Any:
        return model.module(*model.args, **model.kwargs)

    def ours() -> Any:
        return compiled(*model.args, **model.kwargs)

    # No cache is among the results of a compiled model, so that the original need not make one.
    with torch.inference_mode(), without_cache(model.module), quiet():
        expected, found = tensors_of(original()), tensors_of(ours())
        times = [(_time_us(original), _time_us(ours)) for _ in range(PAIRS)]
    return {
        "outputs": [{"name": name, **_difference(expected[name], found[name])} for name in found],
        "original_us": median(a for a, _ in times),
        "compiled_us": median(b for _, b in times),
        "ratio": median(a / b for a, b in times),
        "threads": torch.get_num_threads(),
    }


def tensors_of(result: Any) -> dict[str, Any]:
    """Return the tensors among results by their path, "output" for a result that is one."""
    import torch

    from graphwright.ir.containers import Constant, describe

    found: dict[str, torch.Tensor] = {}

    def leaf(path: str, value: Any) -> Constant | None:
        if not isinstance(value, torch.Tensor):
            return None
        found[path or "output"] = value
        return Constant(None)

    describe(result, leaf)
    return found


def _difference(expected: Any, found: Any) -> dict[str, Any]:
    if not expected.is_floating_point():
        return {"max_abs_error": None, "relative_error": None, "different": int((expected != found).sum())}
    gap = (expected.double() - found.double()).abs()
    # What is infinite or not a number in both is no difference.
    same = (expected == found) | (expected.isnan() & found.isnan())
    largest = float(gap.masked_fill(same, 0).max()) if gap.numel() else 0.0
    scale = float(expected.double().nan_to_num(0, 0, 0).abs().max()) if gap.numel() else 0.0
    different = int((~same).sum())
    return {"max_abs_error": largest, "relative_error": largest / scale if scale else largest, "different": different}


def _time_us(run: Callable[[], Any]) -> float:
    import time

    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1000


def measure_tables(data: dict[str, Any]) -> list[Any]:
    """Return what `measure` found as things that rich prints."""
    rows = [
        [
            entry["name"],
            "-" if entry["max_abs_error"] is None else f"{entry['max_abs_error']:.3g}",
            "-" if entry["relative_error"] is None else f"{entry['relative_error']:.3g}",
            entry["different"],
        ]
        for entry in data["outputs"]
    ]
    times = (
        f"original {time_text(data['original_us'])}, compiled {time_text(data['compiled_us'])}: "
        f"{data['ratio']:.2f} times as fast on {data['threads']} threads"
    )
    columns = ["output", "max abs error", "relative error", "elements that differ"]
    return [table("against the original", columns, rows, right=tuple(columns[1:])), times]
