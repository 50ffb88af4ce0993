"""Quotients of indices in steps: what is too small to matter is left out, and values stay what they were."""

from __future__ import annotations

import itertools

import pytest
import sympy

from graphwright.codegen.indexing import Quotient, Ranges, flat, unflatten
from graphwright.codegen.values import COLUMN

ROW = sympy.Symbol("i0", integer=True, nonnegative=True)


@pytest.mark.parametrize(
    ("columns", "value", "divisor", "expected"),
    [
        (64, 64 * ROW + COLUMN, 256, Quotient(ROW, 4)),
        (64, 192 * ROW + COLUMN + 64, 256, Quotient(3 * ROW + 1, 4)),
        (65, 64 * ROW + COLUMN, 256, Quotient(64 * ROW + COLUMN, 256)),
        (64, 64 * ROW + 2 * COLUMN, 256, Quotient(32 * ROW + COLUMN, 128)),
        (64, 64 * ROW + COLUMN, 100, Quotient(64 * ROW + COLUMN, 100)),
    ],
)
def test_columns_within_a_step_are_left_out(columns: int, value: sympy.Expr, divisor: int, expected: sympy.Expr) -> None:
    """A quotient keeps only what can change it, and is the same number everywhere."""
    found = Ranges({ROW: 24, COLUMN: columns}).divide(value, divisor)
    assert found == expected
    for row, column in itertools.product(range(24), range(columns)):
        at = {ROW: row, COLUMN: column}
        assert evaluate(found, at) == evaluate(value, at) // divisor


def evaluate(value: sympy.Expr, at: dict[sympy.Symbol, int]) -> int:
    """Return an expression's value, quotients rounded towards 0 as in kernels."""
    replaced = value.xreplace({symbol: sympy.Integer(number) for symbol, number in at.items()})
    return int(replaced.replace(Quotient, lambda a, b: sympy.Integer(int(int(a) / int(b)))))


def test_rows_of_windows_do_not_depend_on_the_column() -> None:
    """Rows that are dealt out to windows are found without the column, and are those of eager."""
    image, windows = (3, 8, 8, 16), (3, 2, 4, 2, 4, 16)
    ranges = Ranges({ROW: 192, COLUMN: 16})
    dealt = unflatten(flat((ROW, COLUMN), (192, 16)), (3, 2, 2, 4, 4, 16), ranges)
    source = tuple(dealt[k] for k in (0, 1, 3, 2, 4, 5))
    found = unflatten(flat(source, windows), image, ranges)
    assert found[-1] == COLUMN
    assert not any(COLUMN in part.free_symbols for part in found[:-1])
    order = [(b, 4 * y + v, 4 * x + u) for b, y, x, v, u in itertools.product(range(3), range(2), range(2), range(4), range(4))]
    for row in range(192):
        assert tuple(evaluate(part, {ROW: row, COLUMN: 0}) for part in found[:3]) == order[row]
