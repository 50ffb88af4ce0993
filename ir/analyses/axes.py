"""The axes analysis: what every dimension counts, and which operations mix tokens.

Every dimension is a product of factors; a factor is labelled as batch, token and so on, or stands for features. Labels start
at the inputs and go through the graph by one rule an operation (`axes_rules` and the files beside it). An operation is
*local* if a token's result depends on that token alone; the others are reported as mixing, each with the reason. An operation
without a rule is mixing.

Part of a graph only says *where* tokens are - positions and masks, made of sizes, of constants and of inputs such as an
attention mask. Mixing there (a running sum of a mask, say) is reported on its own, as `Axes.index_mixing`: it moves no
activations, but whoever cuts a sequence must work it out anew, for which the masks analysis has index expressions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import sympy
from torch import fx

from graphwright.ir.analyses.axes_run import Mixing, Run
from graphwright.ir.analyses.axes_seeds import Seeds, guess_seeds, token_origins
from graphwright.ir.analyses.axes_state import Dims, Factor, Label, Region, State, has, is_tensor, labels

__all__ = ["Axes", "Dims", "Factor", "Label", "Mixing", "Region", "analyse_axes", "labels"]


@dataclass(frozen=True)
class Axes:
    """What the analysis found.

    Args:
        roles: for each node that is a tensor, per dimension the labels of its factors from outer to inner; empty for
            features and for size 1.
        factors: the same with every factor's size.
        mixing: the operations on activations that mix tokens, attention among them, each with the reason.
        index_mixing: the same for operations on positions and masks.
        attention_nodes: the operations that are attention over the token axis, in the graph's order: fused ones, and the
            closing products of written-out ones.
        regions: closing product to the written-out attention that it closes.
        generators: nodes whose values have a token axis that none of their tensor operands has, and operands with as many
            rows as there are tokens but no label: all that depends on where a token stands comes in through these.
        main: the nodes that depend on the contents of tokens.
        batch_size: size of the batch; None where no batch axis was found.
        token_size: number of tokens; None where no token axis was found.
    """

    roles: Mapping[fx.Node, tuple[tuple[Label, ...], ...]]
    factors: Mapping[fx.Node, Dims]
    mixing: Mapping[fx.Node, Mixing]
    index_mixing: Mapping[fx.Node, Mixing]
    attention_nodes: tuple[fx.Node, ...]
    regions: Mapping[fx.Node, Region]
    generators: frozenset[fx.Node]
    main: frozenset[fx.Node]
    batch_size: sympy.Expr | None
    token_size: sympy.Expr | None

    def local(self, node: fx.Node) -> bool:
        """Return whether each token's part of the node depends on the same token's part of its operands alone."""
        return node not in self.mixing and node not in self.index_mixing

    def dim(self, node: fx.Node, label: Label) -> int | None:
        """Return the one dimension of a tensor that has a label, alone or with others; None if there is not just one."""
        found = [d for d, role in enumerate(self.roles.get(node, ())) if label in role]
        return found[0] if len(found) == 1 else None


def analyse_axes(
    graph: fx.Graph,
    *,
    batch: Mapping[fx.Node, int] | None = None,
    tokens: Mapping[fx.Node, int] | None = None,
    index: Mapping[fx.Node, int] | None = None,
    seed_from: Literal["inputs", "attention"] = "inputs",
) -> Axes:
    """Find the role of every dimension of a graph, and the operations that mix tokens.

    Args:
        graph: as `torch.export` makes it, with `meta["val"]` on every node; weights are placeholders or attributes.
        batch: the batch dimension of inputs; guessed if None (dimension 0 where it is symbolic).
        tokens: the token dimension of the inputs that hold the tokens; guessed if None (dimension 1 of integer inputs that are
            looked up in an embedding, or of floating [B, S, E] inputs, where it is symbolic).
        index: the token dimension of inputs that only say where tokens are, such as an attention mask; guessed if None (the
            other inputs with a dimension of the tokens' size).
        seed_from: "inputs", or "attention" for encoders whose token axis starts inside, after a patch embedding: the query
            axis of the first attention is followed back to where it starts.

    Returns:
        What was found. Nothing is raised for operations without a rule: they are mixing. After a mixing operation labels are
        taken from shapes as far as possible, so that the analysis can go on; findings behind the first mixing operation that
        is not attention may be incomplete.
    """
    seeds = guess_seeds(graph, batch=batch, tokens=tokens, index=index)
    state, roots = _start(seeds)
    if seed_from == "attention":
        roots = _inner_roots(graph, state, seeds, roots)
    state.main.update(node for node in roots if has(roots[node], Label.TOKEN) and node not in seeds.index)
    run = Run(graph, state, roots)
    run.analyse()
    tensors = {node: value for node, value in state.values.items() if isinstance(value, tuple) and is_tensor(node)}
    return Axes(
        roles={node: tuple(labels(dim) for dim in dims) for node, dims in tensors.items()},
        factors=tensors,
        mixing=run.mixing,
        index_mixing=run.index_mixing,
        attention_nodes=tuple(node for node in state.attention if node in run.mixing),
        regions={close: region for region in state.regions for close in region.closing},
        generators=frozenset(state.generators),
        main=frozenset(state.main),
        batch_size=state.batch_size,
        token_size=state.token_size,
    )


def _start(seeds: Seeds) -> tuple[State, dict[fx.Node, Dims]]:
    """Return the state and the dimensions of the inputs; symbols that must be equal get one representative."""
    same: dict[sympy.Expr, sympy.Expr] = {}
    sizes: dict[sympy.Expr, Label] = {}
    known: dict[Label, sympy.Expr] = {}
    plain = State({}, {}, None)
    for label, places in ((Label.BATCH, seeds.batch), (Label.TOKEN, seeds.tokens | seeds.index)):
        for node, d in places.items():
            size = plain.shape(node)[d]
            first = known.setdefault(label, size)
            if size.is_Symbol:
                same[size] = first
                sizes[first] = label
    state = State({k: v for k, v in sizes.items() if k.is_Symbol}, same, known.get(Label.TOKEN))
    state.batch_size = known.get(Label.BATCH)
    roots: dict[fx.Node, Dims] = {}
    for node in seeds.batch | seeds.tokens | seeds.index:
        dims = list(state.dims(node))
        for label, places in ((Label.BATCH, seeds.batch), (Label.TOKEN, seeds.tokens | seeds.index)):
            if node in places and dims[places[node]]:
                dims[places[node]] = (Factor(label, state.shape(node)[places[node]]),)
        roots[node] = tuple(dims)
    return state, roots


def _inner_roots(graph: fx.Graph, state: State, seeds: Seeds, roots: dict[fx.Node, Dims]) -> dict[fx.Node, Dims]:
    """Return the inputs' dimensions without tokens, and those of the nodes where the tokens of attention start."""
    symbols = {symbol: label for symbol, label in state.sizes.items() if label is not Label.TOKEN}
    outer = {n: tuple(() if has([d], Label.TOKEN) else d for d in dims) for n, dims in roots.items() if n in seeds.batch}
    origins = token_origins(graph, state)
    if not origins:
        return roots
    state.token_size = state.shape(next(iter(origins)))[next(iter(origins.values()))]
    state.sizes = symbols | ({state.token_size: Label.TOKEN} if state.token_size.is_Symbol else {})
    state.values.clear()
    result = dict(outer)
    for node, d in origins.items():
        dims = list(roots.get(node, state.dims(node)))
        dims[d] = (Factor(Label.TOKEN, state.shape(node)[d]),)
        result[node] = tuple(dims)
    state.values.clear()
    return result
