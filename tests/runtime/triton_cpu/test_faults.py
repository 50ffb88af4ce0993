"""What a failing kernel reports."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from graphwright.runtime.triton_cpu import KernelFault, prepare
from graphwright.runtime.triton_cpu.faults import OUT_OF_MEMORY, Extent, FaultRecord, fault_error
from graphwright.runtime.triton_cpu.generated import Site

REPORT = """, ptr %count, i32 %bad) #0 {
  %old = atomicrmw add ptr %count, i32 1 monotonic
  %fails = icmp sge i32 %pid0, %bad
  br i1 %fails, label %fail, label %done
fail:
  %address = zext i32 %pid0 to i64
  call void @report_fault(ptr %fault, i32 0, i32 %pid0, i32 %pid1, i32 %pid2, i64 %address)
  br label %done
done:
  ret void
}
"""


@triton.jit
def assert_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.device_assert(x < 10, "x must be small")
    tl.store(x_ptr + offsets, x + 1)


@triton.jit
def copy_kernel(x_ptr, y_ptr, shift, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets + shift))


@triton.jit
def copy_from_address_kernel(table_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))


@triton.jit
def print_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.device_print("value", tl.load(x_ptr + tl.arange(0, BLOCK)))


def line_of(kernel: object, text: str) -> str:
    """Return 'file:line' of the line of a kernel that contains a text."""
    source = kernel.raw_src
    return f"{__file__}:{kernel.starting_line_number + next(k for k, line in enumerate(source) if text in line)}"


def test_first_fault_wins_and_the_rest_does_not_start(ir_kernel):
    """One record is written, with the place of the first fault, and remaining programs are not started."""
    kernel = ir_kernel(REPORT, ("ptr", "i32"), sites=[Site("load", "f.py:1")])
    count = torch.zeros(1, dtype=torch.int32)
    record = kernel.run((1000, 1, 1), 1, count.data_ptr(), 5)
    assert (record.state, record.site, list(record.program), record.address) == (1, 0, [5, 0, 0], 5)
    assert count.item() == 6
    count.zero_()
    record = kernel.run((100_000, 1, 1), 2, count.data_ptr(), 0)
    assert record.state == 1
    assert count.item() < 100


def test_messages_name_kernel_line_and_program():
    """Each kind of fault says where it happened and what to know about it."""
    record = FaultRecord(state=1, site=1, program=(3, 2, 1), address=1000)
    sites = (Site("assert", "f.py:7", "no luck"), Site("store", "f.py:9"))
    assert str(fault_error(record, "k", sites, [Extent("far", 0, 8), Extent("near", 1100, 1200)])) == (
        "k: store outside the tensors of the launch in program (3, 2, 1) at f.py:9: address 0x3e8 is at byte offset -100 of "
        "'near', the nearest tensor, which has 100 bytes"
    )
    record.site = 0
    message = str(fault_error(record, "k", sites))
    assert message == "k: device-side assertion failed in program (3, 2, 1) at f.py:7: no luck"
    record.site, record.address = OUT_OF_MEMORY, 1 << 40
    assert "out of memory" in str(fault_error(record, "k", sites))
    record.site = 5
    assert "site 5 of 2" in str(fault_error(record, "k", sites))


def test_unobtainable_scratch_is_a_fault(ir_kernel):
    """Programs do not run when there is no memory for their scratch buffer."""
    count = torch.zeros(1, dtype=torch.int32)
    record = ir_kernel(REPORT, ("ptr", "i32"), scratch_bytes=1 << 60).run((4, 1, 1), 2, count.data_ptr(), 9)
    assert (record.state, record.site, count.item()) == (1, OUT_OF_MEMORY, 0)


def test_device_assert_is_off_by_default():
    """Without debug an assertion costs and says nothing."""
    x = torch.full((64,), 20.0)
    assert_kernel[(1,)](x, BLOCK=64)
    assert bool((x == 21).all())


@pytest.mark.parametrize("prepared", [False, True])
def test_device_assert_raises_in_debug_mode(prepared):
    """A failed assertion raises with kernel, line, program and message, and the next launch is as good as ever."""
    x = torch.zeros(256)
    x[130] = 20.0
    launch = prepare(assert_kernel, (4,), x, BLOCK=64, debug=True)
    run = launch if prepared else lambda: assert_kernel[(4,)](x, BLOCK=64, debug=True)
    with pytest.raises(KernelFault) as caught:
        run()
    message = str(caught.value)
    assert message.startswith("assert_kernel: device-side assertion failed in program (2, 0, 0)")
    assert message.endswith("x must be small")
    assert line_of(assert_kernel, "tl.device_assert") in message
    x.zero_()
    launch()
    assert bool((x == 1).all())


def test_debug_environment_variable(run_python):
    """TRITON_DEBUG=1 turns assertions on, as upstream."""
    script = """import torch, triton, triton.language as tl
@triton.jit
def kernel(x_ptr):
    tl.device_assert(tl.load(x_ptr) > 0, "positive")
try:
    kernel[(1,)](torch.zeros(1))
except RuntimeError as error:
    print("positive" in str(error))
"""
    assert run_python(script, TRITON_DEBUG="1") == "True\n"


def test_overflow_is_reported_in_debug_mode():
    """With debug, integer overflow is asserted against, and can be left out."""

    @triton.jit
    def kernel(x_ptr, y_ptr):
        tl.store(y_ptr, tl.load(x_ptr) + tl.load(x_ptr))

    x, y = torch.full((1,), 2**31 - 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    kernel[(1,)](x, y)
    kernel[(1,)](x, y, debug=True, sanitize_overflow=False)
    assert y.item() == -2
    with pytest.raises(KernelFault, match="overflow"):
        kernel[(1,)](x, y, debug=True)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("shift", "place"), [(40, "offset 512 of 'x_ptr'"), (-1, "offset -4 of 'x_ptr'")])
def test_checked_load(prepared, shift, place):
    """A load outside the tensors raises in checked mode, although the memory behind the view exists."""
    base = torch.arange(512, dtype=torch.float32)
    x, y = base[128:256], torch.zeros(128)
    launch = prepare(copy_kernel, (2,), x, y, shift, BLOCK=64, checked=True)
    run = launch if prepared else lambda: copy_kernel[(2,)](x, y, shift, BLOCK=64, checked=True)
    with pytest.raises(KernelFault) as caught:
        run()
    assert "copy_kernel: load outside the tensors" in str(caught.value)
    assert place in str(caught.value)
    assert line_of(copy_kernel, "tl.store") in str(caught.value)


def test_checked_store():
    """A store outside the tensors raises and does not reach memory."""
    base = torch.zeros(256)
    with pytest.raises(KernelFault, match=r"store outside .* offset 256 of 'y_ptr'"):
        copy_kernel[(2,)](torch.ones(128), base[:64], 0, BLOCK=64, checked=True)
    assert not base[64:].any()


def test_checked_launch_within_bounds():
    """A correct kernel computes the same in checked mode, through every launch path."""
    x, y = torch.randn(128), torch.zeros(128)
    copy_kernel[(2,)](x, y, 0, BLOCK=64, checked=True)
    assert torch.equal(x, y)
    launch = prepare(copy_kernel, (2,), x, y, 0, BLOCK=64, checked=True)
    other, out = torch.randn(128), torch.zeros(128)
    launch(other, out)
    assert torch.equal(other, out)
    launch(x, out, 0)
    assert torch.equal(x, out)
    with pytest.raises(TypeError, match=r"prepared for 0, 2 \(the tensors\) or 3 arguments, got 1"):
        launch(x)
    with pytest.raises(KernelFault):
        launch(x[:64], out)


def test_checked_launch_with_a_raw_address():
    """A launch with a raw address has nothing to compare with, and is not checked."""
    x, y = torch.randn(192), torch.zeros(128)
    prepare(copy_kernel, (2,), x, y, 64, BLOCK=64, checked=True)(x.data_ptr(), y, 64)
    assert torch.equal(y, x[64:])


def test_checked_kernel_that_makes_pointers():
    """A kernel that turns integers into pointers reaches memory that the launch cannot know, and is not checked."""
    x, y = torch.randn(64), torch.zeros(64)
    copy_from_address_kernel[(1,)](torch.tensor([x.data_ptr()]), y, BLOCK=64, checked=True)
    assert torch.equal(x, y)


def test_checked_extent_spans_a_strided_view():
    """The extent of a view reaches to its last element, gaps included."""
    base = torch.arange(256, dtype=torch.float32)
    y = torch.zeros(64)
    copy_kernel[(1,)](base[::2][:33], y, 0, BLOCK=64, checked=True)
    assert torch.equal(y, base[:64])
    with pytest.raises(KernelFault):
        copy_kernel[(1,)](base[::2][:32], y, 0, BLOCK=64, checked=True)


def test_checked_environment_variable(run_python):
    """TRITON_CPU_CHECKED=1 turns checking on, and unchecked code in the cache is not taken for checked."""
    script = """import torch, triton, triton.language as tl
@triton.jit
def kernel(x_ptr):
    tl.store(x_ptr + 1, 1.0)
x = torch.zeros(2)
try:
    kernel[(1,)](x[:1])
    print("ran")
except RuntimeError as error:
    print("outside" in str(error))
"""
    assert run_python(script) == "ran\n"
    assert run_python(script, TRITON_CPU_CHECKED="1") == "True\n"


def test_print_reaches_standard_output_before_the_launch_returns(capfd):
    """What a kernel prints is on the descriptor when the launch returns."""
    print_kernel[(1,)](torch.tensor([5, 7], dtype=torch.int32), BLOCK=2)
    out = capfd.readouterr().out
    assert "value" in out
    assert "5" in out
    assert "7" in out
