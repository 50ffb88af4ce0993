"""Computing what comes last for one token of each sequence alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses.axes_registry import POINTWISE, arguments, op_name
from graphwright.ir.containers import Leaf
from graphwright.ir.errors import PlanError
from graphwright.ir.program import Program, calls
from graphwright.ir.signature import Parameter, TensorSpec
from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan, Refusal
from graphwright.passes.local import Places

aten = torch.ops.aten

LAST = "last"
COUNT = "count"
"""The argument by which an operation is told how many of a sequence's new tokens there are, int64 [batch]; None for all."""

_ROWS = (aten.linear.default, dialect.rms_norm, aten.layer_norm.default)
"""Operations that make each row of their result from the same row of their first argument."""


@dataclass(frozen=True, kw_only=True)
class LastToken(Pass):
    """Compute the result of a program with caches for one token of each sequence, which calls name: the last of a prompt.

    What is next to the result and computed for each token alone, such as the product with the vocabulary, is left out for the
    other tokens. An operation that takes a `count`, how many tokens of each sequence there are, is told that the named one is
    the last.

    Before: `%h = rms_norm(%x, ...); %s = linear(%h, weights["lm_head"])`, which is [batch, tokens, words]

    After: `%y = gather(%x, 1, %last); %h = rms_norm(%y, ...); %s = linear(%h, weights["lm_head"])`, which is [batch, 1, words]

    Applies when: the program has caches, and its first result is [batch, tokens, features].

    Declines when: it has none: the model's callers expect all tokens.

    Fidelity: the same sums for fewer rows, which a product may group otherwise.
    """

    name = "last-token"
    fidelity = Fidelity.CLOSE

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide where the tokens that are not wanted are dropped."""
        result = program.results[0] if program.results else None
        if not program.states:
            return Plan(self.name, (), (Refusal(program.output.name, "the program has no caches"),))
        if any(spec.name == LAST for spec in program.signature.tensors):
            return Plan(self.name, (), (Refusal("", "calls name the last token already"),))
        if not isinstance(result, fx.Node) or result.meta["val"].dim() != 3:
            return Plan(self.name, (), (Refusal(program.output.name, "the first result is not [batch, tokens, features]"),))
        rows = _chain(result)
        source = rows[0].all_input_nodes[0] if rows else result
        why = f"{len(rows)} operations after it are computed for one token of each sequence"
        detail = {"rows": [node.name for node in rows]}
        return Plan(self.name, (Decision(source.name, "keep one token of each sequence", why, detail),), ())

    def apply(self, program: Program, plan: Plan) -> Program:
        """Return the program with the plan carried out.

        Raises:
            PlanError: the plan does not fit the program.
        """
        result = program.copy()
        for decision in plan.decisions:
            places = Places(result.graph, plan.pass_name)
            source = places[decision.where]
            try:
                rows = [places[name] for name in decision.detail["rows"]]
            except KeyError as error:
                raise PlanError(f"{self.name}: the decision about %{decision.where} does not say {error}") from error
            _keep(result, source, rows)
        return result


def _chain(result: fx.Node) -> list[fx.Node]:
    """Return the operations before a result, first to last, each of which makes rows of the one before alone."""
    rows: list[fx.Node] = []
    node = result
    while _takes_rows(node) and (node is result or len(node.users) == 1):
        rows.insert(0, node)
        node = node.all_input_nodes[0]
    return rows


def _takes_rows(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    source, *others = node.all_input_nodes
    if any(other.op != "get_attr" for other in others) or source.op == "get_attr" or source.meta["val"].dim() != 3:
        return False
    return node.target in _ROWS or (op_name(node) in POINTWISE and all(other.meta["val"].dim() <= 1 for other in others))


def _keep(program: Program, source: fx.Node, rows: list[fx.Node]) -> None:
    batch, _, size = source.meta["val"].shape
    device = source.meta["val"].device
    with program.graph.inserting_after(program.inputs[-1]):
        last = program.graph.placeholder(LAST)
    with program.fake_mode:
        last.meta["val"] = torch.empty(batch, dtype=torch.int64, device=device)
    spec = TensorSpec(LAST, torch.int64, str(device), tuple(n if isinstance(n, int) else str(n) for n in program.shape(last)))
    old = program.signature
    program.signature = dataclasses.replace(
        old,
        parameters=(*old.parameters, Parameter(LAST, "positional_or_keyword")),
        arguments={**old.arguments, LAST: Leaf(len(old.tensors))},
        tensors=(*old.tensors, spec),
    )
    with program.graph.inserting_after(source):
        index: Any = program.call(aten.reshape.default, last, [-1, 1, 1], like=source)
    with program.graph.inserting_after(index):
        wide = program.call(aten.expand.default, index, [-1, -1, size], like=source)
    with program.graph.inserting_after(wide):
        kept = program.call(aten.gather.default, source, 1, wide, like=source)
    counted = [node for node in calls(program.graph) if COUNT in arguments(node) and arguments(node)[COUNT] is None]
    if counted:
        with program.graph.inserting_after(last):
            count = program.call(aten.add.Tensor, last, 1, like=source)
        for node in counted:
            node.kwargs = {**node.kwargs, COUNT: count}
            program.infer(node)
    source.replace_all_uses_with(kept, delete_user_cb=lambda user: user is (rows[0] if rows else program.output))
    for node in rows:
        program.infer(node)
