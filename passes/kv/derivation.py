"""The rewriting of a plain causal program into one with caches."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from graphwright.ir import dialect
from graphwright.ir.analyses.axes import Axes, Label
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.containers import Leaf
from graphwright.ir.errors import VerifyError
from graphwright.ir.program import Dimension, Program, dimension_symbol
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec

from .emitting import Emitter
from .full_inputs import main_input
from .listed import Lists
from .positions import TOKEN, Positions
from .refusing import NotCausal
from .sites import Site

aten = torch.ops.aten

CAPACITY, PAST = "capacity", "past"
SAMPLE_CAPACITY = 8191
"""Any size unlike those of the sample will do."""


def derive(plain: Program, axes: Axes, positions: Positions, sites: Sequence[Site], lists: Lists) -> Program:
    """Return the program with caches.

    Args:
        plain: the program, of which all inputs but the tokens are gone.
        axes: of it.
        positions: of it.
        sites: its attentions.
        lists: how those of them that are to see listed keys get their lists.

    Raises:
        NotCausal: positions cannot differ between the sequences of a batch.
    """
    program = plain.copy()
    derivation = _Derivation(program, dict(zip(plain.graph.nodes, program.graph.nodes, strict=True)), axes, positions)
    derivation.lists = lists
    derivation.run(sites)
    return program


class _Derivation:
    def __init__(self, program: Program, copies: dict[fx.Node, fx.Node], axes: Axes, positions: Positions) -> None:
        self.program, self.copies, self.axes, self.positions = program, copies, axes, positions
        self.main = main_input(program)
        self.batch, self.tokens = self.main.meta["val"].shape[:2]
        self.specs = list(program.signature.tensors)
        self.results = [self.copies[_result(axes)]]
        self.states: dict[str, int] = {}
        self.lists: Lists = {}

    def run(self, sites: Sequence[Site]) -> None:
        """Rewrite the program."""
        program = self.program
        self.capacity = self._new_dimension()
        self.past = self._input(PAST, (self.batch,), torch.int64)
        with program.graph.inserting_after(program.inputs[-1]):
            size = program.graph.call_function(aten.sym_size.int, (self.main, 1))
        size.meta["val"] = self.tokens
        with program.graph.inserting_before(size.next):
            row = program.call(aten.arange.default, size, device=self.past.meta["val"].device)
            column = program.call(aten.unsqueeze.default, self.past, 1)
            self.where = program.call(aten.add.Tensor, column, row)
        frontier = [(self.copies[node], node) for node in self.positions.frontier()]
        replaced = {copy: self._at_positions(copy, node) for copy, node in frontier}
        for node, new in replaced.items():
            node.replace_all_uses_with(new)
        self._infer_again(set(replaced.values()))
        for number, site in enumerate(sites):
            self._site(site, number)
        program.output.args = ((*self.results,),)
        program.states = self.states
        program.drop_unused()
        self._sign()

    # -- inputs

    def _new_dimension(self) -> Any:
        mode = self.program.fake_mode
        environment = mode.shape_env
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        frozen, environment.frozen = environment.frozen, False
        try:
            size = mode.from_tensor(torch.empty(SAMPLE_CAPACITY), symbolic_context=context).shape[0]
        finally:
            environment.frozen = frozen
        self.program.named[size.node.expr] = dimension_symbol(CAPACITY)
        self.program.dimensions[CAPACITY] = Dimension(CAPACITY, 1, self.positions.count())
        return size

    def _input(self, name: str, shape: tuple[Any, ...], dtype: torch.dtype) -> fx.Node:
        program, device = self.program, self.main.meta["val"].device
        with program.graph.inserting_after(program.inputs[-1]):
            node = program.graph.placeholder(name)
        with program.fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=device)
        sizes = tuple(n if isinstance(n, int) else str(n) for n in program.shape(node))
        self.specs.append(TensorSpec(name, dtype, str(device), sizes))
        return node

    def _sign(self) -> None:
        program = self.program
        names = [spec.name for spec in self.specs]
        program.signature = Signature(
            tuple(Parameter(name, "positional_or_keyword") for name in names),
            {name: Leaf(at) for at, name in enumerate(names)},
            tuple(self.specs),
            {name: Range(d.low, d.high) for name, d in program.dimensions.items()},
            Leaf(0),
        )

    # -- positions

    def _at_positions(self, copy: fx.Node, node: fx.Node) -> fx.Node:
        """Insert what computes a node of the index domain at the tokens' positions, one row for each sequence."""
        program = self.program
        e, shape = self.positions.expressions[node], list(copy.meta["val"].shape)
        (token,) = self.positions.token_dims(node)
        batch_size = self.axes.batch_size
        candidates = [d for d, n in enumerate(shape) if isinstance(n, torch.SymInt) and n.node.expr == batch_size]
        candidates += [d for d, n in enumerate(shape[:token]) if isinstance(n, int) and n == 1]
        if not candidates:
            shape.insert(0, 1)
            token += 1
        batch = candidates[0] if candidates else 0
        rank = len(shape)
        with program.graph.inserting_before(copy):
            value = self.where if batch < token else program.call(aten.permute.default, self.where, [1, 0], like=copy)
            for d in range(rank):
                if d not in (batch, token):
                    value = program.call(aten.unsqueeze.default, value, d, like=copy)
            variables = {TOKEN: value}
            for d, n in enumerate(shape):
                name = f"i{d - (not candidates)}"
                if name in e.free:
                    row = program.call(aten.arange.default, n, device=self.past.meta["val"].device, like=copy)
                    column = [n if i == d else 1 for i in range(rank)]
                    variables[name] = program.call(aten.reshape.default, row, column, like=copy)
            loads = {name: self.copies[load] for name, load in self.positions.loads(e).items()}
            for load in loads.values():
                copy.prepend(load)
            new = Emitter(program, variables, loads, copy).tensor(e, copy.meta["val"].dtype)
            if any(isinstance(n, int) and n != 1 for d, n in enumerate(shape) if d not in (batch, token)):
                sizes = [-1 if d in (batch, token) else n for d, n in enumerate(shape)]
                new = program.call(aten.expand.default, new, sizes, like=copy)
        return new

    def _infer_again(self, changed: set[fx.Node]) -> None:
        """Work out the shapes of what is computed from positions anew; what is computed from tokens keeps its own."""
        program = self.program
        main = {self.copies[node] for node in self.axes.main if node in self.copies}
        for node in program.graph.nodes:
            if node.op != "call_function" or not changed & set(node.all_input_nodes):
                continue
            before = _shapes(program, node)
            try:
                program.infer(node)
            except VerifyError as error:
                raise NotCausal(node, f"it cannot be computed for sequences at different positions: {error}") from error
            if _shapes(program, node) == before:
                continue
            if node in main:
                raise NotCausal(node, "positions of different sequences cannot be told apart where they meet the tokens")
            changed.add(node)

    # -- attention

    def _site(self, site: Site, number: int) -> None:
        program, node = self.program, self.copies[site.node]
        given = arguments(node)
        caches = []
        for name in "kv":
            value = given[name].meta["val"]
            shape = (self.batch, value.shape[1], self.capacity, value.shape[3])
            cache = self._input(f"{name}_cache_{number}", shape, value.dtype)
            with program.graph.inserting_before(node):
                new = program.call(dialect.kv_append, cache, given[name], self.past, like=node)
            self.states[cache.name] = len(self.results)
            self.results.append(new)
            caches.append(new)
        operands = [self.copies[operand] for operand in site.operands]
        for operand in operands:
            if operand.op == "get_attr":
                node.prepend(operand)
        texts = {name: text for name, text in (("predicate", site.predicate), ("bias", site.bias)) if text}
        keywords = {**texts, "scale": given["scale"]} | ({"softcap": given["softcap"]} if given["softcap"] else {})
        with program.graph.inserting_before(node):
            if site.node.name in self.lists:
                options = self.lists[site.node.name]
                index = program.call(dialect.block_index, given["q"], given["k"], self.past, like=node, **options)
                lists = [program.call(operator.getitem, index, at, like=node) for at in range(2)]
                read = (*caches, self.past, *lists, operands, given["sink"])
                keywords["minimum_tokens"] = options["minimum_tokens"]
                new = program.call(dialect.kv_sparse_attention, given["q"], *read, like=node, **keywords)
            else:
                read = (*caches, self.past, operands, given["sink"])
                new = program.call(dialect.kv_attention, given["q"], *read, like=node, **keywords)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)


def _result(axes: Axes) -> fx.Node:
    """Return the first result that has something for each token of each sequence: the scores of what may follow it."""
    output = next(node for node in axes.main if node.op == "output")
    results: Any = output.args[0]
    for node in results:
        if isinstance(node, fx.Node) and axes.roles.get(node) == ((Label.BATCH,), (Label.TOKEN,), ()):
            return node
    raise NotCausal(output, "no result is [batch, tokens, features]")


def _shapes(program: Program, node: fx.Node) -> Any:
    value = node.meta["val"]
    if isinstance(value, list | tuple):
        return [tuple(program.size(n) for n in one.shape) for one in value if isinstance(one, torch.Tensor)]
    return program.shape(node) if isinstance(value, torch.Tensor) else ()
