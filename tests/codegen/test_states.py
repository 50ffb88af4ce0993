"""Tests of states that are changed in place."""

from __future__ import annotations

import pytest
import torch

from graphwright.codegen.lower import lower
from graphwright.codegen.states import states_in_place
from graphwright.ir import dialect
from graphwright.ir.errors import LoweringError

aten = torch.ops.aten


def program_of(builder, *, reads_first: bool):
    """Return a program that attends to what was in a cache, and puts entries into it before or after that."""
    made = builder()
    q, new, cache = (made.input(name, 2, 2, n, 8) for name, n in (("q", 3), ("new", 3), ("cache", 16)))
    past = made.input("past", 2, dtype=torch.int64)

    def attend():
        return made.call(dialect.kv_attention, q, cache, cache, past, [], None, scale=0.3)

    y = attend() if reads_first else None
    kept = made.call(dialect.kv_append, cache, new, past)
    program = made.program(y or attend(), kept)
    program.states = {"cache": 1}
    return program, kept


def test_what_is_read_before_it_changes_is_read_first(builder) -> None:
    """An operation that reads the old value runs before the one that changes it in place."""
    program, kept = program_of(builder, reads_first=True)
    found = states_in_place(program)
    (readers,) = found.after.values()
    assert [reader.target for reader in readers] == [dialect.kv_attention]
    assert {state.name for state in found.states.values()} == {"cache"}
    assert [step.name for step in lower(program).steps][-1] == kept.name


def test_what_is_read_after_it_changed_is_an_error(builder) -> None:
    """In place, the old value would be gone."""
    program, _ = program_of(builder, reads_first=False)
    with pytest.raises(LoweringError, match="before kv_append_default changes it in place"):
        lower(program)


def test_what_cannot_change_in_place_is_an_error(builder) -> None:
    """A new value that an operation of PyTorch makes lies elsewhere."""
    made = builder()
    cache = made.input("cache", 2, 8)
    program = made.program(made.call(aten.relu.default, cache))
    program.states = {"cache": 0}
    with pytest.raises(LoweringError, match="does not change a state in place"):
        lower(program)
