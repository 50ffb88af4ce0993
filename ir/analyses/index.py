"""Index expressions: what one element of a tensor is, as a function of its indices.

    >>> from graphwright.ir.analyses import index as ix
    >>> q, k = ix.var("q"), ix.var("k")
    >>> str(ix.and_(ix.compare("le", k, q), ix.compare("gt", k, ix.subtract(q, ix.const(5)))))
    'k - q + 4 >= 0 & q - k >= 0'
    >>> ix.parse("k <= q") is ix.compare("ge", q, k)
    True

`index_core` has the nodes, integer arithmetic and bounds, `index_logic` comparisons, logic, choices and sums,
`index_float` floating point, `index_text` the reader, `index_eval` the meaning.
"""

from __future__ import annotations

from graphwright.ir.analyses.index_core import (
    FALSE,
    NO_FACTS,
    ONE,
    TRUE,
    ZERO,
    Expr,
    Facts,
    Type,
    absolute,
    add,
    const,
    floor_divide,
    load,
    lower,
    maximum,
    minimum,
    modulo,
    multiply,
    negate,
    parts,
    subtract,
    upper,
    var,
)
from graphwright.ir.analyses.index_eval import evaluate
from graphwright.ir.analyses.index_float import (
    as_integer,
    binary,
    compare,
    float_absolute,
    lift,
    round_to,
    to_bool,
    to_float,
    truncate,
    unary,
)
from graphwright.ir.analyses.index_logic import and_, eq0, ge0, not_, or_, substitute, sum_, to_int, where
from graphwright.ir.analyses.index_text import parse

__all__ = [
    "FALSE",
    "NO_FACTS",
    "ONE",
    "TRUE",
    "ZERO",
    "Expr",
    "Facts",
    "Type",
    "absolute",
    "add",
    "and_",
    "as_integer",
    "atoms",
    "binary",
    "compare",
    "const",
    "contains",
    "eq0",
    "evaluate",
    "float_absolute",
    "floor_divide",
    "ge0",
    "lift",
    "load",
    "loads_of",
    "lower",
    "maximum",
    "minimum",
    "modulo",
    "multiply",
    "negate",
    "not_",
    "or_",
    "parse",
    "parts",
    "round_to",
    "substitute",
    "subtract",
    "sum_",
    "to_bool",
    "to_float",
    "to_int",
    "truncate",
    "unary",
    "upper",
    "var",
    "where",
]


def atoms(e: Expr) -> tuple[Expr, ...]:
    """Return the conjuncts of a bool: none for the constant True."""
    return e.operands if e.kind == "and" else () if e is TRUE else (e,)


def contains(e: Expr, kind: str) -> bool:
    """Return whether a node of this kind is in `e`."""
    return e.kind == kind or any(contains(o, kind) for o in e.operands)


def loads_of(e: Expr) -> frozenset[str]:
    """Return the names of the tensors that `e` reads."""
    inner: frozenset[str] = frozenset().union(*map(loads_of, e.operands))
    return inner | {str(e.value)} if e.kind == "load" else inner
