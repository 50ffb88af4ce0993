"""Random elementwise programs: generated Triton source against a reference in NumPy.

`CONFORMANCE_EXAMPLES=500` draws more programs, and new ones each time.
"""

import os

import numpy as np
import pytest
from conformance_buffers import Buffers
from conformance_kernels import module_from
from conformance_numbers import INTERPRETED, as_numpy, is_float, promoted, random_values, round_to
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("CONFORMANCE_EXAMPLES", "0"))
PROFILE = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
TYPES = ("int8", "int32", "uint8", "uint32", "int64", "float32", "float64")
SIDES = (1, 2, 4, 8, 16, 32)


class Program:
    """Draws a tree of expressions as statements of Triton, and computes the same values with NumPy.

    Args:
        data: source of hypothesis's choices.
    """

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.draw = data.draw
        self.rng = np.random.default_rng(self.draw(st.integers(0, 2**32)))
        self.rank = self.draw(st.integers(0, 3))
        self.shape = tuple(self.draw(st.sampled_from(SIDES[: 6 - self.rank])) for _ in range(self.rank))
        self.lines: list[str] = []
        self.arrays: list[tuple[str, np.ndarray, str]] = []
        self.values: list[tuple[str, np.ndarray, str]] = []

    def index(self, axis: int) -> str:
        """Return the source of the index along an axis, broadcast to the rank."""
        slots = ", ".join(":" if k == axis else "None" for k in range(self.rank))
        return f"tl.arange(0, {self.shape[axis]})[{slots}]"

    def place(self, strides: tuple[int, ...]) -> str:
        """Return the source of a sum of indices times strides."""
        return " + ".join([f"{self.index(k)} * {stride}" for k, stride in enumerate(strides)]) or "0"

    def load(self) -> None:
        """Load a tensor, or a row, column or scalar of one, perhaps strided, transposed or masked."""
        dtype = self.draw(st.sampled_from(TYPES))
        order = self.draw(st.permutations(range(self.rank)))
        gap = self.draw(st.sampled_from((1, 1, 2, 3)))
        strides, step = [0] * self.rank, gap
        for axis in order:
            if self.draw(st.integers(0, 5)):
                strides[axis] = step
                step *= self.shape[axis]
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True))
        bounds = (-100, 100) if not dtype.startswith("u") else (0, 200)
        flat = random_values(self.rng, extent, dtype, *bounds)
        name = f"p{len(self.arrays)}"
        self.arrays.append((name, flat, dtype))
        view = np.lib.stride_tricks.as_strided(flat, self.shape, [s * flat.itemsize for s in strides]).copy()
        place = self.place(tuple(strides))
        if self.rank and self.draw(st.booleans()):
            axis = self.draw(st.integers(0, self.rank - 1))
            limit = self.draw(st.integers(0, self.shape[axis]))
            other = self.draw(st.integers(0, 7))
            slots = [np.newaxis] * self.rank
            slots[axis] = slice(None)
            inside = np.arange(self.shape[axis])[tuple(slots)] < limit
            view = np.where(inside, view, np.array(other, view.dtype))
            mask = f"{self.index(axis)} < {limit}"
            self.add(f"tl.load({name} + {place}, mask={mask}, other={other})", view, dtype)
        else:
            self.add(f"tl.load({name} + {place})", view, dtype)

    def add(self, expression: str, value: np.ndarray, dtype: str) -> None:
        """Name an expression and keep its value."""
        name = f"v{len(self.values)}"
        self.lines.append(f"{name} = {expression}")
        self.values.append((name, np.asarray(value), dtype))

    def pick(self) -> tuple[str, np.ndarray, str]:
        """Choose a value computed so far."""
        return self.values[self.draw(st.integers(0, len(self.values) - 1))]

    def step(self) -> None:
        """Add one operation."""
        kind = self.draw(st.sampled_from(("binary", "binary", "compare", "cast", "unary", "constant", "bits", "divide")))
        a, x, t = self.pick()
        b, y, u = self.pick()
        with np.errstate(all="ignore"):
            if kind == "binary":
                op = self.draw(st.sampled_from("+-*"))
                dtype = promoted(t, u)
                left, right = cast(x, dtype), cast(y, dtype)
                value = left + right if op == "+" else left - right if op == "-" else left * right
                self.add(f"{a} {op} {b}", tame(value), dtype) if not is_float(dtype) else self.add_float(a, op, b, value, dtype)
            elif kind == "compare":
                op = self.draw(st.sampled_from(("<", ">=", "==")))
                dtype = promoted(t, u)
                left, right = cast(x, dtype), cast(y, dtype)
                choice = left < right if op == "<" else left >= right if op == ">=" else left == right
                self.add(f"tl.where({a} {op} {b}, {a}, {b})", np.where(choice, left, right), dtype)
            elif kind == "cast":
                dtype = self.draw(st.sampled_from(TYPES))
                if is_float(t) and not is_float(dtype):
                    x = np.clip(x, 0, 100)
                    self.add(f"tl.minimum(tl.maximum({a}, 0.0), 100.0).to(tl.{dtype})", np.trunc(x).astype(dtype), dtype)
                else:
                    self.add(f"{a}.to(tl.{dtype})", cast(x, dtype), dtype)
            elif kind == "unary":
                if is_float(t):
                    self.add(f"tl.abs({a})", np.abs(x), t)
                else:
                    self.add(f"~{a}", ~x, t) if not (INTERPRETED and t.startswith("u")) else None
            elif kind == "constant":
                number = self.draw(st.integers(0, 9))
                self.add(f"{a} + {number}", x + x.dtype.type(number), t)
            elif kind == "bits" and not is_float(t):
                shift = self.draw(st.integers(0, 7))
                op = self.draw(st.sampled_from(("<<", ">>", "&", "|", "^")))
                number = x.dtype.type(shift)
                functions = {
                    "<<": np.left_shift,
                    ">>": np.right_shift,
                    "&": np.bitwise_and,
                    "|": np.bitwise_or,
                    "^": np.bitwise_xor,
                }
                self.add(f"{a} {op} {shift}", functions[op](x, number), t)
            elif kind == "divide" and not is_float(t):
                divisor = self.draw(st.integers(1, 9))
                op = self.draw(st.sampled_from(("//", "%")))
                remainder = np.fmod(x, x.dtype.type(divisor))
                self.add(f"{a} {op} {divisor}", remainder if op == "%" else (x - remainder) // x.dtype.type(divisor), t)

    def add_float(self, a: str, op: str, b: str, value: np.ndarray, dtype: str) -> None:
        """Add a float operation rounded to integers at once, so that fusing it with another changes nothing."""
        limit = 2.0**20
        value = np.floor(np.clip(value, -limit, limit))
        self.add(f"tl.floor(tl.minimum(tl.maximum({a} {op} {b}, -{limit}), {limit}))", value, dtype)

    def run(self) -> None:
        """Compile and run the program, and compare every value with NumPy's."""
        buffers = Buffers()
        stores, outs = [], []
        place = []
        step = 1
        for n in reversed(self.shape):
            place.insert(0, step)
            step *= n
        where = self.place(tuple(place))
        for name, value, dtype in self.values:
            full = np.broadcast_to(value, self.shape)
            out = buffers.empty(self.shape, dtype)
            outs.append((name, out, full, dtype))
            stores.append(f"tl.store(o{name} + {where}, {name})")
        parameters = [name for name, _, _ in self.arrays] + [f"o{name}" for name, *_ in outs]
        body = "\n    ".join(self.lines + stores)
        source = f"@triton.jit\ndef kernel({', '.join(parameters)}):\n    {body}\n"
        arguments = [buffers.put(flat, dtype) for _, flat, dtype in self.arrays] + [out for _, out, _, _ in outs]
        module_from(source).kernel[(1,)](*arguments)
        for name, out, expected, dtype in outs:
            found = as_numpy(out)
            same = (found == expected) | ((found != found) & (expected != expected))
            assert same.all(), f"{name} ({dtype}) is wrong: {found[~same][:4]} instead of {expected[~same][:4]} in\n{source}"
        buffers.check()


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values in another dtype, wrapped or rounded once."""
    if is_float(dtype):
        return round_to(values, dtype).astype(dtype)
    return values.astype(dtype)


def tame(values: np.ndarray) -> np.ndarray:
    """Return an array for what may be a NumPy scalar."""
    return np.asarray(values)


@pytest.mark.filterwarnings("ignore")
@PROFILE
@given(st.data())
def test_random_programs(data: st.DataObject) -> None:
    """Random trees of loads, arithmetic, casts, comparisons and masks compute what NumPy does."""
    program = Program(data)
    for _ in range(program.draw(st.integers(1, 3))):
        program.load()
    for _ in range(program.draw(st.integers(1, 8))):
        program.step()
    program.run()


@pytest.mark.filterwarnings("ignore")
@PROFILE
@given(st.data())
def test_random_reductions(data: st.DataObject) -> None:
    """A reduction or scan of a random tree, broadcast back into it, computes what NumPy does."""
    program = Program(data)
    if program.rank == 0:
        program.rank, program.shape = 1, (16,)
    program.load()
    for _ in range(program.draw(st.integers(0, 3))):
        program.step()
    name, value, dtype = program.values[-1]
    value = np.broadcast_to(value, program.shape)
    axis = program.draw(st.integers(0, program.rank - 1))
    zero = " + ".join(f"0 * {program.index(k)}" for k in range(program.rank))
    if is_float(dtype):
        value, dtype = np.floor(np.clip(value, -1000, 1000)), dtype
        program.add(f"tl.floor(tl.minimum(tl.maximum({name} + ({zero}), -1000.0), 1000.0))", value, dtype)
    else:
        value = value.astype(np.int32) if value.itemsize < 8 else value
        dtype = "int32" if value.itemsize < 8 else dtype
        program.add(f"{name}.to(tl.{dtype}) + ({zero})", value, dtype)
    name = program.values[-1][0]
    kind = program.draw(st.sampled_from(("sum", "max", "min", "cumsum")))
    with np.errstate(all="ignore"):
        if kind == "cumsum":
            program.add(f"tl.cumsum({name}, {axis})", np.cumsum(value, axis=axis, dtype=value.dtype), dtype)
        else:
            result = (
                value.sum(axis=axis, keepdims=True, dtype=value.dtype)
                if kind == "sum"
                else getattr(np, kind)(value, axis=axis, keepdims=True)
            )
            program.add(
                f"tl.{kind}({name}, axis={axis}, keep_dims=True) + ({zero}).to(tl.{dtype})",
                np.broadcast_to(result, program.shape),
                dtype,
            )
    for _ in range(program.draw(st.integers(0, 3))):
        program.step()
    program.run()
