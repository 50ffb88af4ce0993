"""LLVM: text to object files, and object files to code in this process."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import llvmlite.binding as llvm

from .errors import BackendError
from .isa import Isa

# llvmlite carries no annotations.
TargetMachine = Any
Engine = Any

_engines: list[Engine] = []


@functools.cache
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _new_target_machine(cpu: str, features: str, effort: int = 3) -> TargetMachine:
    _initialize()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=effort, reloc="pic", codemodel="default", jit=True)


@functools.cache
def target_machine(isa: Isa, effort: int = 3) -> TargetMachine:
    """Return the target machine for an instruction set and optimization level; one per process."""
    return _new_target_machine(isa.cpu, isa.features, effort)


def target_description(isa: Isa) -> tuple[str, str]:
    """Return the LLVM triple and data layout for an instruction set."""
    machine = target_machine(isa)
    return str(machine.triple), str(machine.target_data)


def compile_object(text: str, isa: Isa, *, effort: int = 3) -> bytes:
    """Return the object file for a module.

    Args:
        text: LLVM IR of the module.
        isa: the instruction set to generate for.
        effort: LLVM's optimization level for instruction selection, 0 to 3.

    Raises:
        BackendError: LLVM rejects the text.
    """
    machine = target_machine(isa, effort)
    return bytes(machine.emit_object(_optimized(text, machine)))


def assembly(text: str, isa: Isa) -> str:
    """Return the assembly that `compile_object` encodes."""
    machine = target_machine(isa)
    return str(machine.emit_assembly(_optimized(text, machine)))


def _optimized(text: str, machine: TargetMachine) -> Any:
    module = parse(text)
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=0))
    passes = llvm.create_new_module_pass_manager()
    # Emitted loops are already in the shape that the machine should run, so that only small helpers need folding in.
    passes.add_always_inliner_pass()
    passes.run(module, builder)
    return module


def parse(text: str) -> Any:
    """Return the verified LLVM module of a text.

    Raises:
        BackendError: LLVM rejects the text.
    """
    _initialize()
    try:
        module = llvm.parse_assembly(text, llvm.create_context())
        module.verify()
    except RuntimeError as error:
        raise BackendError(f"the generated LLVM IR is not valid, which is a defect of the CPU backend: {error}") from error
    return module


class Code:
    """Loaded machine code; it stays for as long as the process.

    Args:
        engine: the execution engine that owns it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Addresses of the code are held in places that cannot keep an engine alive.
        _engines.append(engine)

    def function(self, name: str) -> int:
        """Return the address of a function.

        Raises:
            BackendError: there is no such function.
        """
        return self._found(name, self._engine.get_function_address(name))

    def variable(self, name: str) -> int:
        """Return the address of a global variable.

        Raises:
            BackendError: there is no such variable.
        """
        return self._found(name, self._engine.get_global_value_address(name))

    @staticmethod
    def _found(name: str, address: int) -> int:
        if not address:
            raise BackendError(f"compiled code: it does not define {name}")
        return address


def load(object_code: bytes, symbols: Mapping[str, int]) -> Code:
    """Load an object file into this process, for good.

    Args:
        object_code: the object file.
        symbols: addresses of functions that it may call, besides those that the process exports.

    Raises:
        BackendError: the object file refers to a function that is nowhere.
    """
    _initialize()
    for name, address in symbols.items():
        llvm.add_symbol(name, address)
    # LLVM ends the process when a symbol is missing, so that has to be found out before.
    missing = [name for name in undefined_symbols(object_code) if not _resolves(name)]
    if missing:
        raise BackendError(f"compiled code: this process has no function {', '.join(sorted(missing))}, which it calls")
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly("", llvm.create_context()), _new_target_machine("", ""))
    engine.add_object_file(llvm.ObjectFileRef.from_data(object_code))
    engine.finalize_object()
    return Code(engine)


def _resolves(symbol: str) -> bool:
    if llvm.address_of_symbol(symbol):
        return True
    for library in _libraries():
        try:
            address = ctypes.cast(library[symbol], ctypes.c_void_p).value
        except AttributeError:
            continue
        if address:
            llvm.add_symbol(symbol, address)
            return True
    return False


@functools.cache
def _libraries() -> tuple[ctypes.CDLL, ...]:
    """Libraries that compiled code may call without the process exporting them: C, mathematics, compiler support."""
    found = []
    for name in (None, "libc.so.6", "libm.so.6", "libgcc_s.so.1", "libSystem.B.dylib"):
        try:
            found.append(ctypes.CDLL(name))
        except OSError:
            continue
    return tuple(found)


def undefined_symbols(object_code: bytes) -> list[str]:
    """Return the names that an ELF object file expects others to define; none for another format."""
    return list(_undefined_symbols(object_code))


_ELF_MAGIC = b"\x7fELF\x02\x01"
_ELF_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SYMBOL_TABLE = 2


def _undefined_symbols(data: bytes) -> Iterator[str]:
    if not data.startswith(_ELF_MAGIC):
        return
    header = _ELF_HEADER.unpack_from(data)
    offset, entry_size, count = header[5], header[10], header[11]
    sections = [_SECTION.unpack_from(data, offset + k * entry_size) for k in range(count)]
    for section in sections:
        if section[1] != _SYMBOL_TABLE:
            continue
        names = sections[section[6]][4]
        for at in range(section[4], section[4] + section[5], _SYMBOL.size):
            name, _, _, home, _, _ = _SYMBOL.unpack_from(data, at)
            if home == 0 and name:
                start = names + name
                yield data[start : data.index(b"\0", start)].decode()
