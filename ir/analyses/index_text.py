"""Read the text of an index expression back."""

from __future__ import annotations

import re
from collections.abc import Mapping

from graphwright.ir.analyses.index_core import (
    FALSE,
    NO_FACTS,
    TRUE,
    Expr,
    Facts,
    Type,
    absolute,
    add,
    const,
    floor_divide,
    load,
    maximum,
    minimum,
    modulo,
    multiply,
    negate,
    subtract,
    var,
)
from graphwright.ir.analyses.index_float import (
    binary,
    compare,
    float_absolute,
    round_to,
    to_bool,
    to_float,
    truncate,
    unary,
)
from graphwright.ir.analyses.index_logic import and_, not_, or_, sum_, to_int, where
from graphwright.ir.errors import GraphwrightError

_TOKEN = re.compile(r"\s*(?:(\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+|\d+)|([A-Za-z_]\w*)|(//|<=|>=|==|!=|[-+*/%<>&|()\[\],]))")
_COMPARISONS = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}
_WORDS = {"True": TRUE, "False": FALSE, "inf": const(float("inf")), "nan": const(float("nan"))}
_ARITY = {"where": 3, "int": 1, "float": 1, "abs": 1, "trunc": 1, "log": 1, "exp": 1, "sqrt": 1, "float16": 1}
_ARITY |= {"bfloat16": 1, "min": 2, "max": 2}


class IndexSyntaxError(GraphwrightError, ValueError):
    """A text is not an index expression."""


def parse(text: str, types: Mapping[str, Type] | None = None, facts: Facts = NO_FACTS) -> Expr:
    """Return the expression that `text` says; `parse(str(e))` is e itself.

    Grammar, from loosest to tightest: `|`, `&`, `not`, comparisons, `+ -`, `* / // %`, unary minus, then
    `name`, `name[i, j]`, numbers, True, False, inf, nan, brackets and the functions where, int, float, abs, min, max,
    trunc, log, exp, sqrt, float16, bfloat16, sum(j <= upto, body).

    Args:
        text: for example "q - k >= 0 & not (in0[b, k] == 0)".
        types: type of the elements of each tensor read; "int" where a name is missing.
        facts: what is known of the variables, to simplify by.

    Raises:
        IndexSyntaxError: the text does not follow the grammar, or mixes types that do not go together.
    """
    return _Parser(text, types or {}, facts).run()


class _Parser:
    def __init__(self, text: str, types: Mapping[str, Type], facts: Facts) -> None:
        self.text, self.types, self.facts = text, types, facts
        self.tokens: list[str] = []
        self.at = 0
        place = 0
        while text[place:].strip():
            match = _TOKEN.match(text, place)
            if match is None:
                raise IndexSyntaxError(f"index expression {text!r}: cannot read {text[place:].strip()[:10]!r}")
            self.tokens.append(match[match.lastindex or 0])
            place = match.end()

    def run(self) -> Expr:
        try:
            result = self.either()
        except TypeError as error:
            raise IndexSyntaxError(f"index expression {self.text!r}: {error}") from error
        if self.peek():
            self.fail("the end")
        return result

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.peek()
        if token in expected:
            self.at += 1
            return token
        return ""

    def need(self, token: str) -> None:
        if not self.take(token):
            self.fail(repr(token))

    def fail(self, expected: str) -> None:
        found = repr(self.peek()) if self.peek() else "the end"
        raise IndexSyntaxError(f"index expression {self.text!r}: expected {expected}, found {found} (token {self.at})")

    def either(self) -> Expr:
        found = [self.both()]
        while self.take("|"):
            found.append(self.both())
        return found[0] if len(found) == 1 else or_(*found, facts=self.facts)

    def both(self) -> Expr:
        found = [self.negation()]
        while self.take("&"):
            found.append(self.negation())
        return found[0] if len(found) == 1 else and_(*found, facts=self.facts)

    def negation(self) -> Expr:
        if self.take("not"):
            return not_(self.negation(), self.facts)
        left = self.sum()
        sign = self.take(*_COMPARISONS)
        return compare(_COMPARISONS[sign], left, self.sum(), self.facts) if sign else left

    def sum(self) -> Expr:
        left = self.product()
        while sign := self.take("+", "-"):
            right = self.product()
            if "float" in (left.type, right.type):
                left = binary("add" if sign == "+" else "sub", left, right, self.facts)
            else:
                left = (add if sign == "+" else subtract)(left, right)
        return left

    def product(self) -> Expr:
        left = self.unary()
        while sign := self.take("*", "/", "//", "%"):
            right = self.unary()
            if sign in ("//", "%"):
                divisor = right.value if right.kind == "const" else None
                if type(divisor) is not int or divisor < 1:
                    self.fail(f"a whole number of 1 or more before this, as what {sign} divides by")
                assert isinstance(divisor, int)
                left = (floor_divide if sign == "//" else modulo)(left, divisor, self.facts)
            elif sign == "/" or "float" in (left.type, right.type):
                left = binary("mul" if sign == "*" else "div", left, right, self.facts)
            else:
                left = multiply(left, right)
        return left

    def unary(self) -> Expr:
        if self.take("-"):
            operand = self.unary()
            return binary("mul", const(-1.0), operand, self.facts) if operand.type == "float" else negate(operand)
        return self.atom()

    def atom(self) -> Expr:
        if self.take("("):
            inner = self.either()
            self.need(")")
            return inner
        token = self.peek()
        if token[:1].isdigit():
            self.at += 1
            return const(int(token) if token.isdigit() else float(token))
        if not token.isidentifier() or token == "not":
            self.fail("a value")
        self.at += 1
        if token in _WORDS:
            return _WORDS[token]
        if self.take("["):
            return load(token, self.items("]"), self.types.get(token, "int"))
        if self.take("("):
            return self.sum_over() if token == "sum" else self.function(token)
        return var(token)

    def items(self, close: str) -> list[Expr]:
        if self.take(close):
            return []
        found = [self.either()]
        while self.take(","):
            found.append(self.either())
        self.need(close)
        return found

    def sum_over(self) -> Expr:
        name = self.peek()
        self.at += 1
        self.need("<=")
        upto = self.sum()
        self.need(",")
        body = self.either()
        self.need(")")
        return sum_(name, upto, body, self.facts)

    def function(self, name: str) -> Expr:
        given = self.items(")")
        if len(given) != _ARITY.get(name):
            known = ", ".join(sorted(_ARITY))
            raise IndexSyntaxError(
                f"index expression {self.text!r}: there is no function {name} of {len(given)} operands. Known: {known}, sum."
            )
        a, floating = given[0], "float" in [e.type for e in given]
        match name:
            case "where":
                return where(to_bool(a, self.facts), given[1], given[2], facts=self.facts)
            case "int":
                return to_int(a)
            case "float":
                return to_float(a)
            case "abs":
                return (float_absolute if floating else absolute)(a, self.facts)
            case "trunc":
                return truncate(a, self.facts)
            case "min" | "max":
                if floating:
                    return binary(name, a, given[1], self.facts)
                return (minimum if name == "min" else maximum)(a, given[1], self.facts)
            case "float16" | "bfloat16":
                return round_to(name, a)
        return unary(name, a)
