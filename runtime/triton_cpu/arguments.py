"""Reading a kernel's arguments in Python: the rare kinds, and the errors.

Compiled code reads the common kinds itself and asks here for the rest, see `launch_code`.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import launch_code
from .errors import BackendError
from .faults import Extent, FaultRecord, fault_error
from .generated import Site

MASK = (1 << 64) - 1

_INTEGER_BITS = {"i8": 8, "i16": 16, "i32": 32, "i64": 64}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A position in the call of a kernel.

    Args:
        name: the kernel's name for it.
        element: as in `Generated.arguments`, or "skip" for what the kernel was specialized for.
        dtype: the torch dtype that a tensor must have; None for any.
        aligned: whether the value must be a multiple of 16.
        fixed: whether a skipped argument must equal `value`.
        value: what a skipped argument was when the kernel was compiled.
    """

    name: str
    element: str
    dtype: Any = None
    aligned: bool = False
    fixed: bool = False
    value: Any = None

    @property
    def kind(self) -> int:
        """How compiled code is to read it."""
        return launch_code.KINDS[self.element] | (launch_code.ALIGNED if self.aligned else 0)


class Reader:
    """Reads what compiled code leaves over.

    Args:
        kernel: the kernel's name.
        parameters: the positions of its call.
        sites: the kernel's sites.
    """

    def __init__(self, kernel: str, parameters: Sequence[Parameter], sites: Sequence[Site]) -> None:
        self.kernel = kernel
        self.parameters = tuple(parameters)
        self.sites = tuple(sites)

    def __call__(self, position: int, value: Any) -> int:
        """Return the 64 bits of an argument, or raise what a negative position reports.

        Raises:
            TypeError: the argument is of the wrong type, or the number of arguments is wrong.
            ValueError: the argument or the grid is out of range, or not what the kernel was compiled for.
            KernelFault: the kernel failed.
        """
        if position == launch_code.FAULT:
            raise fault_error(FaultRecord.from_address(value), self.kernel, self.sites)
        if position == launch_code.BAD_GRID:
            raise ValueError(
                f"{self.kernel}: each direction of the grid must have 0 to {2**31 - 1} programs, and fewer than 2^63 in all"
            )
        if position == launch_code.BAD_COUNT:
            raise TypeError(self._count_message(value))
        parameter = self.parameters[position]
        bits = self._bits(parameter, value)
        if parameter.aligned and bits % 16:
            what = "an address" if parameter.element == "ptr" else "a number"
            raise ValueError(
                f"{self._about(parameter)}: the kernel was compiled for {what} divisible by 16, got {bits}; prepare it again"
            )
        return bits

    def _count_message(self, count: int) -> str:
        return f"{self.kernel}: takes {len(self.parameters)} arguments, got {count - launch_code.UPSTREAM_POSITIONS}"

    def _about(self, parameter: Parameter) -> str:
        return f"{self.kernel}: argument '{parameter.name}'"

    def _bits(self, parameter: Parameter, value: Any) -> int:
        element = parameter.element
        if element == "skip":
            if parameter.fixed and not _same(value, parameter.value):
                expected = f"the kernel was compiled for {parameter.value!r}"
                raise ValueError(f"{self._about(parameter)}: {expected}, got {value!r}; prepare it again")
            return 0
        if element == "ptr":
            return self._address(parameter, value)
        if element[0] == "i":
            return self._integer(parameter, value)
        return self._float(parameter, value)

    def _integer(self, parameter: Parameter, value: Any) -> int:
        try:
            number = value.__index__()
        except (AttributeError, TypeError):
            raise TypeError(
                f"{self._about(parameter)}: expected an integer ({parameter.element}), got {type(value).__name__}"
            ) from None
        if parameter.element == "i1":
            return int(number != 0)
        bits = _INTEGER_BITS[parameter.element]
        # Unsigned parameters are of the same type in the IR, so both ranges are let through.
        if not -(1 << (bits - 1)) <= number < 1 << bits:
            raise OverflowError(f"{self._about(parameter)}: {number} does not fit {parameter.element}")
        return int(number) & MASK

    def _float(self, parameter: Parameter, value: Any) -> int:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(
                f"{self._about(parameter)}: expected a number ({parameter.element}), got {type(value).__name__}"
            ) from None
        return float_bits(parameter.element, number)

    def _address(self, parameter: Parameter, value: Any) -> int:
        if value is None:
            return 0
        if isinstance(value, int):
            return value & MASK
        data_ptr = getattr(value, "data_ptr", None)
        if data_ptr is None:
            raise TypeError(f"{self._about(parameter)}: expected a tensor, an address or None, got {type(value).__name__}")
        device = getattr(value, "device", None)
        if device is not None and getattr(device, "type", str(device)) != "cpu":
            raise ValueError(
                f"{self._about(parameter)}: is on {device}, but the kernel runs on the CPU; "
                "move it with .cpu(), or activate the driver of its device with triton.runtime.driver.set_active"
            )
        dtype = getattr(value, "dtype", None)
        if parameter.dtype is not None and dtype != parameter.dtype:
            raise TypeError(
                f"{self._about(parameter)}: the kernel was compiled for {parameter.dtype}, got {dtype}; prepare it again"
            )
        return int(data_ptr()) & MASK


class PreparedReader(Reader):
    """A reader for prepared launches, which may be given some of the arguments.

    Args:
        kernel: the kernel's name.
        parameters: the positions of its call.
        sites: the kernel's sites.
        replaceable: how many arguments, from the first, a call may replace.
    """

    def __init__(self, kernel: str, parameters: Sequence[Parameter], sites: Sequence[Site], replaceable: int) -> None:
        super().__init__(kernel, parameters, sites)
        self.replaceable = replaceable

    @property
    def tensors(self) -> int:
        """Number of tensors among the replaceable arguments."""
        return sum(parameter.element == "ptr" for parameter in self.parameters[: self.replaceable])

    def merge(self, kept: Sequence[Any], given: Sequence[Any]) -> tuple[Any, ...]:
        """Return the arguments of a call: those given, and those kept in place of the others.

        Raises:
            TypeError: the number of arguments given fits neither all nor the tensors.
        """
        if not given:
            return tuple(kept)
        if len(given) == self.replaceable:
            return (*given, *kept[self.replaceable :])
        if len(given) != self.tensors:
            raise TypeError(self._count_message(len(given)))
        new = iter(given)
        pairs = zip(self.parameters[: self.replaceable], kept, strict=False)
        return (*(next(new) if p.element == "ptr" else value for p, value in pairs), *kept[self.replaceable :])

    def _count_message(self, count: int) -> str:
        return f"{self.kernel}: prepared for 0, {self.tensors} (the tensors) or {self.replaceable} arguments, got {count}"


def _same(value: Any, expected: Any) -> bool:
    return value is expected or (type(value) is type(expected) and bool(value == expected))


def float_bits(element: str, number: float) -> int:
    """Return the bits of a number as "f16", "bf16", "f32" or "f64", rounded to nearest."""
    if element == "f64":
        return int.from_bytes(struct.pack("<d", number), "little")
    if element == "f16":
        try:
            return int.from_bytes(struct.pack("<e", number), "little")
        except OverflowError:
            return int.from_bytes(struct.pack("<e", math.copysign(math.inf, number)), "little")
    bits = int.from_bytes(ctypes.c_float(number), "little")
    if element == "f32":
        return bits
    if math.isnan(number):
        return (bits >> 16) | 0x40
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def extent(name: str, value: Any) -> Extent | None:
    """Return the memory of a tensor, or None for what has no known size.

    It reaches from the tensor's first element to its last, so that a view's surroundings are outside, and the gaps between
    the elements of a strided view inside.
    """
    try:
        begin, shape, strides, size = value.data_ptr(), value.shape, value.stride(), value.element_size()
    except AttributeError:
        return None
    if 0 in shape:
        return Extent(name, begin, begin)
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return Extent(name, begin, begin + (last + 1) * size)


def flatten_signature(signature: Sequence[Any]) -> Iterator[str]:
    """Yield one type per value that `flatten_arguments` yields."""
    for kind in signature:
        if isinstance(kind, tuple | list):
            yield from flatten_signature(kind)
        elif kind.startswith("tensordesc"):
            rank = kind[kind.index("[") : kind.index("]")].count(",") + 1
            yield from ("*i8", *["i64"] * (2 * rank), *["i1"] * _descriptor_flags(), *["i32"] * rank, *["i64"] * rank)
        else:
            yield kind


def flatten_arguments(signature: Sequence[Any], values: Sequence[Any]) -> Iterator[Any]:
    """Yield the values of a call with its tuples and tensor descriptors opened, in the order of the kernel's parameters."""
    for kind, value in zip(signature, values, strict=True):
        if isinstance(kind, tuple | list):
            yield from flatten_arguments(kind, tuple(value))
        elif kind.startswith("tensordesc"):
            flags = (value.padding == "nan", getattr(value, "round_f32_to_tf32", False))
            yield from (value.base, *value.shape, *value.strides, *flags[: _descriptor_flags()], *value.shape, *value.strides)
        else:
            yield value


def is_flat(signature: Sequence[Any]) -> bool:
    """Whether flattening changes nothing."""
    return all(isinstance(kind, str) and not kind.startswith("tensordesc") for kind in signature)


def _descriptor_flags() -> int:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return 1 + ("round_f32_to_tf32" in TensorDescriptor.__dataclass_fields__)


def parameters_of(
    kernel: str, names: Sequence[str], signature: Sequence[Any], arguments: Sequence[str]
) -> tuple[Parameter, ...]:
    """Return the positions of a kernel's flattened call.

    Args:
        kernel: the kernel's name.
        names: name of each argument of the call.
        signature: Triton's type of each argument of the call.
        arguments: the element types of the compiled kernel's parameters.

    Raises:
        BackendError: the signature and the compiled kernel disagree.
    """
    elements = iter(arguments)
    parameters = []
    for name, kind in zip(names, signature, strict=True):
        leaves = list(flatten_signature([kind]))
        for k, leaf in enumerate(leaves):
            element = "skip" if leaf == "constexpr" else next(elements, "")
            if not element:
                break
            parameters.append(Parameter(name if len(leaves) == 1 else f"{name}[{k}]", element))
    passed = sum(leaf != "constexpr" for leaf in flatten_signature(signature))
    if passed != len(arguments):
        raise BackendError(f"{kernel}: the call passes {passed} arguments, but the compiled kernel takes {len(arguments)}")
    return tuple(parameters)
