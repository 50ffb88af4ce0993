"""Dense attention where the number of tokens is known to be too small for lists of keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.errors import PlanError
from graphwright.ir.program import Program, calls
from graphwright.passes.base import Context, Decision, Fidelity, Refusal
from graphwright.passes.local import LocalPass, Places

DENSE = {
    dialect.sparse_attention: dialect.attention,
    dialect.kv_sparse_attention: dialect.kv_attention,
    dialect.kv_quantized_sparse_attention: dialect.kv_quantized_attention,
}
"""Attention over listed keys -> the same over all."""


@dataclass(frozen=True, kw_only=True)
class DenseWhenShort(LocalPass):
    """Make attention over listed keys dense where a fixed number of tokens is below the minimum.

    Before: `%a = graphwright.kv_sparse_attention(%q, %k, %v, %past, %b, %c, [], minimum_tokens=4096)`, of one token

    After: `%a = graphwright.kv_attention(%q, %k, %v, %past, [])`, and no lists

    Applies when: the number of queries is fixed, and less than `minimum_tokens` of the attention: it sees all keys anyway.

    Declines when: there is no such attention, or the number of queries differs from call to call.

    Fidelity: the same values.

    Cost: the lists, which nothing reads.
    """

    name = "dense-when-short"
    fidelity = Fidelity.EXACT

    def find(self, program: Program, context: Context) -> Iterator[Decision | Refusal]:
        """Yield the attentions that are dense."""
        found = [node for node in calls(program.graph) if node.target in DENSE]
        if not found:
            yield Refusal("", "there is no attention over listed keys")
        for node in found:
            reason = _reason(program, node)
            least = arguments(node)["minimum_tokens"]
            yield Refusal(node.name, reason) if reason else Decision(node.name, "see all keys", f"fewer tokens than {least}")

    def build(self, program: Program, node: fx.Node, detail: dict[str, Any], places: Places) -> fx.Node:
        """Insert the dense attention."""
        reason = _reason(program, node) if node.target in DENSE else f"it is {node.target}: plan again"
        if reason:
            raise PlanError(f"{self.name}: %{node.name} cannot see all keys: {reason}")
        given = arguments(node)
        lists = {"blocks", "columns", "minimum_tokens"}
        wanted: Any = DENSE[node.target]
        tensors = [given[a.name] for a in wanted._schema.arguments if not a.kwarg_only]
        keywords = {name: value for name, value in node.kwargs.items() if name not in lists}
        return program.call(wanted, *tensors, like=node, **keywords)


def _reason(program: Program, node: fx.Node) -> str | None:
    """Return why an attention keeps its lists; None if it does not."""
    tokens, least = program.shape(node)[2], arguments(node)["minimum_tokens"]
    if not isinstance(tokens, int):
        return f"the number of its queries, {tokens}, differs from call to call"
    return None if tokens < least else f"its {tokens} queries are not fewer than {least}"
