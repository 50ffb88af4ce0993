"""Comparisons, logic, choices, sums and substitution of index expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from graphwright.ir.analyses.index_core import (
    FALSE,
    NO_FACTS,
    ONE,
    TRUE,
    ZERO,
    Expr,
    Facts,
    add,
    const,
    floor_divide,
    linear,
    lower,
    make,
    multiply,
    negate,
    parts,
    subtract,
    upper,
    var,
)

MAX_LIFTED = 8
"""How many ways the choices inside a comparison may come out for it to be taken apart."""


# ---- comparisons of integers


def ge0(e: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return e >= 0 for an integer e."""
    low, high = lower(e, facts), upper(e, facts)
    if low is not None and low >= 0:
        return TRUE
    if high is not None and high < 0:
        return FALSE
    lifted = _lift_choice(e, facts, ge0)
    if lifted is not None:
        return lifted
    constant, terms = parts(e)
    for atom, coefficient in terms.items():
        if atom.kind == "call" and atom.value in ("abs", "min", "max"):
            a, b = atom.operands if atom.value != "abs" else (atom.operands[0], negate(atom.operands[0]))
            both = [ge0(add(add(e, atom, -coefficient), x, coefficient), facts) for x in (a, b)]
            return (and_ if (atom.value == "min") == (coefficient > 0) else or_)(*both, facts=facts)
    divisor = math.gcd(*terms.values())
    return make("ge0", "bool", None, (linear(constant // divisor, {a: c // divisor for a, c in terms.items()}),))


def eq0(e: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return e == 0 for an integer e."""
    low, high = lower(e, facts), upper(e, facts)
    if low == high == 0:
        return TRUE
    if (low is not None and low > 0) or (high is not None and high < 0):
        return FALSE
    lifted = _lift_choice(e, facts, eq0)
    if lifted is not None:
        return lifted
    constant, terms = parts(e)
    divisor = math.gcd(*terms.values())
    if constant % divisor:
        return FALSE
    # Either sign says the same; the first atom by name is made positive.
    if terms[min(terms, key=lambda a: a.text)] < 0:
        divisor = -divisor
    return make("eq0", "bool", None, (linear(constant // divisor, {a: c // divisor for a, c in terms.items()}),))


def _lift_choice(e: Expr, facts: Facts, test: Callable[[Expr, Facts], Expr]) -> Expr | None:
    """Return where(c, test(e with a), test(e with b)) for a choice in e, None where there is none worth it."""
    _, terms = parts(e)
    choices = [a for a in terms if a.kind in ("where", "int")]
    others = len(terms) - len(choices)
    if not choices or math.prod(ways(a) for a in choices) > MAX_LIFTED or (others and all(a.kind == "int" for a in choices)):
        return None
    atom = max(choices, key=lambda a: (a.kind == "where", a.text))
    rest = add(e, atom, -terms[atom])
    condition, a, b = atom.operands if atom.kind == "where" else (atom.operands[0], ONE, ZERO)
    return where(condition, test(add(rest, a, terms[atom]), facts), test(add(rest, b, terms[atom]), facts), facts=facts)


def ways(e: Expr) -> int:
    """Return how many ways the choices at the top of `e` may come out."""
    if e.kind == "int":
        return 2
    return sum(map(ways, e.operands[1:])) if e.kind == "where" else 1


# ---- logic


def not_(e: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return the negation of a bool."""
    match e.kind:
        case "const":
            return const(not e.value)
        case "not":
            return e.operands[0]
        case "ge0":
            return ge0(subtract(const(-1), e.operands[0]), facts)
        case "where":
            return where(e.operands[0], not_(e.operands[1], facts), not_(e.operands[2], facts), facts=facts)
    if e.type != "bool":
        raise TypeError(f"index expressions: logic on {e!r}, which is {e.type}")
    return make("not", "bool", None, (e,))


def and_(*operands: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return the conjunction of bools, without what the others imply."""
    atoms: list[Expr] = []
    for operand in operands:
        if operand.type != "bool":
            raise TypeError(f"index expressions: logic on {operand!r}, which is {operand.type}")
        for atom in operand.operands if operand.kind == "and" else (operand,):
            if atom is FALSE:
                return FALSE
            if atom is not TRUE and atom not in atoms:
                atoms.append(atom)
    atoms.sort(key=_rank)
    i = 0
    while i < len(atoms):
        others = atoms[:i] + atoms[i + 1 :]
        new = _given(atoms[i], others, facts)
        if new is FALSE:
            return FALSE
        if new is atoms[i]:
            i += 1
            continue
        # A sharper atom may sharpen the others in turn, so the search starts again.
        atoms = sorted({*others, *(new.operands if new.kind == "and" else (new,))} - {TRUE}, key=_rank)
        i = 0
    if not atoms:
        return TRUE
    return atoms[0] if len(atoms) == 1 else make("and", "bool", None, tuple(atoms))


def or_(*operands: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return the disjunction of bools."""
    return not_(and_(*(not_(o, facts) for o in operands), facts=facts), facts)


def _rank(e: Expr) -> tuple[bool, str]:
    return "[" in e.text, e.text


def _given(atom: Expr, others: list[Expr], facts: Facts) -> Expr:
    """Return what `atom` comes down to where all the `others` hold."""
    if atom.kind == "not" and atom.operands[0].kind == "and":
        inner = atom.operands[0].operands
        kept = []
        for e in inner:
            known = _known(e, others, facts)
            if known is False:
                return TRUE
            if known is None:
                kept.append(e)
        return atom if len(kept) == len(inner) else not_(and_(*kept, facts=facts), facts)
    known = _known(atom, others, facts)
    if known is not None:
        return const(known)
    if atom.kind == "ge0":
        e = atom.operands[0]
        for other in others:
            if other.kind == "not" and other.operands[0].kind == "eq0" and other.operands[0].operands[0] in (e, negate(e)):
                return ge0(subtract(e, ONE), facts)
            if other.kind == "ge0" and other.operands[0] is negate(e):
                return eq0(e, facts)
    return atom


def _known(e: Expr, others: list[Expr], facts: Facts) -> bool | None:
    """Return what `e` is where all the `others` hold, None where that is not known."""
    if e.kind == "not":
        known = _known(e.operands[0], others, facts)
        return None if known is None else not known
    for other in others:
        if other is e:
            return True
        if not_(other) is e:
            return False
        if other.kind in ("ge0", "eq0") and e.kind in ("ge0", "eq0"):
            known = _implied(other, e, facts)
            if known is not None:
                return known
    return None


def _implied(other: Expr, e: Expr, facts: Facts) -> bool | None:
    f, g = other.operands[0], e.operands[0]
    if not f.free & g.free and not set(parts(f)[1]) & set(parts(g)[1]):
        return None
    if other.kind == "ge0":
        signs = (1,) if e.kind == "ge0" else (1, -1)
        for sign in signs:
            # Both f >= 0 and sign * g >= 0 make the sum no less than 0.
            high = upper(add(f, g, sign), facts)
            if high is not None and high < 0:
                return False
        low = lower(subtract(g, f), facts) if e.kind == "ge0" else None
        return True if low is not None and low >= 0 else None
    for sign in (1, -1):
        rest = add(g, f, sign)
        low, high = lower(rest, facts), upper(rest, facts)
        if (high is not None and high < 0) or (e.kind == "eq0" and low is not None and low > 0):
            return False
        if low is not None and low >= 0 and (e.kind == "ge0" or high == 0):
            return True
    return None


# ---- choices


def where(condition: Expr, a: Expr, b: Expr, *, facts: Facts = NO_FACTS) -> Expr:
    """Return `a` where the condition holds and `b` elsewhere; both of one type."""
    if a.type != b.type:
        raise TypeError(f"index expressions: a choice between {a!r} and {b!r}, which are of different types")
    if condition.kind == "not":
        condition, a, b = condition.operands[0], b, a
    if a.kind == "where" and a.operands[0] is condition:
        a = a.operands[1]
    if b.kind == "where" and b.operands[0] is condition:
        b = b.operands[2]
    if condition.kind == "eq0":
        a = _where_zero(a, condition.operands[0])
    if condition is TRUE or a is b:
        return a
    if condition is FALSE:
        return b
    if a.type == "bool" and "const" in (a.kind, b.kind):
        if a.kind == "const":
            return or_(condition, b, facts=facts) if a is TRUE else and_(not_(condition, facts), b, facts=facts)
        return or_(not_(condition, facts), a, facts=facts) if b is TRUE else and_(condition, a, facts=facts)
    if a.type == "int" and a.kind == b.kind == "const":
        return add(b, make("int", "int", None, (condition,)), parts(a)[0] - parts(b)[0])
    return make("where", a.type, None, (condition, a, b))


def _where_zero(e: Expr, zero: Expr) -> Expr:
    """Return `e` where `zero` is 0: the constant that e differs from it by, if it does."""
    wrapped = e.kind == "call" and e.value == "float"
    inner = e.operands[0] if wrapped else e
    if inner.type == "int":
        for difference in (subtract(inner, zero), add(inner, zero)):
            if difference.kind == "const":
                return const(float(parts(difference)[0])) if wrapped else difference
    return e


def to_int(e: Expr) -> Expr:
    """Return a bool as 0 or 1; an integer as it is."""
    if e.type == "int":
        return e
    return where(e, ONE, ZERO)


# ---- sums


def sum_(variable: str, upto: Expr, body: Expr, facts: Facts = NO_FACTS) -> Expr:
    """Return the sum of an integer `body` over variable = 0, 1, ..., upto; 0 where upto is -1.

    The bound variable is renamed to j0, j1, ... by its depth, so that equal sums are one object.
    """
    constant, terms = parts(body)
    low = lower(upto, facts)
    if low is not None and low >= -1:
        fixed = linear(constant, {a: c for a, c in terms.items() if variable not in a.free})
        result = multiply(add(upto, ONE), fixed)
        terms = {a: c for a, c in terms.items() if variable in a.free}
        constant = 0
        for atom, coefficient in list(terms.items()):
            first = atom.operands[0] if atom.kind in ("int", "where") else None
            if first is not None and first.kind == "eq0" and first.operands[0] is var(variable) and low >= 0:
                a, b = atom.operands[1:] if atom.kind == "where" else (ONE, ZERO)
                if variable not in a.free | b.free:
                    del terms[atom]
                    result = add(result, add(a, multiply(upto, b)), coefficient)
    else:
        result = ZERO
    rest = linear(constant, terms)
    if rest is ZERO:
        return result
    # A common factor stands outside, so that -sum(x) and sum(-x) are one expression.
    factor = math.gcd(constant, *terms.values())
    if min(terms.items(), key=lambda item: item[0].text, default=(ONE, constant))[1] < 0:
        factor = -factor
    rest = linear(constant // factor, {a: c // factor for a, c in terms.items()})
    name = f"j{_depth(rest)}"
    if name != variable:
        rest = substitute(rest, {variable: var(name)}, facts.known(name, ZERO, upto))
    return add(result, make("sum", "int", name, (upto, rest)), factor)


def _depth(e: Expr) -> int:
    """Return how deep sums are nested in `e`."""
    inner = max(map(_depth, e.operands), default=0)
    return max(inner, _depth(e.operands[1]) + 1) if e.kind == "sum" else inner


# ---- substitution


Read = Callable[[Expr, tuple[Expr, ...]], Expr]
"""From a load and its new indices to what stands for it."""


def substitute(e: Expr, values: Mapping[str, Expr], facts: Facts = NO_FACTS, read: Read | None = None) -> Expr:
    """Return `e` with expressions put for variables, simplified by `facts` about the variables that remain.

    Args:
        e: any expression.
        values: variable name -> integer expression.
        facts: what is known of the variables of the result.
        read: gives what stands for a load; None to keep loads.
    """
    from graphwright.ir.analyses.index_float import rebuild_call

    memo: dict[Expr, Expr] = {}

    def visit(e: Expr) -> Expr:
        if e.kind != "sum" and read is None and not (e.free & values.keys()):
            return e
        found = memo.get(e)
        if found is None:
            found = memo[e] = step(e)
        return found

    def step(e: Expr) -> Expr:
        if e.kind == "sum":
            upto, body = visit(e.operands[0]), e.operands[1]
            inner = {name: value for name, value in values.items() if name != e.value and name in body.free}
            taken = body.free.union(*(value.free for value in inner.values()))
            fresh = next(f"t{i}" for i in range(len(taken) + 1) if f"t{i}" not in taken)
            inner[str(e.value)] = var(fresh)
            return sum_(fresh, upto, substitute(body, inner, facts.known(fresh, ZERO, upto), read), facts)
        if e.kind == "var":
            return values.get(str(e.value), e)
        if e.kind == "const":
            return e
        return rebuild(e, tuple(map(visit, e.operands)))

    def rebuild(e: Expr, operands: tuple[Expr, ...]) -> Expr:
        match e.kind:
            case "linear":
                assert isinstance(e.value, tuple)
                result = const(e.value[0])
                for coefficient, operand in zip(e.value[1:], operands, strict=True):
                    result = add(result, operand, coefficient)
                return result
            case "product":
                result = ONE
                for operand in operands:
                    result = multiply(result, operand)
                return result
            case "floordiv":
                assert isinstance(e.value, int)
                return floor_divide(operands[0], e.value, facts)
            case "ge0" | "eq0":
                return (ge0 if e.kind == "ge0" else eq0)(operands[0], facts)
            case "not":
                return not_(operands[0], facts)
            case "and":
                return and_(*operands, facts=facts)
            case "int":
                return to_int(operands[0])
            case "where":
                return where(operands[0], operands[1], operands[2], facts=facts)
            case "call":
                return rebuild_call(e, operands, facts)
            case "load" if read is not None:
                return read(e, operands)
        return make(e.kind, e.type, e.value, operands)

    return visit(e)
