"""From TTIR to LLVM IR: what the launcher is told, and what is refused and how."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import triton
import triton.language as tl

from graphwright.runtime.triton_cpu import isa, jit, registry
from graphwright.runtime.triton_cpu.errors import BackendError, TtirSyntaxError, UnsupportedError
from graphwright.runtime.triton_cpu.generate import MASKED_STORE_SLOTS, generate
from graphwright.runtime.triton_cpu.generated import Generated
from graphwright.runtime.triton_cpu.options import CPUOptions
from graphwright.runtime.triton_cpu.worker import complete_module


def module(lines: str, arguments: str = "%p: !tt.ptr<f32>", before: str = "") -> str:
    """A module with one kernel."""
    return f"module {{\n{before}tt.func public @k({arguments}) {{\n{lines}\ntt.return\n}}\n}}\n"


def lower(text: str, **options: Any) -> Generated:
    """Generate for the portable instruction set."""
    return generate(text, isa.detect("portable"), CPUOptions(isa="portable", **options))


def test_arguments() -> None:
    """The launcher is told the element types of all arguments, in order."""
    types = ["i1", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64"]
    arguments = ", ".join([f"%a{k}: {t}" for k, t in enumerate(types)] + ["%p: !tt.ptr<bf16>"])
    generated = lower(module("", arguments))
    assert generated.name == "k"
    assert generated.arguments == (*types, "ptr")
    assert generated.sites == ()
    registers = ["i1", "i8", "i16", "i32", "i64", "half", "i16", "float", "double", "ptr"]
    assert ", ".join(f"{t} %arg{k}" for k, t in enumerate(registers)) in generated.llvm_ir


def test_scratch() -> None:
    """Scratch begins with the slots for stores that must not happen, and has room for every buffer."""
    assert lower(module("")).scratch_bytes == 8 * MASKED_STORE_SLOTS
    lines = """%c = arith.constant dense<1.0> : tensor<32x32xf32>
    %d = tt.dot %c, %c, %c : tensor<32x32xf32> * tensor<32x32xf32> -> tensor<32x32xf32>"""
    assert lower(module(lines)).scratch_bytes >= 8 * MASKED_STORE_SLOTS + 32 * 32 * 4


@triton.jit
def reporting_kernel(X, n, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + i)
    tl.device_assert(x > 0, "not positive")
    tl.device_print("values", x)
    tl.store(X + i, x + 1)
    tl.atomic_add(X, 1.0)


def line_of(kernel: Any, text: str) -> str:
    """'file:line' of the line of a kernel that holds `text`."""
    lines, start = inspect.getsourcelines(kernel.fn)
    (at,) = (k for k, line in enumerate(lines) if text in line)
    return f"{__file__}:{start + at}"


@pytest.fixture
def reporting(ttir_text: Any) -> str:
    """TTIR of `reporting_kernel`, compiled so that assertions stay."""
    return ttir_text(reporting_kernel, {"X": "*fp32", "n": "i32", "B": 16}, debug=True)


def test_sites(reporting: str) -> None:
    """Assertions and prints are numbered, with their messages and the lines where they stand."""
    sites = lower(reporting).sites
    assert [(s.kind, s.message.strip(" :"), s.line) for s in sites] == [
        ("assert", "not positive", line_of(reporting_kernel, "device_assert")),
        ("print", "values", line_of(reporting_kernel, "device_print")),
    ]


def test_sites_in_checked_mode(reporting: str) -> None:
    """In checked mode every access is a site; one that is emitted several times is still one."""
    generated = lower(reporting, checked=True)
    kinds = {site.kind: site.line for site in generated.sites}
    assert kinds == {
        "load": line_of(reporting_kernel, "tl.load"),
        "assert": line_of(reporting_kernel, "device_assert"),
        "print": line_of(reporting_kernel, "device_print"),
        "store": line_of(reporting_kernel, "tl.store"),
        "atomic": line_of(reporting_kernel, "tl.atomic"),
    }
    assert len(generated.sites) == len(kinds)
    numbers = {int(n) for n in re.findall(r"@check_lanes\(ptr %fault, i32 (\d+)", generated.llvm_ir)}
    assert {generated.sites[n].kind for n in numbers} == {"load", "store", "atomic"}


REFUSED = {
    "operation": ("%x = tt.strange %a : f32 -> f32", "tt.strange"),
    "tensor operation": ("%x = tt.strange %t : tensor<4xf32> -> tensor<4xf32>", "tt.strange"),
    "statement": ("tt.strange %a : f32", "tt.strange"),
    "type": ("%x = arith.constant 1 : i7", "i7"),
    "tensor type": ("%x = arith.constant dense<1> : tensor<4xi7>", "i7"),
    "constant": (
        "%x = arith.constant dense<[1, 2, 3, 4]> : tensor<4xi32>\n"
        'tt.print "" {hex = false, isSigned = array<i32: 1>} : %x : tensor<4xi32>',
        "elements differ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    """What is not lowered is refused by its name, with the line of the kernel."""
    line, name = REFUSED[case]
    located = "\n".join(f'{part} loc("kernel.py":12:3)' for part in line.split("\n"))
    with pytest.raises(UnsupportedError, match=re.escape(name)) as caught:
        lower(module(located, "%a: f32, %t: tensor<4xf32>"))
    assert caught.value.line == "kernel.py:12"
    assert str(caught.value).startswith("kernel.py:12: not supported on the CPU: ")


def test_refused_argument() -> None:
    """An argument of a type that is not lowered is refused by the type."""
    with pytest.raises(UnsupportedError, match=r"the type !tt\.ptr<i7>") as caught:
        lower(module("", "%p: !tt.ptr<i7>"))
    assert caught.value.line == ""


def test_refused_without_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that knows no line gets that of the statement being lowered."""

    def refuse(lowering: Any, op: Any, args: Any) -> Any:
        raise UnsupportedError("such sums")

    monkeypatch.setitem(registry.ELEMENTWISE, "arith.addf", refuse)
    with pytest.raises(UnsupportedError, match=r"kernel\.py:9: .*such sums"):
        lower(module('%x = arith.addf %a, %a : f32 loc("kernel.py":9:3)', "%a: f32"))


def test_refused_lane_by_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that knows no line names the operation and its line, also where a later statement asks for its result."""

    def refuse(lowering: Any, op: Any, args: Any) -> Any:
        raise UnsupportedError("such sums")

    monkeypatch.setitem(registry.ELEMENTWISE, "arith.addf", refuse)
    lines = """%x = tt.splat %a : f32 -> tensor<16xf32>
%y = arith.addf %x, %x : tensor<16xf32> loc("kernel.py":9:3)
%q = tt.splat %p : !tt.ptr<f32> -> tensor<16x!tt.ptr<f32>>
tt.store %q, %y : tensor<16x!tt.ptr<f32>> loc("kernel.py":10:3)"""
    with pytest.raises(UnsupportedError, match=r"kernel\.py:9: .*arith\.addf: such sums"):
        lower(module(lines, "%a: f32, %p: !tt.ptr<f32>"))


def test_refused_inside_a_region() -> None:
    """What is refused deep inside a loop is named with its own line."""
    lines = """%c = arith.constant 1 : i32
    scf.for %i = %c to %c step %c : i32 {
    %x = tt.strange %i : i32 -> i32 loc("kernel.py":21:3)
    } loc("kernel.py":20:3)"""
    with pytest.raises(UnsupportedError, match=r"kernel\.py:21: .*tt\.strange"):
        lower(module(lines))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("module {\n}\n", "found 0"),
        (module("", before="tt.func public @other() {\ntt.return\n}\n"), "found 2: other, k"),
    ],
)
def test_public_functions(text: str, found: str) -> None:
    """A module has one kernel."""
    with pytest.raises(BackendError, match=f"one public function, {found}"):
        lower(text)


def test_text_that_is_not_ttir() -> None:
    """Text of another form is refused with the line that is not understood."""
    with pytest.raises(TtirSyntaxError, match="line 3"):
        lower(module("%x = = 1"))


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_text_is_valid(reporting: str, name: str, checked: bool) -> None:
    """LLVM accepts what is generated, completed by the launch."""
    try:
        target = isa.detect(name)
    except BackendError as error:
        pytest.skip(str(error))
    generated = generate(reporting, target, CPUOptions(isa=name, checked=checked))
    triple, layout = jit.target_description(target)
    jit.parse(complete_module(generated, "entry", triple=triple, layout=layout, vector_bits=target.vector_bits))


def test_same_text(reporting: str) -> None:
    """The same TTIR gives the same LLVM IR."""
    assert lower(reporting) == lower(reporting)
