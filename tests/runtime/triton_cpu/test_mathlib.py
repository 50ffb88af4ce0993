"""The CPU backend's elementary functions: accuracy against references of higher precision."""

from __future__ import annotations

import ctypes
import functools

import llvmlite.binding as llvm
import numpy as np
import pytest

from graphwright.runtime.triton_cpu import isa as isa_module
from graphwright.runtime.triton_cpu import mathlib
from graphwright.runtime.triton_cpu.emit import LLVM_TYPES, Emitter, vector_type
from graphwright.runtime.triton_cpu.errors import BackendError

ISAS = ["avx512", "avx2", "portable"]
NUMPY = {"f32": np.float32, "f64": np.float64, "i32": np.int32, "i64": np.int64}


def module_text(isa, name, element, lanes, symbol="kernel"):
    """LLVM IR of `void kernel(i64 n, ptr..., ptr out)`, which applies the function to arrays."""
    f = mathlib.find(name, element)
    e = Emitter()
    pointers = [f"%a{i}" for i in range(len(f.args))]
    with e.loop(0, "%n", lanes) as loop:
        operands = []
        for p, kind in zip(pointers, f.args, strict=True):
            at = e.address(LLVM_TYPES[kind], p, loop.index)
            operands.append(e.op(f"load {vector_type(LLVM_TYPES[kind], lanes)}, ptr {at}, align 1"))
        result = mathlib.call(e, isa, name, element, lanes, operands)
        at = e.address(LLVM_TYPES[f.result], "%out", loop.index)
        e.raw(f"store {vector_type(LLVM_TYPES[f.result], lanes)} {result}, ptr {at}, align 1")
    e.raw("ret void")
    parameters = ", ".join(f"ptr {p}" for p in [*pointers, "%out"])
    body = "\n".join(["entry:", *e.lines])
    return "\n".join([*e.declarations.values(), f"define void @{symbol}(i64 %n, {parameters}) {{\n{body}\n}}"])


class Jit:
    """A compiled module; calling it applies the function to NumPy arrays."""

    def __init__(self, isa, name, element, lanes):
        self.function = mathlib.find(name, element)
        self.lanes = lanes
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = llvm.parse_assembly(module_text(isa, name, element, lanes))
        target = llvm.Target.from_default_triple()
        machine = target.create_target_machine(cpu=isa.cpu, features=isa.features, opt=3, jit=True)
        manager = llvm.create_new_module_pass_manager()
        manager.add_always_inliner_pass()
        manager.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=0)))
        self.assembly = machine.emit_assembly(module)
        self.engine = llvm.create_mcjit_compiler(module, machine)
        self.engine.finalize_object()
        address = self.engine.get_function_address("kernel")
        self.pointer = ctypes.CFUNCTYPE(None, ctypes.c_int64, *[ctypes.c_void_p] * (len(self.function.args) + 1))(
            address
        )

    def __call__(self, *args):
        n = len(args[0])
        assert n % self.lanes == 0
        arrays = [np.ascontiguousarray(a, NUMPY[k]) for a, k in zip(args, self.function.args, strict=True)]
        out = np.empty(n, NUMPY[self.function.result])
        self.pointer(n, *[a.ctypes.data for a in arrays], out.ctypes.data)
        return out


@functools.cache
def jit(isa_name, name, element, lanes):
    """Compile a function, or skip the test where the host lacks the instruction set."""
    try:
        isa = isa_module.detect(isa_name)
    except BackendError as error:
        pytest.skip(str(error))
    return Jit(isa, name, element, lanes)


@pytest.mark.parametrize("lanes", [1, 4, 16])
@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("name", ["exp", "exp2", "log"])
def test_first(isa_name, name, lanes):
    x = np.linspace(0.01, 20, 1024, dtype=np.float32)
    got = jit(isa_name, name, "f32", lanes)(x)
    np.testing.assert_allclose(got, getattr(np, name)(x.astype(np.float64)), rtol=3e-7, atol=1e-8)
