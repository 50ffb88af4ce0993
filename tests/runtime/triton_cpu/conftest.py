"""What the tests of the CPU backend share: Triton on the CPU whatever else the machine has, and kernels in LLVM IR."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from triton._C.libtriton import ir
from triton.compiler import ASTSource

from graphwright.runtime.triton_cpu import isa, jit, worker
from graphwright.runtime.triton_cpu.analysis import Plan
from graphwright.runtime.triton_cpu.compiler import CPUBackend, make_ttir
from graphwright.runtime.triton_cpu.driver import CPUDriver
from graphwright.runtime.triton_cpu.emit import Emitter
from graphwright.runtime.triton_cpu.errors import BackendError
from graphwright.runtime.triton_cpu.faults import FaultRecord
from graphwright.runtime.triton_cpu.generate import generate
from graphwright.runtime.triton_cpu.generated import Generated, Site
from graphwright.runtime.triton_cpu.launch_code import launch_code
from graphwright.runtime.triton_cpu.lowering import Lowering
from graphwright.runtime.triton_cpu.options import CPUOptions
from graphwright.runtime.triton_cpu.ttir import Value
from graphwright.runtime.triton_cpu.ttir_parse import parse

# Compiling takes as long as the machine is busy, and a failure has to be there in the next run as well.
settings.register_profile(
    "graphwright", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("graphwright")

SIGNATURE = (
    "define internal void @program(ptr noalias %scratch, ptr %fault, i32 %pid0, i32 %pid1, i32 %pid2, "
    "i32 %np0, i32 %np1, i32 %np2"
)


@pytest.fixture(autouse=True)
def cpu_driver() -> Iterator[None]:
    """Let Triton run on the CPU."""
    triton.runtime.driver.set_active(CPUDriver())
    yield
    triton.runtime.driver.reset_active()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Return torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class IrKernel:
    """A kernel in LLVM IR, launched through ctypes.

    Args:
        body: text of `@program` after its fixed parameters: the others, attributes and the body.
        arguments: TTIR element types of the others.
        scratch_bytes: as in `Generated`.
        sites: as in `Generated`.
        before: module text in front of the function.
        target: name of the instruction set; '' for the best.
    """

    def __init__(
        self,
        body: str,
        arguments: Sequence[str] = (),
        *,
        scratch_bytes: int = 0,
        sites: Sequence[Site] = (),
        before: str = "",
        target: str = "",
    ) -> None:
        generated = Generated("kernel", before + SIGNATURE + body, tuple(arguments), scratch_bytes, tuple(sites))
        self._compile(generated, isa.detect(target))

    def _compile(self, generated: Generated, chosen: isa.Isa) -> None:
        self.generated = generated
        triple, layout = jit.target_description(chosen)
        self.text = worker.complete_module(
            self.generated, "entry", triple=triple, layout=layout, vector_bits=chosen.vector_bits
        )
        self.object_code = jit.compile_object(self.text, chosen)
        code = jit.load(self.object_code, {worker.PARALLEL: launch_code().parallel})
        self.function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32)(code.function("entry"))

    def run(self, grid: tuple[int, int, int], threads: int, *values: int) -> FaultRecord:
        """Run the kernel with the bits of its arguments and return the fault record."""
        record = FaultRecord()
        total = grid[0] * grid[1] * grid[2]
        header = worker.CONTEXT_HEADER.pack(0, total, 0, *grid, 0, ctypes.addressof(record))
        context = ctypes.create_string_buffer(header + struct.pack(f"<{len(values)}q", *values))
        self.function(ctypes.addressof(context), threads)
        return record


@pytest.fixture
def ir_kernel() -> type[IrKernel]:
    """Return the class of kernels in LLVM IR."""
    return IrKernel


class TtirKernel(IrKernel):
    """A kernel in TTIR, launched through ctypes.

    Args:
        text: the TTIR module.
        target: name of the instruction set; '' for the best.
        options: fields of `CPUOptions`.
    """

    def __init__(self, text: str, *, target: str = "", **options: Any) -> None:
        chosen = isa_or_skip(target)
        self._compile(generate(text, chosen, CPUOptions(isa=chosen.name, **options)), chosen)

    def __call__(self, *values: torch.Tensor | int, grid: tuple[int, int, int] = (1, 1, 1)) -> FaultRecord:
        """Run the kernel on tensors and the bits of scalars."""
        return self.run(grid, 1, *(v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values))


def isa_or_skip(name: str) -> isa.Isa:
    """Return the instruction set, or skip the test on a host without it."""
    try:
        return isa.detect(name)
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture
def ttir_kernel() -> type[TtirKernel]:
    """Return the class of kernels in TTIR."""
    return TtirKernel


@pytest.fixture
def ttir_text() -> Callable[..., str]:
    """Return a function that compiles a `triton.jit` kernel to TTIR, as the backend does.

    It takes the kernel, its signature (an int or a tl.constexpr is a constant) and the names of arguments divisible by 16;
    options are fields of `CPUOptions`.
    """

    def text(kernel: Any, signature: dict[str, Any], divisible: Sequence[str] = (), **options: Any) -> str:
        constants = {name: kind for name, kind in signature.items() if not isinstance(kind, str)}
        types = {name: "constexpr" if name in constants else kind for name, kind in signature.items()}
        attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in divisible}
        source = ASTSource(kernel, types, constants, attributes)
        backend = CPUBackend(CPUDriver().get_current_target())
        parsed = backend.parse_options(options)
        context = ir.context()
        ir.load_dialects(context)
        functions = backend.get_codegen_implementation(parsed)
        return str(make_ttir(source.make_ir(backend.target, parsed, functions, backend.get_module_map(), context)))

    return text


class IndexKernel:
    """A kernel that stores an index expression over two dimensions, as TTIR and as numpy evaluates it.

    Args:
        tree: what `index_trees` or `MASKS` draws.
        shape: dimensions of the result.
        scalars: values of the arguments %a and %b.
    """

    def __init__(self, tree: tuple[Any, ...], shape: tuple[int, int], scalars: tuple[int, int]) -> None:
        self._lines: list[str] = []
        self._scalars = dict(zip("ab", scalars, strict=True))
        place = ("add", ("mul", ("row",), ("constant", shape[1])), ("column",))
        where, _ = self._build(place, shape)
        value, self.expected = self._build(tree, shape)
        kind, size = "i1" if self.expected.dtype == bool else "i32", "x".join(map(str, shape))
        pointers = f"tensor<{size}x!tt.ptr<{kind}>>"
        self._lines += [
            f"%ps = tt.splat %p : !tt.ptr<{kind}> -> {pointers}",
            f"%pp = tt.addptr %ps, {where} : {pointers}, tensor<{size}xi32>",
            f"tt.store %pp, {value} : {pointers}",
        ]
        head = f"tt.func public @k(%p: !tt.ptr<{kind}>, %a: i32, %b: i32)"
        self.text = "module {\n" + head + " {\n" + "\n".join(self._lines) + "\ntt.return\n}\n}\n"

    def lowering(self) -> tuple[Lowering, Value]:
        """Return the state of lowering before any code is emitted, and the value that is stored."""
        (function,) = parse(self.text).values()
        (store,) = (op for op in function.walk() if op.name == "tt.store")
        return Lowering(plan=Plan(function), isa=isa.detect(""), options=CPUOptions()), store.operands[1]

    def _emit(self, text: str) -> str:
        name = f"%v{len(self._lines)}"
        self._lines.append(f"{name} = {text}")
        return name

    def _build(self, tree: tuple[Any, ...], shape: tuple[int, int]) -> tuple[str, np.ndarray[Any, Any]]:
        size = "x".join(map(str, shape))
        kind, (name, *rest) = f"tensor<{size}xi32>", tree
        if name in ("row", "column"):
            axis = name == "column"
            n, inner = shape[axis], ("1x%d" if axis else "%dx1") % shape[axis]
            line = self._emit(f"tt.make_range {{start = 0 : i32, end = {n} : i32}} : tensor<{n}xi32>")
            spread = self._emit(
                f"tt.expand_dims {line} {{axis = {int(not axis)} : i32}} : tensor<{n}xi32> -> tensor<{inner}xi32>"
            )
            values = np.arange(n, dtype=np.int32).reshape((1, n) if axis else (n, 1))
            return self._emit(f"tt.broadcast {spread} : tensor<{inner}xi32> -> {kind}"), np.broadcast_to(values, shape)
        if name == "constant":
            return self._emit(f"arith.constant dense<{rest[0]}> : {kind}"), np.full(shape, rest[0], np.int32)
        if name == "scalar":
            return self._emit(f"tt.splat %{rest[0]} : i32 -> {kind}"), np.full(shape, self._scalars[rest[0]], np.int32)
        if name == "trans":
            inner_text, inner_value = self._build(rest[0], shape[::-1])
            source = f"tensor<{shape[1]}x{shape[0]}xi32>"
            return self._emit(f"tt.trans {inner_text} {{order = array<i32: 1, 0>}} : {source} -> {kind}"), inner_value.T
        predicate = rest.pop(0) if name == "compare" else ""
        (a, x), (b, y) = (self._build(t, shape) for t in rest)
        if name == "compare":
            if predicate.startswith("u"):
                x, y = x.astype(np.uint32), y.astype(np.uint32)
            held = {"lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y, "eq": x == y, "ne": x != y}[predicate[-2:]]
            return self._emit(f"arith.cmpi {predicate}, {a}, {b} : {kind}"), held
        if name == "and":
            return self._emit(f"arith.andi {a}, {b} : tensor<{size}xi1>"), x & y
        operation = {"add": "addi", "sub": "subi", "mul": "muli", "rem": "remsi", "div": "divsi"}[name]
        apply = {
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "rem": np.fmod,
            "div": lambda x, y: (x - np.fmod(x, y)) // y,
        }
        return self._emit(f"arith.{operation} {a}, {b} : {kind}"), apply[name](x, y)


_LEAVES = st.one_of(
    st.sampled_from([("row",), ("column",), ("scalar", "a"), ("scalar", "b")]),
    st.tuples(st.just("constant"), st.integers(-5, 9)),
)
_DIVISORS = st.tuples(st.just("constant"), st.sampled_from([1, 2, 3, 8, 16, 100]))


def index_trees(*divisions: str) -> st.SearchStrategy[tuple[Any, ...]]:
    """Index expressions with the given kinds of division."""
    return st.recursive(
        _LEAVES,
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(["add", "sub", "mul"]), inner, inner),
            st.tuples(st.sampled_from(divisions), inner, _DIVISORS),
            st.tuples(st.just("trans"), inner),
        ),
        max_leaves=5,
    )


TREES, TREES_WITHOUT_REMAINDERS = index_trees("rem", "div"), index_trees("div")
MASKS = st.recursive(
    st.tuples(
        st.just("compare"), st.sampled_from(["slt", "sle", "sgt", "sge", "eq", "ne", "ult", "ule", "ugt", "uge"]), TREES, TREES
    ),
    lambda inner: st.tuples(st.just("and"), inner, inner),
    max_leaves=2,
)
"""Comparisons of index expressions."""


@dataclass(frozen=True)
class Indices:
    """What tests of index arithmetic draw from, and the class that they build."""

    trees: st.SearchStrategy[tuple[Any, ...]] = TREES
    trees_without_remainders: st.SearchStrategy[tuple[Any, ...]] = TREES_WITHOUT_REMAINDERS
    masks: st.SearchStrategy[tuple[Any, ...]] = MASKS
    kernel: type[IndexKernel] = IndexKernel


@pytest.fixture
def indices() -> Indices:
    """Return index expressions to draw from."""
    return Indices()


@pytest.fixture
def run_emitted() -> Callable[..., list[int]]:
    """Return a function that runs emitted instructions and returns what they stored as i64 at %out.

    It takes a function that emits into an `Emitter` and the i64 values of %a, %b, ...; `words` is the size of %out.
    """

    def run(emit: Callable[[Emitter], None], *values: int, words: int) -> list[int]:
        e = Emitter()
        emit(e)
        parameters = "".join(f", i64 %{name}" for name, _ in zip("abcdefgh", values, strict=False))
        body = f", ptr %out{parameters}) #0 {{\nentry:\n" + "\n".join(e.lines) + "\n  ret void\n}\n"
        before = "\n".join(e.declarations.values()) + "\n"
        kernel = IrKernel(body, ["ptr", *["i64"] * len(values)], before=before)
        out = (ctypes.c_int64 * words)()
        kernel.run((1, 1, 1), 1, ctypes.addressof(out), *values)
        return list(out)

    return run


@pytest.fixture
def python(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts a script in a process of its own, with its own Triton cache."""
    started = []

    def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        path = tmp_path / "script.py"
        path.write_text(script)
        variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_DEFAULT_BACKEND": "cpu", **environment}
        process = subprocess.Popen(
            [sys.executable, str(path), *arguments],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        # Its children hold the pipes as well.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def run_python(python: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Return a function that runs a script in a process of its own and returns what it prints."""

    def run(script: str, *arguments: str, **environment: str) -> str:
        process = python(script, *arguments, **environment)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, f"{out}\n{err}"
        return out

    return run
