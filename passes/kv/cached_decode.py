"""Deriving a program that decodes with a cache from the plain causal forward."""

from __future__ import annotations

from dataclasses import dataclass

from graphwright.ir import dialect
from graphwright.ir.analyses.axes import analyse_axes
from graphwright.ir.errors import PlanError
from graphwright.ir.program import Program, calls
from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan, Refusal

from .derivation import derive
from .full_inputs import with_full_inputs
from .listed import without_lists
from .positions import Positions
from .refusing import NotCausal
from .self_check import check_derived
from .sites import find_sites


@dataclass(frozen=True, kw_only=True)
class CachedDecode(Pass):
    """Turn the forward of a causal decoder into a program that continues sequences, with keys and values kept in caches.

    The program that comes out takes new tokens, how many came before them in each sequence, and the caches. It serves a whole
    prompt, a part of one and a single token alike; sequences of a batch may be of different lengths.

    Before: `%a = graphwright.attention(%q, %k, %v, [], predicate="q - k >= 0"); %p = arange(tokens)`

    After: `%kc = graphwright.kv_append(%k_cache, %k, %past); %vc = graphwright.kv_append(%v_cache, %v, %past);
        %a = graphwright.kv_attention(%q, %kc, %vc, %past, [], predicate="q - k >= 0"); %p = %past + arange(tokens)`

    Applies when: attention is all that mixes tokens, every attention is causal whatever the length, and all else that depends
        on where a token stands is an expression of its position.
    Applies when: attention is over listed keys (vertical-slash): a prompt in an empty cache has lists, all else sees all keys.
    Applies when: an input called attention_mask says which tokens are there: all are, since sequences start in slot 0.

    Declines when: there is no attention, or the model has several inputs with tokens.
    Declines when: an operation other than attention mixes tokens, such as a mean, a running sum, a convolution or a flip.
    Declines when: an attention sees later keys, or what it sees depends on the number of tokens.
    Declines when: the number of tokens is used as a value, or a table's part for the tokens does not follow from positions.

    Fidelity: the same mathematics; what is summed over keys is summed in another order.

    Source: the derivation by axes and index expressions is this project's own.

    Cost: a token costs what one token costs, and attention over the filled slots, instead of all tokens anew.

    Args:
        check: compare the derived program with the plain one on random tokens before it is handed out.
    """

    name = "cached-decode"
    fidelity = Fidelity.CLOSE

    check: bool = True

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide how every attention reads its cache; one refusal if the program cannot be derived."""
        if program.states:
            return Plan(self.name, (), (Refusal("", "the program has caches already"),))
        try:
            decisions = self._decide(program)
        except NotCausal as found:
            return Plan(self.name, (), (Refusal(found.where, str(found)),))
        return Plan(self.name, tuple(decisions), ())

    def apply(self, program: Program, plan: Plan) -> Program:
        """Return the derived program.

        Raises:
            PlanError: the plan does not fit the program.
            PassError: the derived program computes something else.
        """
        if not plan.decisions:
            return program
        try:
            planned = {d.where: (d.detail["predicate"], d.detail["bias"]) for d in plan.decisions}
            plain = with_full_inputs(program)
            lists = without_lists(plain)
            axes = analyse_axes(plain.graph)
            positions = Positions(plain, axes)
            sites = find_sites(plain, axes, positions)
            if {s.node.name: (s.predicate, s.bias) for s in sites} != planned:
                raise PlanError(f"{self.name}: the plan is about other attentions than the program has: plan again")
            derived = derive(plain, axes, positions, sites, lists)
        except NotCausal as found:
            raise PlanError(f"{self.name}: {found}") from found
        except KeyError as error:
            raise PlanError(f"{self.name}: a decision does not say {error}") from error
        if self.check:
            check_derived(program, derived)
        return derived

    def _decide(self, program: Program) -> list[Decision]:
        attentions = [node for node in calls(program.graph) if node.target in (dialect.attention, dialect.sparse_attention)]
        if not attentions:
            raise NotCausal(program.output, "there is no attention to keep keys and values of")
        plain = with_full_inputs(program)
        lists = without_lists(plain)
        axes = analyse_axes(plain.graph)
        for node, mixing in axes.mixing.items():
            if node.target is not dialect.attention:
                raise NotCausal(node, f"{node.target} mixes tokens: {mixing.reason}")
        if axes.token_size is None or not axes.token_size.is_Symbol or axes.batch_size is None:
            raise NotCausal(attentions[0], "the number of sequences or of tokens is not a dimension of the program")
        positions = Positions(plain, axes)
        sites = find_sites(plain, axes, positions)
        # What can be found out only by doing it is found out before it is promised.
        derive(plain, axes, positions, sites, lists)
        return [
            Decision(
                site.node.name,
                "read keys and values from a cache",
                f"causal: {site.predicate}" if not site.bias else f"causal: {site.predicate}; bias {site.bias}",
                {"predicate": site.predicate, "bias": site.bias},
            )
            for site in sites
        ]
