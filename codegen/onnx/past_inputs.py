"""Programs with caches in the form that users of ONNX models know: what came before goes in, and comes out longer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import dialect
from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.axes_registry import arguments
from graphwright.ir.containers import Container, Leaf
from graphwright.ir.diagnostics import at_node
from graphwright.ir.errors import ExportError
from graphwright.ir.ops.attention import operand_name, operand_type
from graphwright.ir.program import Dimension, Program, dimension_symbol, replace
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec

aten = torch.ops.aten

MASK, PAST, TOKENS = "attention_mask", "past", "tokens"
"""The input that says which tokens are there, and the dimensions of what came before and of what is new."""

HIDDEN = 2**30
"""The position of a key that is not there: behind every query's."""

_CACHE = re.compile(r"([kv])_cache_(\d+)")
_WORDS = {"k": "key", "v": "value"}
_CAPACITY = "capacity"


def with_past_inputs(derived: Program) -> Program:
    """Return a derived program as one whose caches are as long as what is in them.

    It takes the tokens, `attention_mask` [batch, past + tokens] (int64; 0 where there is no token), and for each attention N
    `past_key_values.N.key` and `.value` [batch, key heads, past, features]; it returns `logits` [batch, tokens, ...] and
    `present.N.key` and `.value` [batch, key heads, past + tokens, features]. `past` may be 0. A token's position is the number
    of tokens of its sequence before it, so that padding may stand anywhere. What is returned for padding means nothing.

    Args:
        derived: what the pass "cached-decode" makes; it is not changed.

    Raises:
        ExportError: the program keeps something else than keys and values as they are, or uses positions in an unknown way.
    """
    program = derived.copy()
    rewriting = _Rewriting(program)
    rewriting.run()
    return program


@dataclass
class _Positions:
    """Where tokens stand: queries [batch, tokens], and keys [batch, past + tokens], `HIDDEN` where there is none."""

    queries: fx.Node
    keys: fx.Node


class _Rewriting:
    def __init__(self, program: Program) -> None:
        self.program = program
        specs = zip(program.inputs, program.signature.tensors, strict=True)
        self.specs = {node: spec for node, spec in specs}
        self.filled = next((node for node in program.inputs if self.specs[node].name == "past"), None)
        if not program.states or self.filled is None:
            raise ExportError("the program has no caches: the pass cached-decode makes them")
        self.main = program.inputs[0]
        self.names: dict[fx.Node, str] = {}

    def run(self) -> None:
        """Rewrite the program."""
        program = self.program
        for node in program.inputs:
            self.names[node] = self._name(node)
        _rename(program)
        positions = self._positions()
        assert self.filled is not None
        for user in list(self.filled.users):
            if user.target is dialect.kv_append:
                self._append(user)
            elif user.target is dialect.kv_attention:
                self._attention(user, positions)
            elif not self._is_position(user):
                raise at_node(ExportError(f"{user.target} has no form with past keys and values in ONNX"), program, user)
        for user in list(self.filled.users):
            for where in list(user.users):
                replace(where, positions.queries)
            program.graph.erase_node(user)
        program.graph.erase_node(self.filled)
        program.drop_unused()
        self._sign()

    def _name(self, node: fx.Node) -> str:
        name = self.specs[node].name
        found = _CACHE.fullmatch(name)
        if node.name not in self.program.states:
            if node not in (self.main, self.filled):
                raise ExportError(f"the program takes {name}, which a file with past keys and values has no input for")
            return name
        if found is None:
            raise ExportError(
                f"the program keeps {name}, which has no form in ONNX: what can be written are caches of keys and values. "
                "Export without the pass that keeps it"
            )
        return f"past_key_values.{found[2]}.{_WORDS[found[1]]}"

    def _positions(self) -> _Positions:
        """Insert the mask, and what follows from it."""
        program = self.program
        cache = next(node for node in program.inputs if node.name in program.states)
        batch, tokens = self.main.meta["val"].shape[:2]
        past, device = cache.meta["val"].shape[2], self.main.meta["val"].device
        with program.graph.inserting_after(self.main):
            mask = program.graph.placeholder(MASK)
        with program.fake_mode:
            mask.meta["val"] = torch.empty((batch, past + tokens), dtype=torch.int64, device=device)
        self.specs[mask] = TensorSpec(MASK, torch.int64, str(device), (_text(program, mask, 0), f"{PAST} + {TOKENS}"))
        self.names[mask] = MASK
        with program.graph.inserting_after(program.inputs[-1]):
            count = program.graph.call_function(aten.sym_size.int, (cache, 2))
        count.meta["val"] = past
        with program.graph.inserting_before(count.next):
            there = program.call(aten.gt.Scalar, mask, 0)
            ones = program.call(torch.ops.prims.convert_element_type.default, there, torch.int64)
            slots = program.call(aten.sub.Tensor, program.call(aten.cumsum.default, ones, 1), 1)
            hidden = program.call(aten.full.default, [], HIDDEN, dtype=torch.int64, device=device)
            keys = program.call(aten.where.self, there, slots, hidden)
            own = program.call(aten.slice.Tensor, slots, 1, count, 2**63 - 1)
            # Padding before the first token would stand at -1, where tables have no row.
            queries = program.call(aten.clamp.default, own, 0)
        return _Positions(queries, keys)

    def _append(self, node: fx.Node) -> None:
        program = self.program
        cache, new = node.args[:2]
        with program.graph.inserting_before(node):
            longer = program.call(aten.cat.default, [cache, new], 2, like=node)
        replace(node, longer)

    def _attention(self, node: fx.Node, positions: _Positions) -> None:
        program, given = self.program, arguments(node)
        operands = [*given["operands"], positions.queries, positions.keys]
        types = {operand_name(at): operand_type(operand.meta["val"].dtype) for at, operand in enumerate(operands)}
        b, q, k = (ix.var(name) for name in "bqk")
        query = ix.load(operand_name(len(operands) - 2), (b, q), "int")
        key = ix.load(operand_name(len(operands) - 1), (b, k), "int")

        def moved(text: str) -> ix.Expr:
            return ix.substitute(ix.parse(text, types), {"q": query, "k": key})

        seen = ix.and_(moved("q - k >= 0"), moved(given["predicate"]) if given["predicate"] else ix.TRUE)
        keywords = {"bias": str(moved(given["bias"]))} if given["bias"] else {}
        keywords |= {"softcap": given["softcap"]} if given["softcap"] else {}
        with program.graph.inserting_before(node):
            new = program.call(
                dialect.attention,
                *(given[name] for name in "qkv"),
                operands,
                given["sink"],
                like=node,
                predicate=str(seen),
                scale=given["scale"],
                **keywords,
            )
        replace(node, new)

    def _is_position(self, node: fx.Node) -> bool:
        """Return whether a node is `past` as a column, to which nothing but the tokens' numbers are added."""
        if node.target is not aten.unsqueeze.default or node.args[1] != 1:
            return False
        return all(self._is_sum(user, node) for user in node.users)

    def _is_sum(self, node: fx.Node, column: fx.Node) -> bool:
        other: Any = next((n for n in node.args if n is not column), None)
        if node.target is not aten.add.Tensor or getattr(other, "target", None) is not aten.arange.default:
            return False
        return len(other.args) == 1 and self.program.size(other.args[0]) == self.program.shape(self.main)[1]

    def _sign(self) -> None:
        program = self.program
        states, results = program.states, program.results
        program.states = {}
        names = ["logits"] + [""] * (len(results) - 1)
        for node, name in self.names.items():
            if node.name in states:
                names[states[node.name]] = name.replace("past_key_values", "present", 1)
        inputs = program.inputs
        specs = tuple(
            TensorSpec(self.names[node], self.specs[node].dtype, self.specs[node].device, _renamed(self.specs[node].shape))
            for node in inputs
        )
        program.signature = Signature(
            tuple(Parameter(spec.name, "positional_or_keyword") for spec in specs),
            {spec.name: Leaf(at) for at, spec in enumerate(specs)},
            specs,
            {name: Range(d.low, d.high) for name, d in program.dimensions.items()},
            Container("dict", "", tuple(names), tuple(Leaf(at) for at in range(len(names)))),
        )


def _rename(program: Program) -> None:
    """Let a cache's size be that of what came before."""
    old, new = dimension_symbol(_CAPACITY), dimension_symbol(PAST)
    program.named = {key: value.xreplace({old: new}) for key, value in program.named.items()}
    high = program.dimensions.pop(_CAPACITY).high
    program.dimensions[PAST] = Dimension(PAST, 0, high)


def _renamed(shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
    return tuple(PAST if size == _CAPACITY else size for size in shape)


def _text(program: Program, node: fx.Node, dim: int) -> int | str:
    size = program.shape(node)[dim]
    return size if isinstance(size, int) else str(size)


def past_of(program: Program) -> Mapping[str, str]:
    """Return the inputs of past keys and values by the names of the results that continue them; none without caches."""
    names = [spec.name for spec in program.signature.tensors]
    return {name.replace("past_key_values", "present", 1): name for name in names if name.startswith("past_key_values.")}
