"""Keeping keys and values in few bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphwright.ir.errors import OptionError, PassError, PlanError
from graphwright.ir.ops.kv_quantized import BITS
from graphwright.ir.program import Program
from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan, Refusal, Stage
from graphwright.passes.local import Places

from .cache_budget import Measured, choose
from .cache_format import CacheFormat, Parameters, Site, attentions, each_site, rewrite, site_of
from .states import exchange_states

EXACT = 16
"""The bits that stand for the model's own dtype, whatever it is."""


@dataclass(frozen=True, kw_only=True)
class QuantizeCache(Pass):
    """Keep the keys and values of earlier tokens in 8, 4 or 2 bits, and the newest as they are.

    Before: `%a = graphwright.kv_attention(%q, %kc, %vc, %past, ...)`, with `%kc = graphwright.kv_append(%k_cache, %k, %past)`

    After: `%a = graphwright.kv_quantized_attention(%q, %k, %v, %past, %k_codes, %k_scale, %k_minimum, %k_ring, ..., bits=4)`,
        with `%s = graphwright.kv_quantized_append(%k_codes, %k_scale, %k_minimum, %k_ring, %k, %past, bits=4, ...)`

    Applies when: the program has caches, and an attention is all that reads the keys and the values that it appends.

    Declines when: the program has no caches; it is one that is derived to generate.
    Declines when: a cache is read by several attentions, or is of another format.
    Declines when: codes do not fill bytes, or values have no equal groups of at least 8 channels, or they are not float32,
        float16 or bfloat16.
    Declines when: a budget is given and the layer is among those that stay as they are.

    Fidelity: attention over more than `residual` tokens is an approximation; the first `residual` tokens of a sequence, and a
        prompt that starts one, are computed as without the pass. 16 bits are the identity.

    Source: Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, 2024, arXiv 2402.02750. Differs from the
        paper in: keys and values leave the residual window together, a group at a time, so that what is kept does not depend
        on how tokens came; bits can be chosen for each layer by what they cost.

    Cost: bytes of the caches, and what a step reads of them; the conversion of codes to numbers is added. Planning with a
        budget runs the program in plain PyTorch once, and once for each layer and number of bits.

    Args:
        bits: of a code: 8, 4 or 2, or 16 to leave keys and values as they are; one number, or one for each layer.
        group_size: consecutive tokens that share a scale for each channel of their keys, a power of two from 16 to 256; of
            values at most so many channels of one token share one.
        residual: the newest tokens that are kept as they are; a multiple of `group_size`.
        layers: numbers of the layers to quantise, counted from 0; None for all.
        budget_bytes_per_token: choose the bits of each layer so that all caches together take at most so many bytes for each
            token that there is room for, by what each costs on the calibration; None for `bits` as they are.
        candidates: with a budget, the bits to choose from beside the model's own dtype.
        parameters: "float16" or "float32", the dtype of scales and minima.

    Raises:
        OptionError: an option is out of its range.
    """

    name = "quantize-cache"
    fidelity = Fidelity.LOSSY
    source = "KIVI, arXiv 2402.02750"
    stage = Stage.DECODE

    bits: int | tuple[int, ...] = 4
    group_size: int = 32
    residual: int = 128
    layers: tuple[int, ...] | None = None
    budget_bytes_per_token: float | None = None
    candidates: tuple[int, ...] = (8, 4)
    parameters: Parameters = "float16"

    def __post_init__(self) -> None:
        for bits in self.bits if isinstance(self.bits, tuple) else (self.bits,):
            if bits not in (*BITS, EXACT):
                raise OptionError(f"{self.name}: bits must be {', '.join(map(str, BITS))} or {EXACT}, got {bits}")
        try:
            for bits in (BITS[0], *self.candidates):
                self._format(bits)
        except OptionError as error:
            raise OptionError(f"{self.name}: {error}") from error
        budget = self.budget_bytes_per_token
        if budget is not None and not 0 < budget < math.inf:
            raise OptionError(f"{self.name}: budget_bytes_per_token must be above 0 and finite, got {budget}")

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide which layers are kept in how many bits.

        Raises:
            OptionError: `bits` or `layers` do not fit the program's layers, or the budget cannot be met.
            PassError: a budget is given, and the calibration is not enough to decide by.
        """
        if not program.states:
            return Plan(self.name, (), (Refusal("", "the program has no caches"),))
        sites, refusals = [], []
        for layer, node, found in each_site(program, lists=True):
            if not self._wanted(layer, len(attentions(program))):
                continue
            reason = found if isinstance(found, str) else self._why_not(found, layer)
            if reason:
                refusals.append(Refusal(node.name, f"layer {layer}: {reason}"))
            elif isinstance(found, Site):
                sites.append(found)
        if self.budget_bytes_per_token is None:
            decisions = [self._decision(site, self._bits(site.layer)) for site in sites if self._bits(site.layer) != EXACT]
        else:
            decisions, kept = self._within_budget(program, context, sites)
            refusals += kept
        return Plan(self.name, tuple(decisions), tuple(refusals))

    def apply(self, program: Program, plan: Plan) -> Program:
        """Return the program with the plan's layers quantised.

        Raises:
            PlanError: the plan does not fit the program.
        """
        if not plan.decisions:
            return program
        result = program.copy()
        places = Places(result.graph, plan.pass_name)
        layers = {node: layer for layer, node in enumerate(attentions(result))}
        gone: list[fx.Node] = []
        made: dict[fx.Node, fx.Node] = {}
        for decision in plan.decisions:
            node = places.once(decision.where)
            site = site_of(result, node, layers[node], lists=True) if node in layers else "it is no attention over a cache"
            form = self._planned(decision.detail, decision.where)
            reason = site if isinstance(site, str) else form.why_not(site)
            if isinstance(site, str) or reason:
                raise PlanError(f"{self.name}: %{decision.where} cannot be kept in {form.bits} bits: {reason}")
            gone += site.caches
            made |= rewrite(result, site, form)
        exchange_states(result, gone, made)
        return result

    def _planned(self, detail: Any, where: str) -> CacheFormat:
        try:
            return CacheFormat(detail["bits"], detail["group_size"], detail["residual"], detail["parameters"])
        except KeyError as error:
            raise PlanError(f"{self.name}: the decision about %{where} does not say {error}") from error
        except (OptionError, TypeError) as error:
            raise PlanError(f"{self.name}: the decision about %{where} is of no format: {error}") from error

    def _format(self, bits: int) -> CacheFormat:
        return CacheFormat(bits, self.group_size, self.residual, self.parameters)

    def _wanted(self, layer: int, count: int) -> bool:
        if isinstance(self.bits, tuple) and len(self.bits) != count:
            raise OptionError(f"{self.name}: bits are given for {len(self.bits)} layers, and the program has {count}")
        for number in self.layers or ():
            if not 0 <= number < count:
                raise OptionError(f"{self.name}: layers must be 0 to {count - 1}, got {number}")
        return self.layers is None or layer in self.layers

    def _bits(self, layer: int) -> int:
        return self.bits[layer] if isinstance(self.bits, tuple) else self.bits

    def _why_not(self, site: Site, layer: int) -> str:
        tried: Sequence[int] = self.candidates if self.budget_bytes_per_token is not None else (self._bits(layer),)
        reasons = [self._format(bits).why_not(site) for bits in tried if bits != EXACT]
        return next(filter(None, reasons), "")

    def _decision(self, site: Site, bits: int, measured: Measured | None = None) -> Decision:
        form = self._format(bits)
        taken = form.bytes_per_token(site)
        detail: dict[str, Any] = {
            "layer": site.layer,
            "bits": bits,
            "group_size": self.group_size,
            "residual": self.residual,
            "parameters": self.parameters,
            "bytes_per_token": taken,
            "bytes_per_sequence": form.bytes_per_sequence(site),
        }
        why = f"{taken:g} instead of {site.bytes_per_token:g} bytes per token"
        if measured is not None:
            scores = measured.of(site.layer)
            detail["scores"] = {str(tried): score for tried, score in scores.items()}
            why += f"; alone it changes predictions by {scores[bits]:.3g} nats per token"
        return Decision(site.node.name, f"keep keys and values of layer {site.layer} in {bits} bits", why, detail)

    def _within_budget(
        self, program: Program, context: Context, sites: list[Site]
    ) -> tuple[list[Decision], Iterator[Refusal] | list[Refusal]]:
        """Return decisions that meet the budget, and the layers that stay as they are."""
        assert self.budget_bytes_per_token is not None
        chosen = {site.layer for site in sites}
        rest = sum(
            found.bytes_per_token
            for layer, _, found in each_site(program, lists=True)
            if isinstance(found, Site) and layer not in chosen
        )
        forms = {bits: self._format(bits) for bits in self.candidates}
        costs = [{EXACT: s.bytes_per_token, **{b: f.bytes_per_token(s) for b, f in forms.items()}} for s in sites]
        left = self.budget_bytes_per_token - rest
        least, most = (sum(pick(cost.values()) for cost in costs) for pick in (min, max))
        if left < least:
            raise OptionError(
                f"{self.name}: a budget of {self.budget_bytes_per_token:g} bytes per token cannot be met: with every layer in "
                f"its smallest format the caches take {least + rest:g}. What to do: raise budget_bytes_per_token, or offer "
                f"fewer bits in candidates"
            )
        if left >= most:
            return [], []
        measured = Measured.on(program, sites, forms, context.calibration, self.name)
        bits = choose(costs, [measured.of(site.layer) for site in sites], left)
        decisions = [self._decision(s, b, measured) for s, b in zip(sites, bits, strict=True) if b != EXACT]
        kept = [
            Refusal(s.node.name, f"layer {s.layer} stays as it is: {_scores(measured.of(s.layer))}")
            for s, b in zip(sites, bits, strict=True)
            if b == EXACT
        ]
        if not decisions:
            raise PassError(f"{self.name}: no layer was chosen")
        return decisions, kept


def _scores(scores: dict[int, float]) -> str:
    return ", ".join(f"{bits} bits would change predictions by {score:.3g} nats" for bits, score in scores.items())
