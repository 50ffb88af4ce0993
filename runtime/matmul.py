"""Matrix products by the vendor's library, prepared once and called many times.

Weights are brought into the order in which they are multiplied fastest, when a model is loaded; calls are bound to their
memory when its buffers are planned. What is left for the run is one native call per product.

    weight = prepare_weight(linear.weight, rows=(1, 128))
    product = weight.bind(x, out)
    product()
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from graphwright.ir.errors import InputError, OptionError, unknown

from . import matmul_choice, mkl

Layout = Literal["nk", "kn", "packed", "panels", "onednn"]
"""How a weight lies in memory: as given, [N, K]; transposed, [K, N]; in MKL's order; in panels; in oneDNN's order."""

Rebind = Callable[..., object]

_HALVES = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALVES)
_AMX_ELEMENTS = 32
# Layouts whose objects bind and unpack by themselves.
_OWN_ORDER = ("packed", "panels")
# A slower layout that needs no copy of the weight, or a plainer one, is worth this much.
_WORTH_RATIO = 1.05
# Speed is not worth more memory than this much.
_MOST_PADDING_RATIO = 1 / 8


class Product:
    """A product bound to its memory. Calling it computes it; it keeps its tensors alive.

    Calls of one object may overlap in several threads as far as what they write does not.

    Args:
        run: the call without arguments, for callers who want to save a Python frame.
        rebind: runs it with other addresses.
        native: the C call that it is, where it is one.
    """

    __slots__ = ("_rebind", "native", "run")

    def __init__(self, run: Callable[[], object], rebind: Rebind, native: mkl.NativeCall | None = None) -> None:
        self.run = run
        self.native = native
        self._rebind = rebind

    def __call__(self) -> None:
        """Compute the product."""
        self.run()

    def with_pointers(self, *pointers: int) -> None:
        """Compute the product with operands elsewhere, of the same shapes, strides and dtypes.

        Args:
            pointers: addresses of x and out, of a, b and out for `bind_bmm`, which stay valid until the call returns.
                A dtype's own alignment is enough.
        """
        self._rebind(*pointers)


class PreparedWeight:
    """A weight [N, K] in a layout for multiplying; `prepare_weight` makes it.

    Args:
        weight: [N, K].
        layout: how to store it.
    """

    __slots__ = ("_padding", "_stored", "device", "dtype", "k", "layout", "n")

    def __init__(self, weight: Tensor, layout: Layout) -> None:
        self.n, self.k = weight.shape
        self.dtype, self.device, self.layout = weight.dtype, weight.device, layout
        self._padding = _padding(weight, self.k)
        self._stored: Any = _store(pad(weight, (0, self._padding)) if self._padding else weight, layout)

    @property
    def bytes(self) -> int:
        """Memory it takes. In the layouts "nk" and "kn" that is the original's own where this already lies so."""
        if self.layout in _OWN_ORDER:
            return int(self._stored.bytes)
        if self.layout == "onednn":
            return int(torch.ops.mkldnn._nbytes(self._stored))
        return int(self._stored.nbytes)

    def unpack(self) -> Tensor:
        """Return the weight as it was given, [N, K], contiguous; it may share memory with this object.

        Every element has its old value; from the layout "packed", negative zeros come back as zeros.
        """
        if self.layout in _OWN_ORDER:
            return cast(Tensor, self._stored.unpack())
        dense: Tensor = self._stored.to_dense() if self.layout == "onednn" else self._stored
        return (dense.t() if self.layout == "kn" else dense)[:, : self.k].contiguous()

    def bind(self, x: Tensor, out: Tensor, *, accumulate: bool = False) -> Product:
        """Bind out = x @ weight^T to memory.

        Args:
            x: [M, K], of the weight's dtype and device. Elements of a row are adjacent; rows may be further apart than K.
            out: [M, N], likewise. It must not overlap x.
            accumulate: add to what `out` holds instead.

        Raises:
            InputError: shape, dtype, device or strides are others.
        """
        _check("x", x, (None, self.k), self.dtype, self.device)
        _check("out", out, (x.shape[0], self.n), self.dtype, self.device)
        x, out = x.detach(), out.detach()
        if out.numel() == 0:
            return Product(_nothing, _nothing)
        if self.layout == "packed" and not _fits_blas(x, out):
            raise InputError(
                f"PreparedWeight.bind: MKL counts rows and strides in 32 bits, got x {list(x.shape)} with strides "
                f"{x.stride()} and out with {out.stride()}; use fewer rows, or prepare the weight with layout='kn'"
            )
        if self.layout in _OWN_ORDER:
            return _native(self._stored.bind(x, out, accumulate=accumulate))
        if self.layout == "onednn":
            return _with_tensors(functools.partial(_onednn, self._stored, self._padding, accumulate), x, out)
        matrix: Tensor = self._stored if self.layout == "kn" else self._stored.t()
        native = _is_sgemm(x) and _fits_blas(x, matrix, out) and mkl.bind_sgemm(x, matrix, out, accumulate=accumulate)
        if native:
            return _native(native)
        return _with_tensors(functools.partial(_mm, matrix, self._padding, accumulate), x, out)

    def __repr__(self) -> str:
        return f"PreparedWeight([{self.n}, {self.k}], {self.dtype}, {self.device}, layout={self.layout!r})"


def prepare_weight(
    weight: Tensor, *, layout: Layout | Literal["auto"] = "auto", rows: Sequence[int] = (128,)
) -> PreparedWeight:
    """Bring a weight into a layout for multiplying.

    Drop the original afterwards: what is returned refers to it only where the layout is the original's own.

    Args:
        weight: [N, K], float32, float64, bfloat16 or float16.
        layout: "auto" measures on the CPU which layout is fastest, a few milliseconds for each new size, and keeps the
            result in Triton's cache folder (TRITON_CACHE_DIR), else in the user's. "packed" needs finite float32 elements and
            MKL, "panels" float32 and a CPU with AVX2 or AVX-512, "onednn" bfloat16 or float16 on a CPU that multiplies them.
        rows: the numbers of rows, M, that x will mostly have; each counts the same.

    Raises:
        InputError: the weight is no matrix of these dtypes.
        OptionError: the layout is unknown or cannot hold this weight, or `rows` is empty or not positive.
    """
    if weight.dim() != 2 or weight.dtype not in _DTYPES or weight.layout != torch.strided:
        raise InputError(
            f"prepare_weight: expected a dense weight [N, K] of {', '.join(map(str, _DTYPES))}, got "
            f"{list(weight.shape)} of {weight.dtype}, {weight.layout}"
        )
    if not rows or min(rows) < 1:
        raise OptionError(f"prepare_weight: rows must be one or more positive numbers, got {tuple(rows)}")
    weight = weight.detach()
    if layout == "auto":
        return PreparedWeight(weight, _fastest(weight, rows))
    if layout not in get_args(Layout):
        raise OptionError(f"prepare_weight: {unknown('layout', layout, ('auto', *get_args(Layout)))}")
    possible = tuple(_layouts(weight))
    if layout not in possible:
        raise OptionError(
            f"prepare_weight: layout {layout!r} cannot hold this weight, {list(weight.shape)} of {weight.dtype} on "
            f"{weight.device}; {', '.join(map(repr, possible))} can"
        )
    return PreparedWeight(weight, layout)


def bind_bmm(a: Tensor, b: Tensor, out: Tensor) -> Product:
    """Bind out = a @ b, a product of two activations, to memory.

    Args:
        a: [..., M, K], with the batch dimensions of `out` or ones that broadcast to them.
        b: [..., K, N], likewise.
        out: [..., M, N], any strides. It must not overlap a or b.

    Raises:
        InputError: shapes, dtypes or devices do not fit.
    """
    operands = (a.detach(), b.detach(), out.detach())
    fits = min(t.dim() for t in operands) >= 2 and a.shape[-1] == b.shape[-2]
    try:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]) if fits else ()  # type: ignore[no-untyped-call]
        fits = fits and (*batch, a.shape[-2], b.shape[-1]) == tuple(out.shape)
    except RuntimeError:
        fits = False
    if not fits or len({(t.dtype, t.device) for t in operands}) > 1:
        described = ", ".join(f"{list(t.shape)} {t.dtype} on {t.device}" for t in operands)
        raise InputError(f"bind_bmm: expected a [..., M, K], b [..., K, N] and out [..., M, N] of one dtype, got {described}")
    if out.numel() == 0:
        return Product(_nothing, _nothing)
    a, b, out = operands
    padding = _padding(a, a.shape[-1])
    flat = [_flatten(t.expand(*batch, *t.shape[-2:])) for t in operands]
    if all(t is not None for t in flat):
        return _with_tensors(functools.partial(_batched, torch.bmm, padding), *(t for t in flat if t is not None))
    return _with_tensors(functools.partial(_batched, torch.matmul, padding), a, b, out)


def _store(weight: Tensor, layout: Layout) -> Any:
    if layout == "packed":
        return mkl.PackedMatrix(weight if _has_rows(weight) else weight.contiguous())
    if layout == "panels":
        # Needs LLVM, which is imported late.
        from .panels import PanelMatrix

        return PanelMatrix(weight)
    if layout == "onednn":
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), matmul_choice.ROW_CLASSES[-2])
    return weight.t().contiguous() if layout == "kn" else weight.contiguous()


def _layouts(weight: Tensor) -> Iterator[Layout]:
    """Yield the layouts that can hold a weight; of two that are as fast, the better one first.

    Panels come before what is as fast with the rows that are expected, because they are good with fewer and more as well.
    """
    yield "nk"
    on_cpu = weight.device.type == "cpu" and weight.numel() > 0
    if on_cpu and weight.dtype == torch.float32:
        from .panels import can_panel

        if can_panel():
            yield "panels"
    yield "kn"
    if not on_cpu:
        return
    if weight.dtype == torch.float32:
        # The way back multiplies every element by zeros, too.
        finite = all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(weight)).tolist())
        if finite and mkl.can_pack() and max(*weight.shape, *weight.stride()) <= mkl.LARGEST_INT:
            yield "packed"
    if weight.dtype in _HALVES and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        name = "bf16" if weight.dtype == torch.bfloat16 else "fp16"
        if getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")():
            yield "onednn"


def _fastest(weight: Tensor, rows: Sequence[int]) -> Layout:
    if weight.device.type != "cpu" or weight.numel() == 0:
        # cuBLAS multiplies by a transposed weight as fast.
        return "nk"
    n, k = weight.shape
    layouts = tuple(layout for layout in _layouts(weight) if layout != "panels" or _fills_panels(n))
    slowness = dict.fromkeys(layouts, 0.0)
    for m in sorted({matmul_choice.row_class(m) for m in rows}):
        key = f"{str(weight.dtype).removeprefix('torch.')} n{n} k{k} m{m}"
        taken = matmul_choice.times(key, {name: functools.partial(_trials, weight, name, m) for name in layouts})
        for name in layouts:
            slowness[name] += taken[name] / min(taken.values())
    return next(name for name in layouts if slowness[name] <= _WORTH_RATIO * min(slowness.values()))


def _fills_panels(n: int) -> bool:
    from .panels import padding_ratio

    return padding_ratio(n) <= _MOST_PADDING_RATIO


def _trials(weight: Tensor, layout: Layout, m: int) -> list[Callable[[], object]]:
    """Return equal calls, each with a copy of the weight."""
    n, k = weight.shape
    # A part of a large weight tells enough.
    weight = weight[: matmul_choice.measured_columns(n, k * weight.element_size())]
    n = weight.shape[0]
    m = matmul_choice.measured_rows(m, n, k)
    # Ones, because drawing numbers would change what the caller draws next.
    x, out = weight.new_ones(m, k), weight.new_empty(m, n)
    count = matmul_choice.copies_for(weight.nbytes)
    return [PreparedWeight(weight.clone(), layout).bind(x, out).run for _ in range(count)]


def _check(name: str, tensor: Tensor, shape: tuple[int | None, int], dtype: torch.dtype, device: torch.device) -> None:
    fits = tensor.dim() == 2 and tensor.shape[1] == shape[1] and shape[0] in (None, tensor.shape[0])
    if not fits or tensor.dtype != dtype or tensor.device != device or not _has_rows(tensor):
        rows = "M" if shape[0] is None else shape[0]
        raise InputError(
            f"PreparedWeight.bind: {name} must be [{rows}, {shape[1]}] of {dtype} on {device} with adjacent elements in a row, "
            f"got {list(tensor.shape)} of {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        )


def _has_rows(matrix: Tensor) -> bool:
    """Whether the elements of each row are adjacent and rows do not overlap."""
    m, n = matrix.shape
    return (n <= 1 or matrix.stride(1) == 1) and (m <= 1 or matrix.stride(0) >= n)


def _is_sgemm(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[1] > 0


def _fits_blas(*matrices: Tensor) -> bool:
    return all(size <= mkl.LARGEST_INT for t in matrices for size in (*t.shape, *t.stride()))


def _native(call: mkl.NativeCall) -> Product:
    return Product(call.run, call.with_pointers, call)


def _with_tensors(function: Callable[..., object], *tensors: Tensor) -> Product:
    """Return a product that a function of tensors computes."""

    def rebind(*pointers: int) -> None:
        function(*(_at(pointer, like) for pointer, like in zip(pointers, tensors, strict=True)))

    return Product(functools.partial(function, *tensors), rebind)


def _nothing(*pointers: int) -> None:
    pass


def _mm(matrix: Tensor, padding: int, accumulate: bool, x: Tensor, out: Tensor) -> None:
    x = pad(x, (0, padding)) if padding else x
    if accumulate:
        out.addmm_(x, matrix)
    else:
        torch.mm(x, matrix, out=out)


def _onednn(weight: Tensor, padding: int, accumulate: bool, x: Tensor, out: Tensor) -> None:
    x = pad(x, (0, padding)) if padding else x
    if accumulate:
        out.copy_(torch.ops.mkldnn._linear_pointwise.binary(x, out, weight, None, "add"))
    else:
        out.copy_(torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], ""))


def _batched(function: Callable[..., Tensor], padding: int, a: Tensor, b: Tensor, out: Tensor) -> None:
    if padding:
        a, b = pad(a, (0, padding)), pad(b, (0, 0, 0, padding))
    function(a, b, out=out)


def _padding(operand: Tensor, k: int) -> int:
    """Return how many zeros to append to the K elements of a sum.

    On CPUs with AMX, oneDNN up to 3.14 reads rows of bfloat16 to the next multiple of 32 and multiplies what lies there by
    zeros, so that a NaN in the next row or between rows gets into this one (its issue 5717).
    """
    return -k % _AMX_ELEMENTS if operand.dtype in _HALVES and operand.device.type == "cpu" and k > _AMX_ELEMENTS else 0


def _flatten(tensor: Tensor) -> Tensor | None:
    """Return a view with one batch dimension, if there is one."""
    try:
        return tensor.view(-1, *tensor.shape[-2:])
    except RuntimeError:
        return None


class _Memory:
    """Memory of a CUDA device, in the form that `torch.as_tensor` takes."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 3}


def _at(pointer: int, like: Tensor) -> Tensor:
    """Return a tensor over memory that starts at an address, with the shape, strides and dtype of another tensor."""
    reach = sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True)) + 1
    size = reach * like.element_size() if like.numel() else 0
    if size == 0:
        return torch.empty_like(like)
    if like.device.type == "cpu":
        flat = torch.frombuffer((ctypes.c_char * size).from_address(pointer), dtype=like.dtype)
    else:
        flat = torch.as_tensor(_Memory(pointer, size), device=like.device).view(like.dtype)
    return flat.as_strided(like.shape, like.stride())
