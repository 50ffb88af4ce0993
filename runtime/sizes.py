"""Sizes as texts: checking them, and turning many into one function of the dimensions."""

from __future__ import annotations

import ast
import keyword
from collections.abc import Callable, Iterable, Mapping, Sequence

from graphwright.ir.errors import ArtifactError

from .schedule import Size

LONGEST = 4096
"""Characters of a text; what a compiler writes is far shorter."""

_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)
_FUNCTIONS = {"max": max, "min": min}

Evaluator = Callable[[Mapping[str, int]], dict[Size, int]]
"""From the dimensions by name to the value of each text."""


def size_names(size: Size) -> frozenset[str]:
    """Return the names of the dimensions that a size depends on.

    Raises:
        ArtifactError: the text is not a size.
    """
    if isinstance(size, int):
        return frozenset()
    tree = _checked(size)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called)


def compile_sizes(sizes: Iterable[Size], names: Sequence[str]) -> Evaluator:
    """Return a function that evaluates many sizes at once.

    Args:
        sizes: numbers, which need no evaluation, and texts.
        names: the dimensions that texts may name.

    Returns:
        A function from the dimensions by name to a table of the values by text. It raises ZeroDivisionError where a text
        divides by a dimension that is 0.

    Raises:
        ArtifactError: a text is not a size, or names something else.
    """
    texts = sorted({size for size in sizes if isinstance(size, str)})
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name) or name in _FUNCTIONS or name.startswith("__"):
            raise ArtifactError(f"{name!r} cannot be the name of a dimension: it must be an identifier, and not max or min")
    for text in texts:
        unknown = size_names(text) - set(names)
        if unknown:
            raise ArtifactError(
                f"the size {text!r} names {', '.join(sorted(unknown))}; the dimensions are {', '.join(names) or 'none'}"
            )
    # Every tree has been checked, so that nothing but arithmetic of the parameters is compiled.
    function = ast.Lambda(
        args=ast.arguments(posonlyargs=[], args=[ast.arg(name) for name in names], kwonlyargs=[], kw_defaults=[], defaults=[]),
        body=ast.Tuple([_checked(text) for text in texts], ast.Load()),
    )
    code = compile(ast.fix_missing_locations(ast.Expression(function)), "<sizes>", "eval")
    evaluate = eval(code, {"__builtins__": {}, **_FUNCTIONS})

    def table(dimensions: Mapping[str, int]) -> dict[Size, int]:
        return dict(zip(texts, evaluate(*[dimensions[name] for name in names]), strict=True))

    return table


def evaluate_size(size: Size, dimensions: Mapping[str, int]) -> int:
    """Return the value of one size.

    Raises:
        ArtifactError: the text is not a size, or names something that is not in `dimensions`.
    """
    return size if isinstance(size, int) else compile_sizes([size], sorted(dimensions))(dimensions)[size]


def _checked(text: str) -> ast.expr:
    if len(text) > LONGEST:
        raise ArtifactError(f"a size must be a short expression, got {len(text)} characters")
    try:
        tree = ast.parse(text.strip(), "<size>", "eval").body
        _check(tree, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"{text!r} is not a size: {error}") from error
    return tree


def _check(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return
    if isinstance(node, ast.Name):
        return
    if isinstance(node, ast.BinOp) and isinstance(node.op, _OPERATORS):
        _check(node.left, text)
        _check(node.right, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        _check(node.operand, text)
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
        and len(node.args) >= 2
        and not node.keywords
    ):
        for argument in node.args:
            _check(argument, text)
    else:
        raise ArtifactError(
            f"{text!r} is not a size: found {ast.unparse(node)!r}; numbers, dimensions, + - * // % max() min() may stand in it"
        )
