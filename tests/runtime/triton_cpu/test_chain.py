"""Several launches and C calls as one call from Python."""

from __future__ import annotations

import ctypes
import ctypes.util
import struct
import threading

import pytest
import torch
import triton
import triton.language as tl

from graphwright.runtime.triton_cpu import KernelFault, prepare
from graphwright.runtime.triton_cpu.chain import Chain, call_link


@triton.jit(do_not_specialize=["n"])
def scale_kernel(p_x, p_out, n, factor, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_x + o, mask=o < n) * factor, mask=o < n)


@triton.jit
def positive_kernel(p_x, p_out, BLOCK: tl.constexpr):
    x = tl.load(p_x + tl.arange(0, BLOCK))
    tl.device_assert(x > 0, "not positive")
    tl.store(p_out + tl.arange(0, BLOCK), x)


def scaled(x: torch.Tensor, out: torch.Tensor, factor: float, block: int = 64) -> object:
    return prepare(scale_kernel, (triton.cdiv(x.numel(), block),), x, out, x.numel(), factor, BLOCK=block)


@pytest.mark.parametrize("size", [1, 63, 1000, 100_000])
def test_links_run_in_order(size: int) -> None:
    """Each link sees what those before it have written, with one program and with many."""
    x, y, z = torch.randn(size), torch.full((size,), torch.nan), torch.full((size,), torch.nan)
    chain = Chain([launch.link()[0] for launch in (scaled(x, y, 2.0), scaled(y, z, 3.0), scaled(z, y, 0.5))])
    for _ in range(3):
        y.fill_(torch.nan)
        z.fill_(torch.nan)
        chain.function()
        torch.testing.assert_close(z, x * 6)
        torch.testing.assert_close(y, x * 3)


def test_arguments_can_be_replaced() -> None:
    """A link's addresses and numbers are 8 bytes each in its context."""
    x, out, other = torch.randn(64), torch.zeros(64), torch.zeros(64)
    link, places = scaled(x, out, 2.0).link()
    chain = Chain([link])
    chain.set(0, places[1], other.data_ptr())
    chain.slot(0, places[3]).value = struct.unpack("<I", struct.pack("<f", 5.0))[0]
    chain.function()
    assert not out.any()
    torch.testing.assert_close(other, x * 5)


def test_c_functions_are_links() -> None:
    """A C function is called with its arguments by value and by reference."""
    source, target = torch.arange(16, dtype=torch.float32), torch.zeros(16)
    copy = ctypes.cast(ctypes.CDLL(None).memcpy, ctypes.c_void_p).value
    swap = ctypes.cast(ctypes.CDLL(None).swab, ctypes.c_void_p).value
    link, places = call_link(copy, [("ptr", target.data_ptr()), ("ptr", source.data_ptr()), ("i32", 64)])
    pair = torch.zeros(2, dtype=torch.uint8)
    swapped, _ = call_link(swap, [("ref", 0x1234), ("ptr", pair.data_ptr()), ("i32", 2)])
    chain = Chain([link, swapped])
    chain.function()
    assert torch.equal(source, target)
    assert pair.tolist() == [0x12, 0x34]
    other = torch.ones(16)
    chain.set(0, places[1], other.data_ptr())
    chain.function()
    assert torch.equal(other, target)


def test_a_fault_stops_the_chain_and_names_the_kernel() -> None:
    """The links after a failed one do not run, and the next call starts anew."""
    x, y, z = torch.ones(16), torch.zeros(16), torch.zeros(16)
    guarded = prepare(positive_kernel, (1,), x, y, BLOCK=16, debug=True)
    chain = Chain([scaled(x, x, 1.0).link()[0], guarded.link()[0], scaled(y, z, 2.0).link()[0]])
    x[3] = -1
    with pytest.raises(KernelFault, match="not positive"):
        chain.function()
    assert chain.failed == 1
    assert not z.any()
    x[3] = 1
    chain.function()
    torch.testing.assert_close(z, x * 2)


def test_a_launch_of_nothing_is_no_link() -> None:
    """A grid without programs has no link."""
    x = torch.ones(16)
    assert scaled(x, x, 1.0).rebind((0,), [x, x, 0, 1.0]).link() is None


def test_other_threads_run_meanwhile() -> None:
    """The interpreter's lock is free while a chain runs."""
    x = torch.ones(1 << 22)
    chain = Chain([scaled(x, x, 1.0, block=1024).link()[0] for _ in range(40)])
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    chain.function()
    stop.set()
    thread.join()
    assert counted[0] > 0
