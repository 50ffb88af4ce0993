"""The nodes of index expressions, their text, linear arithmetic and bounds.

An index expression says what one element of a tensor is, as a function of the element's indices: `q - k >= 0` is a
causal mask. Nodes are interned, so equal expressions are one object and `is` compares them. Every constructor returns
a canonical form: integers are sums of multiples of atoms, and every integer comparison is `sum >= 0` or `sum == 0`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal
from weakref import WeakValueDictionary

Type = Literal["bool", "int", "float"]
Value = bool | int | float | str | tuple[int, ...] | None

_PRECEDENCE = {"or": 1, "and": 2, "not": 3, "ge0": 4, "eq0": 4, "linear": 5, "product": 6, "floordiv": 6}
_CALL_PRECEDENCE = {"lt": 4, "le": 4, "eq": 4, "add": 5, "mul": 6, "div": 6}
_CALL_SYMBOL = {"lt": "<", "le": "<=", "eq": "==", "add": " + ", "mul": "*", "div": "/"}
_ATOM = 8


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True, repr=False)
class Expr:
    """One node; made by the constructors of `graphwright.ir.analyses.index`, never directly.

    Args:
        kind: const, var, linear, product, floordiv, ge0, eq0, not, and, int, where, sum, load or call.
        type: what the expression evaluates to.
        value: a constant's value; a variable's, a load's, a call's or a sum's bound variable's name; a linear
            expression's constant followed by its coefficients; a floor division's divisor.
        operands: the sub-expressions.
        text: the readable form; `index_text.parse` reads it back.
        free: the names of the variables the expression depends on.
    """

    kind: str
    type: Type
    value: Value
    operands: tuple[Expr, ...]
    text: str
    free: frozenset[str]

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<{self.type} {self.text}>"

    def __reduce__(self) -> tuple[object, ...]:
        return make, (self.kind, self.type, self.value, self.operands)

    def __copy__(self) -> Expr:
        return self

    def __deepcopy__(self, memo: object) -> Expr:
        return self


_interned: WeakValueDictionary[object, Expr] = WeakValueDictionary()
_lock = Lock()


def make(kind: str, type: Type, value: Value, operands: tuple[Expr, ...]) -> Expr:
    """Return the one node with these parts. It does not simplify: the constructors do, and then call this."""
    # True == 1 == 1.0 and nan != nan, so neither can be a key by itself.
    key = (kind, type, repr(value), operands)
    found = _interned.get(key)
    if found is not None:
        return found
    free = frozenset().union(*(operand.free for operand in operands))
    if kind == "var":
        free = frozenset({str(value)})
    elif kind == "sum":
        free = operands[0].free | (operands[1].free - {str(value)})
    new = Expr(kind, type, value, operands, _format(kind, value, operands), free)
    with _lock:
        return _interned.setdefault(key, new)


def _level(e: Expr) -> int:
    if e.kind == "call":
        return _CALL_PRECEDENCE.get(str(e.value), _ATOM)
    if e.kind == "not" and e.operands[0].kind == "and":
        return _PRECEDENCE["or"]
    return _PRECEDENCE.get(e.kind, _ATOM)


def _at_level(e: Expr, level: int) -> str:
    return e.text if _level(e) >= level else f"({e.text})"


def _negated(e: Expr) -> str:
    if e.kind == "not":
        return _at_level(e.operands[0], 2)
    if e.kind == "ge0":
        return f"{subtract(const(-1), e.operands[0]).text} >= 0"
    return f"not ({e.text})"


def _format(kind: str, value: Value, operands: tuple[Expr, ...]) -> str:
    match kind:
        case "const":
            return repr(value)
        case "var":
            return str(value)
        case "linear":
            assert isinstance(value, tuple)
            return _format_linear(value, operands)
        case "product":
            return "*".join(_at_level(o, 7) for o in operands)
        case "floordiv":
            return f"{_at_level(operands[0], 7)}//{value}"
        case "ge0" | "eq0":
            return f"{_at_level(operands[0], 5)} {'>=' if kind == 'ge0' else '=='} 0"
        case "not":
            inner = operands[0]
            return " | ".join(map(_negated, inner.operands)) if inner.kind == "and" else f"not ({inner.text})"
        case "and":
            return " & ".join(_at_level(o, 3) for o in operands)
        case "sum":
            return f"sum({value} <= {operands[0].text}, {operands[1].text})"
        case "load":
            return f"{value}[{', '.join(o.text for o in operands)}]"
        case "call" if value in _CALL_SYMBOL:
            symbol = _CALL_SYMBOL[str(value)]
            level = _CALL_PRECEDENCE[str(value)]
            if level == 4:
                return f"{_at_level(operands[0], 5)} {symbol} {_at_level(operands[1], 5)}"
            return f"{_at_level(operands[0], level)}{symbol}{_at_level(operands[1], level + 1)}"
    name = value if kind == "call" else kind
    return f"{name}({', '.join(o.text for o in operands)})"


def _format_linear(value: tuple[int, ...], atoms: tuple[Expr, ...]) -> str:
    text = ""
    for coefficient, atom in zip(value[1:], atoms, strict=True):
        size = abs(coefficient)
        term = _at_level(atom, 6) if size == 1 else f"{size}*{_at_level(atom, 7)}"
        sign = "-" if coefficient < 0 else "+"
        text = f"{text} {sign} {term}" if text else f"{sign.lstrip('+')}{term if sign == '+' or size > 1 else _tight(atom)}"
    if value[0]:
        text += f" {'-' if value[0] < 0 else '+'} {abs(value[0])}"
    return text


def _tight(atom: Expr) -> str:
    # A leading minus binds to one operand only, so -(a*b) needs its brackets to be read back.
    return _at_level(atom, 7)


def const(value: bool | int | float) -> Expr:
    """Return a constant; -0.0 becomes 0.0."""
    kind: Type = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
    return make("const", kind, 0.0 if kind == "float" and value == 0 else value, ())


TRUE = const(True)
FALSE = const(False)
ZERO = const(0)
ONE = const(1)


def var(name: str) -> Expr:
    """Return an integer variable: an index, or a size."""
    return make("var", "int", name, ())


def load(name: str, indices: Iterable[Expr], type: Type = "int") -> Expr:
    """Return the element of the tensor `name` at `indices` (integers, one per dimension, each in range)."""
    return make("load", type, name, tuple(indices))


def call(name: str, type: Type, *operands: Expr) -> Expr:
    """Return a function that the algebra knows nothing more about."""
    return make("call", type, name, operands)


# ---- linear arithmetic


def parts(e: Expr) -> tuple[int, dict[Expr, int]]:
    """Split an integer expression into its constant and its atoms' coefficients."""
    if e.type != "int":
        raise TypeError(f"index expressions: integer arithmetic on {e!r}, which is {e.type}")
    if e.kind == "const":
        assert isinstance(e.value, int)
        return e.value, {}
    if e.kind == "linear":
        assert isinstance(e.value, tuple)
        return e.value[0], dict(zip(e.operands, e.value[1:], strict=True))
    return 0, {e: 1}


def linear(constant: int, terms: Mapping[Expr, int]) -> Expr:
    """Return constant + the sum of coefficient * atom."""
    kept = sorted(((a, c) for a, c in terms.items() if c), key=lambda item: (item[1] < 0, item[0].text))
    if not kept:
        return const(constant)
    if constant == 0 and len(kept) == 1 and kept[0][1] == 1:
        return kept[0][0]
    return make("linear", "int", (constant, *(c for _, c in kept)), tuple(a for a, _ in kept))


def add(a: Expr, b: Expr, scale: int = 1) -> Expr:
    """Return a + scale * b."""
    constant, terms = parts(a)
    more, others = parts(b)
    for atom, coefficient in others.items():
        terms[atom] = terms.get(atom, 0) + scale * coefficient
    return linear(constant + scale * more, terms)


def subtract(a: Expr, b: Expr) -> Expr:
    """Return a - b."""
    return add(a, b, -1)


def negate(a: Expr) -> Expr:
    """Return -a."""
    return add(ZERO, a, -1)


def multiply(a: Expr, b: Expr) -> Expr:
    """Return a * b, as a polynomial of the atoms."""
    (constant_a, terms_a), (constant_b, terms_b) = parts(a), parts(b)
    terms: dict[Expr, int] = {}

    def accumulate(atom: Expr, coefficient: int) -> None:
        terms[atom] = terms.get(atom, 0) + coefficient

    for x, cx in terms_a.items():
        accumulate(x, cx * constant_b)
        for y, cy in terms_b.items():
            factors = [f for e in (x, y) for f in (e.operands if e.kind == "product" else (e,))]
            accumulate(make("product", "int", None, tuple(sorted(factors, key=lambda f: f.text))), cx * cy)
    for y, cy in terms_b.items():
        accumulate(y, cy * constant_a)
    return linear(constant_a * constant_b, terms)


# ---- bounds


@dataclass(frozen=True)
class Facts:
    """What is known of the variables.

    Args:
        ranges: name -> (smallest, largest) value, both inclusive integer expressions, None where there is no limit.
            A limit may mention other variables: 0 <= q <= s0 - 1.
    """

    ranges: Mapping[str, tuple[Expr | None, Expr | None]] = field(default_factory=dict)

    def known(self, name: str, low: Expr | None, high: Expr | None) -> Facts:
        """Return these facts and low <= name <= high, which replaces what was known of `name`."""
        return Facts({**self.ranges, name: (low, high)})


NO_FACTS = Facts()


def lower(e: Expr, facts: Facts = NO_FACTS) -> int | None:
    """Return an integer that `e` is never below, None where none is found."""
    return _bound(e, facts, upper=False)


def upper(e: Expr, facts: Facts = NO_FACTS) -> int | None:
    """Return an integer that `e` is never above, None where none is found."""
    return _bound(e, facts, upper=True)


def _bound(e: Expr, facts: Facts, *, upper: bool) -> int | None:
    total = e
    while True:
        # A limit that names other variables goes in first, while these can still cancel.
        pending = []
        for atom, coefficient in parts(total)[1].items():
            limit = facts.ranges.get(atom.text, (None, None))[(coefficient > 0) == upper] if atom.kind == "var" else None
            if limit is not None:
                pending.append((limit.kind == "const", atom, coefficient, limit))
        if not pending:
            break
        _, atom, coefficient, limit = min(pending, key=lambda p: p[0])
        total = add(add(total, atom, -coefficient), limit, coefficient)
    constant, terms = parts(total)
    for atom, coefficient in terms.items():
        limit_of_atom = _atom_bound(atom, facts, upper=(coefficient > 0) == upper)
        if limit_of_atom is None:
            return None
        constant += coefficient * limit_of_atom
    return constant


def _atom_bound(atom: Expr, facts: Facts, *, upper: bool) -> int | None:
    pick = max if upper else min
    match atom.kind:
        case "int":
            return int(upper)
        case "floordiv":
            inner = _bound(atom.operands[0], facts, upper=upper)
            assert isinstance(atom.value, int)
            return None if inner is None else inner // atom.value
        case "where":
            both = [_bound(o, facts, upper=upper) for o in atom.operands[1:]]
            return None if None in both else pick(b for b in both if b is not None)
        case "call" if atom.value in ("min", "max"):
            both = [_bound(o, facts, upper=upper) for o in atom.operands]
            found = [b for b in both if b is not None]
            # One side is enough where the function can only go beyond it: min(a, b) <= a.
            if (atom.value == "min") == upper:
                return min(found) if upper and found else max(found) if found else None
            return None if None in both else pick(found)
        case "call" if atom.value == "abs":
            low, high = (_bound(atom.operands[0], facts, upper=side) for side in (False, True))
            if not upper:
                return max(0, *(x for x in (low, None if high is None else -high) if x is not None), 0)
            return None if low is None or high is None else max(abs(low), abs(high))
        case "product":
            limits = [(_bound(o, facts, upper=False), _bound(o, facts, upper=True)) for o in atom.operands]
            if any(low is None or low < 0 for low, _ in limits):
                return None
            ends = [limit[upper] for limit in limits]
            return None if None in ends else math.prod(x for x in ends if x is not None)
        case "sum":
            upto, body = atom.operands
            inner_facts = facts.known(str(atom.value), ZERO, upto)
            low = _bound(body, inner_facts, upper=False)
            return 0 if not upper and low is not None and low >= 0 else None
    return None


def floor_divide(a: Expr, divisor: int, facts: Facts = NO_FACTS) -> Expr:
    """Return a // divisor, rounded down; divisor >= 1."""
    if divisor < 1:
        raise ValueError(f"index expressions: floor division needs a divisor of 1 or more, got {divisor}")
    constant, terms = parts(a)
    whole = {atom: c // divisor for atom, c in terms.items() if c % divisor == 0}
    rest = linear(constant % divisor, {atom: c for atom, c in terms.items() if c % divisor})
    result = linear(constant // divisor, whole)
    if rest.kind == "floordiv":
        assert isinstance(rest.value, int)
        return add(result, floor_divide(rest.operands[0], rest.value * divisor, facts))
    low, high = lower(rest, facts), upper(rest, facts)
    if low is not None and high is not None and low // divisor == high // divisor:
        return add(result, const(low // divisor))
    return add(result, make("floordiv", "int", divisor, (rest,)))


def modulo(a: Expr, divisor: int, facts: Facts = NO_FACTS) -> Expr:
    """Return a - divisor * (a // divisor); divisor >= 1."""
    return add(a, floor_divide(a, divisor, facts), -divisor)


def minimum(a: Expr, b: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return the smaller of two integers."""
    return _extreme("min", a, b, subtract(b, a), facts)


def maximum(a: Expr, b: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return the larger of two integers."""
    return _extreme("max", a, b, subtract(a, b), facts)


def _extreme(name: str, a: Expr, b: Expr, first_wins: Expr, facts: Facts) -> Expr:
    low, high = lower(first_wins, facts), upper(first_wins, facts)
    if low is not None and low >= 0:
        return a
    if high is not None and high <= 0:
        return b
    return call(name, "int", *sorted((a, b), key=lambda e: e.text))


def absolute(a: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return |a| of an integer; |a| and |-a| are one expression."""
    low, high = lower(a, facts), upper(a, facts)
    if low is not None and low >= 0:
        return a
    if high is not None and high <= 0:
        return negate(a)
    return call("abs", "int", min(a, negate(a), key=lambda e: e.text))
