"""Integer arithmetic on uniform, affine and vector forms against Python's integers, lane by lane."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphwright.runtime.triton_cpu import scalars as s
from graphwright.runtime.triton_cpu.emit import Emitter, vector_type
from graphwright.runtime.triton_cpu.values import BYTES, MAX_DIVISOR, Affine, Number, Pointer, Uniform, Vector, wrap

compiled = settings(max_examples=60)
WIDTHS = [(), (2,), (8,), (2, 4), (4, 2, 2)]
NAMES = "abcdefgh"


def lanes(x: Number, widths: tuple[int, ...]) -> list[int]:
    """The lanes of a form whose numbers are all known."""
    if isinstance(x, Uniform):
        assert isinstance(x.value, int)
        return [x.value] * math.prod(widths)
    assert isinstance(x, Affine)
    assert x.widths == widths
    (base,), strides = lanes(x.base, ()), [lanes(stride, ())[0] for stride in x.strides]
    indices = itertools.product(*map(range, widths))
    return [wrap(base + sum(i * stride for i, stride in zip(index, strides, strict=True)), x.element) for index in indices]


@dataclass
class Leaf:
    """Numbers of an affine form (one number: uniform); those whose flag is set come in as arguments."""

    numbers: list[int]
    named: list[bool]
    spread: bool = False
    """Whether the form is given as a vector."""


@dataclass
class Tree:
    """An expression."""

    operation: str
    a: Leaf | Tree
    b: Leaf | Tree


Expression = Leaf | Tree


def expressions(
    widths: tuple[int, ...], numbers: st.SearchStrategy[int], *, named: bool = True
) -> st.SearchStrategy[Expression]:
    """Trees of sums, differences and products of forms."""

    def leaf(count: int) -> st.SearchStrategy[Leaf]:
        flags = st.lists(st.booleans() if named else st.just(False), min_size=count, max_size=count)
        spread = st.booleans() if named and widths else st.just(False)
        return st.builds(Leaf, st.lists(numbers, min_size=count, max_size=count), flags, spread)

    leaves = st.one_of(leaf(1), leaf(1 + len(widths)))
    return st.recursive(
        leaves, lambda inner: st.builds(Tree, st.sampled_from(["add", "sub", "mul"]), inner, inner), max_leaves=4
    )


@dataclass
class Case:
    """Builds an expression as forms, and evaluates it lane by lane in Python."""

    element: str
    widths: tuple[int, ...]
    arguments: list[int] = field(default_factory=list)
    ready: list[str] = field(default_factory=list)

    def collect(self, x: Expression) -> None:
        """Gather the arguments of an expression, in the order of `form`."""
        if isinstance(x, Tree):
            self.collect(x.a)
            self.collect(x.b)
        else:
            self.arguments += [n for n, is_named in zip(x.numbers, x.named, strict=True) if is_named]

    def expected(self, x: Expression) -> list[int]:
        """Evaluate in Python."""
        if isinstance(x, Tree):
            pairs = zip(self.expected(x.a), self.expected(x.b), strict=True)
            apply = {"add": int.__add__, "sub": int.__sub__, "mul": int.__mul__}[x.operation]
            return [wrap(apply(a, b), self.element) for a, b in pairs]
        base, *strides = [wrap(n, self.element) for n in x.numbers]
        indices = itertools.product(*map(range, self.widths))
        return [
            wrap(base + sum(i * stride for i, stride in zip(index, strides or [0] * len(index), strict=True)), self.element)
            for index in indices
        ]

    def form(self, e: Emitter, x: Expression) -> Number:
        """Build with the arithmetic under test."""
        if isinstance(x, Tree):
            a, b = self.form(e, x.a), self.form(e, x.b)
            return s.multiply(e, a, b) if x.operation == "mul" else s.add(e, a, b, x.operation)
        parts = []
        for number, is_named in zip(x.numbers, x.named, strict=True):
            if not is_named:
                parts.append(s.constant(number, self.element))
                continue
            name = "%" + NAMES[len(self.ready)]
            self.ready.append(name)
            if self.element != "i64":
                name = e.op(f"trunc i64 {name} to {self.element}")
            parts.append(Uniform(name, self.element))
        if len(parts) == 1 or not self.widths:
            return parts[0]
        found = s.affine(parts[0], tuple(parts[1:]), self.widths)
        count = math.prod(self.widths)
        return Vector(s.vector_text(e, found, count), self.element, self.widths) if x.spread else found


def stored(e: Emitter, x: Number, count: int) -> None:
    """Store all lanes at %out as i64."""
    text = s.vector_text(e, x, count)
    wide = vector_type("i64", count)
    if x.element != "i64":
        text = e.op(f"sext {vector_type(x.element, count)} {text} to {wide}")
    e.raw(f"store {wide} {text}, ptr %out, align 8")


@compiled
@given(data=st.data(), widths=st.sampled_from(WIDTHS), element=st.sampled_from(["i16", "i32", "i64"]))
def test_expressions(run_emitted: Callable[..., list[int]], data: st.DataObject, widths: tuple[int, ...], element: str) -> None:
    """Sums, differences and products of any forms agree with Python's in every lane, overflow included."""
    numbers = st.one_of(st.integers(-3, 3), st.integers(-(1 << 20), 1 << 20), st.integers(-(1 << 63), (1 << 63) - 1))
    expression = data.draw(expressions(widths, numbers))
    case = Case(element, widths)
    case.collect(expression)
    assume(len(case.arguments) <= len(NAMES))
    count = math.prod(widths)
    found = run_emitted(lambda e: stored(e, case.form(e, expression), count), *case.arguments, words=count)
    assert found == case.expected(expression)


@given(data=st.data(), widths=st.sampled_from(WIDTHS), element=st.sampled_from(["i32", "i64"]))
def test_constants_stay_symbolic(data: st.DataObject, widths: tuple[int, ...], element: str) -> None:
    """Expressions of known numbers emit nothing, unless two affine ones are multiplied."""
    expression = data.draw(expressions(widths, st.integers(-(1 << 40), 1 << 40), named=False))
    case, e = Case(element, widths), Emitter()
    found = case.form(e, expression)
    assume(not isinstance(found, Vector))
    assert e.lines == []
    assert lanes(found, widths) == case.expected(expression)


def test_affine_and_uniform() -> None:
    """An affine index times a uniform one plus another affine one is affine, with no vector instruction."""
    e = Emitter()
    rows = Affine(Uniform("%r", "i32"), (Uniform(1, "i32"), Uniform(0, "i32")), (4, 4), "i32")
    columns = Affine(Uniform("%c", "i32"), (Uniform(0, "i32"), Uniform(1, "i32")), (4, 4), "i32")
    found = s.add(e, s.multiply(e, rows, Uniform("%s", "i32")), columns)
    assert isinstance(found, Affine)
    assert found.strides == (Uniform("%s", "i32"), Uniform(1, "i32"))
    assert not any("x i32>" in line for line in e.lines)


def test_affine_times_affine() -> None:
    """The product of two affine numbers is a vector."""
    x = Affine(Uniform(0, "i32"), (Uniform(1, "i32"),), (4,), "i32")
    assert isinstance(s.multiply(Emitter(), x, x), Vector)


def test_strides_that_cancel() -> None:
    """A difference whose strides cancel is uniform."""
    e = Emitter()
    x = Affine(Uniform("%a", "i32"), (Uniform(2, "i32"),), (8,), "i32")
    y = Affine(Uniform(3, "i32"), (Uniform(2, "i32"),), (8,), "i32")
    assert isinstance(s.add(e, x, y, "sub"), Uniform)


@given(
    st.sampled_from(["add", "sub", "mul"]),
    *[st.tuples(st.integers(0, 5), st.integers(-40, 40), st.booleans()) for _ in range(2)],
)
def test_known_facts(operation: str, left: tuple[int, int, bool], right: tuple[int, int, bool]) -> None:
    """The divisor and the sign that a result is said to have are those of its value."""
    values, operands = [], []
    for name, (log, factor, is_named) in zip("ab", (left, right), strict=True):
        value = factor << log
        values.append(value)
        operands.append(Uniform(f"%{name}", "i64", 1 << log, value >= 0) if is_named else Uniform(value, "i64"))
    found = s.uniform_binary(Emitter(), operation, *operands)
    actual = {"add": values[0] + values[1], "sub": values[0] - values[1], "mul": values[0] * values[1]}[operation]
    assert actual % found.known_divisor == 0
    assert actual >= 0 or not found.is_nonnegative


def test_facts_are_kept() -> None:
    """Tile indices keep a useful divisor: a multiple of 64 plus a multiple of 16 is one of 16, and is not negative."""
    e = Emitter()
    program = Uniform("%pid0", "i32", 1, True)
    tile = s.uniform_binary(e, "mul", program, Uniform(64, "i32"))
    assert (tile.known_divisor, tile.is_nonnegative) == (64, True)
    shifted = s.uniform_binary(e, "add", tile, Uniform("%n", "i32", 16, True))
    assert (shifted.known_divisor, shifted.is_nonnegative) == (16, True)
    assert not s.uniform_binary(e, "sub", tile, shifted).is_nonnegative
    large = Uniform("%x", "i64", MAX_DIVISOR)
    assert s.uniform_binary(e, "mul", large, large).known_divisor == MAX_DIVISOR


@pytest.mark.parametrize(("operation", "neutral", "on_both_sides"), [("add", 0, True), ("sub", 0, False), ("mul", 1, True)])
def test_neutral_operands(operation: str, neutral: int, on_both_sides: bool) -> None:
    """Adding nothing and multiplying by one emit nothing."""
    e, x = Emitter(), Uniform("%x", "i32", 4)
    assert s.uniform_binary(e, operation, x, Uniform(neutral, "i32")) == x
    if on_both_sides:
        assert s.uniform_binary(e, operation, Uniform(neutral, "i32"), x) == x
    assert e.lines == []


def test_zero_minus_a_number() -> None:
    """0 - x is not x."""
    e = Emitter()
    assert s.uniform_binary(e, "sub", Uniform(0, "i32"), Uniform("%x", "i32")).value != "%x"
    assert e.lines == ["  %t1 = sub i32 0, %x"]


def test_times_zero() -> None:
    """A product with zero is zero."""
    e = Emitter()
    assert s.uniform_binary(e, "mul", Uniform("%x", "i32"), Uniform(0, "i32")) == Uniform(0, "i32")
    assert e.lines == []


@compiled
@given(
    data=st.data(),
    widths=st.sampled_from([w for w in WIDTHS if w]),
    element=st.sampled_from(["i1", "i8", "i16", "i32"]),
    is_named=st.booleans(),
)
def test_sign_extension(
    run_emitted: Callable[..., list[int]], data: st.DataObject, widths: tuple[int, ...], element: str, is_named: bool
) -> None:
    """Widening to 64 bits keeps every lane, of constants that wrap within the chunk as well."""
    numbers = st.one_of(st.integers(-9, 9), st.integers(-(2**31), 2**31 - 1))
    values = data.draw(st.lists(numbers, min_size=1 + len(widths), max_size=1 + len(widths)))
    case = Case(element, widths)
    leaf = Leaf(values, [is_named] * len(values))
    case.collect(leaf)
    expected = case.expected(leaf)
    if element == "i1":
        expected = [-x for x in expected]
    elif is_named and element == "i32":
        indices = itertools.product(*map(range, widths))
        exact = [values[0] + sum(n * i for n, i in zip(values[1:], index, strict=True)) for index in indices]
        assume(all(wrap(x, element) == x for x in exact))
    count = math.prod(widths)
    found = run_emitted(lambda e: stored(e, s.to_i64(e, case.form(e, leaf)), count), *case.arguments, words=count)
    assert found == expected


def test_widened_indices_stay_affine() -> None:
    """An affine i32 index is affine after widening, and keeps what is known of it."""
    e = Emitter()
    x = Affine(Uniform("%a", "i32", 16, True), (Uniform(1, "i32"),), (8,), "i32")
    found = s.to_i64(e, x)
    assert isinstance(found, Affine)
    assert (found.base.known_divisor, found.base.is_nonnegative, found.element) == (16, True, "i64")
    assert found.strides == (Uniform(1, "i64"),)


@pytest.mark.parametrize("has_base", [True, False], ids=["base", "address"])
@pytest.mark.parametrize("pointee", ["i8", "bf16", "f32", "f64", "i1"])
def test_pointers(run_emitted: Callable[..., list[int]], pointee: str, has_base: bool) -> None:
    """Pointers advance by elements, addresses by their bytes."""

    def emit(e: Emitter) -> None:
        start = Pointer("%out", Uniform(2, "i64"), pointee)
        if not has_base:
            start = Pointer(None, s.absolute(e, start), pointee)
        by = Affine(Uniform(5, "i32"), (Uniform(-3, "i32"),), (4,), "i32")
        moved = s.advance(e, s.advance(e, start, Uniform("%a", "i64")), by)
        assert moved.pointee == pointee
        distance = s.add(e, s.absolute(e, moved), s.absolute(e, Pointer("%out", Uniform(0, "i64"), pointee)), "sub")
        stored(e, distance, 4)

    size = BYTES[pointee]
    assert run_emitted(emit, 7, words=4) == [size * (2 + 7 + 5 - 3 * i) for i in range(4)]


def test_memo() -> None:
    """What was emitted is used again within its scope and below, and forgotten after it."""
    e = Emitter()
    x = Uniform("%x", "i32")
    outer = s.vector_text(e, x, 8)
    with e.scope():
        assert s.vector_text(e, x, 8) == outer
        inner = s.vector_text(e, Uniform("%y", "i32"), 8)
        assert s.vector_text(e, Uniform("%y", "i32"), 8) == inner
    assert s.vector_text(e, Uniform("%y", "i32"), 8) != inner
    assert s.vector_text(e, x, 8) == outer
    assert s.vector_text(e, x, 4) != outer


def test_constants_are_wrapped() -> None:
    """A constant is one of its type; floats stay as they are."""
    assert s.constant(300, "i8") == Uniform(44, "i8")
    assert s.constant(2**31, "i32") == Uniform(-(2**31), "i32")
    assert s.constant(0.5, "f32") == Uniform(0.5, "f32")


def test_known_integers() -> None:
    """All operands have to be known integers."""
    assert s.known_integers(Uniform(1, "i32"), Uniform(2, "i32")) == [1, 2]
    assert s.known_integers(Uniform(1, "i32"), Uniform("%x", "i32")) is None
    assert s.known_integers(Uniform(1.0, "f32")) is None
    assert s.known_integers(Vector("%v", "i32", (4,))) is None


def test_widths_of_operands() -> None:
    """The lanes of an operation are those of the first operand that has any, pointers included."""
    vector = Vector("%v", "i32", (4, 2))
    assert s.widths_with(Uniform(1, "i32"), Uniform(2, "i32")) == ()
    assert s.widths_with(Uniform(1, "i32"), vector) == (4, 2)
    assert s.widths_with(Uniform(1, "i1"), Pointer("%p", vector, "f32")) == (4, 2)
