"""What passes are tried with: their options, sample calls, and the programs that they are for.

The passes are those of the registry: one that is added is tried with its defaults, or as TEXTS says.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree

from graphwright.ir.errors import PassError
from graphwright.ir.program import Program
from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan, Refusal, Stage
from graphwright.passes.registry import parse_pass, pass_class, pass_names
from graphwright.pipeline import DEFAULT_PASSES, run_passes
from graphwright.runtime.kv_cache import KVCache

TEXTS: dict[str, str] = {
    "drop-layers": "drop-layers:drop=1,minimum_tokens=8",
    "merge-tokens": "merge-tokens:r=1",
    "quantize-cache": "quantize-cache:group_size=16,residual=16",
    "tier-cache": "tier-cache:group_size=8,residual=8",
    "vertical-slash": "vertical-slash:vertical=30,slash=30,minimum_tokens=2",
    "window-attention": "window-attention:window=3,sinks=1",
}
"""Passes that do nothing without options, or nothing to models that are this small: how they are tried."""

CHUNKS = (20, 1, 18)
"""Tokens of the calls of a program with caches, one after the other: enough for small groups of them to be complete."""


def tried(name: str) -> Pass:
    """Return a pass with options at which it finds something to do where there is something."""
    return parse_pass(TEXTS.get(name, name))


def needs_caches(step: Pass) -> bool:
    """Return whether a pass is for programs with caches."""
    return step.stage is Stage.DECODE or step.name == "last-token"


def needs_capture(step: Pass) -> bool:
    """Return whether a pass is for programs as they are captured: every compilation runs it."""
    return step.name in DEFAULT_PASSES


def calibration(family: Any) -> Context:
    """Return sample calls of a family, other ones than its sample."""
    return Context(tuple(family.sample(4, 16, seed) for seed in (11, 12)))


def with_caches(program: Program) -> Program | None:
    """Return the program with caches that is derived of a model's own; None if it cannot be."""
    derived = run_passes(program, ["cached-decode", "dead-code"])
    return derived if derived.states else None


def tensors(results: Any) -> list[torch.Tensor]:
    """Return the tensors of a model's results."""
    plain = dict(results) if hasattr(results, "keys") else results
    return [leaf for leaf in _pytree.tree_leaves(plain) if isinstance(leaf, torch.Tensor)]


def run_forward(program: Program, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the results of a call, in plain PyTorch."""
    return tensors(program.reference(**inputs))


def run_chunks(program: Program, tokens: torch.Tensor, chunks: Sequence[int] = CHUNKS) -> list[torch.Tensor]:
    """Return the first result of each of several calls of a program with caches, in plain PyTorch.

    Caches are full of NaN at first: what they hold where no token is must not matter.

    Args:
        program: with caches.
        tokens: [batch, tokens, ...], as many as the calls take together, or more.
        chunks: number of tokens of each call.
    """
    caches = KVCache(program.signature, len(tokens), sum(chunks)).tensors
    for cache in caches.values():
        cache.fill_(torch.nan if cache.dtype.is_floating_point else 1)
    module, done, found = program.module(), 0, []
    main = program.signature.tensors[0].name
    for count in chunks:
        given = {main: tokens[:, done : done + count], **caches}
        for name, number in (("past", done), ("last", count - 1)):
            given[name] = torch.full((len(tokens),), number, dtype=torch.int64)
        with torch.no_grad():
            results = module(*(given[spec.name] for spec in program.signature.tensors))
        found.append(results[0])
        caches = {name: results[at] for name, at in program.states.items()}
        done += count
    return found


def through_json(plan: Plan) -> Plan:
    """Return a plan that was written as JSON and read again."""
    data = json.loads(json.dumps(dataclasses.asdict(plan)))
    decisions = tuple(Decision(**entry) for entry in data["decisions"])
    return Plan(data["pass_name"], decisions, tuple(Refusal(**entry) for entry in data["refusals"]))


def distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference relative to the largest element, over all tensors of floats; NaN if any is."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b.is_floating_point()]
    ratios = [(a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30) for a, b in pairs]
    return float(torch.stack(ratios).max())


def pairs() -> list[tuple[str, str]]:
    """Return all ordered pairs of passes that approximate; those for programs with caches run after all others."""
    lossy = [name for name in pass_names() if pass_class(name).fidelity is Fidelity.LOSSY]
    return [
        (first, second)
        for first in lossy
        for second in lossy
        if not (pass_class(first).stage is Stage.DECODE and pass_class(second).stage is Stage.PROGRAM)
    ]


class Pairs:
    """Runs pairs of passes on a family's program.

    Args:
        family: the family.
        program: its program, after what is done to every model.
    """

    def __init__(self, family: Any, program: Program) -> None:
        self.family, self.context = family, calibration(family)
        self._made: dict[str, Program] = {"": program}
        self._cached: dict[str, Program | None] = {}
        self._applied_to: set[str] = set()

    def does(self, first: str) -> bool:
        """Return whether the first pass of a pair found something to do; it was asked for by `after`."""
        return first in self._applied_to

    def after(self, first: str, second: str) -> Program | None:
        """Return what the second pass is given after the first; None if it is for caches, and there can be none."""
        if not needs_caches(tried(second)):
            return self._plain(first)
        if needs_caches(tried(first)):
            program = self._with_caches("")
            return None if program is None else self._applied(first, program)
        return self._with_caches(first)

    def plan(self, second: str, program: Program) -> Plan | str:
        """Return the second pass's plan, or why it cannot plan at all."""
        try:
            # Calls of a program with caches are not those of the model.
            return tried(second).plan(program, Context() if program.states else self.context)
        except PassError as error:
            return str(error)

    def _plain(self, name: str) -> Program:
        if name not in self._made:
            self._made[name] = self._applied(name, self._made[""])
        return self._made[name]

    def _with_caches(self, name: str) -> Program | None:
        if name not in self._cached:
            self._cached[name] = with_caches(self._plain(name))
        return self._cached[name]

    def _applied(self, name: str, program: Program) -> Program:
        step = tried(name)
        plan = step.plan(program, Context() if program.states else self.context)
        if plan.decisions:
            self._applied_to.add(name)
        return step.apply(program, plan)
