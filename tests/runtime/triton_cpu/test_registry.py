"""The tables of handlers."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from graphwright.runtime.triton_cpu import analysis, generate, registry

TABLES = {
    "evaluator": registry.EVALUATORS,
    "elementwise": registry.ELEMENTWISE,
    "materialiser": registry.MATERIALISERS,
    "statement": registry.STATEMENTS,
}
OPERATIONS = sorted((name, table) for table, entries in TABLES.items() for name in entries)
FOLDER = Path(inspect.getfile(registry)).parent


def test_one_handler_an_operation() -> None:
    """No operation is in two tables."""
    names = [name for name, _ in OPERATIONS]
    assert sorted(set(names)) == names


@pytest.mark.parametrize("decorator", sorted(TABLES))
def test_second_handler(decorator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second handler for an operation is refused, and the first one stays."""
    name = next(iter(TABLES[decorator]))
    kept = TABLES[decorator][name]
    with pytest.raises(ValueError, match=f"two handlers for {name}"):
        getattr(registry, decorator)(name)(lambda *args: None)
    assert TABLES[decorator][name] is kept


@pytest.mark.parametrize("decorator", sorted(TABLES))
def test_several_names(decorator: str) -> None:
    """One function may handle several operations; the decorator returns it unchanged."""

    def handler() -> None:
        """Do nothing."""

    table = TABLES[decorator]
    try:
        assert getattr(registry, decorator)("test.one", "test.two")(handler) is handler
        assert table["test.one"] is table["test.two"] is handler
    finally:
        table.pop("test.one", None)
        table.pop("test.two", None)


@pytest.mark.parametrize(("operation", "table"), OPERATIONS)
def test_documented(operation: str, table: str) -> None:
    """Every handler says in a sentence what it does."""
    text = inspect.getdoc(TABLES[table][operation]) or ""
    assert text.splitlines()[0].endswith(".")


def test_every_module_is_loaded() -> None:
    """The code generator imports every module that registers handlers."""
    registering = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = {d.func.id for d in node.decorator_list if isinstance(d, ast.Call) and isinstance(d.func, ast.Name)}
                if names & set(TABLES):
                    registering.add(path.stem)
    assert registering == {module.__name__.rpartition(".")[2] for module in generate._HANDLERS}


def test_names_in_tables_of_the_analysis() -> None:
    """The analysis knows operations by names that have handlers."""
    known = {name for name, _ in OPERATIONS}
    gone = {"tt.descriptor_store"}  # Triton rewrites it to plain stores beforehand.
    mentioned = analysis.EXPENSIVE | analysis.INTEGER_DIVISIONS | analysis.WRITES
    assert mentioned - gone <= known
