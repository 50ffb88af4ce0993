"""What a program costs as a short table: operations that are alike are one line, and chains that fuse are one operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from graphwright.ir.inference import describe
from graphwright.ir.printer import operation_name
from graphwright.ir.program import Program, Size, calls
from graphwright.ir.records import CostLine, ProgramCost
from graphwright.ir.size_texts import text_of_size

from .cost import PRODUCTS, VIEWS, bytes_of_value, cache_ratio, flops_of_node

aten = torch.ops.aten

PRODUCT, ATTENTION, REST = "product", "attention", "rest"
KINDS = (PRODUCT, ATTENTION, REST)

Memo = dict[Hashable, CostLine]
"""Lines by what they were made from: what one program taught serves the next one of the same dimensions."""


def program_cost(program: Program, memo: Memo | None = None) -> ProgramCost:
    """Return what a program costs.

    What is neither a product nor attention is taken to be computed where it is read, as code generation does it: a value that
    only one kernel needs is not stored. What only looks at memory in another way costs nothing.

    Args:
        program: what to cost.
        memo: lines of programs with the same dimensions, and of this one afterwards.
    """
    known: Memo = {} if memo is None else memo
    kernels, counts = _Kernels(program), Counter[Hashable]()
    for root, members in kernels.all():
        key = kernels.key(root, members)
        if key not in known:
            known[key] = kernels.line(root, members)
        counts[key] += 1
    merged = Counter[CostLine]()
    for key, count in counts.items():
        merged[known[key]] += count
    lines = tuple(replace(line, count=count) for line, count in merged.items())
    held = sum(weight.numel() * weight.element_size() for weight in program.weights.values())
    states: Size = 0
    for node in program.inputs:
        if node.name in program.states:
            states = states + bytes_of_value(program, node.meta["val"])
    return ProgramCost(lines, held, text_of_size(states))


def kind_of(node: fx.Node) -> str:
    """Return the kind of a call."""
    if node.target in PRODUCTS:
        return PRODUCT
    return ATTENTION if "attention" in operation_name(node.target) else REST


class _Kernels:
    """The operations of a program, each with the chain that is computed in it."""

    def __init__(self, program: Program) -> None:
        self._program = program
        results = program.results
        # An operation may give several states: each is an item of what it gives.
        self._kept = {_behind_views(results[at])[0] for at in program.states.values()}
        self._states = {node for node in program.inputs if node.name in program.states} | self._kept
        self._stored: set[fx.Node] = set()
        self._find()

    def all(self) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
        """Yield each node whose value is stored, with all nodes that are computed with it, itself first."""
        for node in calls(self._program.graph):
            if node in self._stored:
                yield node, self._members(node)

    def key(self, root: fx.Node, members: list[fx.Node]) -> Hashable:
        """Return what decides the line of a kernel."""
        return (root in self._kept, *(self._key(node) for node in members), *self._reads(members))

    def line(self, root: fx.Node, members: list[fx.Node]) -> CostLine:
        """Return the line of a kernel."""
        program = self._program
        flops: Size = sum((flops_of_node(program, node) for node in members), 0)
        moved: dict[str, Size] = dict.fromkeys(("weight", "state", "value"), 0)
        writes = bytes_of_value(program, root.meta["val"])
        for where, value, rows in self._read_values(members):
            # Of a table only the rows that are asked for are read.
            size = bytes_of_value(program, rows if rows is not None else value)
            moved[where] = moved[where] + (size * cache_ratio(program, root) if where == "state" else size)
        if root in self._kept:
            # What is kept is changed in place, by as much as is new.
            moved["state"] = moved["value"]
        else:
            moved["value"] = moved["value"] + writes
        texts = {f"{where}_bytes": _text(size) for where, size in moved.items()}
        return CostLine(kind_of(root), operation_name(root.target), 1, _text(flops), **texts)

    def _find(self) -> None:
        """Decide what is stored, from the results back: what two kernels need, and what is read or written by itself."""
        # What needs a value: the stored values that are computed from it in one kernel; None where it has to be stored.
        needed: dict[fx.Node, set[fx.Node | None]] = {}
        for node in reversed(self._program.graph.nodes):
            if node.op != "call_function" or not _is_tensor(node):
                continue
            needs: set[fx.Node | None] = set()
            for user in node.users:
                needs |= {None} if user.op == "output" or _stands_alone(user) else needed.get(user, set())
            if needs and not _is_view(node) and (_stands_alone(node) or None in needs or len(needs) > 1):
                self._stored.add(node)
                needs = {node}
            needed[node] = needs

    def _members(self, root: fx.Node) -> list[fx.Node]:
        found = {root: None}
        stack = [root]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source.op == "call_function" and _is_tensor(source) and source not in self._stored and source not in found:
                    found[source] = None
                    stack.append(source)
        return [node for node in found if not _is_view(node)]

    def _read_values(self, members: list[fx.Node]) -> Iterator[tuple[str, Any, Any]]:
        """Yield each stored value that a kernel reads: where it lies, the value, and for a table the rows that are read."""
        seen: set[fx.Node] = set()
        inside = set(members)
        for node in members:
            for source in node.all_input_nodes:
                base, value, mark = _behind_views(source)
                if base in inside or mark in seen or not isinstance(value, torch.Tensor | list | tuple):
                    continue
                seen.add(mark)
                where = "weight" if base.op == "get_attr" else "state" if base in self._states else "value"
                is_table = node.target is aten.embedding.default and source is node.args[0]
                yield where, value, node.meta["val"] if is_table else None

    def _reads(self, members: list[fx.Node]) -> list[Hashable]:
        return [(where, describe(value), rows is not None) for where, value, rows in self._read_values(members)]

    def _key(self, node: fx.Node) -> Hashable:
        values = tuple(describe(source.meta["val"]) for source in node.all_input_nodes if "val" in source.meta)
        numbers = tuple(sorted((key, str(value)) for key, value in node.kwargs.items() if isinstance(value, str | bool)))
        return (node.target, values, describe(node.meta["val"]), numbers)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor | list | tuple)


def _is_view(node: fx.Node) -> bool:
    return node.target in VIEWS


def _stands_alone(node: fx.Node) -> bool:
    """Return whether a call reads and writes memory, whatever comes before and after it."""
    return not _is_view(node) and kind_of(node) != REST


def _behind_views(node: fx.Node) -> tuple[fx.Node, Any, fx.Node]:
    """Return the node whose memory a value lies in, a value of as many elements as are read, and what tells the part read."""
    value, part = node.meta.get("val"), None
    while node.op == "call_function" and _is_view(node):
        source: Any = node.args[0]
        if node.target is aten.expand.default:
            value = source.meta.get("val")
        if node.target in (aten.slice.Tensor, aten.select.int):
            part = part or node
        node = source
    return node, value, part or node


def _text(size: Size) -> str:
    return text_of_size(sympy.expand(size) if isinstance(size, sympy.Expr) else size)
