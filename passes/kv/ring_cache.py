"""Keeping only the keys and values that a sliding window can still see."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.analyses.masks import recognise
from graphwright.ir.errors import OptionError, PlanError
from graphwright.ir.ops.attention import operand_name, operand_type
from graphwright.ir.program import Program
from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan, Refusal, Stage
from graphwright.passes.local import Places

from .cache_format import Site, attentions, each_site, site_of
from .derivation import CAPACITY
from .sites import FACTS
from .states import exchange_states, new_state


@dataclass(frozen=True, kw_only=True)
class RingCache(Pass):
    """Keep as many tokens of a layer with a sliding window as the window has, in slots that are used again and again.

    Before: `%kc = graphwright.kv_append(%k_cache, %k, %past); %vc = graphwright.kv_append(%v_cache, %v, %past);
        %a = graphwright.kv_attention(%q, %kc, %vc, %past, [], predicate="q - k >= 0 & k - q + 1023 >= 0")`

    After: `%ks = graphwright.kv_ring_read(%k_ring, %k, %past); %vs = graphwright.kv_ring_read(%v_ring, %v, %past);
        %a = graphwright.kv_ring_attention(%q, %ks, %vs, %past, [], predicate="q - k >= 0 & k - q + 1023 >= 0");
        %kr = graphwright.kv_ring_append(%k_ring, %k, %past); %vr = graphwright.kv_ring_append(%v_ring, %v, %past)`

    Applies when: the program has caches, and an attention over them sees a window of the newest tokens and no others.

    Declines when: there are no caches, or a layer's are of another format already or are read by others too.
    Declines when: an attention sees earlier tokens than those of a window, however few.
    Declines when: the window is no smaller than the positions that the model has.

    Fidelity: the same mathematics; what is summed over keys is summed in another order.

    Source: rolling buffer caches as in Jiang et al., Mistral 7B, 2023, arXiv 2310.06825. Differs from the paper in: a call may
        bring more tokens than the window has.

    Cost: bytes of the caches, which no longer grow with the tokens; a call of several tokens copies the window first.

    Args:
        layers: numbers of the layers to rewrite, counted from 0; None for all that can be.

    Raises:
        OptionError: a layer's number is below 0.
    """

    name = "ring-cache"
    fidelity = Fidelity.CLOSE
    source = "Mistral 7B, arXiv 2310.06825"
    stage = Stage.DECODE

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if any(layer < 0 for layer in self.layers or ()):
            raise OptionError(f"{self.name}: layers are counted from 0, got {min(self.layers or ())}")

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide which layers keep a window only: all that have one, of those that are asked for.

        Raises:
            OptionError: `layers` names one that the program does not have.
        """
        if not program.states:
            return Plan(self.name, (), (Refusal("", "the program has no caches"),))
        count = len(attentions(program))
        for layer in self.layers or ():
            if layer >= count:
                raise OptionError(f"{self.name}: layers must be 0 to {count - 1}, got {layer}")
        decisions, refusals = [], []
        for layer, node, found in each_site(program):
            if self.layers is not None and layer not in self.layers:
                continue
            window = found if isinstance(found, str) else window_of(program, found)
            if isinstance(window, str):
                refusals.append(Refusal(node.name, f"layer {layer}: {window}"))
            elif isinstance(found, Site):
                taken = int(window * found.bytes_per_token)
                decisions.append(
                    Decision(
                        node.name,
                        f"keep the last {window} tokens of layer {layer}",
                        f"{taken} bytes for a sequence instead of {found.bytes_per_token:g} for each token",
                        {"layer": layer, "window": window, "slots": window, "bytes_per_sequence": taken},
                    )
                )
        return Plan(self.name, tuple(decisions), tuple(refusals))

    def apply(self, program: Program, plan: Plan) -> Program:
        """Return the program with rings for the plan's layers.

        Raises:
            PlanError: the plan does not fit the program, or a ring has fewer slots than the layer's window.
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
            window = site if isinstance(site, str) else window_of(result, site)
            if isinstance(site, str) or isinstance(window, str):
                raise PlanError(f"{self.name}: %{decision.where} cannot keep a window only: {window}")
            slots = decision.detail.get("slots")
            if not isinstance(slots, int) or slots < window:
                raise PlanError(
                    f"{self.name}: %{decision.where} sees {window} tokens, and the decision gives it slots={slots!r}: it must "
                    f"be a number of at least {window}"
                )
            made |= _rewrite(result, site, slots)
            gone += site.caches
        exchange_states(result, gone, made)
        _forget_capacity(result)
        return result


def window_of(program: Program, site: Site) -> int | str:
    """Return how many tokens a layer sees, its query's own included, or why that is not known."""
    given = arguments(site.node)
    types = {operand_name(at): operand_type(operand.meta["val"].dtype) for at, operand in enumerate(given["operands"])}
    seen = ix.parse(given["predicate"], types, FACTS) if given["predicate"] else ix.TRUE
    form = recognise(seen, None, (), True, FACTS)
    if form.window is None or not form.causal or form.offset is not ix.ZERO:
        return f"its attention has no window, and may see tokens however far back: {given['predicate'] or 'all of them'}"
    limit = program.dimensions[CAPACITY].high
    if limit is not None and form.window >= limit:
        return f"its window of {form.window} tokens is no smaller than the {limit} positions that the model has"
    return form.window


def _rewrite(program: Program, site: Site, slots: int) -> dict[fx.Node, fx.Node]:
    """Let a layer keep its tokens in rings; return the new states, and their values for the next call."""
    given, node = arguments(site.node), site.node
    new = [append.args[1] for append in site.appends]
    rings = []
    for cache in site.caches:
        batch, heads, _, size = cache.meta["val"].shape
        name = cache.name.replace("cache", "ring")
        rings.append(new_state(program, name, (batch, heads, slots, size), site.dtype))
    kept = {name: value for name in ("predicate", "bias", "softcap") if (value := given[name])}
    with program.graph.inserting_before(node):
        reads = [
            program.call(dialect.kv_ring_read, ring, one, given["past"], like=node)
            for ring, one in zip(rings, new, strict=True)
        ]
        attention = program.call(
            dialect.kv_ring_attention,
            *(given["q"], *reads, given["past"], given["operands"], given["sink"]),
            like=node,
            **kept,
            scale=given["scale"],
        )
        values = {
            ring: program.call(dialect.kv_ring_append, ring, one, given["past"], like=node)
            for ring, one in zip(rings, new, strict=True)
        }
    node.replace_all_uses_with(attention)
    program.graph.erase_node(node)
    return values


def _forget_capacity(program: Program) -> None:
    """Drop the number of tokens that there is room for where no state depends on it any more."""
    if any(CAPACITY in str(n) for node in program.inputs for n in program.shape(node)):
        return
    del program.dimensions[CAPACITY]
