"""Merging tokens that are alike."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphwright.ir.errors import OptionError, PlanError, unknown
from graphwright.ir.program import Program
from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan, Refusal

from .counts import PARTS, Kept, Schedule, can_go, constant_counts, least_for, ratio_counts
from .rewriting import Merge, Metric, Rewrite
from .sites import NotMergeable, Site, Sites, find_sites, positions_read


@dataclass(frozen=True, kw_only=True)
class MergeTokens(Pass):
    """Merge the tokens of an encoder that are most alike, a few in every block, and compute all that follows for those left.

    Between the attention and the feed-forward of a block every other token is a source. Its likeness to its best partner among
    the others is the cosine of their keys, the mean over the heads, or of the tokens themselves. The sources that are most like
    their partners are merged into them: into the mean, weighted by how many tokens each stands for. A key that stands for n
    tokens counts n times in every attention after that. Padding is merged first, which changes nothing, and content only where
    padding does not suffice. Tokens keep their order.

    Before: `%a = add(%x, %attention); %y = add(%a, %feed_forward_of_a)`

    After: `%row = graphwright.merge_plan(..., kept); (%m, %sizes) = graphwright.merge(%a, %ones, %row, kept);
        %y = add(%m, %feed_forward_of_m); ...; %b = graphwright.attention(%q, %k, %v, [%sizes], bias="log(in0[b, k])");
        ...; %out = graphwright.unmerge(%z, %row)`

    Applies when: the model has residual blocks of an attention and a feed-forward behind it, wherever its norms are, and one of
        `r` and `ratio` is given.
    Applies when: attention sees all keys, or all but those that a mask [batch, tokens] of zeros and ones hides.
    Applies when: results have every token, or a fixed one, or are a mean over tokens: before what needs every token, each gets
        again what it was merged into.

    Declines when: an attention sees keys by their positions (causal, in a window), has a bias or a sink, reads the keys of
        another sequence, or is not recognised.
    Declines when: between the merges anything else depends on where tokens are, such as a rotary embedding or a convolution.
    Declines when: the program is packed, has caches, or has merged tokens already.
    Declines when: the number of tokens is fixed, or has a limit, and is too small for what is asked.
    Declines when: a block has no feed-forward behind one attention; it is left alone.

    Fidelity: LOSSY. Nothing is merged for r=0 and ratio=1. Tokens that are the same are merged without loss.

    Source: Bolya et al., Token Merging: Your ViT But Faster, 2022, arXiv 2210.09461. Differs from the paper in: padding is
        merged first; protected tokens take none in; the order is kept; tokens can be compared by themselves.

    Cost: operations on tokens shrink with the number of tokens, attention with its square. Finding partners takes a product of
        half of the tokens' keys, of one head, with the other half.

    Args:
        r: tokens merged in each block, on average, at least 0. Nothing goes below `minimum_tokens`, nor below what makes as
            many pairs in one block; the plan says where that is.
        ratio: share of the tokens that is left after the last merge, in (0, 1], rounded up to 1/1024.
        metric: what tokens are compared by: "keys" (the mean over the heads of the block's keys) or "tokens" (the vectors that
            are merged; a wider product, and often the better choice).
        schedule: "constant": the same number in every block; "decreasing": from twice the average down to none; "increasing".
        first: number of the first block that merges, from 0.
        last: number of the last one; None for the model's last.
        protect: so many of the first tokens are never merged, at least 0; None: up to the last token that is taken at a fixed
            place, such as a class token, or none.
        minimum_tokens: what the number of tokens does not go below, at least 0.

    Raises:
        OptionError: an option is out of its range, or both `r` and `ratio` are given.
    """

    name = "merge-tokens"
    fidelity = Fidelity.LOSSY
    source = "Bolya et al., Token Merging: Your ViT But Faster, 2022, arXiv 2210.09461"

    r: int | None = None
    ratio: float | None = None
    metric: Metric = "keys"
    schedule: Schedule = "constant"
    first: int = 0
    last: int | None = None
    protect: int | None = None
    minimum_tokens: int = 0

    def __post_init__(self) -> None:
        if self.r is not None and self.ratio is not None:
            raise OptionError(f"{self.name}: r and ratio each say how much to merge: give one of them")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise OptionError(f"{self.name}: ratio must be in (0, 1], got {self.ratio}")
        for option in ("r", "first", "last", "protect", "minimum_tokens"):
            value = getattr(self, option)
            if value is not None and value < 0:
                raise OptionError(f"{self.name}: {option} must be at least 0, got {value}")
        if self.last is not None and self.last < self.first:
            raise OptionError(f"{self.name}: last must be at least first, {self.first}, got {self.last}")
        for option, choices in (("metric", Metric), ("schedule", Schedule)):
            if getattr(self, option) not in typing.get_args(choices):
                raise OptionError(f"{self.name}: {unknown(option, str(getattr(self, option)), typing.get_args(choices))}")

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide how many tokens to merge in which blocks."""
        if self.r is None and self.ratio is None:
            return Plan(self.name, (), (Refusal("", "nothing is asked for: give r or ratio"),))
        try:
            sites = find_sites(program)
            found = [s for s in sites.found if self.first <= s.block and (self.last is None or s.block <= self.last)]
            if not found:
                raise NotMergeable("", f"none of the blocks from {self.first} to {self.last or 'the last'} can merge tokens")
            refusals = tuple(Refusal(*refused) for refused in sites.refused)
            if self.r == 0 or self.ratio == 1:
                return Plan(self.name, (), refusals)
            merges = self._merges(program, sites, found)
            _check(program, merges)
            # What stands in the way is found by trying.
            copy = program.copy()
            Rewrite(copy, *_bound(copy, merges)).run()
        except NotMergeable as reason:
            return Plan(self.name, (), (Refusal(reason.where, str(reason)),))
        return Plan(self.name, tuple(_decision(merge) for merge in merges), refusals)

    def _merges(self, program: Program, sites: Sites, found: Sequence[Site]) -> list[Merge]:
        protect = self.protect
        if protect is None:
            read = positions_read(sites.axes, program.graph, found[0].stream)
            protect = max((place + 1 for place in read), default=0)
        if self.r is not None:
            counts = constant_counts(self.r, self.schedule, len(found))
        else:
            assert self.ratio is not None
            counts = ratio_counts(self.ratio, self.schedule, len(found))
        least = self.minimum_tokens
        if not isinstance(_tokens(program, found[0]), int):
            wanted = [least_for(before, after, protect) for before, after in zip((Kept(), *counts), counts, strict=False)]
            if None in wanted:
                raise NotMergeable("", f"{self.ratio} of the tokens in {len(found)} blocks is more than half in one of them")
            least = max(least, *(number for number in wanted if number is not None))
            most = next((d.high for d in program.dimensions.values() if d.symbol == _tokens(program, found[0])), None)
            if most is not None and most <= least:
                raise NotMergeable("", f"there are {most} tokens at most, and nothing is merged below {least}: merge fewer")
        result, before = [], Kept()
        for site, count in zip(found, counts, strict=True):
            if count != before:
                result.append(Merge(site, Kept(count.parts, count.less, least), protect, self.metric))
            before = count
        return result

    def apply(self, program: Program, plan: Plan) -> Program:
        """Return the program with tokens merged as the plan says.

        Raises:
            PlanError: the plan does not fit the program.
        """
        result = program.copy()
        if not plan.decisions:
            return result
        try:
            sites = find_sites(result)
            known = {site.stream.name: site for site in sites.found}
            merges = []
            for decision in plan.decisions:
                if decision.where not in known:
                    raise PlanError(f"{self.name}: %{decision.where} is no place to merge tokens: plan again")
                merges.append(_read(self.name, decision, known[decision.where]))
            blocks = [merge.site.block for merge in merges]
            if blocks != sorted(set(blocks)):
                raise PlanError(f"{self.name}: the plan's blocks are {blocks}, and must be in order, each once")
            _check(result, merges)
            Rewrite(result, sites, merges).run()
        except NotMergeable as reason:
            where = f"%{reason.where}: " if reason.where else ""
            raise PlanError(f"{self.name}: {where}{reason}") from reason
        return result


def _tokens(program: Program, site: Site) -> Any:
    return program.shape(site.stream)[1]


def _check(program: Program, merges: Sequence[Merge]) -> None:
    """Raise if a merge would have to take away more tokens than it can.

    Raises:
        NotMergeable: it would, for some number of tokens.
    """
    before = Kept(least=merges[0].kept.least)
    for merge in merges:
        site, kept, protect = merge.site, merge.kept, merge.protect
        where = site.stream.name
        tokens = _tokens(program, site)
        if kept.least != before.least or kept.parts > before.parts or kept.less < before.less:
            raise NotMergeable(where, f"{kept} is left of {before}: numbers must fall, and `least` be the same in all")
        if isinstance(tokens, int):
            have, gone = before.of(tokens), before.of(tokens) - kept.of(tokens)
            if gone > can_go(have, protect):
                raise NotMergeable(
                    where,
                    f"{gone} of {have} tokens are to go in block {site.block}, and {can_go(have, protect)} can: one in two "
                    f"behind the first {protect}. Merge fewer, or set minimum_tokens",
                )
        else:
            least = least_for(before, kept, protect)
            if least is None or kept.least < least:
                raise NotMergeable(where, f"{kept} tokens are left of {before}, which needs `least` to be {least or 'larger'}")
        before = kept


def _bound(copy: Program, merges: Sequence[Merge]) -> tuple[Sites, list[Merge]]:
    """Return the places, and the merges, of a copy of a program."""
    sites = find_sites(copy)
    known = {site.block: site for site in sites.found}
    return sites, [replace(merge, site=known[merge.site.block]) for merge in merges]


def _decision(merge: Merge) -> Decision:
    kept = merge.kept
    detail = {"parts": kept.parts, "less": kept.less, "least": kept.least, "protect": merge.protect, "metric": merge.metric}
    why = f"block {merge.site.block}: {kept} tokens are left"
    return Decision(merge.site.stream.name, "merge tokens", why, detail)


def _read(name: str, decision: Decision, site: Site) -> Merge:
    """Return what a decision says of a place.

    Raises:
        PlanError: a number is missing or out of its range.
    """
    detail = dict(decision.detail)
    for key, low, high in (("parts", 1, PARTS), ("less", 0, None), ("least", 0, None), ("protect", 0, None)):
        value = detail.get(key)
        if not isinstance(value, int) or value < low or (high is not None and value > high):
            limit = f"{low} to {high}" if high is not None else f"at least {low}"
            raise PlanError(f"{name}: the decision about %{decision.where} must have `{key}`, {limit}, got {value}")
    if detail.get("metric") not in typing.get_args(Metric):
        metrics = unknown("metric", str(detail.get("metric")), typing.get_args(Metric))
        raise PlanError(f"{name}: the decision about %{decision.where}: {metrics}")
    return Merge(site, Kept(detail["parts"], detail["less"], detail["least"]), detail["protect"], detail["metric"])
