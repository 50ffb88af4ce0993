"""Weights in panels: float32 on the CPU, multiplied by compiled code that fetches the weight while it multiplies."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap

import torch
from torch import Tensor

from .matmul_choice import second_level_cache_bytes
from .mkl import Address, NativeCall, row_stride
from .triton_cpu.panel_product import panel_product

_HUGE_PAGE_BYTES = 2 << 20


class PanelMatrix:
    """A weight in panels, which serves every number of rows and of threads.

    Args:
        weight: [N, K], float32, on the CPU, N and K at least 1.
    """

    __slots__ = ("_panels", "_product", "shape")

    def __init__(self, weight: Tensor) -> None:
        product = panel_product(weight.shape[0])
        if product is None:
            raise RuntimeError("PanelMatrix: there is no product by panels for this CPU")
        n, k = weight.shape
        self._product, self.shape = product, (n, k)
        whole, rest = divmod(n, product.width)
        self._panels = _empty(whole + (rest > 0), k, product.width)
        self._panels[:whole] = weight[: n - rest].reshape(whole, product.width, k).transpose(1, 2)
        if rest:
            self._panels[whole, :, :rest] = weight[n - rest :].t()
            self._panels[whole, :, rest:] = 0.0

    @property
    def bytes(self) -> int:
        """Memory of the panels, with what fills up the last."""
        return self._panels.nbytes

    def bind(self, x: Tensor, out: Tensor, *, accumulate: bool) -> NativeCall:
        """Return the call out[M, N] = x[M, K] weight^T, or += where it accumulates; rows of x and out are contiguous."""
        n, k = self.shape
        plan = self._product.plan(
            *(x.shape[0], n, k),
            x_stride=row_stride(x),
            out_stride=row_stride(out),
            accumulate=accumulate,
            cache_bytes=second_level_cache_bytes(),
        )
        address = Address(ctypes.addressof(plan))
        address.owner = plan
        operands = (Address.of(x), Address.of(out), Address.of(self._panels), address)
        return NativeCall(functools.partial(self._product.call, *operands), x_position=0, out_position=1)

    def unpack(self) -> Tensor:
        """Return the weight, [N, K], every element as it was."""
        n, _ = self.shape
        return self._panels.transpose(1, 2).flatten(0, 1)[:n].contiguous()


def can_panel() -> bool:
    """Whether there are products by panels for this CPU."""
    return panel_product(1) is not None


def padding_ratio(n: int) -> float:
    """Return what fills up the last panel of a weight of `n` rows, as a part of the weight."""
    product = panel_product(n)
    return -n % product.width / n if product else 0.0


def _empty(*shape: int) -> Tensor:
    """Return new memory, float32; much of it in large pages, where the system has some, because products visit every page."""
    count = math.prod(shape)
    if 4 * count < _HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape)
    memory = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32, count=count).view(shape)
