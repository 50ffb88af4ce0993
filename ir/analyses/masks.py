"""The masks analysis: what an attention mask lets through, as an expression of batch, head, query and key.

    form = analyse_mask(mask_node, query_length=s, key_length=s)
    str(form.predicate)     # k - q + 4 >= 0 & q - k >= 0 & in0[b, k]
    form.causal, form.window, str(form.residual)     # True, 5, in0[b, k]

Nothing is matched on how a model writes its mask: the mask's element at (b, h, q, k) is worked out through the graph and
simplified, and what is left is read off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx

from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.index import Expr, Facts
from graphwright.ir.analyses.index_call import Inexpressible, Size, is_one, size_expression
from graphwright.ir.analyses.index_functions import IndexFunctionError, IndexFunctions
from graphwright.ir.errors import GraphwrightError

HIDDEN = -1e30
"""An additive mask hides what it adds this or less to; in float16, what it adds the smallest number to."""

B, H, Q, K = (ix.var(name) for name in "bhqk")
_INDEX_NAMES = frozenset("bhqk")

BiasKind = Literal["alibi", "relative", "other"]


class MaskError(GraphwrightError):
    """An attention mask has no form."""


@dataclass(frozen=True)
class MaskForm:
    """What a mask says. Variables: b batch, h query head, q query and k key position, and the sizes by their symbols.

    Args:
        predicate: bool, True where the key is visible; the constant True where nothing is hidden.
        bias: float, what is added to the scaled score of a visible key; None where nothing is.
        loads: the nodes whose tensors predicate and bias read, named in0, in1, ... in this order.
        causal: no key after q + offset is visible: k <= q + offset wherever the predicate holds.
        offset: how many keys come before the first query's own: 0, or an expression of the sizes.
        window: the keys of a sliding window with the query's own: only k > q + offset - window is visible.
        right_window: the same forwards: only k < q + offset + right_window is visible. None where causal.
        chunk: queries and keys see each other only within chunks of this many tokens.
        sinks: how many first keys stay visible whatever `sink_window` says; 0 where there are none.
        sink_window: the window that the sinks are exempt from. The residual still has both.
        prefix: how many first keys all queries see, whatever causality says; None where there is no such prefix.
        packed: atoms that keep queries and keys to their own segment.
        padding: atoms about the key alone, which hide padding.
        bias_kind: "alibi": a slope for each head times the distance; "relative": any function of the distance and the
            head; "other": anything else; None without a bias.
        exact: the mask hides by True/False or by minus infinity. Otherwise it adds a large negative number, and a query
            that sees no key at all attends to all of them alike in eager mode, not to none.
        residual: the predicate without the causal and window atoms: what a kernel still has to test for each key.
        facts: what is known of the variables, to substitute with.
    """

    predicate: Expr
    bias: Expr | None
    loads: tuple[fx.Node, ...]
    causal: bool
    offset: Expr
    window: int | None
    right_window: int | None
    chunk: int | None
    sinks: int
    sink_window: int | None
    prefix: Expr | None
    packed: tuple[Expr, ...]
    padding: tuple[Expr, ...]
    bias_kind: BiasKind | None
    exact: bool
    residual: Expr
    facts: Facts = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.predicate}" if self.bias is None else f"{self.predicate}; bias {self.bias}"


def analyse_mask(
    mask: fx.Node | None,
    *,
    query_length: Size,
    key_length: Size,
    is_causal: bool = False,
    query_rank: int = 4,
    constants: Mapping[fx.Node, Tensor] | None = None,
    for_kernels: bool = False,
) -> MaskForm:
    """Return the form of an attention mask.

    Args:
        mask: the node of the mask, broadcast to [B, H, S, T]: bool (True: visible) or float (added to the scaled score);
            None for no mask.
        query_length: S, an int or symbolic.
        key_length: T, an int or symbolic.
        is_causal: the operator hides keys after the query as well, counted from the top left: k <= q.
        query_rank: dimensions of the query tensor: 4 for [B, H, S, D], 3 for [B, S, D], 2 for [S, D].
        constants: the values of nodes that never change (buffers, lifted constants): a causal table among them is seen
            for what it is.
        for_kernels: read what a kernel cannot compute exactly for one element (sums over a tensor, integers made from a
            rounded logarithm) from the tensor that the graph computes.

    Raises:
        MaskError: the mask has more dimensions than the scores, or elements that are neither bool nor floating point.
    """
    try:
        facts = _facts(size_expression(query_length), size_expression(key_length))
    except Inexpressible:
        # The lengths only serve to simplify.
        facts = _facts(None, None)
    names: dict[fx.Node, str] = {}
    while True:
        functions = IndexFunctions(facts, constants=constants, for_kernels=for_kernels, names=names)
        predicate, bias, exact = _element(functions, mask, query_rank, facts)
        if is_causal:
            predicate = ix.and_(predicate, ix.ge0(ix.subtract(Q, K), facts), facts=facts)
        read = ix.loads_of(predicate) | (ix.loads_of(bias) if bias is not None else frozenset())
        loads = tuple(node for name, node in functions.loads.items() if name in read)
        wanted = {node: f"in{i}" for i, node in enumerate(loads)}
        if wanted == {node: name for name, node in functions.loads.items() if name in read}:
            return recognise(predicate, bias, loads, exact, facts)
        # Simplifying left some loads out; with its final names the expression is canonical again.
        names = wanted


def _facts(query_length: Expr | None, key_length: Expr | None) -> Facts:
    facts = ix.NO_FACTS.known("b", ix.ZERO, None).known("h", ix.ZERO, None)
    for name, length in (("q", query_length), ("k", key_length)):
        facts = facts.known(name, ix.ZERO, None if length is None else ix.subtract(length, ix.ONE))
        for size in length.free if length is not None else ():
            # A mask with an element at all has lengths of 1 or more; a part of a length may be 0.
            facts = facts.known(size, ix.const(int(length is not None and length.kind == "var")), None)
    return facts


def _element(functions: IndexFunctions, mask: fx.Node | None, query_rank: int, facts: Facts) -> tuple[Expr, Expr | None, bool]:
    if mask is None:
        return ix.TRUE, None, True
    value = mask.meta.get("val")
    shape: Sequence[object] = tuple(value.shape) if isinstance(value, Tensor) else ()
    variables = {4: (B, H, Q, K), 3: (B, Q, K), 2: (Q, K)}.get(query_rank, ())
    if not isinstance(value, Tensor) or len(shape) > len(variables):
        raise MaskError(
            f"masks: expected a mask of up to {len(variables)} dimensions for a query of {query_rank} (2 to 4), "
            f"found {mask.format_node()} of shape {tuple(shape)}"
        )
    own = variables[len(variables) - len(shape) :]
    try:
        e = functions.at(mask, [ix.ZERO if is_one(n) else v for n, v in zip(shape, own, strict=True)])
    except IndexFunctionError as error:
        raise MaskError(f"masks: {mask.format_node()} has no form. {error}") from error
    if e.type == "bool":
        return e, None, True
    if e.type != "float":
        raise MaskError(
            f"masks: a mask is bool or floating point, but {mask.format_node()} is {value.dtype}. Convert it to one of these."
        )
    # The smallest float16 hides as well: it is what a model in float16 has for it.
    predicate, bias, exact = _split(e, max(HIDDEN, torch.finfo(value.dtype).min), facts)
    is_zero = bias.kind == "const" and bias.value == 0
    return predicate, None if is_zero else bias, exact


def _split(e: Expr, limit: float, facts: Facts) -> tuple[Expr, Expr, bool]:
    """Split an additive mask into what it hides, by `limit` or less, and what it adds to the rest."""
    hidden = _hidden(e, limit)
    if hidden is not None:
        return ix.FALSE, ix.const(0.0), hidden
    if e.kind != "where":
        return ix.TRUE, e, True
    condition, a, b = e.operands
    seen_a, bias_a, exact_a = _split(a, limit, facts)
    seen_b, bias_b, exact_b = _split(b, limit, facts)
    seen = ix.where(condition, seen_a, seen_b, facts=facts)
    if seen_a is ix.FALSE or seen_b is ix.FALSE:
        bias = bias_b if seen_a is ix.FALSE else bias_a
    else:
        bias = ix.where(condition, bias_a, bias_b, facts=facts)
    return seen, bias, exact_a and exact_b


def _hidden(e: Expr, limit: float) -> bool | None:
    """Return None for a value that is not hidden, else whether it is minus infinity."""
    if e.kind == "const" and isinstance(e.value, float) and e.value <= limit:
        return e.value == float("-inf")
    if e.kind == "call" and e.value == "add":
        # A bias is finite and small beside what hides.
        return next((known for o in e.operands if (known := _hidden(o, limit)) is not None), None)
    return None


# ---- recognition


def recognise(predicate: Expr, bias: Expr | None, loads: tuple[fx.Node, ...], exact: bool, facts: Facts) -> MaskForm:
    """Return the form of a mask whose expressions are known.

    Args:
        predicate: bool over b, h, q and k.
        bias: float over the same, None for none.
        loads: the tensors that they read.
        exact: whether the mask hides by True/False or by minus infinity.
        facts: what is known of the variables.
    """
    atoms = ix.atoms(predicate)
    offset = next((o for o in (ix.ZERO, *_offsets(atoms)) if is_causal_at(predicate, o, facts)), None)
    causal = offset is not None
    offset = ix.ZERO if offset is None else offset
    diagonal = ix.add(ix.subtract(Q, K), offset)
    window = right_window = chunk = sink_window = prefix = None
    sinks = 0
    packed, padding, residual = [], [], []
    for atom in atoms:
        behind, ahead = _limit(atom, ix.negate(diagonal)), _limit(atom, diagonal)
        if behind is not None and behind >= 0:
            window = behind + 1
            continue
        if ahead is not None and (ahead == 0 or (ahead > 0 and not causal)):
            right_window = None if ahead == 0 else ahead + 1
            continue
        residual.append(atom)
        inner = [ix.not_(e) for e in atom.operands[0].operands] if atom.kind == "not" and atom.operands[0].kind == "and" else []
        if atom.kind == "eq0" and (size := _chunk(atom.operands[0])) is not None:
            chunk = size
        elif atom.kind == "eq0" and _is_same_of_both(atom.operands[0]):
            packed.append(atom)
        elif "k" in atom.free and "q" not in atom.free:
            padding.append(atom)
        elif len(inner) == 2:
            for first, second in (inner, inner[::-1]):
                leading, reach = _leading_keys(first), _limit(second, ix.negate(diagonal))
                if leading is not None and reach is not None and leading.kind == "const":
                    sinks, sink_window = ix.parts(leading)[0], reach + 1
                elif leading is not None and second is ix.ge0(diagonal, facts):
                    prefix = leading
    return MaskForm(
        predicate=predicate,
        bias=bias,
        loads=loads,
        causal=causal,
        offset=offset,
        window=window,
        right_window=right_window,
        chunk=chunk,
        sinks=sinks,
        sink_window=sink_window,
        prefix=prefix,
        packed=tuple(packed),
        padding=tuple(padding),
        bias_kind=None if bias is None else _bias_kind(bias, facts),
        exact=exact,
        residual=ix.and_(*residual, facts=facts),
        facts=facts,
    )


def is_causal_at(predicate: Expr, offset: Expr, facts: Facts) -> bool:
    """Return whether no key after q + offset is visible.

    It is decided by what the predicate becomes at k = q + offset + 1 + (0 or more), whatever atoms it is made of.

    Args:
        predicate: bool over b, h, q and k.
        offset: an integer expression without b, h, q and k.
        facts: what is known of the variables.
    """
    distance = ix.var("distance")
    later = ix.add(ix.add(ix.add(Q, offset), ix.ONE), distance)
    # That k stays below the key length says that the distance does.
    limit = facts.ranges.get("k", (None, None))[1]
    room = None if limit is None else ix.subtract(limit, ix.subtract(later, distance))
    return ix.substitute(predicate, {"k": later}, facts.known("distance", ix.ZERO, room)) is ix.FALSE


def _offsets(atoms: Sequence[Expr]) -> list[Expr]:
    """Return the symbolic o of atoms q + o - k >= 0."""
    found = []
    for atom in atoms:
        rest = ix.add(ix.subtract(atom.operands[0], Q), K) if atom.kind == "ge0" else ix.ZERO
        if rest.kind != "const" and not rest.free & _INDEX_NAMES and "[" not in rest.text:
            found.append(rest)
    return found


def _limit(atom: Expr, e: Expr) -> int | None:
    """Return c where the atom is e + c >= 0."""
    rest = ix.subtract(atom.operands[0], e) if atom.kind == "ge0" else e
    return ix.parts(rest)[0] if rest.kind == "const" else None


def _leading_keys(atom: Expr) -> Expr | None:
    """Return n where the atom is k < n and n does not depend on q or k."""
    rest = ix.add(atom.operands[0], K) if atom.kind == "ge0" else K
    return None if rest.free & {"q", "k"} else ix.add(rest, ix.ONE)


def _chunk(e: Expr) -> int | None:
    """Return c where e is +-(q // c - k // c)."""
    divisor = next((a.value for a in e.operands if a.kind == "floordiv"), None)
    if not isinstance(divisor, int):
        return None
    difference = ix.subtract(ix.floor_divide(Q, divisor), ix.floor_divide(K, divisor))
    return divisor if e in (difference, ix.negate(difference)) else None


def _is_same_of_both(e: Expr) -> bool:
    """Return whether e is f(q) - f(k) for some f."""
    of_query = {a: c for a, c in ix.parts(e)[1].items() if "q" in a.free}
    if not of_query or any("k" in a.free for a in of_query):
        return False
    mirrored = e
    for atom, coefficient in of_query.items():
        mirrored = ix.add(mirrored, atom, -coefficient)
        mirrored = ix.add(mirrored, ix.substitute(atom, {"q": K}), coefficient)
    return mirrored is ix.ZERO


def _bias_kind(bias: Expr, facts: Facts) -> BiasKind:
    if bias.kind == "call" and bias.value == "mul":
        for slope, distance in (bias.operands, bias.operands[::-1]):
            steps = ix.as_integer(distance)
            if steps is not None and not slope.free & {"q", "k"} and _is_distance(steps):
                return "alibi"
    # Both moved on by one, a function of the distance stays what it is.
    open_ended = facts.known("q", ix.ZERO, None).known("k", ix.ZERO, None)
    moved = ix.substitute(bias, {"q": ix.add(Q, ix.ONE), "k": ix.add(K, ix.ONE)}, open_ended)
    still = ix.substitute(bias, {"q": ix.add(Q, ix.ZERO), "k": ix.add(K, ix.ZERO)}, open_ended)
    return "relative" if moved is still else "other"


def _is_distance(e: Expr) -> bool:
    inner = e.operands[0] if e.kind == "call" and e.value == "abs" else e
    if inner.kind == "linear" and len(inner.operands) == 1 and inner.operands[0].kind == "call":
        return _is_distance(inner.operands[0])
    terms = ix.parts(inner)[1]
    return K in terms and terms.keys() <= {Q, K} | {a for a in terms if not a.free & _INDEX_NAMES}
