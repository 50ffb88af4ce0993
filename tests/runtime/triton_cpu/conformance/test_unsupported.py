"""What the backend does not lower raises one clear error that names it, with the kernel's source line where known."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import triton
import triton.language as tl
from conformance_kernels import module_from

pytestmark = pytest.mark.compiled


def compile_error(kernel, *arguments, **constants):
    """Launch a kernel that must not compile and return the backend's error."""
    from graphwright.runtime.triton_cpu.errors import UnsupportedError

    with pytest.raises((UnsupportedError, triton.TritonError)) as caught:
        kernel[(1,)](*arguments, **constants)
    error = caught.value
    while error is not None and not isinstance(error, UnsupportedError):
        error = error.__cause__ or error.__context__
    assert error is not None, f"no UnsupportedError behind {caught.value!r}"
    return error


UNSUPPORTED = {
    "inline assembly": (
        """    y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out + i, y)""",
        r"elementwise_inline_asm|inline_asm",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_operations(name, buffers, covers):
    """The error names the operation and the line of the kernel's source."""
    covers(name, "any", supported=False)
    body, pattern = UNSUPPORTED[name]
    module = module_from(f"@triton.jit\ndef kernel(out, N: tl.constexpr):\n    i = tl.arange(0, N)\n    x = i + 1\n{body}\n")
    out = buffers.empty(32, "int32")
    before = out.clone()
    error = compile_error(module.kernel, out, N=32)
    assert re.search(pattern, str(error)), str(error)
    assert re.search(rf"{re.escape(module.__name__)}\.py:\d+", str(error)), str(error)
    line = int(re.search(r"\.py:(\d+)", str(error))[1])
    text = Path(module.__file__).read_text().splitlines()[line - 1]
    assert re.search(r"inline_asm", text), text
    assert (out == before).all()


def test_map_elementwise_in_packs_larger_than_the_tensor(buffers, covers):
    """`map_elementwise` of more elements at a time than there are is refused by name, with the line that calls it."""
    covers("map_elementwise in packs larger than the tensor", "any", supported=False)
    module = module_from("""@triton.jit
def same(a, b, c, d):
    return a, b, c, d


@triton.jit
def kernel(out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.map_elementwise(same, i, pack=4)[0])
""")
    error = compile_error(module.kernel, buffers.empty(2, "int32"), N=2)
    assert "map_elementwise that takes 4 of 2 elements" in str(error)
    line = int(re.search(rf"{re.escape(module.__name__)}\.py:(\d+)", str(error))[1])
    assert "map_elementwise" in Path(module.__file__).read_text().splitlines()[line - 1]


def test_loops_in_mapped_functions(buffers, covers):
    """A loop in a function of scalars is refused by name, with its own line."""
    covers("map_elementwise with loops", "any", supported=False)
    module = module_from("""@triton.jit
def halve(a):
    while a > 3:
        a = a // 2
    return a


@triton.jit
def kernel(out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.map_elementwise(halve, i))
""")
    error = compile_error(module.kernel, buffers.empty(16, "int32"), N=16)
    assert "scf.while" in str(error)
    line = int(re.search(rf"{re.escape(module.__name__)}\.py:(\d+)", str(error))[1])
    assert "while" in Path(module.__file__).read_text().splitlines()[line - 1]


def test_unknown_libdevice_functions(buffers, covers):
    """A libdevice function without a counterpart is refused by its symbol, with the line that calls it."""
    covers("libdevice.add_rd", "float32", supported=False)
    module = module_from(
        "@triton.jit\ndef kernel(out, x, N: tl.constexpr):\n    i = tl.arange(0, N)\n    value = tl.load(x + i)\n"
        "    tl.store(out + i, libdevice.add_rd(value, value))\n"
    )
    error = compile_error(module.kernel, buffers.empty(16, "float32"), buffers.put(np.ones(16), "float32"), N=16)
    assert "__nv_fadd_rd" in str(error)
    assert re.search(r"\.py:\d+", str(error)), str(error)


def test_the_error_is_one_of_triton(buffers, covers):
    """What catches Triton's errors catches the backend's refusal, also when it comes from another process."""
    covers("errors", "any")
    body, _ = UNSUPPORTED["inline assembly"]
    kernel = module_from(f"@triton.jit\ndef kernel(out, N: tl.constexpr):\n    i = tl.arange(0, N)\n    x = i\n{body}\n").kernel
    with pytest.raises(triton.TritonError) as caught:
        kernel[(1,)](buffers.empty(32, "int32"), N=32)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is type(caught.value)
    assert str(copy) == str(caught.value)


def test_a_kernel_after_an_unsupported_one_works(buffers, covers):
    """A refused kernel leaves the process usable."""
    covers("errors", "any")
    body, _ = UNSUPPORTED["inline assembly"]
    bad = module_from(
        f"@triton.jit\ndef kernel(out, N: tl.constexpr):\n    i = tl.arange(0, N)\n    x = i + 2\n{body}\n"
    ).kernel
    for _ in range(2):
        compile_error(bad, buffers.empty(32, "int32"), N=32)
        out = buffers.empty(32, "int32")
        fine_kernel[(1,)](out, N=32)
        assert out.tolist() == list(range(32))


@triton.jit
def fine_kernel(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.arange(0, N))
