"""How arguments reach kernels, through Triton's launch path and through `prepare`."""

from __future__ import annotations

import gc
import math
import struct
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from graphwright.runtime.triton_cpu import BackendError, prepare
from graphwright.runtime.triton_cpu.arguments import float_bits, parameters_of


@triton.jit
def add_kernel(x_ptr, y_ptr, z_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(z_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) + tl.load(y_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def axpy_kernel(x_ptr, BLOCK: tl.constexpr, y_ptr, alpha, z_ptr):
    offsets = tl.arange(0, BLOCK)
    tl.store(z_ptr + offsets, alpha * tl.load(x_ptr + offsets) + tl.load(y_ptr + offsets))


@triton.jit
def store_kernel(out_ptr, value):
    tl.store(out_ptr, value)


@triton.jit
def annotated_kernel(
    out_ptr, a: tl.int8, b: tl.int16, c: tl.uint32, d: tl.int64, e: tl.float16, f: tl.bfloat16, g: tl.float64, h: tl.int1
):
    tl.store(out_ptr + 0, a.to(tl.float64))
    tl.store(out_ptr + 1, b.to(tl.float64))
    tl.store(out_ptr + 2, c.to(tl.float64))
    tl.store(out_ptr + 3, d.to(tl.float64))
    tl.store(out_ptr + 4, e.to(tl.float64))
    tl.store(out_ptr + 5, f.to(tl.float64))
    tl.store(out_ptr + 6, g.to(tl.float64))
    tl.store(out_ptr + 7, h.to(tl.float64))


@triton.jit
def tuple_kernel(pair, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(pair[0] + offsets) * pair[1] + tl.load(pair[2][0] + offsets))


@triton.jit
def descriptor_kernel(source, row, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets[:, None] * BLOCK + offsets[None, :], source.load([row, 4]))


@triton.jit
def optional_kernel(x_ptr, bias_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offsets)
    tl.store(out_ptr + offsets, x)


@triton.jit
def grid_kernel(out_ptr):
    z, y, x = tl.program_id(2), tl.program_id(1), tl.program_id(0)
    tl.store(out_ptr + (z * tl.num_programs(1) + y) * tl.num_programs(0) + x, x + 10 * y + 100 * z)


def vectors(n: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(n), torch.randn(n), torch.zeros(n)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (0, torch.int32), (7, torch.int32), (16, torch.int32), (-3, torch.int32), (2**31 - 1, torch.int32),
        (-(2**31), torch.int32), (2**31, torch.int64), (-(2**63), torch.int64), (2**63 - 1, torch.int64),
        (-1, torch.int64), (True, torch.int32), (False, torch.int32),
        (1.5, torch.float32), (-0.0, torch.float32), (-1.0, torch.float32), (math.inf, torch.float32),
    ],
)  # fmt: skip
def test_scalars(value, dtype):
    """Integers, booleans and floats of every size arrive as they are."""
    out = torch.full((1,), 99, dtype=dtype)
    store_kernel[(1,)](out, value)
    assert out.item() == value


def test_unsigned_64_bit_scalar():
    """An integer beyond the signed range arrives as its bits."""
    out = torch.zeros(1, dtype=torch.int64)
    store_kernel[(1,)](out, 2**64 - 5)
    assert out.item() == -5


def test_annotated_scalars():
    """Parameters with a declared type are converted to it."""
    out = torch.zeros(8, dtype=torch.float64)
    annotated_kernel[(1,)](out, -5, 300, 2**32 - 2, -(2**40), 1.2, 1.01, 0.1, True)
    expected = [-5, 300, 2**32 - 2, -(2**40)]
    expected += [torch.tensor(1.2).half().item(), torch.tensor(1.01).bfloat16().item(), 0.1, 1]
    assert out.tolist() == expected


def test_scalar_that_does_not_fit():
    """A number beyond its declared type is an error that names the parameter."""
    with pytest.raises(OverflowError, match=r"argument 'a': 1000 does not fit i8"):
        annotated_kernel[(1,)](torch.zeros(8, dtype=torch.float64), 1000, 0, 0, 0, 0.0, 0.0, 0.0, False)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 65519.0, 1e-8, 1e30, -1e39, math.inf, -math.inf])
def test_half_precision_bits(value):
    """Half-precision arguments are rounded to nearest, as torch does."""
    for element, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        bits = torch.tensor(value, dtype=torch.float64).to(torch.float32).to(dtype).view(torch.int16).item() & 0xFFFF
        assert float_bits(element, value) == bits, element


def test_half_precision_nan():
    """A NaN stays one."""
    assert float_bits("bf16", math.nan) & 0x7FFF > 0x7F80
    assert float_bits("f16", math.nan) & 0x7FFF > 0x7C00
    assert float_bits("f64", 2.5) == struct.unpack("<Q", struct.pack("<d", 2.5))[0]


def test_constants_between_the_arguments():
    """Compile-time arguments are left out wherever they stand."""
    x, y, z = vectors()
    axpy_kernel[(1,)](x, 64, y, 2.0, z)
    assert torch.equal(z, 2 * x + y)


def test_none_is_a_constant():
    """A pointer may be None."""
    x, y, z = vectors()
    optional_kernel[(1,)](x, None, z, BLOCK=64)
    assert torch.equal(z, x)
    optional_kernel[(1,)](x, y, z, BLOCK=64)
    assert torch.equal(z, x + y)


def test_tuples_are_opened():
    """Tuples of tensors and numbers, nested too, reach the kernel."""
    x, y, z = vectors(16)
    tuple_kernel[(1,)]((x, 2.0, (y,)), z, BLOCK=16)
    assert torch.equal(z, x * 2 + y)


@pytest.mark.parametrize("checked", [False, True])
def test_tensor_descriptors_are_opened(checked):
    """A tensor descriptor made on the host reaches the kernel."""
    source, out = torch.arange(64.0).reshape(8, 8), torch.zeros(4, 4)
    descriptor_kernel[(1,)](TensorDescriptor.from_tensor(source, [4, 4]), 2, out, BLOCK=4, checked=checked)
    assert torch.equal(out, source[2:6, 4:])


def test_reinterpreted_tensor():
    """A tensor under another dtype is read as that dtype."""
    x, z = torch.full((64,), 2.0).view(torch.int32), torch.zeros(64, dtype=torch.int32)
    x, z = triton.reinterpret(x, tl.float32), triton.reinterpret(z, tl.float32)
    add_kernel[(1,)](x, x, z, 64, BLOCK=64)
    assert z.base.view(torch.float32).tolist() == [4.0] * 64
    prepare(add_kernel, (1,), z, x, z, 64, BLOCK=64)()
    assert z.base.view(torch.float32).tolist() == [6.0] * 64


@pytest.mark.parametrize("grid", [(5,), (5, 3), (5, 3, 2), [5, 3, 2]])
def test_grids(grid):
    """Grids of one to three directions run with the right program ids."""
    shape = (*grid, 1, 1)[:3][::-1]
    out = torch.zeros(shape, dtype=torch.int32)
    grid_kernel[grid](out)
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.int32) for n in shape), indexing="ij")
    assert torch.equal(out, x + 10 * y + 100 * z)


def test_callable_grid():
    """A grid may be computed from the arguments."""
    x, y, z = vectors(100)
    add_kernel[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, y, z, 100, BLOCK=32)
    assert torch.equal(z, x + y)


def test_empty_grid_runs_nothing():
    """A grid with a zero runs no program, and is no error."""
    x, y, z = vectors()
    add_kernel[(0,)](x, y, z, 64, BLOCK=64)
    add_kernel[(3, 0, 2)](x, y, z, 64, BLOCK=64)
    prepare(add_kernel, (0,), x, y, z, 64, BLOCK=64)()
    assert not z.any()


@pytest.mark.parametrize("grid", [(-1,), (2**31,), (1, -5, 1), (2**31 - 1, 2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("checked", [False, True])
def test_grid_out_of_range(grid, checked):
    """A grid beyond 31 bits in a direction, or negative, is an error."""
    x, y, z = vectors()
    with pytest.raises(ValueError, match="grid"):
        add_kernel[grid](x, y, z, 64, BLOCK=64, checked=checked)


def test_grid_of_the_wrong_type():
    """A grid of other than integers is an error."""
    with pytest.raises(TypeError, match="float"):
        add_kernel[(1.5,)](*vectors(), 64, BLOCK=64)


@pytest.mark.parametrize("checked", [False, True])
def test_tensor_elsewhere_is_refused(checked):
    """A tensor that is not on the CPU is an error that says where it is and what to do."""
    x, y, _ = vectors()
    z = torch.zeros(64, device="meta")
    launch = prepare(add_kernel, (1,), x, y, torch.zeros(64), 64, BLOCK=64, checked=checked)
    with pytest.raises(ValueError, match=r"argument 'z_ptr': is on meta.*\.cpu\(\)"):
        launch(x, y, z)
    with pytest.raises(ValueError, match=r"argument 'z_ptr': is on meta"):
        add_kernel[(1,)](x, y, z, 64, BLOCK=64, checked=checked)


def test_hooks_surround_the_launch():
    """Launch hooks get the launch metadata, before and after the kernel has run."""
    x, y, z = vectors()
    seen = []

    def enter(metadata: object) -> None:
        seen.append((metadata.get()["name"], bool(z.any())))

    def leave(metadata: object) -> None:
        seen.append((metadata.get()["name"], torch.equal(z, x + y)))

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.launch_enter_hook = enter
        triton.knobs.runtime.launch_exit_hook = leave
        add_kernel[(1,)](x, y, z, 64, BLOCK=64)
    names = {name.split(".")[-1] for name, _ in seen}
    assert names == {"add_kernel"}
    assert [state for _, state in seen] == [False, True]


def test_error_in_a_hook_reaches_the_caller():
    """An exception of a hook is the launch's, and an enter hook's keeps the kernel from running."""
    x, y, z = vectors()

    def fail(metadata: object) -> None:
        raise LookupError("hook")

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.launch_enter_hook = fail
        with pytest.raises(LookupError):
            add_kernel[(1,)](x, y, z, 64, BLOCK=64)
    assert not z.any()


def test_references_are_balanced():
    """Launches, successful or not, neither keep nor lose references to arguments."""
    x, y, z = vectors()
    launch = prepare(add_kernel, (1,), x, y, z, 64, BLOCK=64)
    big = 10**15
    gc.collect()
    objects = (x, y, z, None, True, big, launch, x.dtype)
    before = [sys.getrefcount(o) for o in objects]
    for _ in range(500):
        add_kernel[(1,)](x, y, z, 64, BLOCK=64)
        launch()
        launch(x, y, z)
        launch(x, y, z, 64)
        for wrong in ((x, y), (x, y, "z"), (x, y, z, big), (x, y, z, None), (x[1:], y, z)):
            with pytest.raises((TypeError, ValueError, OverflowError)):
                launch(*wrong)
    gc.collect()
    after = [sys.getrefcount(o) for o in objects]
    assert all(abs(a - b) < 100 for a, b in zip(before, after, strict=True)), (before, after)


def test_prepared_launch_repeats():
    """A prepared launch reads its tensors anew each time."""
    x, y, z = vectors()
    launch = prepare(add_kernel, (1,), x, y, z, 64, BLOCK=64)
    assert launch.grid == (1, 1, 1)
    assert "add_kernel" in repr(launch)
    for _ in range(3):
        x.normal_()
        launch()
        assert torch.equal(z, x + y)
    x.set_(torch.randn(64))
    launch()
    assert torch.equal(z, x + y)


def test_prepared_launch_takes_other_arguments():
    """A prepared launch takes other tensors, or all arguments anew."""
    launch = prepare(add_kernel, (1,), *vectors(), 64, BLOCK=64)
    x, y, z = vectors()
    launch(x, y, z)
    assert torch.equal(z, x + y)
    z.zero_()
    launch(x, y, z, 32)
    assert torch.equal(z[:32], (x + y)[:32])
    assert not z[32:].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y, z: (x, y), TypeError, r"prepared for 0, 3 \(the tensors\) or 4 arguments, got 2"),
        (lambda x, y, z: (x.double(), y, z), TypeError, r"'x_ptr'.*torch.float32, got torch.float64"),
        (lambda x, y, z: (x, y, z[1:]), ValueError, r"'z_ptr'.*divisible by 16"),
        (lambda x, y, z: (x, y, z, 7), ValueError, r"'n'.*divisible by 16, got 7"),
        (lambda x, y, z: (x, y, z, 2**40), OverflowError, r"'n'.*does not fit i32"),
        (lambda x, y, z: (x, y, z, 1.5), TypeError, r"'n': expected an integer \(i32\), got float"),
        (lambda x, y, z: (x, y, [1]), TypeError, r"'z_ptr': expected a tensor, an address or None, got list"),
    ],
)
def test_prepared_launch_refuses_what_it_was_not_compiled_for(change, error, message):
    """Other dtypes, alignments and values than the kernel was specialized for are errors, not wrong results."""
    launch = prepare(add_kernel, (1,), *vectors(), 64, BLOCK=64)
    with pytest.raises(error, match=message):
        launch(*change(*vectors()))


def test_prepared_launch_keeps_constants():
    """What Triton turned into a constant has to stay as it is."""
    out = torch.zeros(1, dtype=torch.int32)
    launch = prepare(store_kernel, (1,), out, 1)
    launch(out, 1)
    assert out.item() == 1
    with pytest.raises(ValueError, match=r"'value': the kernel was compiled for 1, got 2"):
        launch(out, 2)
    x, y, z = vectors()
    launch = prepare(axpy_kernel, (1,), x, 64, y, 2.0, z)
    launch(x, 64, y, 5.0, z)
    assert torch.allclose(z, 5 * x + y)
    with pytest.raises(ValueError, match=r"'BLOCK': the kernel was compiled for 64, got 32"):
        launch(x, 32, y, 5.0, z)


def test_prepared_launch_with_a_raw_address():
    """An address stands for a tensor."""
    x, y, z = vectors()
    launch = prepare(add_kernel, (1,), x, y, z, 64, BLOCK=64)
    launch(x.data_ptr(), y, z.data_ptr())
    assert torch.equal(z, x + y)


def test_prepared_launch_of_tuples_repeats_only():
    """A kernel with opened arguments can be launched again, but not with others."""
    x, y, z = vectors(16)
    launch = prepare(tuple_kernel, (1,), (x, 2.0, (y,)), z, BLOCK=16)
    launch()
    assert torch.equal(z, x * 2 + y)
    with pytest.raises(TypeError, match="prepared for 0"):
        launch((x, 2.0, (y,)), z)


def test_prepare_with_a_callable_grid_and_heuristics():
    """Grid functions and heuristics see the arguments."""

    @triton.heuristics({"BLOCK": lambda arguments: triton.next_power_of_2(arguments["n"])})
    @triton.jit
    def kernel(x_ptr, z_ptr, n, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(z_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)

    x, _, z = vectors(100)
    launch = prepare(kernel, lambda meta: (triton.cdiv(100, meta["BLOCK"]),), x, z, 100)
    launch()
    assert launch.grid == (1, 1, 1)
    assert torch.equal(x, z)


def test_prepare_does_not_need_the_active_driver():
    """A kernel can be prepared for the CPU while Triton uses another device."""

    class Elsewhere:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"the active driver was asked for {name}")

    x, y, z = vectors()
    triton.runtime.driver.set_active(Elsewhere())
    prepare(add_kernel, (1,), x, y, z, 64, BLOCK=64)()
    assert torch.equal(z, x + y)


def test_prepare_refuses_other_functions():
    """Only jit functions can be prepared, on grids of one to three directions."""
    with pytest.raises(TypeError, match=r"triton\.jit, got function"):
        prepare(vectors, (1,))
    with pytest.raises(ValueError, match="1 to 3 directions"):
        prepare(add_kernel, (), *vectors(), 64, BLOCK=64)
    with pytest.raises(ValueError, match="each direction"):
        prepare(add_kernel, (-1,), *vectors(), 64, BLOCK=64)


def test_unknown_keyword_is_refused():
    """Options that the backend does not know are errors, as upstream."""
    with pytest.raises(KeyError, match="no_such_option"):
        add_kernel[(1,)](*vectors(), 64, BLOCK=64, no_such_option=1)


def test_signature_and_kernel_must_agree():
    """A call that passes another number of arguments than the compiled kernel takes is refused."""
    with pytest.raises(BackendError, match=r"passes 2 arguments, but the compiled kernel takes 1"):
        parameters_of("k", ["a", "b", "c"], ["*fp32", "constexpr", "i32"], ["ptr"])


@pytest.mark.parametrize("checked", [False, True])
def test_rebound_launch(checked):
    """A launch is bound to another grid and other arguments without compiling again, and the first one stays as it was."""
    launch = prepare(add_kernel, (1,), *vectors(), 64, BLOCK=64, checked=checked)
    x, y, z = vectors(256)
    other = launch.rebind((4,), (x, y, z, 256))
    assert other.compiled is launch.compiled
    assert (launch.grid, other.grid) == ((1, 1, 1), (4, 1, 1))
    other()
    assert torch.equal(z, x + y)
    a, b, c = vectors()
    launch(a, b, c)
    assert torch.equal(c, a + b)


def test_rebound_launch_with_addresses():
    """Addresses stand for tensors, in the launch and in calls of it."""
    x, y, z = vectors(128)
    launch = prepare(add_kernel, (1,), *vectors(), 64, BLOCK=64).rebind((2,), [t.data_ptr() for t in (x, y, z)] + [128])
    launch()
    assert torch.equal(z, x + y)
    z.zero_()
    launch.function(y.data_ptr(), y.data_ptr(), z.data_ptr())
    assert torch.equal(z, y + y)
    with pytest.raises(ValueError, match=r"'z_ptr'.*an address divisible by 16"):
        launch(x.data_ptr(), y.data_ptr(), z.data_ptr() + 4)
    with pytest.raises(TypeError, match=r"'z_ptr': expected a tensor, an address or None, got list"):
        launch(x.data_ptr(), y.data_ptr(), [1])


@pytest.mark.parametrize(
    ("grid", "change", "error", "message"),
    [
        ((1,), lambda x, y, z: (x, y, z), TypeError, "rebinding takes 4 arguments, got 3"),
        ((1,), lambda x, y, z: (x, y.double(), z, 64), TypeError, r"'y_ptr'.*torch.float32, got torch.float64"),
        ((1,), lambda x, y, z: (x, y, z[1:], 48), ValueError, r"'z_ptr'.*divisible by 16"),
        ((1,), lambda x, y, z: (x, y, z, 63), ValueError, r"'n'.*divisible by 16, got 63"),
        ((), lambda x, y, z: (x, y, z, 64), ValueError, r"1 to 3 directions, got \(\)"),
        ((-1,), lambda x, y, z: (x, y, z, 64), ValueError, r"0 to 2147483647 programs, got \(-1,\)"),
    ],
)
def test_rebinding_refuses_what_the_kernel_was_not_compiled_for(grid, change, error, message):
    """Rebinding checks at once what a launch would read wrongly."""
    launch = prepare(add_kernel, (1,), *vectors(), 64, BLOCK=64)
    with pytest.raises(error, match=message):
        launch.rebind(grid, change(*vectors()))
