"""What passes on caches do to what a model continues with, and to the time of a token, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from graphwright.codegen.lower import lower
from graphwright.ir.analyses.cost_lines import program_cost
from graphwright.ir.analyses.roofline import predict
from graphwright.ir.errors import InputError
from graphwright.ir.fixing import fix_dimension
from graphwright.ir.program import Program
from graphwright.ir.records import PassRecord
from graphwright.runtime.executable import Executable
from graphwright.runtime.generation import TYPICAL
from graphwright.runtime.kv_cache import KVCache
from graphwright.runtime.machine import this_machine

from .pipeline import replay
from .quality import Comparison, Logits, Quality

if TYPE_CHECKING:
    from .measuring import Measurements

CONTEXT = 1023
"""Tokens in the caches when a step is timed; fewer where a model has no positions for so many."""

CHUNKS = 4
"""Calls that the second half of a text goes through a cache in: each reads what those before wrote."""

FEWEST_TOKENS = 4


def measure_decoding(
    program: Program,
    records: Sequence[PassRecord],
    decoding: Sequence[PassRecord],
    texts: Sequence[torch.Tensor],
    *,
    repeat: int,
    tell: Callable[[str], object],
) -> Measurements:
    """Return what passes on the program with caches did to its results and to the time of a token.

    The first half of each text is a prompt, and the second goes through the caches in `CHUNKS` calls; results are compared with
    those of the caches in the model's own format. A step is one token of one sequence, behind `CONTEXT` others.

    Args:
        program: the model as it was captured.
        records: the passes that ran on it, in order.
        decoding: those that made the program with caches of it, and rewrote that one; the first is "cached-decode".
        texts: token ids, int64 [T] each; those below `FEWEST_TOKENS` do not count.
        repeat: pairs of timed steps, the first program's and a pass's in turn, at least 1.
        tell: called with what is being measured.

    Raises:
        InputError: no text is long enough.
        PlanError: the records are another program's.
        LoweringError: an operation can neither be generated nor called.
    """
    from .measuring import Measurements, StageMeasurement, time_pairs

    rows = [ids[None] for ids in texts if len(ids) >= FEWEST_TOKENS]
    if not rows:
        raise InputError(
            f"measure: caches are measured on texts of at least {FEWEST_TOKENS} tokens, and none of {len(texts)} has so many: "
            f"give a longer sample or calibration"
        )
    target, stages = this_machine(), []
    expected: list[torch.Tensor] = []
    first: Callable[[], object] | None = None
    for record, stage in _derived(program, records, decoding):
        tell(record.options)
        started = perf_counter()
        whole = _executable(stage)
        found = [_scores(whole, ids) for ids in rows]
        expected = expected or found
        quality = _compare(rows, expected, found)
        single = fix_dimension(stage, "tokens", 1)
        step, context = _step(_executable(single))
        compile_us = (perf_counter() - started) * 1e6
        first = first or step
        pairs = time_pairs(first, step, repeat)
        sizes = {"batch": 1, "capacity": context + 1}
        stages.append(
            StageMeasurement(
                record.options,
                quality,
                median(ours for _, ours in pairs) * 1e6,
                median(theirs for theirs, _ in pairs) * 1e6,
                median(theirs / ours for theirs, ours in pairs),
                predict(program_cost(single), sizes, target),
                compile_us,
            )
        )
    return Measurements(tuple(stages), len(rows), torch.get_num_threads(), target)


def _derived(
    program: Program, records: Sequence[PassRecord], decoding: Sequence[PassRecord]
) -> Iterator[tuple[PassRecord, Program]]:
    """Yield the programs with caches, after each pass that changed something."""
    for record, stage in replay(program, [*records, *decoding]):
        if stage.states:
            yield record, stage


def _executable(program: Program) -> Executable:
    device = next((w.device.type for w in program.weights.values()), "cpu")
    return Executable(lower(program, device=device), program.weights, program.signature, typical=TYPICAL)


def _scores(executable: Executable, ids: torch.Tensor) -> torch.Tensor:
    """Return the scores of what follows each token of the second half, [1, tokens, words]."""
    tokens = ids.shape[1]
    prompt = tokens // 2
    chunk = max(1, (tokens - prompt) // CHUNKS)
    cache = KVCache(executable.signature, 1, tokens)
    found = []
    for start in (0, *range(prompt, tokens, chunk)):
        stop = prompt if start == 0 else min(start + chunk, tokens)
        past = torch.full((1,), start, device=ids.device)
        found.append(executable(ids[:, start:stop].contiguous(), past, *cache.tensors.values()).clone())
    return torch.cat(found[1:], 1)


def _compare(rows: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> Quality:
    comparison = Comparison(Logits(result=0, ids=0, mask=None), causal=True)
    for ids, one, other in zip(rows, expected, found, strict=True):
        comparison.add([ids[:, ids.shape[1] // 2 :]], [one], [other])
    return comparison.quality()


def _step(executable: Executable) -> tuple[Callable[[], object], int]:
    """Return a call that adds one token behind others, the same one each time, and how many others."""
    limit = executable.signature.dimensions["capacity"].high if "capacity" in executable.signature.dimensions else None
    context = CONTEXT if limit is None else min(CONTEXT, limit - 1)
    cache = KVCache(executable.signature, 1, context + 1)
    device = executable.signature.tensors[0].device
    ids, past = torch.zeros((1, 1), dtype=torch.int64, device=device), torch.full((1,), context, device=device)
    call = executable.bind(ids, past, *cache.tensors.values())
    return call.run, context
