"""Leaving out the layers that a model can do without."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from graphwright.ir.errors import OptionError, PassError, PlanError, unknown
from graphwright.ir.program import Program
from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan, Refusal
from graphwright.passes.local import Places, erase_unused

from .calibrating import Calibration
from .units import Kind, Savings, Unit, find_units, sizes_of, why_not_in_place

Score = Literal["influence", "leave-one-out"]


@dataclass(frozen=True, kw_only=True)
class DropLayers(Pass):
    """Leave out the blocks, or the attention or feed-forward branches, that sample calls show to matter least.

    Before: `%h = add(%x, %attention); %y = add(%h, %feed_forward); %z = add(%y, %next)`

    After: `%z = add(%x, %next)`, and none of the weights that only the block read

    Applies when: the model has a residual stream, and one of `drop`, `keep_ratio` and `budget` is given. The stream goes around
        what is left out; norms on the stream, as behind the branches of BERT, stay where a branch goes, and go with a block.

    Declines when: there is no residual stream, or no branch of the kind.
    Declines when: what a unit computes is a result of the model, such as keys and values, or is read outside of it.
    Declines when: the stream changes its shape or dtype in the unit.
    Declines when: leaving out one more would raise the loss above the budget.

    Fidelity: every plan is lossy; its decisions say by how much the loss on the calibration rises. Each run counts anew: the
        pass run twice leaves out twice as much.

    Source: Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024, arXiv 2403.03853
        (block influence); branches as in He et al., What Matters in Transformers? Not All Attention is Needed, 2024, arXiv
        2406.15786. Differs from the papers in: units can be scored by the loss without them; scores can be taken again after
        each one that goes; padding counts for nothing.

    Cost: floating point operations, bytes moved and weights of what is left out. Planning runs the model in plain PyTorch: once
        for all influences and once for each unit left out; for leave-one-out once for each unit, every time scores are taken.

    Args:
        drop: number of units to leave out, from 0 to all.
        keep_ratio: ratio of the units that stay to all, in (0, 1]; at least so many stay.
        budget: leave out units while the loss on the calibration rises by no more than this, above 0: nats per token for a
            language model, else 1 - cosine similarity of the results.
        unit: "block", "attention" (the attention branch of a block) or "feed-forward" (the other one).
        score: "influence" (1 - cosine similarity of the stream before and after the unit, the mean over tokens) or
            "leave-one-out" (the increase of the loss without the unit); the least goes first.
        greedy: take the scores again after each unit that goes; otherwise they are those of the whole model. The loss that a
            budget limits is measured after each unit in either case.
        minimum_tokens: the least number of calibration tokens to decide on, at least 1.

    Raises:
        OptionError: an option is out of its range, or more than one says how many.
    """

    name = "drop-layers"
    fidelity = Fidelity.LOSSY
    source = "ShortGPT, arXiv 2403.03853; What Matters in Transformers?, arXiv 2406.15786"

    drop: int | None = None
    keep_ratio: float | None = None
    budget: float | None = None
    unit: Kind = "block"
    score: Score = "influence"
    greedy: bool = False
    minimum_tokens: int = 64

    def __post_init__(self) -> None:
        given = [name for name in ("drop", "keep_ratio", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(f"{self.name}: {' and '.join(given)} each say how much to leave out: give one of them")
        if self.drop is not None and self.drop < 0:
            raise OptionError(f"{self.name}: drop must be at least 0, got {self.drop}")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise OptionError(f"{self.name}: keep_ratio must be in (0, 1], got {self.keep_ratio}")
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise OptionError(f"{self.name}: budget must be above 0 and finite, got {self.budget}")
        if self.minimum_tokens < 1:
            raise OptionError(f"{self.name}: minimum_tokens must be at least 1, got {self.minimum_tokens}")
        for option, choices in (("unit", Kind), ("score", Score)):
            if getattr(self, option) not in typing.get_args(choices):
                raise OptionError(f"{self.name}: {unknown(option, str(getattr(self, option)), typing.get_args(choices))}")

    def plan(self, program: Program, context: Context) -> Plan:
        """Choose what to leave out, the least important first.

        Raises:
            PassError: more units are to go than there are; there are no sample calls, too few tokens in them, or they do not
                fit the model.
        """
        if self.drop is None and self.keep_ratio is None and self.budget is None:
            return Plan(self.name, (), (Refusal("", "nothing is asked for: give drop, keep_ratio or budget"),))
        units, refusals = find_units(program, self.unit)
        limit = self._limit(len(units), refusals)
        if not units or limit == 0:
            return Plan(self.name, (), tuple(refusals))
        calibration = Calibration(program, context.calibration, self.name)
        tokens = calibration.tokens(units)
        if tokens < self.minimum_tokens:
            raise PassError(
                f"{self.name}: the {len(calibration.calls)} calibration calls have {tokens} tokens, and at least "
                f"{self.minimum_tokens} are wanted: give more or longer ones, or lower minimum_tokens"
            )
        found = _Search(self, program, calibration, units).run(limit)
        return Plan(self.name, tuple(found[0]), (*refusals, *found[1]))

    def _limit(self, count: int, refusals: Sequence[Refusal]) -> int:
        """Return the most units to leave out."""
        if self.keep_ratio is not None:
            # Nine tenths of ten are nine, whatever their product rounds to.
            return count - math.ceil(self.keep_ratio * count - 1e-9)
        if self.drop is None:
            return count
        if count and self.drop > count:
            cannot = f", and {len(refusals)} more that cannot" if refusals else ""
            raise PassError(f"{self.name}: drop={self.drop} of unit={self.unit}, and there are {count} that can go{cannot}")
        return self.drop

    def apply(self, program: Program, plan: Plan) -> Program:
        """Return the program without what the plan names, and without the weights that only this read.

        Raises:
            PlanError: a node is not there, is named twice, or cannot stand in the other's place.
        """
        result = program.copy()
        places = Places(result.graph, self.name)
        order = {node: k for k, node in enumerate(result.graph.nodes)}
        replaced: dict[str, fx.Node] = {}
        for decision in plan.decisions:
            if "keep" not in decision.detail:
                raise PlanError(f"{self.name}: the decision about %{decision.where} does not say what to `keep` in its place")
            where, keep = places[decision.where], places[decision.detail["keep"]]
            if decision.where in replaced:
                raise PlanError(f"{self.name}: the plan names %{decision.where} twice")
            reason = why_not_in_place(result, where, keep)
            if reason is None and order[keep] >= order[where]:
                reason = "it is not computed before it"
            if reason is not None:
                raise PlanError(f"{self.name}: %{keep.name} cannot stand in the place of %{where.name}: {reason}")
            where.replace_all_uses_with(keep)
            places.move(decision.where, keep)
            replaced[decision.where] = where
        erase_unused(result, replaced.values())
        return result


class _Search:
    """Chooses units one by one."""

    def __init__(self, step: DropLayers, program: Program, calibration: Calibration, units: Sequence[Unit]) -> None:
        self.step, self.program, self.calibration, self.units = step, program, calibration, units
        self.savings = Savings(program, sizes_of(program, calibration.calls[0]))
        self.instead: dict[str, str] = {}
        self.decisions: list[Decision] = []

    def run(self, limit: int) -> tuple[list[Decision], list[Refusal]]:
        """Return what goes, and why the others stay."""
        rest, gone = list(self.units), list[Unit]()
        current, risen = self.program, 0.0
        scores = self._scores(current, rest, risen)
        saved = self.savings.of(gone)
        while rest and len(gone) < limit:
            if gone and self.step.greedy:
                scores = self._scores(current, rest, risen)
            unit = min(rest, key=lambda unit: scores[unit])
            trial = self._without(unit)
            increase = self.calibration.increase(trial)
            if self.step.budget is not None and increase > self.step.budget:
                return self.decisions, [*self._kept(rest, scores, unit, increase)]
            now = self.savings.of([*gone, unit])
            detail = {
                "keep": unit.keep,
                "score": scores[unit],
                "loss": self.calibration.loss,
                "loss_increase": increase,
                **{f"saved_{name}": now[name] - saved[name] for name in now},
            }
            why = f"{self.step.score} {scores[unit]:.3g}, the least of {len(rest)}"
            self.decisions.append(Decision(unit.where, f"leave out {unit.label}", why, detail))
            self.instead[unit.where] = unit.keep
            rest.remove(unit)
            gone.append(unit)
            current, risen, saved = trial, increase, now
        return self.decisions, [*self._kept(rest, scores)]

    def _without(self, unit: Unit) -> Program:
        decision = Decision(unit.where, "", "", {"keep": unit.keep})
        return self.step.apply(self.program, Plan(self.step.name, (*self.decisions, decision)))

    def _scores(self, current: Program, units: Sequence[Unit], risen: float) -> dict[Unit, float]:
        if self.step.score == "influence":
            found = self.calibration.influence(current, units, self._resolve)
        else:
            found = [self.calibration.increase(self._without(unit)) - risen for unit in units]
        # What gives no number at all is the last to go.
        return {unit: math.inf if math.isnan(value) else value for unit, value in zip(units, found, strict=True)}

    def _resolve(self, name: str) -> str:
        while name in self.instead:
            name = self.instead[name]
        return name

    def _kept(
        self, rest: Sequence[Unit], scores: dict[Unit, float], tried: Unit | None = None, increase: float = 0.0
    ) -> list[Refusal]:
        over = f"without it the loss would rise by {increase:.3g}, and the budget is {self.step.budget}"
        return [
            Refusal(
                unit.where,
                f"{unit.label} stays: {self.step.score} {scores[unit]:.3g}" + (f"; {over}" if unit is tried else ""),
            )
            for unit in rest
        ]
