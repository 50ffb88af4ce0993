"""The rules that every program obeys, checked after every pass."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from .containers import Container, Leaf, Structure
from .diagnostics import at_node
from .errors import VerifyError
from .inference import infer_value, is_checked, is_data_dependent, mark_checked
from .program import Program
from .signature import Signature

SIZE_FUNCTIONS = frozenset(
    {
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.truediv,
        operator.mod,
        operator.neg,
        operator.pow,
        torch.sym_float,
        torch.sym_int,
        torch.sym_max,
        torch.sym_min,
        math.ceil,
        math.floor,
        math.trunc,
    }
)
"""Plain functions that nodes may call: they compute sizes."""


@dataclass(frozen=True)
class Violation:
    """A broken rule.

    Args:
        rule: the rule's name.
        message: what is wrong.
        node: where; None for the program as a whole.
    """

    rule: str
    message: str
    node: fx.Node | None = None


Rule = Callable[[Program], Iterator[tuple[str, fx.Node | None]]]

_RULES: dict[str, Rule] = {}


def _rule(name: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES[name] = rule
        return rule

    return register


def violations(program: Program) -> Iterator[Violation]:
    """Yield every broken rule. Rules build on each other: those after the first broken one may not hold either."""
    for name, rule in _RULES.items():
        for message, node in rule(program):
            yield Violation(name, message, node)


def verify(program: Program) -> None:
    """Check that a program obeys the rules.

    Raises:
        VerifyError: naming the first broken rule, with the node, the user's line and the graph around it.
    """
    for found in violations(program):
        where = "" if found.node is None else f" at %{found.node.name}"
        error = VerifyError(f"{found.rule}{where}: {found.message}")
        raise error if found.node is None else at_node(error, program, found.node)


@_rule("graph")
def _graph(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    """Nodes come before their users, the output is last, names are unique."""
    try:
        program.graph.lint()
    except RuntimeError as error:
        yield str(error), None
    outputs = [node for node in program.graph.nodes if node.op == "output"]
    if len(outputs) != 1 or next(reversed(program.graph.nodes)) is not outputs[0]:
        yield f"there must be one output node, at the end; there are {len(outputs)}", None


@_rule("operation")
def _operation(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    """Nodes call operations that change nothing."""
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.op != "call_function":
            yield f"a {node.op} node; only operations may be called", node
        elif isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.is_mutable:
                yield f"{node.target} changes a tensor in place; programs are functional", node
        elif node.target is not operator.getitem and node.target not in SIZE_FUNCTIONS:
            yield f"{node.target} is not an operation; expected an OpOverload, getitem or a function of sizes", node


@_rule("weight")
def _weight(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    """The weights that nodes read exist, and are what the nodes say."""
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        weight, value = program.weights.get(str(node.target)), node.meta.get("val")
        if weight is None:
            yield f"there is no weight {node.target!r}", node
        elif value is not None and (tuple(weight.shape) != tuple(value.shape) or weight.dtype != value.dtype):
            found, said = f"{tuple(weight.shape)} {weight.dtype}", f"{tuple(value.shape)} {value.dtype}"
            yield f"the weight {node.target!r} is {found}, the node says {said}", node


@_rule("value")
def _value(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    """Every node says what it computes."""
    for node in program.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            yield 'meta["val"] is missing', node


@_rule("shape")
def _shape(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    """What a node says agrees with what its operation gives for its arguments."""
    mode = None
    for node in program.graph.nodes:
        if node.op != "call_function" or is_checked(node):
            continue
        mode = mode or program.fake_mode
        try:
            inferred = infer_value(node, mode)
        except Exception as error:  # noqa: BLE001 - an operation may raise anything for arguments that do not fit
            yield f"the operation does not accept its arguments: {error}", node
            continue
        said = node.meta["val"]
        if _same_value(program, said, inferred):
            mark_checked(node)
        else:
            yield f"the node says {_describe(program, said)}, its operation gives {_describe(program, inferred)}", node


@_rule("signature")
def _signature(program: Program) -> Iterator[tuple[str, fx.Node | None]]:
    """The placeholders come first; results are nodes or plain values; there are as many as a call passes and gets."""
    called = False
    for node in program.graph.nodes:
        called = called or node.op == "call_function"
        if called and node.op == "placeholder":
            yield "placeholders come before calls", node
    arguments = program.output.args[0] if program.output.args else None
    if not isinstance(arguments, tuple | list):
        yield f"the results must be a tuple, got {arguments!r}", program.output
        return
    for result in arguments:
        if not isinstance(result, fx.Node | int | float | bool | str | type(None)):
            yield f"a result is {result!r}; results are nodes or plain values", program.output
    if isinstance(program.signature, Signature):
        wanted = max(_leaves(program.signature.results), default=-1) + 1 + len(program.states)
        if len(arguments) != wanted:
            yield f"there are {len(arguments)} results, the signature and the states have {wanted}", program.output
        given, expected = len(program.inputs), len(program.signature.tensors)
        if given != expected and program.signature.packing is None:
            yield f"there are {given} inputs, the signature has {expected}", None


def _leaves(structure: Structure) -> Iterator[int]:
    """Yield the numbers of the tensors in a nested value."""
    if isinstance(structure, Leaf):
        yield structure.index
    elif isinstance(structure, Container):
        for child in structure.children:
            yield from _leaves(child)


def _same_value(program: Program, said: Any, inferred: Any) -> bool:
    if isinstance(said, list | tuple):
        return (
            isinstance(inferred, list | tuple)
            and len(said) == len(inferred)
            and all(_same_value(program, a, b) for a, b in zip(said, inferred, strict=True))
        )
    if isinstance(said, torch.Tensor):
        return (
            isinstance(inferred, torch.Tensor)
            and said.dtype == inferred.dtype
            and said.dim() == inferred.dim()
            and all(_same_size(program, a, b) for a, b in zip(said.shape, inferred.shape, strict=True))
        )
    if said is None or inferred is None:
        return said is inferred
    return _same_size(program, said, inferred)


def _same_size(program: Program, said: Any, inferred: Any) -> bool:
    if isinstance(said, float | torch.SymFloat | bool | torch.SymBool):
        return True
    mine, other = program.size(said), program.size(inferred)
    if mine == other:
        return True
    symbols = {symbol for size in (mine, other) for symbol in getattr(size, "free_symbols", ())}
    # Every inference makes new symbols for sizes that depend on values.
    return any(map(is_data_dependent, symbols)) or bool(sympy.simplify(mine - other) == 0)


def _describe(program: Program, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(program.size(n) for n in value.shape)} {value.dtype}"
    return str(value)
