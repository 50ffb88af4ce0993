"""Keeping keys and values in few bits, and those of important tokens in more."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.analyses.index_text import parse
from graphwright.ir.errors import OptionError, PlanError
from graphwright.ir.ops.kv_tiered import STATES, Tiers
from graphwright.ir.ops.tier_codes import PACKED
from graphwright.ir.program import Program
from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan, Refusal, Stage
from graphwright.passes.local import Places

from .cache_format import Site, attentions, each_site, site_of
from .states import exchange_states, new_state

AS_THEY_ARE = 16
"""As `high`: the model's own dtype."""

CAUSAL = "q - k >= 0"
"""The predicate that hides later tokens and nothing else."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Weighing:
    """How keys and tokens are weighed: options of the pass."""

    balanced: bool
    decay: float
    window: int

    def problem(self) -> str:
        """Return what is out of its range, "" if nothing is."""
        if not 0 < self.decay <= 1:
            return f"decay must be above 0 and at most 1, got {self.decay}"
        return "" if self.window >= 0 else f"window must be at least 0, got {self.window}"


@dataclass(frozen=True, kw_only=True)
class TierCache(Pass):
    """Keep the keys and values of all but the newest tokens in few bits, and those of the important ones in more.

    Each head keeps an exact number of refined tokens: those that got the most attention. A token that falls behind loses its
    refinement and keeps its few bits; it is not lost. Channels of keys that are large in all tokens are scaled down for
    encoding and the query's up, so that they do not spoil the others' bits.

    Before: `%kc = graphwright.kv_append(%k_cache, %k, %past); %vc = graphwright.kv_append(%v_cache, %v, %past);
        %a = graphwright.kv_attention(%q, %kc, %vc, %past, [], predicate="q - k >= 0")`

    After: `%a, %lse = graphwright.kv_tiered_attention(%q, %k, %v, %past, *%states, low_bits=2, fine_bits=6, ...);
        %masses = graphwright.kv_tiered_mass(%q, %k, %lse, %past, *%states, ...);
        %new_states = graphwright.kv_tiered_append(%q, %k, %v, %past, *%masses, *%states, ...)`

    Applies when: the program has caches, and an attention over them hides nothing but later tokens.

    Declines when: there are no caches, or a layer's are of another format already or are read by others too.
    Declines when: an attention has a window or another mask, a bias, sinks or capped scores.
    Declines when: keys and values are not float32, float16 or bfloat16, or codes of theirs do not fill whole bytes.
    Declines when: every token would be kept as it is: important=1 with high=16.

    Fidelity: lossy for tokens beyond the newest. What a call's own tokens give each other, and with it a prompt that starts a
        sequence, is computed as without the pass. The contents of a cache follow from the calls that filled it.

    Source: Yang et al., No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision
        Quantization, 2024, arXiv 2402.18096 (MiKV); importance as in Zhang et al., H2O, 2023, arXiv 2306.14048, and forgotten
        by and by as in A2SF, Jo and Shin, 2024, arXiv 2407.20485. Differs from the paper in: important tokens hold more bits
        of what their few bits leave over, so that no token is encoded twice; tokens compete when a group of them leaves the
        newest ones; the share of important ones is that of the tokens so far, not of a cache of fixed size.

    Cost: bytes of the caches, and what a step reads of them; the conversion of codes to numbers and the scores of tokens are
        added. A prompt's attention is computed again for the scores, of `window` queries if that is not 0.

    Args:
        low_bits: of the codes of every token but the newest: 2, 3 or 4.
        high: bits of an important token's codes, above low_bits and at most 8; 16 to keep important ones as they are.
        important: ratio of important tokens to those in codes, 0 to 1; rounded to a whole number of each group.
        residual: the newest tokens that are kept as they are, at least 0.
        group_size: tokens that are encoded together: 8, 16 or 32.
        balance: scale channels by the first call's tokens; a first call of one token tells little.
        decay: ratio of a token's importance that is left after each further token, above 0; 1 to forget nothing, as H2O.
        window: of each call only the last so many queries count for importance; 0 for all.
        layers: numbers of the layers to rewrite, counted from 0; None for all.

    Raises:
        OptionError: an option is out of its range.
    """

    name = "tier-cache"
    fidelity = Fidelity.LOSSY
    source = "MiKV, arXiv 2402.18096"
    stage = Stage.DECODE

    low_bits: int = 2
    high: int = 8
    important: float = 0.25
    residual: int = 128
    group_size: int = 32
    balance: bool = True
    decay: float = 0.98
    window: int = 64
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.low_bits not in (2, 3, 4):
            raise OptionError(f"{self.name}: low_bits must be 2, 3 or 4, got {self.low_bits}")
        if not (self.low_bits < self.high <= PACKED or self.high == AS_THEY_ARE):
            allowed = f"{self.low_bits + 1} to {PACKED}, or {AS_THEY_ARE} for the model's dtype"
            raise OptionError(f"{self.name}: high must be {allowed}, got {self.high}")
        if not 0 <= self.important <= 1:
            raise OptionError(f"{self.name}: important must be 0 to 1, got {self.important}")
        if self.group_size not in (8, 16, 32):
            raise OptionError(f"{self.name}: group_size must be 8, 16 or 32, got {self.group_size}")
        if self.important and not self._tiers().promoted:
            raise OptionError(
                f"{self.name}: important={self.important} of groups of {self.group_size} tokens is less than one: give 0, or "
                f"at least {1 / self.group_size:g}"
            )
        if not 0 < self.decay <= 1:
            raise OptionError(f"{self.name}: decay must be above 0 and at most 1, got {self.decay}")
        for option in ("residual", "window"):
            if getattr(self, option) < 0:
                raise OptionError(f"{self.name}: {option} must be at least 0, got {getattr(self, option)}")

    def _tiers(self) -> Tiers:
        fine_bits = 0 if self.high == AS_THEY_ARE else self.high - self.low_bits
        promoted = round(self.important * self.group_size)
        return Tiers(self.low_bits, fine_bits, self.residual, self.group_size, promoted)

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide which layers are kept in two tiers: all that can be, of those that are asked for.

        Raises:
            OptionError: `layers` names one that the program does not have.
        """
        if not program.states:
            return Plan(self.name, (), (Refusal("", "the program has no caches"),))
        count = len(attentions(program))
        for number in self.layers or ():
            if not 0 <= number < count:
                raise OptionError(f"{self.name}: layers must be 0 to {count - 1}, got {number}")
        decisions, refusals = [], []
        for layer, node, found in each_site(program):
            if self.layers is not None and layer not in self.layers:
                continue
            reason = found if isinstance(found, str) else _why_not(found, self._tiers()) or self._why_nothing()
            if reason:
                refusals.append(Refusal(node.name, f"layer {layer}: {reason}"))
            elif isinstance(found, Site):
                decisions.append(self._decision(found))
        return Plan(self.name, tuple(decisions), tuple(refusals))

    def _why_nothing(self) -> str:
        tiers = self._tiers()
        if tiers.promoted == tiers.group_size and not tiers.fine_bits:
            return "every token would be kept as it is, which the cache does already"
        return ""

    def _decision(self, site: Site) -> Decision:
        tiers = self._tiers()
        taken = bytes_per_token(site, tiers)
        detail = {
            "layer": site.layer,
            **asdict(tiers),
            "balanced": self.balance,
            "decay": self.decay,
            "window": self.window,
            "bytes_per_token": taken,
            "bytes_per_sequence": bytes_per_sequence(site, tiers),
        }
        high = f"{self.high} bits" if tiers.fine_bits else "the model's dtype"
        share = f"{tiers.promoted} of {tiers.group_size} in {high}"
        what = f"keep keys and values of layer {site.layer} in {self.low_bits} bits, {share}"
        return Decision(site.node.name, what, f"{taken:g} instead of {site.bytes_per_token:g} bytes per token", detail)

    def apply(self, program: Program, plan: Plan) -> Program:
        """Return the program with the plan's layers kept in two tiers.

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
            site = site_of(result, node, layers[node]) if node in layers else "it is no attention over a cache"
            tiers, weighing = self._planned(decision)
            reason = site if isinstance(site, str) else _why_not(site, tiers)
            if isinstance(site, str) or reason:
                raise PlanError(f"{self.name}: %{decision.where} cannot be kept in two tiers: {reason}")
            made |= _rewrite(result, site, tiers, weighing)
            gone += site.caches
        exchange_states(result, gone, made)
        return result

    def _planned(self, decision: Decision) -> tuple[Tiers, _Weighing]:
        """Return the format that a decision says, and how importance is found.

        Raises:
            PlanError: it says none.
        """
        detail, where = decision.detail, f"the decision about %{decision.where}"
        try:
            tiers = Tiers(*(int(detail[field.name]) for field in fields(Tiers)))
            weighing = _Weighing(bool(detail["balanced"]), float(detail["decay"]), int(detail["window"]))
        except KeyError as error:
            raise PlanError(f"{self.name}: {where} does not say {error}") from error
        except (TypeError, ValueError) as error:
            raise PlanError(f"{self.name}: {where} is of no format: {error}") from error
        problem = tiers.problem() or weighing.problem()
        if problem:
            raise PlanError(f"{self.name}: {where} is of no format: {problem}")
        return tiers, weighing


def _rewrite(program: Program, site: Site, tiers: Tiers, weighing: _Weighing) -> dict[fx.Node, fx.Node]:
    """Let a layer keep keys and values in two tiers; return the new states, and their values for the next call."""
    given, form = arguments(site.node), asdict(tiers)
    k, v = (append.args[1] for append in site.appends)
    states = [new_state(program, f"{name}_{site.layer}", shape, dtype) for name, (shape, dtype) in _shapes(site, tiers).items()]
    new, past = (given["q"], k, v), given["past"]

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return program.call(target, *args, like=site.node, **kwargs)

    with program.graph.inserting_before(site.node):
        both = call(dialect.kv_tiered_attention, *new, past, *states, scale=given["scale"], **form)
        out, lse = (call(operator.getitem, both, at) for at in range(2))
        masses = call(
            dialect.kv_tiered_mass, *new[:2], lse, past, *states, scale=given["scale"], window=weighing.window, **form
        )
        mass = [call(operator.getitem, masses, at) for at in range(3)]
        after = call(
            dialect.kv_tiered_append, *new, past, *mass, *states, decay=weighing.decay, balanced=weighing.balanced, **form
        )
        values = {state: call(operator.getitem, after, at) for at, state in enumerate(states)}
    site.node.replace_all_uses_with(out)
    program.graph.erase_node(site.node)
    return values


def _why_not(site: Site, tiers: Tiers) -> str:
    """Return why a layer cannot be kept in two tiers, "" if it can."""
    given = arguments(site.node)
    if site.dtype not in _DTYPES:
        return f"keys and values are {site.dtype}; float32, float16 and bfloat16 can be encoded"
    for what, size in (("keys", site.key_size), ("values", site.value_size)):
        if size * tiers.low_bits % 8:
            return f"the codes of {what} of {size} features do not fill whole bytes at {tiers.low_bits} bits"
    for what, there in (("a bias", given["bias"]), ("sinks", given["sink"] is not None), ("capped scores", given["softcap"])):
        if there:
            return f"its attention has {what}, and attention over two tiers has none"
    if given["predicate"] and (given["operands"] or parse(given["predicate"]) is not parse(CAUSAL)):
        return f"its attention hides more than later tokens: {given['predicate']}"
    return ""


def _shapes(site: Site, tiers: Tiers) -> dict[str, tuple[tuple[Any, ...], torch.dtype]]:
    """Return the shape and the dtype of each state of a layer."""
    batch, heads, capacity, size = site.caches[0].meta["val"].shape
    values, dtype = site.value_size, site.dtype
    # The pool is never empty: an empty tensor has no place.
    slots = capacity // tiers.group_size * tiers.promoted // PACKED * PACKED + PACKED if tiers.promoted else PACKED
    fine, kind = (slots // PACKED * tiers.fine_bits, torch.uint8) if tiers.fine_bits else (slots, dtype)
    shapes: dict[str, tuple[tuple[Any, ...], torch.dtype]] = {
        "recent_k": ((tiers.ring, size), dtype),
        "recent_v": ((tiers.ring, values), dtype),
        "recent_score": ((tiers.ring,), torch.float32),
        "balance": ((size,), torch.float32),
        "low_k": ((capacity, size * tiers.low_bits // 8), torch.uint8),
        "low_v": ((capacity, values * tiers.low_bits // 8), torch.uint8),
        "ranges": ((4, PACKED, capacity // PACKED), torch.float16),
        "refined": ((capacity // PACKED,), torch.uint8),
        "fine_k": ((fine, size), kind),
        "fine_v": ((fine, values), kind),
        "pool_token": ((slots,), torch.int32),
        "pool_score": ((slots,), torch.float32),
    }
    return {name: ((batch, heads, *shapes[name][0]), shapes[name][1]) for name in STATES}


def _slot_bytes(site: Site, tiers: Tiers) -> float:
    """Return the bytes of a slot of the pool of one head."""
    features = site.key_size + site.value_size
    held = features * tiers.fine_bits / 8 if tiers.fine_bits else features * site.dtype.itemsize
    return held + torch.int32.itemsize + torch.float32.itemsize


def bytes_per_token(site: Site, tiers: Tiers) -> float:
    """Return the bytes of a layer's cache for each token that there is room for."""
    codes = (site.key_size + site.value_size) * tiers.low_bits / 8
    ranges, refined = 4 * torch.float16.itemsize, 1 / PACKED
    return site.heads * (codes + ranges + refined + tiers.promoted / tiers.group_size * _slot_bytes(site, tiers))


def bytes_per_sequence(site: Site, tiers: Tiers) -> int:
    """Return the bytes of a layer's cache beside those: the ring, the balance, and slots that are always there."""
    score = torch.float32.itemsize
    ring = tiers.ring * ((site.key_size + site.value_size) * site.dtype.itemsize + score)
    return site.heads * int(ring + site.key_size * score + PACKED * _slot_bytes(site, tiers))
