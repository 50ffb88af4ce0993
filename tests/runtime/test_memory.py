"""Placing buffers in the arena."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphwright.runtime.memory import ALIGNMENT, Lifetime, MemoryPlanner, buffers_of, lifetimes
from graphwright.runtime.schedule import Buffer, CallStep, KernelStep, MatmulStep, Schedule, View

spans = st.tuples(st.integers(0, 20), st.integers(0, 8)).map(lambda p: Lifetime(p[0], p[0] + p[1]))
alive = st.dictionaries(st.integers(0, 30).map(str), st.tuples(spans, st.integers(0, 5000)), max_size=20)


@given(alive)
def test_no_two_live_buffers_overlap(table):
    """Buffers that are alive at one step have no byte in common, all are aligned, and the arena holds them."""
    planner = MemoryPlanner({name: life for name, (life, _) in table.items()})
    offsets, total = planner.place({name: size for name, (_, size) in table.items()})
    assert offsets.keys() == table.keys()
    for a, (life, size) in table.items():
        assert offsets[a] % ALIGNMENT == 0
        assert offsets[a] >= 0
        assert offsets[a] + size <= total
        for b, (other, length) in table.items():
            if a < b and life.overlaps(other) and size and length:
                assert offsets[a] + size <= offsets[b] or offsets[b] + length <= offsets[a]


@given(alive)
def test_the_arena_is_no_larger_than_all_buffers_together(table):
    """Sharing never costs memory."""
    planner = MemoryPlanner({name: life for name, (life, _) in table.items()})
    _, total = planner.place({name: size for name, (_, size) in table.items()})
    assert total <= sum(-(-size // ALIGNMENT) * ALIGNMENT for _, size in table.values())


def test_a_chain_needs_two_buffers():
    """In a chain of steps of which each reads what the one before wrote, two buffers' worth of memory do for all."""
    planner = MemoryPlanner({f"t{k}": Lifetime(k, k + 1) for k in range(50)})
    _, total = planner.place({f"t{k}": 1024 for k in range(50)})
    assert total == 2 * 1024


def test_a_short_buffer_goes_into_the_tightest_hole():
    """Of two holes the smaller one that is large enough is taken."""
    life = {"a": Lifetime(0, 9), "b": Lifetime(0, 1), "c": Lifetime(0, 9), "d": Lifetime(0, 1), "e": Lifetime(0, 9)}
    sizes = {"a": 6400, "b": 3200, "c": 1920, "d": 640, "e": 576, "f": 512}
    offsets, total = MemoryPlanner(life | {"f": Lifetime(5, 6)}).place(sizes)
    assert offsets["f"] == offsets["d"]
    assert total == 6400 + 3200 + 1920 + 640 + 576


def view(name, offset=0):
    return View(name, (1,), (1,), offset)


def test_lifetimes():
    """A buffer lives from its first step to its last, whether read through views or written; a result to the end."""
    buffers = {name: Buffer(name, "float32", (4,), (1,), "temporary") for name in "abcdu"}
    buffers["x"] = Buffer("x", "float32", (4,), (1,), "input")
    steps = (
        KernelStep("0", "k", (1,), (view("x"), view("a")), {}, ("x",), ("a",)),
        MatmulStep("1", view("a"), "x", view("b")),
        CallStep("2", "aten::f", ([view("b"), [view("a", 3)]],), {"k": view("x")}, ("", "c")),
        KernelStep("3", "k", (1,), (view("c"), 3, 1.5), {}, (), ("d",)),
    )
    schedule = Schedule({}, ("x",), (view("b"), 3), buffers, steps)
    assert lifetimes(schedule) == {
        "a": Lifetime(0, 2),
        "b": Lifetime(1, 4),
        "c": Lifetime(2, 3),
        "d": Lifetime(3, 3),
    }
    assert [sorted(buffers_of(step)) for step in steps] == [["a", "x"], ["a", "b", "x"], ["a", "b", "c", "x"], ["c", "d"]]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65])
def test_sizes_are_rounded_up(size):
    """Every buffer starts on a cache line of its own."""
    offsets, total = MemoryPlanner({"a": Lifetime(0, 1), "b": Lifetime(0, 1)}).place({"a": size, "b": size})
    assert total == 2 * (-(-size // 64) * 64)
    assert sorted(offsets.values()) == [0, total // 2]
