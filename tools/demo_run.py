"""What the demo measures: a real sentence encoder, as it is and compiled, on all docstrings of Python's standard library."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import graphwright

from . import reference, sentences
from .demo_outcome import Answer, Hit, Latency, Outcome

BATCH, MAX_TOKENS = 32, 256
QUICK_TEXTS = 200
EAGER_BUDGET_S = 100.0
CALL_SHAPE, QUICK_CALL_SHAPE = (BATCH, MAX_TOKENS), (8, 128)
LATENCY_TOKENS = (32, 128)
LATENCY_PAIRS, QUICK_LATENCY_PAIRS = 60, 10
SHOWN_HITS, COMPARED_HITS = 3, 10
QUERIES = (
    "how do I compress a file",
    "pick random items from a list",
    "find out which day of the week a date falls on",
    "make a temporary directory that is deleted afterwards",
    "measure how long a piece of code takes",
)

Run = Callable[..., torch.Tensor]


@torch.inference_mode()
def run(*, quick: bool = False, tell: Callable[[str], None] = lambda text: None) -> Outcome:
    """Run the demo.

    Args:
        quick: take the first 200 docstrings only, and fewer timings.
        tell: called with what is being done now.

    Raises:
        InputError: the weights are not installed.
    """
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    seconds: dict[str, float] = {}
    started = last = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage], last = now - last, now

    tell("loading all-MiniLM-L6-v2")
    eager = sentences.load_encoder()
    done("load")
    tell("reading the docstrings of Python's standard library")
    found = list(itertools.islice(reference.each_docstring(), QUICK_TEXTS)) if quick else reference.docstrings()
    texts = [document.text for document in found]
    batches = sentences.batches(texts, size=BATCH, max_tokens=MAX_TOKENS)
    done("read")
    tell("compiling")
    with torch.inference_mode(False):
        compiled = graphwright.compile(eager, *batches[len(batches) // 2].inputs.values())
    compile_s = {name: us / 1e6 for name, us in compiled.report.times_us.items()}
    first = time.perf_counter()
    compiled(**batches[0].inputs)
    compile_s["first call"] = time.perf_counter() - first
    done("compile")
    tell("timing single texts")
    pairs = QUICK_LATENCY_PAIRS if quick else LATENCY_PAIRS
    latencies = [_latency(eager, compiled, _one_text(batches, tokens), pairs) for tokens in LATENCY_TOKENS]
    call_shape = QUICK_CALL_SHAPE if quick else CALL_SHAPE
    calls = _memory(eager, compiled, call_shape)
    done("single texts")
    embedded = _Embedded(len(texts))
    embedded.fill(eager, compiled, batches, tell)
    done("embed")
    tell("searching")
    answers = [_answer(query, found, embedded, eager, compiled) for query in QUERIES]
    done("search")
    seconds["all"] = time.perf_counter() - started
    ours, theirs = embedded.compiled.double(), embedded.eager.double()
    rows = embedded.by_both
    cosines = torch.cosine_similarity(ours[rows], theirs[rows])
    return Outcome(
        busy=busy,
        docstrings=len(texts),
        eager_docstrings=len(rows),
        tokens=sum(batch.tokens for batch in batches),
        seconds=seconds,
        compile_s=compile_s,
        latencies=latencies,
        eager_per_s=len(rows) / sum(embedded.eager_s),
        compiled_per_s=len(texts) / sum(embedded.compiled_s),
        eager_cpu_ms=sum(embedded.eager_cpu_s) / len(rows) * 1e3,
        compiled_cpu_ms=sum(embedded.compiled_cpu_s[: len(embedded.eager_s)]) / len(rows) * 1e3,
        throughput_ratio=sum(embedded.eager_s) / sum(embedded.compiled_s[: len(embedded.eager_s)]),
        call_shape=call_shape,
        eager_call_bytes=calls[0],
        compiled_call_bytes=calls[1],
        eager_weight_bytes=sum(weight.nbytes for weight in eager.state_dict().values()),
        compiled_weight_bytes=compiled.memory.weight_bytes,
        largest_difference=float((ours - theirs)[rows].abs().max()),
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        kernels=compiled.report.kernels,
        steps=dict(compiled.report.steps),
        answers=answers,
    )


class _Embedded:
    """The embeddings of all texts by both, and how long each batch took, in wall time and in processor time."""

    def __init__(self, count: int) -> None:
        self.eager = torch.zeros(count, 384)
        self.compiled = torch.zeros(count, 384)
        self.by_both: list[int] = []
        self.eager_s: list[float] = []
        self.compiled_s: list[float] = []
        self.eager_cpu_s: list[float] = []
        self.compiled_cpu_s: list[float] = []

    def fill(self, eager: Run, compiled: Run, batches: Sequence[sentences.Batch], tell: Callable[[str], None]) -> None:
        """Embed every batch by the compiled model, and by the original until its time is up."""
        # In any order but that of lengths, the batches that the original gets to are a fair sample.
        order = random.Random(0).sample(range(len(batches)), len(batches))
        count = 0
        for number, k in enumerate(order):
            batch = batches[k]
            count += len(batch.rows)
            tell(f"embedding {count} of {len(self.eager)} docstrings")
            both = sum(self.eager_s) < EAGER_BUDGET_S
            # Each goes first in turn, so that what the other left in the caches helps both alike.
            for ours in (number % 2 == 0, number % 2 == 1):
                if ours or both:
                    cpu_s = time.process_time()
                    result, took_s = _timed(compiled if ours else eager, batch.inputs)
                    (self.compiled_cpu_s if ours else self.eager_cpu_s).append(time.process_time() - cpu_s)
                    (self.compiled_s if ours else self.eager_s).append(took_s)
                    (self.compiled if ours else self.eager)[batch.rows] = result
            if both:
                self.by_both += batch.rows


def _timed(model: Run, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    result = model(**inputs)
    return result, time.perf_counter() - start


def _one_text(batches: Sequence[sentences.Batch], tokens: int) -> dict[str, torch.Tensor]:
    """Return the beginning of the longest text, without padding."""
    last = batches[-1].inputs
    ids = last["input_ids"][-1:, :tokens]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _latency(eager: Run, compiled: Run, inputs: Mapping[str, torch.Tensor], pairs: int) -> Latency:
    for model in (eager, compiled):
        model(**inputs)
    times: list[tuple[float, float]] = []
    for number in range(pairs):
        if number % 2:
            eager_s, compiled_s = _timed(eager, inputs)[1], _timed(compiled, inputs)[1]
        else:
            compiled_s, eager_s = _timed(compiled, inputs)[1], _timed(eager, inputs)[1]
        times.append((eager_s * 1e3, compiled_s * 1e3))
    # What a fifth of the calls stay below: a busy machine disturbs it less than the median.
    eager_ms, compiled_ms = (statistics.quantiles(column, n=5)[0] for column in zip(*times, strict=True))
    return Latency(inputs["input_ids"].shape[1], eager_ms, compiled_ms, eager_ms / compiled_ms)


def _memory(eager: Run, compiled: Any, shape: tuple[int, int]) -> tuple[int | None, int | None]:
    """Return what a call needs beyond the weights, by the original and by the compiled model."""
    ids = torch.full(shape, 1000)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    theirs = growth_bytes(lambda: eager(**inputs))
    held = compiled.memory.arena_bytes
    ours = growth_bytes(lambda: compiled(**inputs))
    return theirs, None if ours is None else ours + held


def growth_bytes(call: Callable[[], object]) -> int | None:
    """Return by how much the resident memory of this process grows at most during a call; None where /proc does not tell."""
    forget, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not forget.exists() or not status.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        # Else a call would get what calls before it have freed, for nothing.
        trim(0)
    forget.write_text("5")
    before = _status_bytes(status, "VmRSS:")
    call()
    return max(0, _status_bytes(status, "VmHWM:") - before)


def _status_bytes(status: Path, key: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))


def _answer(query: str, found: Sequence[reference.Docstring], embedded: _Embedded, eager: Run, compiled: Run) -> Answer:
    """Search the docstrings that both have embedded, each with its own embedding of the query."""
    inputs = sentences.batches([query], size=1, max_tokens=MAX_TOKENS)[0].inputs
    rows = embedded.by_both
    hits = [
        _hits(found, rows, vectors[rows] @ model(**inputs)[0])
        for model, vectors in ((eager, embedded.eager), (compiled, embedded.compiled))
    ]
    shown = [list(best.values())[:SHOWN_HITS] for best in hits]
    return Answer(query, shown[0], shown[1], len(hits[0].keys() & hits[1].keys()), len(hits[0]))


def _hits(found: Sequence[reference.Docstring], rows: Sequence[int], cosines: torch.Tensor) -> dict[str, Hit]:
    """Return the best hits by their text, best first; of docstrings that say the same, the first."""
    hits: dict[str, Hit] = {}
    for place in cosines.argsort(descending=True, stable=True).tolist():
        document = found[rows[place]]
        if document.text not in hits:
            hits[document.text] = Hit(document.name, document.text.splitlines()[0].strip(), float(cosines[place]))
            if len(hits) == COMPARED_HITS:
                break
    return hits
