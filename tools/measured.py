"""What was measured of a compiled model, as plain data and as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .costs import count_text, prediction_data, sizes_text
from .output import percent_text, size_text, table, time_text

if TYPE_CHECKING:
    from graphwright.compiled import Compiled
    from graphwright.measuring import Measurements

    from .building import Built
    from .models import Model

PRODUCT_WORDS = ("linear", "mm", "conv")
"""What the names of steps have in them that call a product in PyTorch."""

PAIRS = 11
"""Pairs of runs that a time ratio is the median of."""


def measure(
    built: Built, *, pairs: int = PAIRS, threads: int | None = None, tell: Callable[[str], object] = lambda text: None
) -> dict[str, Any]:
    """Return how far a compiled model's results are from the original's, how long both take, and what each pass did to both.

    Returns:
        `outputs`: for each tensor of the sample call its `name`, the largest difference `max_abs_error`, and `relative_error`,
        that over the largest value of the original; for tensors of integers the number of elements that differ is `different`,
        and the errors are null. `original_us`, `compiled_us` and `ratio`, the first over the second: medians of pairs in turn,
        on `threads` threads, CPU time with one and wall time with more. `stages`: see `stage_data`. `calls`: number of sample
        calls that the stages' quality was measured on. `machine`: what predictions rest on. `sizes` of the sample call.
        `kinds`: kind of operation -> `predicted_us` and `measured_us`, the sum of its steps' least wall times.
        `decoding`: of a model that generates the stages of the program with caches, for one token, the original being the
        first of them; else null.
    """
    from statistics import median

    import torch

    from graphwright.exporting import quiet, without_cache
    from graphwright.measuring import measure_passes, tensors_of, time_pairs

    model, compiled = built.model, built.compiled
    assert model is not None
    assert built.program is not None
    module = model.module

    def original(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    # No cache is among the results of a compiled model, so that the original need not make one.
    with torch.inference_mode(), without_cache(module), quiet(), _threads(threads):
        expected, found = (tensors_of(run(*model.args, **model.kwargs)) for run in (original, compiled))
        times = time_pairs(lambda: original(*model.args, **model.kwargs), lambda: compiled(*model.args, **model.kwargs), pairs)
        measured = measure_passes(
            built.program,
            [record for record in compiled.report.records if record.plan.decisions],
            (model.args, model.kwargs),
            original,
            built.calibration,
            decoding=compiled.report.decoding,
            repeat=pairs,
            tell=tell,
        )
    cached = measured.decoding
    return {
        "outputs": [{"name": name, **_difference(expected[name], found[name])} for name in found],
        "original_us": median(a for a, _ in times) * 1e6,
        "compiled_us": median(b for _, b in times) * 1e6,
        "ratio": median(a / b for a, b in times),
        "threads": measured.threads,
        "stages": [stage_data(measured, at) for at in range(len(measured.stages))],
        "calls": measured.calls,
        "machine": asdict(measured.target),
        "sizes": dict(measured.stages[0].predicted.sizes),
        "kinds": _kinds(compiled, model, measured),
        "decoding": None if cached is None else [stage_data(cached, at) for at in range(len(cached.stages))],
    }


def _kinds(compiled: Compiled, model: Model, measured: Measurements) -> dict[str, dict[str, float]]:
    """Return for each kind of operation the time that its steps take beside the predicted one."""
    from graphwright.ir.analyses.cost_lines import ATTENTION, KINDS, PRODUCT, REST

    taken = dict.fromkeys(KINDS, 0.0)
    runs = [compiled.profile(*model.args, repeat=1, **model.kwargs).rows for _ in range(PAIRS)]
    # The least of several: what else the machine does only adds.
    for row in (min(same, key=lambda row: row.us) for same in zip(*runs, strict=True)):
        is_product = row.kind == "matmul" or (row.kind == "call" and any(word in row.name for word in PRODUCT_WORDS))
        taken[PRODUCT if is_product else ATTENTION if "attention" in row.name else REST] += row.us
    last = measured.stages[-1].predicted
    return {
        kind: {"predicted_us": last.time_of(kind), "measured_us": us} for kind, us in taken.items() if us or last.time_of(kind)
    }


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let PyTorch compute on so many threads; None for as many as it does."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stage_data(measured: Measurements, at: int) -> dict[str, Any]:
    """Return what was measured of the program after a pass, as plain data.

    Keys: `name` ("capture", or the pass with its options), `quality` (`relative_error`, `different`, `cosine`, `kl`,
    `top1_agreement`, `nll_change`, `tokens`; null where there is no such thing), `time_us`, `original_us`, `ratio` (of the
    original's time to this), `saved_ratio` (of the time that the pass saves to the time before it; null for the capture),
    `saved_ratio_predicted`, `compile_us`, and `predicted` (see `costs.prediction_data`).
    """
    stage = measured.stages[at]
    return {
        "name": stage.name,
        "quality": asdict(stage.quality),
        "time_us": stage.time_us,
        "original_us": stage.original_us,
        "ratio": stage.ratio,
        "saved_ratio": measured.saved(at),
        "saved_ratio_predicted": measured.saved_predicted(at),
        "compile_us": stage.compile_us,
        "predicted": prediction_data(stage.predicted),
    }


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
        f"{data['ratio']:.2f} times as fast on {data['threads']} thread{'s' if data['threads'] > 1 else ''}"
    )
    columns = ["output", "max abs error", "relative error", "elements that differ"]
    parts = [
        *stage_tables(data["stages"], data["calls"], sizes_text(data["sizes"])),
        table("the result against the original", columns, rows, right=tuple(columns[1:])),
        times,
    ]
    kinds = [
        [kind, time_text(d["predicted_us"]), time_text(d["measured_us"]), _factor(d["measured_us"], d["predicted_us"])]
        for kind, d in data["kinds"].items()
    ]
    numbers = ("predicted", "measured", "measured / predicted")
    parts.append(table(f"by kind of operation, {data['machine']['name']}", ["kind", *numbers], kinds, right=numbers))
    if data["decoding"]:
        stages = data["decoding"]
        parts += stage_tables(stages, data["calls"], f"one token, {sizes_text(stages[0]['predicted']['sizes'])}")
    return parts


def stage_tables(stages: Sequence[dict[str, Any]], calls: int, sizes: str) -> list[Any]:
    """Return the passes with their results, their times and their work, as three tables.

    Args:
        stages: each as `stage_data` returns it.
        calls: number of sample calls.
        sizes: those of the call that was timed.
    """
    titles = {
        "relative_error": "error",
        "different": "differ",
        "cosine": "cosine",
        "kl": "KL",
        "top1_agreement": "same top 1",
        "nll_change": "NLL change",
    }
    shown = [key for key in titles if any(stage["quality"][key] for stage in stages) or key == "relative_error"]
    quality = [[stage["name"], *(_number(key, stage["quality"][key]) for key in shown)] for stage in stages]
    plural = "s" if calls > 1 else ""
    headings = [titles[key] for key in shown]
    first = table(f"results after each pass, {calls} sample call{plural}", ["pass", *headings], quality, right=tuple(headings))
    times = ("time", "speed", "saves", "predicted", "predicted saves")
    rows = [
        [
            stage["name"],
            time_text(stage["time_us"]),
            f"{stage['ratio']:.2f} x",
            "" if stage["saved_ratio"] is None else percent_text(stage["saved_ratio"]),
            time_text(stage["predicted"]["time_us"]),
            "" if stage["saved_ratio_predicted"] is None else percent_text(stage["saved_ratio_predicted"]),
        ]
        for stage in stages
    ]
    second = table(f"time after each pass, {sizes}", ["pass", *times], rows, right=times)
    has_caches = any(stage["predicted"]["state_bytes"] for stage in stages)
    work = ("flops", "bytes moved", "weights", *(("caches",) if has_caches else ()))
    rows = [
        [
            stage["name"],
            count_text(stage["predicted"]["flops"]),
            size_text(stage["predicted"]["moved_bytes"]),
            size_text(stage["predicted"]["weight_bytes"]),
            *([size_text(stage["predicted"]["state_bytes"])] if has_caches else []),
        ]
        for stage in stages
    ]
    return [first, second, table(f"work after each pass, {sizes}", ["pass", *work], rows, right=work)]


def _factor(measured: float, predicted: float) -> str:
    return f"{measured / predicted:.2f}" if predicted else "-"


def _number(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in ("cosine", "top1_agreement"):
        return f"{value:.4f}"
    return f"{value:.3g}" if key != "nll_change" else f"{value:+.2g}"


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
