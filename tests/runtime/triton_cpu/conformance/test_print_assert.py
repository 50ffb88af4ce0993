"""`device_print`, `device_assert`, `static_assert`, `static_print` and `debug`."""

import re
import subprocess
import sys

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_kernels import module_from

pytestmark = pytest.mark.compiled


def printed(capfd, buffers, body, values, dtype="int32", grid=(1,)):
    """Run a kernel that prints and return the lines of its output."""
    kernel = module_from(
        f"@triton.jit\ndef kernel(x_ptr, scalar, N: tl.constexpr):\n    x = tl.load(x_ptr + tl.arange(0, N))\n    {body}\n"
    ).kernel
    kernel[grid](buffers.put(np.array(values), dtype), 5, N=len(values))
    flush()
    return [line for line in capfd.readouterr().out.splitlines() if line.strip()]


def flush():
    """Flush C's standard output, where kernels print."""
    import ctypes

    ctypes.CDLL(None).fflush(None)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [("int32", [1, -2, 3, 2**31 - 1]), ("int8", [1, -2, 3, 127]), ("uint8", [1, 2, 3, 255]), ("int64", [1, -2, 3, 2**62]),
     ("uint32", [1, 2, 3, 2**32 - 1]), ("uint64", [0, 1, 2, 2**64 - 1]), ("int16", [-5, 4, 3, 2])],
)  # fmt: skip
def test_integers_are_printed(dtype, values, capfd, buffers, covers):
    """Each element is printed on a line with the program's and its own indices."""
    covers("device_print", dtype)
    array = np.array(values, dtype=dtype)
    lines = printed(capfd, buffers, 'tl.device_print("value", x)', array, dtype)
    assert len(lines) == len(values)
    assert all("pid (0, 0, 0)" in line and "value" in line for line in lines)
    assert sorted(int(re.search(r"(-?\d+)\s*$", line)[1]) for line in lines) == sorted(values)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_floats_are_printed(dtype, capfd, buffers, covers):
    """Floats are printed in decimals."""
    covers("device_print", dtype)
    lines = printed(capfd, buffers, 'tl.device_print("value: ", x)', [0.5, -1.25, 3.0, 100.0], dtype)
    assert sorted(float(line.split(":")[-1]) for line in lines) == [-1.25, 0.5, 3.0, 100.0]


def test_hexadecimal_scalars_and_text(capfd, buffers, covers):
    """Hexadecimal, scalars, several operands and text alone are printed."""
    covers("device_print", "any")
    lines = printed(capfd, buffers, 'tl.device_print("hex", x, hex=True)', [255, 16])
    assert any(re.search(r"0x0*ff\s*$", line) for line in lines)
    lines = printed(capfd, buffers, 'tl.device_print("only text")', [1], grid=(3,))
    assert sum("only text" in line for line in lines) == 3
    lines = printed(capfd, buffers, 'tl.device_print("scalar", scalar)', [1])
    assert len(lines) == 1
    assert lines[0].rstrip().endswith("5")
    lines = printed(capfd, buffers, 'tl.device_print("two", x, x + 10)', [1, 2])
    assert len(lines) == 4
    lines = printed(capfd, buffers, 'print("builtin", x)', [7])
    assert lines[0].rstrip().endswith("7")


def test_matrices_are_printed_with_both_indices(capfd, buffers, covers):
    """The index of an element of a matrix has two parts."""
    covers("device_print", "any")
    lines = printed(capfd, buffers, 'tl.device_print("m", tl.reshape(x, (2, 2)))', [1, 2, 3, 4])
    assert sorted(re.search(r"idx \((.*?)\)", line)[1].replace(" ", "") for line in lines) == ["0,0", "0,1", "1,0", "1,1"]


ASSERTION = """@triton.jit
def check(x):
    tl.device_assert(x > 0, "x must be positive")


@triton.jit
def kernel(out, x_ptr, n, FORM: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    if FORM == "masked":
        tl.device_assert(x > 0, "x must be positive", mask=mask)
    elif FORM == "scalar":
        tl.device_assert(tl.min(tl.where(mask, x, 1), axis=0) > 0, "x must be positive")
    elif FORM == "function":
        check(tl.where(mask, x, 1))
    else:
        assert tl.min(tl.where(mask, x, 1), axis=0) > 0, "x must be positive"
    tl.store(out + offsets, x, mask=mask)
"""


@pytest.mark.parametrize("form", ["masked", "scalar", "function", "statement"])
def test_assertions_in_debug_mode(form, buffers, covers):
    """With `debug` a false assertion raises an error with its message after the launch; a true one passes."""
    from graphwright.runtime.triton_cpu.errors import KernelFault

    covers("device_assert", "any")
    kernel = module_from(ASSERTION).kernel
    good = buffers.put(np.arange(1, 101), "int32")
    out = buffers.empty(100, "int32")
    kernel[(2,)](out, good, 100, FORM=form, BLOCK=64, debug=True)
    assert out.tolist() == list(range(1, 101))
    bad = buffers.put(np.arange(100), "int32")
    with pytest.raises(KernelFault, match="x must be positive"):
        kernel[(2,)](buffers.empty(100, "int32"), bad, 100, FORM=form, BLOCK=64, debug=True)


def test_assertions_without_debug_mode(buffers, covers):
    """Without `debug` assertions are left out."""
    covers("device_assert", "any")
    out = buffers.empty(100, "int32")
    module_from(ASSERTION).kernel[(2,)](out, buffers.put(np.arange(100), "int32"), 100, FORM="scalar", BLOCK=64, debug=False)
    assert out.tolist() == list(range(100))


def test_a_launch_after_a_failed_one_works(buffers, covers):
    """A failed assertion leaves the process and the kernel usable."""
    from graphwright.runtime.triton_cpu.errors import KernelFault

    covers("device_assert", "any")
    kernel = module_from(ASSERTION).kernel
    for _ in range(2):
        with pytest.raises(KernelFault):
            kernel[(1,)](buffers.empty(4, "int32"), buffers.put(np.zeros(4), "int32"), 4, FORM="masked", BLOCK=4, debug=True)
        out = buffers.empty(4, "int32")
        kernel[(1,)](out, buffers.put(np.ones(4), "int32"), 4, FORM="masked", BLOCK=4, debug=True)
        assert out.tolist() == [1] * 4


OVERFLOW = "@triton.jit\ndef kernel(out, x):\n    tl.store(out, tl.load(x) {op} tl.load(x + 1))\n"


@pytest.mark.parametrize(("op", "a", "b"), [("+", 2**31 - 1, 1), ("-", -(2**31), 1), ("*", 2**20, 2**20)])
def test_overflow_is_found_in_debug_mode(op, a, b, buffers, covers):
    """With `debug` integer overflow raises an error; without it the result wraps."""
    from graphwright.runtime.triton_cpu.errors import KernelFault

    covers("sanitize_overflow", "int32")
    kernel = module_from(OVERFLOW.format(op=op)).kernel
    x = buffers.put(np.array([a, b]), "int32")
    with pytest.raises(KernelFault, match="overflow"):
        kernel[(1,)](buffers.empty(1, "int32"), x, debug=True)
    kernel[(1,)](buffers.empty(1, "int32"), x, debug=True, sanitize_overflow=False)
    kernel[(1,)](buffers.empty(1, "int32"), buffers.put(np.array([3, 4]), "int32"), debug=True)


def test_static_assertions(buffers, covers):
    """A false `static_assert` is a compile-time error with its message."""
    covers("static_assert", "any")
    kernel = module_from(
        '@triton.jit\ndef kernel(out, N: tl.constexpr):\n    tl.static_assert(N > 3, "N is too small")\n'
    ).kernel
    kernel[(1,)](buffers.empty(1, "int32"), N=4)
    with pytest.raises(triton.TritonError, match="N is too small"):
        kernel[(1,)](buffers.empty(1, "int32"), N=2)


def test_static_print(buffers, capfd, covers):
    """`static_print` prints constants while compiling."""
    covers("static_print", "any")
    kernel = module_from('@triton.jit\ndef kernel(out, N: tl.constexpr):\n    tl.static_print("block of", N)\n').kernel
    kernel[(1,)](buffers.empty(1, "int32"), N=48)
    assert "block of 48" in capfd.readouterr().out


@triton.jit
def print_many_kernel(x, N: tl.constexpr):
    tl.device_print("item ", tl.load(x + tl.program_id(0) * N + tl.arange(0, N)))


def test_lines_of_many_programs_stay_whole(buffers, capfd, covers):
    """Programs that print at the same time do not mix their lines."""
    covers("device_print", "any")
    print_many_kernel[(32,)](buffers.put(np.arange(512), "int32"), N=16)
    flush()
    lines = [line for line in capfd.readouterr().out.splitlines() if line]
    assert sorted(int(re.fullmatch(r"pid \(\d+, 0, 0\) idx \([ \d]+\) ?item ?:? *(\d+)", line)[1]) for line in lines) == list(
        range(512)
    )


def test_printing_reaches_a_redirected_output(tmp_path, covers):
    """The output of a process that ends normally is complete."""
    covers("device_print", "any")
    script = tmp_path / "prints.py"
    script.write_text(
        "import torch, triton, triton.language as tl\n\n@triton.jit\n"
        "def kernel(x):\n    tl.device_print('seen', tl.load(x))\n\n"
        "kernel[(2,)](torch.tensor([41], dtype=torch.int32))\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=100)
    assert len(re.findall(r"seen:? *41", result.stdout)) == 2
