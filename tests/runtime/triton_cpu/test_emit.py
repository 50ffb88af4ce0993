"""Emitted instructions, run: sums of products, loops, branches, shuffles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphwright.runtime.triton_cpu.emit import Emitter, mangle, vector_type
from graphwright.runtime.triton_cpu.values import wrap

Run = Callable[..., list[int]]
compiled = settings(max_examples=60)
NAMES = "abcdefgh"

SMALL = st.one_of(st.sampled_from([0, 1, -1, 2]), st.integers(-(1 << 31), 1 << 31))
TERMS = st.lists(st.tuples(st.tuples(SMALL, st.booleans()), st.tuples(SMALL, st.booleans())), max_size=4)


@compiled
@given(TERMS)
def test_combine(run_emitted: Run, terms: list[tuple[tuple[int, bool], tuple[int, bool]]]) -> None:
    """A sum of products of constants and names is that number."""
    values = [value for term in terms for value, is_named in term if is_named]

    def emit(e: Emitter) -> None:
        names = iter(f"%{n}" for n in NAMES)
        total = e.combine(*((next(names) if a[1] else a[0], next(names) if b[1] else b[0]) for a, b in terms))
        e.raw(f"store i64 {total}, ptr %out")

    assert run_emitted(emit, *values, words=1) == [wrap(sum(a * b for (a, _), (b, _) in terms), "i64")]


@given(st.lists(st.tuples(st.integers(), st.integers())))
def test_combine_constants(terms: list[tuple[int, int]]) -> None:
    """Constants are folded, and emit nothing."""
    e = Emitter()
    assert e.combine(*terms) == sum(a * b for a, b in terms)
    assert e.lines == []


def test_combine_economically() -> None:
    """Factors of one and terms that vanish emit nothing."""
    e = Emitter()
    assert e.combine((1, "%a"), (0, "%b"), ("%c", 0)) == "%a"
    assert e.combine(("%a", 1)) == "%a"
    assert e.combine((0, "%a")) == 0
    assert e.lines == []
    e.combine(("%a", "%b"), (2, 3), ("%c", 4), (5, 1))
    assert [line.split(" = ")[1] for line in e.lines] == [
        "mul i64 %b, %a", "mul i64 %c, 4", "add i64 %t1, %t2", "add i64 %t3, 11",
    ]  # fmt: skip


def visits(e: Emitter, lower: int | str, upper: int | str, step: int | str, **options: object) -> None:
    """Store how often a loop runs, the sum of its indices and the last one."""
    kind = str(options.get("type", "i64"))
    with e.loop(lower, upper, step, carried=[("i64", "0"), ("i64", "7"), ("i64", "-1")], **options) as loop:  # type: ignore[arg-type]
        index = loop.index if kind == "i64" else e.op(f"sext {kind} {loop.index} to i64")
        loop.next = [e.op(f"add i64 {loop.phis[0]}, 1"), e.op(f"add i64 {loop.phis[1]}, {index}"), index]
    for k, text in enumerate(loop.results):
        e.raw(f"store i64 {text}, ptr {e.address('i64', '%out', k)}")


def expected_visits(indices: range) -> list[int]:
    """What `visits` stores."""
    return [len(indices), wrap(7 + sum(indices), "i64"), indices[-1] if indices else -1]


@compiled
@given(st.integers(-20, 20), st.integers(-20, 20), st.integers(1, 50), st.lists(st.booleans(), min_size=3, max_size=3))
def test_loop(run_emitted: Run, lower: int, upper: int, step: int, named: list[bool]) -> None:
    """A loop runs as Python's range does, whichever of its bounds are known."""
    values = [x for x, is_named in zip((lower, upper, step), named, strict=True) if is_named]

    def emit(e: Emitter) -> None:
        names = iter(f"%{n}" for n in NAMES)
        bounds = [next(names) if is_named else x for x, is_named in zip((lower, upper, step), named, strict=True)]
        visits(e, *bounds)

    assert run_emitted(emit, *values, words=3) == expected_visits(range(lower, upper, step))


@pytest.mark.parametrize(
    ("lower", "upper", "step"),
    [
        (2**31 - 10, 2**31 - 1, 4),
        (2**31 - 2, 2**31 - 1, 1),
        (0, 2**31 - 1, 2**30),
        (-(2**31), 2**31 - 1, 2**30),
        (5, 5, 1),
        (6, 5, 1),
        (-8, -1, 3),
    ],
)
def test_narrow_loop(run_emitted: Run, lower: int, upper: int, step: int) -> None:
    """An index near the limit of its type does not wrap into further iterations."""

    def emit(e: Emitter) -> None:
        bounds = [e.op(f"trunc i64 %{n} to i32") for n in "abc"]
        visits(e, *bounds, type="i32")

    assert run_emitted(emit, lower, upper, step, words=3) == expected_visits(range(lower, upper, step))


@pytest.mark.parametrize("is_unsigned", [False, True])
def test_unsigned_loop(run_emitted: Run, is_unsigned: bool) -> None:
    """Bounds beyond the signed range are compared as they are meant."""

    def emit(e: Emitter) -> None:
        bounds = [e.op(f"trunc i64 %{n} to i32") for n in "abc"]
        visits(e, *bounds, type="i32", unsigned=is_unsigned)

    found = run_emitted(emit, 2**31 - 4, 2**31 + 4, 2, words=3)[:1]
    assert found == [4 if is_unsigned else 0]


def test_nested_loops(run_emitted: Run) -> None:
    """A loop within a loop takes its values from the outer one and hands them back."""

    def emit(e: Emitter) -> None:
        with e.loop(0, "%a", 1, carried=[("i64", "0")]) as outer:
            with e.loop(0, outer.index, 1, carried=[("i64", outer.phis[0])]) as inner:
                inner.next = [e.op(f"add i64 {inner.phis[0]}, 1")]
            outer.next = inner.results
        e.raw(f"store i64 {outer.results[0]}, ptr %out")

    assert run_emitted(emit, 6, words=1) == [15]
    assert run_emitted(emit, 0, words=1) == [0]


def test_when(run_emitted: Run) -> None:
    """A guarded body runs only if its condition holds."""

    def emit(e: Emitter) -> None:
        e.raw("store i64 5, ptr %out")
        with e.when(e.op("icmp sgt i64 %a, 0")):
            e.raw("store i64 6, ptr %out")
        e.raw(f"store i64 {e.op('load i64, ptr %out')}, ptr {e.address('i64', '%out', 1)}")

    assert run_emitted(emit, 1, words=2) == [6, 6]
    assert run_emitted(emit, 0, words=2) == [5, 5]


def test_bodies_are_scopes() -> None:
    """What was remembered inside a loop or a branch is forgotten after it."""
    e = Emitter()
    for body in (e.loop(0, "%n", 1), e.when("%c"), e.scope()):
        with body:
            e.scopes[-1]["key"] = "%x"
        assert e.scopes == [{}]


def test_scope_left_by_an_error() -> None:
    """A scope ends when an error leaves it."""
    e = Emitter()

    def fail() -> None:
        with e.scope():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(e.scopes) == 1


@compiled
@given(st.data(), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_shuffle(run_emitted: Run, data: st.DataObject, lanes: int, has_other: bool) -> None:
    """A shuffle picks the lanes that its order names, from one vector or two."""
    total = lanes * (2 if has_other else 1)
    order = data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=8))
    assume(len(order).bit_count() == 1)

    def emit(e: Emitter) -> None:
        vectors = []
        for start in (0, lanes):
            vector = "%a" if lanes == 1 else "poison"
            for lane in range(lanes):
                x = e.op(f"add i64 %a, {start + lane}")
                vector = x if lanes == 1 else e.op(f"insertelement <{lanes} x i64> {vector}, i64 {x}, i32 {lane}")
            vectors.append(vector)
        found = e.shuffle(vectors[0], "i64", lanes, order, vectors[1] if has_other else None)
        e.raw(f"store {vector_type('i64', len(order))} {found}, ptr %out, align 8")

    assert run_emitted(emit, 100, words=len(order)) == [100 + i for i in order]


def test_undefined_lanes() -> None:
    """Lanes of a shuffle may be left undefined."""
    e = Emitter()
    e.shuffle("%x", "float", 4, [3, -1])
    assert e.lines == ["  %t1 = shufflevector <4 x float> %x, <4 x float> poison, <2 x i32> <i32 3, i32 poison>"]


@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_splat(run_emitted: Run, lanes: int) -> None:
    """A splat has the scalar in all lanes; of one lane it is the scalar."""

    def emit(e: Emitter) -> None:
        text = e.splat("%a", "i64", lanes)
        e.raw(f"store {vector_type('i64', lanes)} {text}, ptr %out, align 8")

    assert run_emitted(emit, -5, words=8) == [-5] * lanes + [0] * (8 - lanes)
    assert Emitter().splat("%a", "i64", 1) == "%a"


def test_address(run_emitted: Run) -> None:
    """Addresses count in elements, and offset zero is the base."""

    def emit(e: Emitter) -> None:
        assert e.address("i64", "%out", 0) == "%out"
        e.raw(f"store i64 1, ptr {e.address('i64', '%out', 2)}")
        e.raw(f"store i64 2, ptr {e.address('i64', '%out', '%a')}")

    assert run_emitted(emit, 1, words=3) == [0, 2, 1]


def test_calls() -> None:
    """An external function is declared once by the types of its call."""
    e = Emitter()
    args = [("<8 x float>", "%x"), ("<8 x float>", "%y")]
    for _ in range(2):
        e.call("<8 x float>", "llvm.maxnum.v8f32", args, flags="contract ")
    assert e.call("void", "llvm.assume", [("i1", "%c")]) == ""
    assert list(e.declarations.values()) == [
        "declare <8 x float> @llvm.maxnum.v8f32(<8 x float>, <8 x float>)",
        "declare void @llvm.assume(i1)",
    ]
    assert e.lines[1:] == [
        "  %t2 = call contract <8 x float> @llvm.maxnum.v8f32(<8 x float> %x, <8 x float> %y)",
        "  call void @llvm.assume(i1 %c)",
    ]


def test_first_declaration_stays() -> None:
    """A symbol keeps the text that it was declared with first."""
    e = Emitter()
    e.declare("zeros", "first")
    e.declare("zeros", "second")
    assert e.declarations == {"zeros": "first"}


def test_names_are_fresh() -> None:
    """No name or label is handed out twice."""
    e = Emitter()
    names = [e.fresh(), e.fresh("p"), e.op("add i64 0, 0"), e.fresh_label(), e.fresh_label("H"), e.fresh()]
    assert len({n.lstrip("%") for n in names}) == len(names)


def test_types() -> None:
    """One lane is a scalar, and intrinsics are named by their types."""
    assert (vector_type("float", 1), vector_type("float", 8)) == ("float", "<8 x float>")
    assert [mangle("float", 16), mangle("double", 1), mangle("half", 8), mangle("ptr", 4), mangle("i32", 8)] == [
        "v16f32", "f64", "v8f16", "v4p0", "v8i32",
    ]  # fmt: skip
