"""Leaving out the padding of a batch."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from graphwright.ir import dialect
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.errors import OptionError, PlanError
from graphwright.ir.packing import LARGEST_MULTIPLE, Packing, Part
from graphwright.ir.program import Dimension, Program, dimension_symbol
from graphwright.passes.base import Context, Decision, Fidelity, Pass, Plan, Refusal
from graphwright.passes.local import Places

from .moves import Moves
from .region import RESHAPING, NotPackable, Region, find_region, has_both, why_not_local

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class PackTokens(Pass):
    """Compute what an encoder does to each token for the tokens that the attention mask keeps, and for no padding.

    The kept tokens of a batch become the rows of one long batch of one. What is done to each token is done to these rows,
    attention goes over each sequence's own, and results that have tokens are padded again. Which rows there are is worked out
    of the mask when a call comes, before anything runs.

    Before: `%y = linear(%x, weights["w"]); %a = graphwright.attention(%q, %k, %v, [%mask], predicate="not (in0[b, k] == 0)")`

    After: `%p = graphwright.take_rows(%x, %rows); %y = linear(%p, weights["w"]);
        %a = graphwright.ragged_attention(%q, %k, %v, %starts, tokens); %out = graphwright.take_rows(%a, %places)`

    Applies when: every attention hides the keys where an input [batch, tokens] is 0 (or, for all of them, where it is 1), and
        no others, by a condition or by a large negative number. Tokens may be anywhere in their row.
    Applies when: all else that depends on tokens is computed for each alone, or takes tokens at fixed positions, or is taken
        over tokens of what the mask made 0, or another number, elsewhere. Before the first attention, anything.

    Declines when: there is no such input, or the number of sequences or of tokens is fixed.
    Declines when: an attention has a bias or a sink, hides keys by their position as well, or is not recognised.
    Declines when: behind an attention another operation mixes tokens, such as a convolution or a mean over padding too.

    Fidelity: the same sums in another order. The mask has to be of zeros and ones. Results at padded positions are 0, so are
        all of a sequence without tokens, and what is computed of such a position alone follows from that 0.

    Cost: operations on tokens shrink to the share of tokens that are there, attention to the squares of the lengths.

    Args:
        multiple: the number of rows is rounded up to a multiple of it, 1 to 64: calls of nearly as many tokens then share what
            is prepared for a number of rows.

    Raises:
        OptionError: multiple is out of its range.
    """

    name = "pack-tokens"
    fidelity = Fidelity.CLOSE
    source = "Zhai et al., ByteTransformer: Transformer Boosted for Variable-Length Inputs, 2022, arXiv 2210.03052"

    multiple: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.multiple <= LARGEST_MULTIPLE:
            raise OptionError(f"pack-tokens: multiple must be 1 to {LARGEST_MULTIPLE}, got {self.multiple}")

    def plan(self, program: Program, context: Context) -> Plan:
        """Decide which operations to compute for packed tokens: all that depend on what tokens hold, or none."""
        if program.signature.packing is not None:
            return Plan(self.name, (), (Refusal("", "the program is packed already"),))
        try:
            region = self._region(program)
        except NotPackable as found:
            return Plan(self.name, (), (Refusal(found.where, str(found)),))
        if region is None:
            return Plan(self.name, (), (Refusal("", "there is no attention whose mask says which tokens are padding"),))
        attentions = sum(node.target is dialect.attention for node in region.nodes)
        why = f"{len(region.nodes)} operations on tokens, {attentions} of them attention, need no padding"
        detail = {"multiple": self.multiple, "nodes": [node.name for node in region.nodes]}
        return Plan(self.name, (Decision(region.mask.name, "pack the tokens that the mask keeps", why, detail),), ())

    def _region(self, program: Program) -> Region | None:
        """Return what is packed, tried out: nodes that cannot be after all are left padded, where that is possible.

        Raises:
            NotPackable: it is not.
        """
        region = find_region(program)
        while region is not None:
            try:
                _Rewrite(program.copy(), self.name, region.mask.name, [n.name for n in region.nodes], self.multiple).run()
            except NotPackable as found:
                rest = [node for node in region.nodes if node.name != found.where]
                if len(rest) == len(region.nodes):
                    raise
                region = find_region(program, among=rest)
            else:
                break
        return region

    def apply(self, program: Program, plan: Plan) -> Program:
        """Return the program with the plan's nodes computed for packed tokens.

        Raises:
            PlanError: the plan does not fit the program.
        """
        result = program.copy()
        for decision in plan.decisions:
            detail = dict(decision.detail)
            try:
                _Rewrite(result, self.name, decision.where, detail["nodes"], detail["multiple"]).run()
            except KeyError as error:
                raise PlanError(f"{self.name}: the decision about %{decision.where} does not say {error}") from error
            except NotPackable as found:
                raise PlanError(f"{self.name}: %{found.where} cannot be packed: {found}") from found
        return result


class _Rewrite:
    """Packs one program, which is changed."""

    def __init__(self, program: Program, pass_name: str, mask: str, nodes: list[str], multiple: int) -> None:
        places = Places(program.graph, pass_name)
        wanted = [places[name] for name in nodes]
        region = find_region(program, among=wanted)
        if region is None or region.mask is not places[mask] or len(region.nodes) != len(wanted):
            raise PlanError(f"{pass_name}: %{mask} is not the mask of every attention, or a node is none of tokens: plan again")
        self.program = program
        self.region: Region = region
        self.parts = _Parts(program, region, multiple)
        self.moves = Moves(program, region.axes, self.parts.get)
        self.packed: dict[fx.Node, fx.Node] = {}
        self.longest = self._longest(multiple)

    def run(self) -> None:
        """Rewrite."""
        nodes = self.region.nodes
        for node in nodes:
            with self.program.graph.inserting_before(node):
                self.packed[node] = self._copy(node)
        inside = set(nodes)
        for node in self.region.exits:
            with self.program.graph.inserting_before(node):
                padded = self.moves.unpack(self.packed[node], node)
            for user in [user for user in node.users if user not in inside]:
                user.replace_input_with(node, padded)
        self.parts.finish()
        self.program.drop_unused()

    def _longest(self, multiple: int) -> fx.Node:
        """Return the node of the most rows of a sequence, or of those that stand for nothing."""
        with self.program.graph.inserting_after(self.program.inputs[-1]):
            tokens = self.program.call(aten.sym_size.int, self.region.mask, 1)
        with self.program.graph.inserting_after(tokens):
            return self.program.call(torch.sym_max, tokens, multiple)

    def _copy(self, node: fx.Node) -> fx.Node:
        """Insert a node's packed form."""
        program = self.program
        if node.target is dialect.attention:
            given = arguments(node)
            q, k, v = (self._operand(given[name], node) for name in "qkv")
            starts, keywords = self.parts.get("starts"), {"scale": given["scale"], "softcap": given["softcap"]}
            return program.call(dialect.ragged_attention, q, k, v, starts, self.longest, like=node, **keywords)
        if node.target in RESHAPING:
            source: Any = node.args[0]
            return program.call(node.target, self._operand(source, node), self.moves.packed_shape(node), like=node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: self._operand(operand, node))
        return program.call(node.target, *args, like=node, **kwargs)

    def _operand(self, operand: fx.Node, user: fx.Node) -> fx.Node:
        """Return an operand's packed form, which is inserted if it is not there."""
        if operand in self.packed:
            return self.packed[operand]
        if not isinstance(operand.meta.get("val"), torch.Tensor):
            raise NotPackable(user.name, f"it reads %{operand.name}, which is not packed")
        if not self.moves.is_padded(operand):
            return operand
        axes = self.region.axes
        is_plain = operand.op == "call_function" and operand not in axes.generators | axes.main and axes.local(operand)
        if is_plain and has_both(axes, operand) and operand.all_input_nodes and not why_not_local(operand):
            # What many read, such as an embedding of types, is computed for packed tokens too.
            with contextlib.suppress(NotPackable):
                self.packed[operand] = self._copy(operand)
                return self.packed[operand]
        packed = self.moves.pack(operand, user)
        self.packed[operand] = packed
        return packed


class _Parts:
    """The inputs of a packed program that are worked out of the mask; made when they are asked for."""

    def __init__(self, program: Program, region: Region, multiple: int) -> None:
        self._program = program
        self._mask = region.mask
        self._inverted = region.hidden == 1
        self._multiple = multiple
        self._last = program.inputs[-1]
        self._found: dict[Part, fx.Node] = {}
        self._names = {node.name for node in program.graph.nodes}
        taken = program.dimensions
        self._dimension = next(name for k in range(len(taken) + 1) if (name := f"packed{k or ''}") not in taken)
        self._size = self._new_size()

    def get(self, part: Part) -> fx.Node:
        """Return the input."""
        if part not in self._found:
            with self._program.graph.inserting_after(self._last):
                name = next(n for k in range(len(self._names) + 1) if (n := f"token_{part}{k or ''}") not in self._names)
                node = self._program.graph.placeholder(name)
            node.meta["val"] = self._value(part)
            self._found[part] = self._last = node
        return self._found[part]

    def finish(self) -> None:
        """Let the program's signature say what it takes."""
        program, mask = self._program, self._program.inputs.index(self._mask)
        packing = Packing(mask, self._inverted, self._multiple, tuple(self._found), self._dimension)
        program.signature = dataclasses.replace(program.signature, packing=packing)

    def _new_size(self) -> Any:
        """Return a symbolic number for the number of rows, and name it."""
        program, mode = self._program, self._program.fake_mode
        environment = mode.shape_env
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        frozen, environment.frozen = environment.frozen, False
        try:
            # Any size but 0 and 1 that is unlike the sample's will do.
            sample = torch.empty(5 * LARGEST_MULTIPLE * 7)
            size = mode.from_tensor(sample, symbolic_context=context).shape[0]
        finally:
            environment.frozen = frozen
        program.named[size.node.expr] = dimension_symbol(self._dimension)
        program.dimensions[self._dimension] = Dimension(self._dimension)
        return size

    def _value(self, part: Part) -> torch.Tensor:
        batch, tokens = self._mask.meta["val"].shape
        device = self._mask.meta["val"].device
        with self._program.fake_mode:
            if part == "places":
                return torch.empty(batch, tokens, dtype=torch.int64, device=device)
            if part == "starts":
                return torch.empty(batch + 2, dtype=torch.int32, device=device)
            return torch.empty(1, self._size, dtype=torch.int64, device=device)
