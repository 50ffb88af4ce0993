"""The sweep `cache`: the small language model with its keys and values in other formats."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import graphwright
from graphwright.codegen.lower import lower
from graphwright.ir.fixing import fix_dimension
from graphwright.ir.program import Program
from graphwright.passes.base import Context
from graphwright.passes.registry import as_passes
from graphwright.pipeline import run_passes
from graphwright.runtime.executable import Executable
from graphwright.runtime.generation import TYPICAL
from graphwright.runtime.kv_cache import KVCache, cache_bytes
from graphwright.tools import reference
from graphwright.tools.bench.models.measure import refuse_strays, rounds
from graphwright.tools.bench.models.rivals import Run

from .forward import problem_of, tell
from .frame import UNCHANGED, Outcome, Setting

TOKENS = 1024
"""Tokens of a sequence that quality is measured on."""

PROMPT, CHUNK = 192, 64
"""Tokens that come first, and with each later call: a token is predicted from what is in the cache, but for its chunk."""

HELD_OUT, CALIBRATION = 12, 1
"""Sequences to measure with, and to decide on; they are of different text."""

ROWS = 4
"""Sequences of a call."""

CONTEXTS = (512, 1024, 2048, 4095)
"""Tokens in the cache when a step is timed."""


@dataclass(frozen=True)
class CacheSweep:
    """Bytes of cache and time of a step against the loss of text that goes through the cache.

    Qualities are `nll_change` and `nll_change_percent`, of the mean loss of the next token, and `kl`, the divergence from the
    unchanged model's distribution. Costs are `cache_bytes_per_token`, `cache_bytes_per_sequence` (what each sequence takes
    whatever its length), and for each context `step_us_N`, the time of one token of one sequence behind N others.

    Args:
        name: as given on the command line.
        title: one line on what is swept.
        x: the key of the cost that a picture shows.
        y: the key of the quality.
    """

    name: str = "cache"
    title: str = "small language model, text through its cache: formats of keys and values"
    x: str = "cache_bytes_per_token"
    y: str = "nll_change"

    def settings(self, quick: bool) -> Sequence[Setting]:
        """Return what is run; less of it if quick."""
        uniform = [
            Setting(f"{bits} bits", (f"quantize-cache:bits={bits}",), "uniform") for bits in ((8, 4) if quick else (8, 4, 2))
        ]
        if quick:
            return [UNCHANGED, *uniform]
        mixed = [
            Setting(f"{budget} bytes", (f"quantize-cache:budget_bytes_per_token={budget},candidates=8+4+2",), "by layer")
            for budget in (896, 512, 448)
        ]
        groups = [Setting(f"groups of {size}", (f"quantize-cache:group_size={size}",), "4 bits") for size in (64, 128)]
        windows = [Setting(f"window of {size}", (f"quantize-cache:residual={size}",), "4 bits") for size in (0, 32)]
        tiers = [
            Setting(f"{bits} bits, {share:g} in 8", (f"tier-cache:low_bits={bits},important={share}",), "two tiers")
            for bits, share in ((2, 0.25), (3, 0), (3, 0.0625), (3, 0.125), (3, 0.25), (4, 0.125))
        ]
        return [UNCHANGED, *uniform, *mixed, *groups, *windows, *tiers]

    def run(self, settings: Sequence[Setting], repeat: int, threads: int) -> Iterator[Outcome]:
        """Compile, compare and time all settings, then yield what was found of each."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield from _run(settings, repeat, threads)
        finally:
            torch.set_num_threads(before)


CACHE = CacheSweep()


def _run(settings: Sequence[Setting], repeat: int, threads: int) -> Iterator[Outcome]:
    tell("capturing")
    ids = reference.held_out_ids((HELD_OUT + CALIBRATION) * TOKENS).reshape(-1, TOKENS)
    program = run_passes(graphwright.capture(reference.load_language_model(), input_ids=ids[:2, :64]))
    program = run_passes(program, ["cached-decode", "dead-code"])
    context = Context(((((), {"input_ids": ids[HELD_OUT:]})),))
    text = torch.split(ids[:HELD_OUT], ROWS)
    exact = [_scores(_executable(program), rows) for rows in text]
    found: dict[str, Outcome] = {}
    runs: dict[str, Run] = {}
    for setting in settings:
        tell(setting.name)
        # Whatever keeps a setting from running is its result, and the others are still worth measuring.
        try:
            changed = run_passes(program, [*as_passes(setting.passes), "dead-code"], context)
            quality = _quality(text, exact, [_scores(_executable(changed), rows) for rows in text])
            taken = cache_bytes(changed.signature)
            step = _executable(fix_dimension(changed, "tokens", 1))
            made = {f"{setting.name}\0{count}": _step(step, count) for count in CONTEXTS}
            if threads == 1:
                refuse_strays(next(iter(made.values())))
        except Exception as error:  # noqa: BLE001
            found[setting.name] = Outcome(setting, problem=problem_of(error))
        else:
            cost = {"cache_bytes_per_token": taken.per_token, "cache_bytes_per_sequence": float(taken.per_sequence)}
            found[setting.name] = Outcome(setting, quality, cost)
            runs |= made
    samples, _ = rounds(runs, threads, repeat, tell)
    for setting in settings:
        outcome = found[setting.name]
        times = {
            f"step_us_{count}": statistics.median(samples[name]) * 1e6
            for count in CONTEXTS
            if (name := f"{setting.name}\0{count}") in samples
        }
        yield Outcome(setting, outcome.quality, {**outcome.cost, **times}, problem=outcome.problem)


def _executable(program: Program) -> Executable:
    return Executable(lower(program), program.weights, program.signature, typical=TYPICAL)


def _scores(executable: Executable, ids: torch.Tensor) -> torch.Tensor:
    """Return the scores of what follows each token behind the prompt, [batch, tokens, words]."""
    cache, found, start, stop = KVCache(executable.signature, len(ids), TOKENS), [], 0, PROMPT
    while start < TOKENS:
        past = torch.full((len(ids),), start)
        scores = executable(ids[:, start:stop].contiguous(), past, *cache.tensors.values())
        found.append(scores)
        start, stop = stop, stop + CHUNK
    return torch.cat(found[1:], 1)


def _quality(text: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> Mapping[str, float]:
    before = after = divergence = 0.0
    tokens = 0
    for ids, old, new in zip(text, exact, found, strict=True):
        target = ids[:, PROMPT + 1 :].flatten()
        old_log, new_log = (F.log_softmax(scores[:, :-1].double(), -1).flatten(0, 1) for scores in (old, new))
        before += F.nll_loss(old_log, target, reduction="sum").item()
        after += F.nll_loss(new_log, target, reduction="sum").item()
        divergence += F.kl_div(new_log, old_log, reduction="sum", log_target=True).item()
        tokens += target.numel()
    change = (after - before) / tokens
    return {"nll_change": change, "nll_change_percent": 100 * change / (before / tokens), "kl": divergence / tokens}


def _step(executable: Executable, count: int) -> Run:
    """Return a call that adds one token behind `count` others; it adds the same one each time."""
    cache = KVCache(executable.signature, 1, count + 1)
    for tensor in cache.tensors.values():
        tensor.copy_(torch.randint(0, 255, tensor.shape) if tensor.dtype == torch.uint8 else torch.rand(tensor.shape))
    call = executable.bind(torch.zeros((1, 1), dtype=torch.int64), torch.full((1,), count), *cache.tensors.values())

    def step() -> torch.Tensor:
        call.run()
        result: torch.Tensor = call.results
        return result

    return step
