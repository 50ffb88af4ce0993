"""The matrix products of the BLAS library inside torch, called by address.

A call of `torch.mm` costs several microseconds before any work is done, and torch has no way to multiply by an MKL-packed
weight into memory that is already there. Both are one C call away: torch's CPU library exports the symbols where it was built
with MKL, and elsewhere the functions here return None.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .triton_cpu.chain import Link

Function = Callable[..., Any]

LARGEST_INT = 2**31 - 1
"""Sizes and strides are 32-bit integers."""

_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE, _PACKED, _B_MATRIX = 101, 111, 112, 151, 162
# The blocking is chosen for this many rows. A pack for many rows serves few as well, and one for few is slow for many.
_ROWS_HINT = 1024


@dataclass(frozen=True, slots=True)
class NativeCall:
    """A C call with all its arguments.

    Args:
        run: makes the call.
        x_position: where the address of x is among the arguments.
        out_position: where the address of the result is.
    """

    run: functools.partial[Any]
    x_position: int
    out_position: int

    def link(self) -> tuple[Link, int, int]:
        """Return the call as a link of a chain, and where in its context the addresses of x and of the result stand."""
        from .triton_cpu.chain import call_link

        function: Any = self.run.func
        address = ctypes.cast(function, ctypes.c_void_p).value
        link, places = call_link(address or 0, [_as_bits(argument) for argument in self.run.args])
        return link, places[self.x_position], places[self.out_position]

    def with_pointers(self, x: int, out: int) -> None:
        """Make the call with other addresses."""
        arguments = list(self.run.args)
        arguments[self.x_position] = ctypes.c_void_p(x)
        arguments[self.out_position] = ctypes.c_void_p(out)
        self.run.func(*arguments)


def _as_bits(argument: Any) -> tuple[str, int]:
    """Return how an argument of a C call is passed, and its bits."""
    if isinstance(argument, bytes):
        return "ref", argument[0]
    if isinstance(argument, ctypes.c_void_p):
        return "ptr", argument.value or 0
    # What `byref` makes holds the number that it refers to.
    number = getattr(argument, "_obj", argument)
    bits = int.from_bytes(bytes(number), "little")
    if number is not argument:
        return "ref", bits
    return ("float" if isinstance(number, ctypes.c_float) else "i32"), bits


class Address(ctypes.c_void_p):
    """An address, with the owner of the memory: who holds the address keeps the memory."""

    owner: object

    @classmethod
    def of(cls, tensor: Tensor) -> Address:
        """Return the address of a tensor's first element."""
        address = cls(tensor.data_ptr())
        address.owner = tensor
        return address


class PackedMatrix:
    """A weight in MKL's own order, which serves every number of rows and of threads.

    Args:
        weight: [N, K], float32, on the CPU, its rows contiguous.
    """

    __slots__ = ("_address", "shape")

    def __init__(self, weight: Tensor) -> None:
        packing = _packing()
        if packing is None:
            raise RuntimeError("PackedMatrix: this build of torch does not export MKL's packed products")
        n, k = weight.shape
        # MKL asks for megabytes more than it writes, at an offset that depends on the address. Pages that are never
        # touched take no memory, so the blob is mapped, and never copied.
        size = packing.size(_B_MATRIX, _ROWS_HINT, n, k)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = Address(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        self._address.owner = memory
        self.shape = (n, k)
        address, stride = self._address, row_stride(weight)
        packing.pack(_ROW_MAJOR, _B_MATRIX, _TRANSPOSE, _ROWS_HINT, n, k, 1.0, weight.data_ptr(), stride, address)

    @property
    def bytes(self) -> int:
        """Resident memory: the elements, and the partly used pages of the header and at both ends."""
        n, k = self.shape
        return (_pages(4 * n * k) + 2) * mmap.PAGESIZE

    def bind(self, x: Tensor, out: Tensor, *, accumulate: bool) -> NativeCall:
        """Return the call out[M, N] = x[M, K] weight^T, or += where it accumulates; rows of x and out are contiguous."""
        packing = _packing()
        assert packing is not None
        n, k = self.shape
        integer = ctypes.c_int
        run = functools.partial(
            packing.compute,
            *(integer(_ROW_MAJOR), integer(_NO_TRANSPOSE), integer(_PACKED), integer(x.shape[0]), integer(n), integer(k)),
            *(Address.of(x), integer(row_stride(x)), self._address, integer(n)),
            *(ctypes.c_float(accumulate), Address.of(out), integer(row_stride(out))),
        )
        return NativeCall(run, x_position=6, out_position=11)

    def unpack(self) -> Tensor:
        """Return the weight, [N, K]: the packed product with the identity, which is exact for finite elements."""
        n, k = self.shape
        weight = torch.empty(n, k)
        for start in range(0, k, 256):
            rows = torch.zeros(min(256, k - start), k)
            rows.diagonal(start).fill_(1.0)
            columns = torch.empty(rows.shape[0], n)
            self.bind(rows, columns, accumulate=False).run()
            weight[:, start : start + 256] = columns.t()
        return weight


def can_pack() -> bool:
    """Whether weights can be packed here."""
    return _packing() is not None


def bind_sgemm(x: Tensor, matrix: Tensor, out: Tensor, *, accumulate: bool) -> NativeCall | None:
    """Return the call out[M, N] = x[M, K] matrix, or += where it accumulates; None where there is no such function.

    Args:
        x: [M, K], float32, on the CPU, its rows contiguous.
        matrix: [K, N], likewise, its rows or its columns contiguous.
        out: [M, N], likewise, its rows contiguous.
        accumulate: add to what `out` holds.
    """
    sgemm = _sgemm()
    if sgemm is None:
        return None
    (m, k), n = x.shape, matrix.shape[1]
    transposed = matrix.stride(1) != 1 and n != 1
    stride = row_stride(matrix.t() if transposed else matrix)

    def integer(value: int) -> Any:
        return ctypes.byref(ctypes.c_int(value))

    def real(value: float) -> Any:
        return ctypes.byref(ctypes.c_float(value))

    # Fortran's columns are our rows: the call computes out^T = matrix^T x^T.
    run = functools.partial(
        sgemm,
        *(b"T" if transposed else b"N", b"N", integer(n), integer(m), integer(k), real(1.0)),
        *(Address.of(matrix), integer(stride), Address.of(x), integer(row_stride(x)), real(accumulate)),
        *(Address.of(out), integer(row_stride(out))),
    )
    return NativeCall(run, x_position=8, out_position=11)


@dataclass(frozen=True, slots=True)
class _Packing:
    size: Function
    pack: Function
    compute: Function


@functools.cache
def _packing() -> _Packing | None:
    for library in _libraries():
        try:
            packing = _Packing(library.cblas_sgemm_pack_get_size, library.cblas_sgemm_pack, library.cblas_sgemm_compute)
        except AttributeError:
            continue
        integer = ctypes.c_int
        size: Any = packing.size
        size.restype, size.argtypes = ctypes.c_size_t, [integer] * 4
        pack: Any = packing.pack
        pack.restype = None
        pack.argtypes = [integer] * 6 + [ctypes.c_float, ctypes.c_void_p, integer, ctypes.c_void_p]
        compute: Any = packing.compute
        compute.restype = None
        return packing
    return None


@functools.cache
def _sgemm() -> Function | None:
    for library in _libraries():
        try:
            function: Any = library.sgemm_
        except AttributeError:
            continue
        function.restype = None
        return function  # type: ignore[no-any-return]
    return None


def _libraries() -> Iterator[ctypes.CDLL]:
    path = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    # Only MKL's interface is known to be this one; a BLAS with 64-bit integers would read beyond the arguments.
    if torch.backends.mkl.is_available() and os.path.exists(path):  # type: ignore[no-untyped-call]
        yield ctypes.CDLL(path)


def row_stride(matrix: Tensor) -> int:
    """Return the distance from row to row in elements, as BLAS wants it."""
    # The stride of a single row means nothing, and BLAS rejects one that is less than the row.
    return max(matrix.stride(0), matrix.shape[1], 1) if matrix.shape[0] > 1 else max(matrix.shape[1], 1)


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE)
