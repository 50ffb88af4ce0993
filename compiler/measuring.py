"""What each pass does to a model's results and to its time, measured, beside what was predicted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from graphwright.codegen.lower import lower
from graphwright.ir.analyses.cost_lines import program_cost
from graphwright.ir.analyses.roofline import Prediction, predict
from graphwright.ir.containers import Constant, build, describe
from graphwright.ir.errors import OptionError
from graphwright.ir.program import Program
from graphwright.ir.records import PassRecord
from graphwright.ir.target import Target
from graphwright.passes.base import Context, Pass
from graphwright.passes.depth.units import sizes_of
from graphwright.runtime.executable import Executable
from graphwright.runtime.machine import this_machine

from .capturing import capture
from .compiling import by_stage
from .exporting import quiet, without_cache
from .generating import AFTER
from .measuring_decode import measure_decoding
from .pipeline import DEFAULT_PASSES, replay, run_passes
from .quality import Comparison, Logits, Quality, find_logits, with_last_changed
from .recipe import Recipe, mark_of, recipe_of
from .sampling import Dynamic

CAPTURE = "capture"
"""The name of the program before the first pass, compiled as it is."""

PAIRS = 11
"""Pairs of runs, the original and a stage in turn, that a ratio of times is the median of."""

SAMPLE_S, MOST_CALLS = 2e-3, 1000
"""A timed run is so long at least, by calling up to so many times: the clock and a late interrupt count for little then."""

Call = tuple[Sequence[Any], Mapping[str, Any]]
"""Arguments of a call: by position and by name."""


@dataclass(frozen=True)
class StageMeasurement:
    """A model after a pass, compiled and run.

    Args:
        name: "capture", or the pass with its options.
        quality: how far its results are from the original's.
        time_us: median time of a call, in microseconds.
        original_us: median time of the original's calls in between.
        ratio: median of original / this over the pairs: above 1, this is faster.
        predicted: what was foretold for this machine.
        compile_us: how long compiling took.
    """

    name: str
    quality: Quality
    time_us: float
    original_us: float
    ratio: float
    predicted: Prediction
    compile_us: float


@dataclass(frozen=True)
class Measurements:
    """What each pass that changed something does.

    Args:
        stages: the program as it was captured, then after each pass.
        calls: number of sample calls that quality was measured on; the first of them is timed.
        threads: that computed.
        target: the machine of the predictions.
        decoding: what passes on caches do to a token of a text, as `stages` of their own; None if there are none.
    """

    stages: tuple[StageMeasurement, ...]
    calls: int
    threads: int
    target: Target
    decoding: Measurements | None = None

    def saved(self, at: int) -> float | None:
        """Return the ratio of the time that a pass saves to the time before it, measured; None for the first stage."""
        return 1 - self.stages[at - 1].ratio / self.stages[at].ratio if at else None

    def saved_predicted(self, at: int) -> float | None:
        """Return the same, predicted."""
        before = self.stages[at - 1].predicted.time_us if at else 0.0
        return 1 - self.stages[at].predicted.time_us / before if before else None


def measure(
    model: torch.nn.Module,
    *args: Any,
    passes: Iterable[Pass | str] = (),
    recipe: Recipe | str | os.PathLike[str] | None = None,
    calibration: Sequence[Any] = (),
    dynamic: Dynamic = None,
    check: bool = True,
    generate: bool = False,
    repeat: int = PAIRS,
    **kwargs: Any,
) -> Measurements:
    """Return what each pass does to a model's results and time.

    Every stage is compiled, compared with the model on the calibration (the sample call if there is none), and timed in turns
    with the model on the sample call.

    Args:
        model: any module.
        args: arguments of the sample call.
        passes: as `compile` takes them.
        recipe: likewise.
        calibration: likewise.
        dynamic: likewise.
        check: likewise.
        generate: also measure the program with caches, after each of its passes.
        repeat: pairs of timed runs for each stage, at least 1.
        kwargs: named arguments of the sample call.

    Raises:
        CaptureError: the model cannot be captured.
        OptionError: a pass or an option is unknown or needs `generate`, or the recipe was made for another model.
        PassError: a pass cannot do what it was asked to.
        InputError: no sample is long enough to measure caches with.
        LoweringError: an operation can neither be generated nor called.
    """
    asked = recipe_of(recipe, passes)
    program = capture(model, *args, dynamic=dynamic, check=check, **kwargs)
    asked.check(mark_of(program, type(model).__name__))
    plain, cached = by_stage(asked.passes, generate)
    device = next((w.device.type for w in program.weights.values()), "cpu")
    context = Context(tuple(calibration), device)
    result = run_passes(program, [*DEFAULT_PASSES, *plain], context)
    derived = run_passes(result, ["cached-decode", *cached, *AFTER], context).records if generate else result.records
    decoding = derived[len(result.records) :]

    def original(*args: Any, **kwargs: Any) -> Any:
        with without_cache(model), quiet():
            return model(*args, **kwargs)

    model.eval()
    return measure_passes(program, result.records, (args, kwargs), original, calibration, decoding=decoding, repeat=repeat)


def measure_passes(
    program: Program,
    records: Iterable[PassRecord],
    sample: Call,
    original: Callable[..., Any],
    calibration: Sequence[Any] = (),
    *,
    decoding: Sequence[PassRecord] = (),
    repeat: int = PAIRS,
    tell: Callable[[str], object] = lambda text: None,
) -> Measurements:
    """Return what passes that ran on a program did to its results and its time.

    Args:
        program: as it was before them.
        records: theirs, in order; what they decided is done again.
        sample: the call that is timed.
        original: computes what the model does.
        calibration: calls that results are compared on: each (args, kwargs), or named arguments; none for the sample alone.
        decoding: the passes that made and rewrote the program with caches; none to leave that out.
        repeat: pairs of timed runs for each stage, at least 1.
        tell: called with what is being measured.

    Raises:
        OptionError: `repeat` is below 1.
        InputError: no sample is long enough to measure caches with.
        PlanError: the records are another program's.
        LoweringError: an operation can neither be generated nor called.
    """
    if repeat < 1:
        raise OptionError(f"measure: repeat must be at least 1, got {repeat}")
    records = tuple(records)
    calls = [_as_call(call) for call in calibration] or [sample]
    target = this_machine()
    cached = None
    with torch.inference_mode():
        wanted = _Wanted(program, original, calls)
        stages = []
        for name, stage in _stages(program, records):
            tell(name)
            stages.append(_measure_stage(name, stage, sample, original, wanted, target, repeat))
    if decoding:
        cached = measure_decoding(program, records, decoding, wanted.texts(), repeat=repeat, tell=tell)
    return Measurements(tuple(stages), len(calls), torch.get_num_threads(), target, cached)


def tensors_of(result: Any) -> dict[str, torch.Tensor]:
    """Return the tensors among results by their path, "output" for a result that is one."""
    found: dict[str, torch.Tensor] = {}

    def leaf(path: str, value: Any) -> Constant | None:
        if not isinstance(value, torch.Tensor):
            return None
        found[path or "output"] = value
        return Constant(None)

    describe(result, leaf)
    return found


class _Wanted:
    """The original's results of the calls that stages are compared on."""

    def __init__(self, program: Program, original: Callable[..., Any], calls: Sequence[Call]) -> None:
        self._signature = program.signature
        self._original = original
        self.calls = calls
        self._expected = [tensors_of(original(*args, **kwargs)) for args, kwargs in calls]
        found = find_logits(program)
        self._logits = None if found is None else self._placed(program, found)
        self._causal = found is not None and self._is_causal(found)

    def compare(self, run: Callable[..., Any]) -> Quality:
        """Return how far the results of `run` are from the original's."""
        comparison = Comparison(self._logits, self._causal)
        for (args, kwargs), expected in zip(self.calls, self._expected, strict=True):
            found = tensors_of(run(*args, **kwargs))
            # The model may return more, such as a cache.
            inputs = self._signature.collect(args, kwargs)
            comparison.add(inputs, [expected[name] for name in found], list(found.values()))
        return comparison.quality()

    def texts(self) -> list[torch.Tensor]:
        """Return the token ids of each row of the calls, without padding, int64 [T]."""
        if self._logits is None:
            return []
        found = []
        for call in self.calls:
            inputs = self._signature.collect(*call)
            ids = inputs[self._logits.ids]
            mask = torch.ones_like(ids) if self._logits.mask is None else inputs[self._logits.mask]
            found += [row[kept != 0] for row, kept in zip(ids, mask, strict=True)]
        return found

    def _placed(self, program: Program, logits: Logits) -> Logits:
        """Return where the logits are among the tensors of the results."""
        markers = [torch.empty(0) for _ in program.results]
        tensors = list(tensors_of(program.signature.unflatten(markers)).values())
        at = next(k for k, tensor in enumerate(tensors) if tensor is markers[logits.result])
        return Logits(at, logits.ids, logits.mask)

    def _is_causal(self, logits: Logits) -> bool:
        """Return whether no logits of the longest call depend on a later token: its last one is changed to see."""
        inputs = max((self._signature.collect(*call) for call in self.calls), key=lambda tensors: tensors[logits.ids].shape[1])
        if inputs[logits.ids].shape[1] < 2:
            return False
        one, other = (self._results(tensors)[self._at] for tensors in (inputs, with_last_changed(inputs, logits)))
        return torch.allclose(one[:, :-1], other[:, :-1], rtol=1e-4, atol=1e-4, equal_nan=True)

    @property
    def _at(self) -> int:
        assert self._logits is not None
        return self._logits.result

    def _results(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        arguments = {name: build(structure, tensors) for name, structure in self._signature.arguments.items()}
        return list(tensors_of(self._original(**arguments)).values())


def _stages(program: Program, records: Iterable[PassRecord]) -> Iterator[tuple[str, Program]]:
    yield CAPTURE, program
    for record, result in replay(program, records):
        yield record.options, result


def _measure_stage(
    name: str,
    program: Program,
    sample: Call,
    original: Callable[..., Any],
    wanted: _Wanted,
    target: Target,
    repeat: int,
) -> StageMeasurement:
    started = time.perf_counter()
    device = next((w.device.type for w in program.weights.values()), "cpu")
    executable = Executable(lower(program, device=device), program.weights, program.signature)
    quality = wanted.compare(executable)
    compile_us = (time.perf_counter() - started) * 1e6
    args, kwargs = sample
    pairs = time_pairs(lambda: original(*args, **kwargs), lambda: executable(*args, **kwargs), repeat)
    sizes = sizes_of(program, program.signature.flatten(args, kwargs))
    return StageMeasurement(
        name,
        quality,
        median(ours for _, ours in pairs) * 1e6,
        median(theirs for theirs, _ in pairs) * 1e6,
        median(theirs / ours for theirs, ours in pairs),
        predict(program_cost(program), sizes, target),
        compile_us,
    )


def time_pairs(one: Callable[[], object], other: Callable[[], object], repeat: int) -> list[tuple[float, float]]:
    """Return the times of two in seconds, in turn and each first in turn.

    With one thread it is the CPU time of this thread, which other processes hardly disturb; wall time with more. What takes
    less than `SAMPLE_S` is called as often as fits into it.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def timed(run: Callable[[], object], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run()
        return max(clock() - start, 1e-9) / calls

    runs = (one, other)
    # The first call of either may compile, and does not count.
    calls = [max(1, min(MOST_CALLS, int(SAMPLE_S / min(timed(run, 1) for _ in range(2))))) for run in runs]
    pairs = []
    for count in range(repeat):
        pair = [0.0, 0.0]
        for k in (0, 1) if count % 2 == 0 else (1, 0):
            pair[k] = timed(runs[k], calls[k])
        pairs.append((pair[0], pair[1]))
    return pairs


def _as_call(sample: Any) -> Call:
    return ((), sample) if isinstance(sample, Mapping) else (sample[0], sample[1])
