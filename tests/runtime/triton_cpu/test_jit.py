"""Compiling LLVM IR to objects, loading objects, and the container they are stored in."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from graphwright.runtime.triton_cpu import isa, jit
from graphwright.runtime.triton_cpu.binary import Binary, CorruptBinaryError, pack, unpack
from graphwright.runtime.triton_cpu.errors import BackendError
from graphwright.runtime.triton_cpu.generated import Site

DOUBLE = """define i32 @double(i32 %x) {
  %y = add i32 %x, %x
  ret i32 %y
}
"""

ADD = """, ptr %x, ptr %y, ptr %z, i32 %n) #0 {
entry:
  %base = mul i32 %pid0, 64
  %limit = add i32 %base, 64
  %whole = icmp slt i32 %limit, %n
  %end = select i1 %whole, i32 %limit, i32 %n
  br label %loop
loop:
  %i = phi i32 [ %base, %entry ], [ %next, %loop ]
  %x.at = getelementptr float, ptr %x, i32 %i
  %y.at = getelementptr float, ptr %y, i32 %i
  %z.at = getelementptr float, ptr %z, i32 %i
  %a = load <16 x float>, ptr %x.at, align 4
  %b = load <16 x float>, ptr %y.at, align 4
  %sum = fadd <16 x float> %a, %b
  store <16 x float> %sum, ptr %z.at, align 4
  %next = add i32 %i, 16
  %more = icmp slt i32 %next, %end
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""

BINARY = Binary(
    "kernel", "entry", ("ptr", "i32"), 64, (Site("load", "f.py:3"), Site("assert", "f.py:4", "x")), True, b"code" * 9
)


@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_every_instruction_set_runs(ir_kernel, name):
    """The same text compiles and runs for each instruction set of the host."""
    try:
        isa.detect(name)
    except BackendError as error:
        pytest.skip(str(error))
    kernel = ir_kernel(ADD, ("ptr", "ptr", "ptr", "i32"), target=name)
    x, y, z = torch.randn(1024), torch.randn(1024), torch.zeros(1024)
    kernel.run((16, 1, 1), 2, x.data_ptr(), y.data_ptr(), z.data_ptr(), 1024)
    assert torch.equal(z, x + y)


def test_assembly_uses_the_instruction_set(ir_kernel):
    """Assembly of a vector addition names a vector register of the instruction set."""
    register = {"avx512": "zmm", "avx2": "ymm", "portable": ""}[isa.host_isa().name]
    assert register in jit.assembly(ir_kernel(ADD, ("ptr", "ptr", "ptr", "i32")).text, isa.host_isa())


def test_object_loads_in_another_process(tmp_path, run_python):
    """Object bytes run in a process that never saw the text."""
    path = tmp_path / "object"
    path.write_bytes(jit.compile_object(DOUBLE, isa.host_isa()))
    script = """import ctypes, pathlib, sys
from graphwright.runtime.triton_cpu import jit
code = jit.load(pathlib.Path(sys.argv[1]).read_bytes(), {})
print(ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32)(code.function("double"))(21))
"""
    assert run_python(script, str(path)) == "42\n"


def test_invalid_text_is_refused():
    """Text that LLVM rejects is an error that quotes LLVM."""
    with pytest.raises(BackendError, match=r"(?s)not valid.*expected"):
        jit.compile_object("define i32 @f( {", isa.host_isa())


def test_undefined_symbols_are_listed():
    """The names that an object expects from others are read from it, and from nothing else."""
    text = (
        "declare void @alpha()\ndeclare void @beta()\ndefine void @f() {\n call void @alpha()\n call void @beta()\n ret void\n}"
    )
    assert sorted(jit.undefined_symbols(jit.compile_object(text, isa.host_isa()))) == ["alpha", "beta"]
    assert jit.undefined_symbols(b"no object") == []


def test_missing_function_is_an_error_not_the_end_of_the_process():
    """An object that calls an unknown function is refused by name."""
    text = "declare void @no_such_function()\ndefine void @f() {\n call void @no_such_function()\n ret void\n}"
    with pytest.raises(BackendError, match="no_such_function"):
        jit.load(jit.compile_object(text, isa.host_isa()), {})


def test_missing_entry_is_an_error():
    """Asking loaded code for a function that it does not define is an error."""
    code = jit.load(jit.compile_object(DOUBLE, isa.host_isa()), {})
    with pytest.raises(BackendError, match="triple_it"):
        code.function("triple_it")


def test_mathematics_and_printing_resolve():
    """Functions of the C and mathematics libraries are found."""
    text = """declare float @expf(float)
declare i32 @printf(ptr, ...)
define float @f(float %x) {
  %y = call float @expf(float %x)
  ret float %y
}
define i32 @g(ptr %x) {
  %y = call i32 (ptr, ...) @printf(ptr %x)
  ret i32 %y
}
"""
    assert jit.load(jit.compile_object(text, isa.host_isa()), {}).function("f")


def test_text_may_declare_what_the_launch_defines(ir_kernel):
    """Declarations in the generated text of the functions that the launch brings do not clash with it."""
    before = """declare void @report_fault(ptr, i32, i32, i32, i32, i64)
declare i1 @in_bounds(ptr, i64, i64)
declare void @free(ptr)
"""
    body = """) #0 {
  %in = call i1 @in_bounds(ptr %fault, i64 0, i64 4)
  call void @free(ptr null)
  br i1 %in, label %good, label %bad
bad:
  call void @report_fault(ptr %fault, i32 0, i32 %pid0, i32 %pid1, i32 %pid2, i64 0)
  br label %good
good:
  ret void
}
"""
    assert ir_kernel(body, before=before).run((3, 1, 1), 2).state == 0


def test_container_round_trip():
    """What is packed comes back equal."""
    assert unpack(pack(BINARY)) == BINARY


def test_container_detects_every_truncation():
    """No proper prefix of a container passes for one."""
    data = pack(BINARY)
    for size in range(len(data)):
        with pytest.raises(CorruptBinaryError):
            unpack(data[:size])
    with pytest.raises(CorruptBinaryError, match="header says"):
        unpack(data + b"\0")


def test_container_detects_every_changed_byte():
    """A change of any byte is detected."""
    data = bytearray(pack(BINARY))
    for k in range(len(data)):
        data[k] ^= 0x20
        with pytest.raises(CorruptBinaryError):
            unpack(bytes(data))
        data[k] ^= 0x20


def test_container_differs_with_its_contents():
    """Containers of different kernels differ."""
    assert pack(BINARY) != pack(dataclasses.replace(BINARY, checked=False))
