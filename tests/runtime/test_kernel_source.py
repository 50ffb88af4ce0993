"""Kernel sources: what may stand in them, and that nothing else is run."""

from __future__ import annotations

import sys

import pytest

from graphwright.ir.errors import ArtifactError
from graphwright.runtime.kernel_source import check_source, kernel_functions

HEAD = "import triton\nimport triton.language as tl\n\n\n"


def kernel(*lines, parameters="x, n, BLOCK: tl.constexpr", decorator="@triton.jit"):
    body = "".join(f"    {line}\n" for line in lines)
    return f"{HEAD}{decorator}\ndef f({parameters}):\n{body}"


FULL = f'''"""Text about the kernel."""

{HEAD}from triton.language.extra import libdevice

LIMIT: tl.constexpr = tl.constexpr(-1.5)
OTHER = tl.constexpr(float("inf"))


@triton.jit
def add(a, b):
    return a + b


@triton.jit(do_not_specialize=["n"])
def f(x, n, scale=2.0, BLOCK: tl.constexpr = 64):
    """Does things."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(0, tl.cdiv(n, BLOCK)):
        mask = (k < n) & (i >= 0)
        value = tl.load(x + k, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(value > LIMIT, libdevice.exp(value), tl.math.exp2(value))[None, :].reshape([BLOCK])
    if BLOCK > 32 and not n == 3:
        total, other = add(total, 1.0), -total
    else:
        other = total if n > 2 else total * OTHER
    best = tl.reduce(tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL), 0, add)
    tl.static_assert(BLOCK % 2 == 0, "even")
    tl.store(x + k, total + other + best + min(1, 2), mask=k < n)
    WIDTH: tl.constexpr = BLOCK // 2
    tl.store(x + k.to(tl.int64), tl.sum(total, axis=0).to(x.dtype.element_ty), mask=k < WIDTH)
'''


def test_kernels_are_let_through():
    """What generated kernels are made of is allowed, and becomes Triton's functions in order."""
    found = kernel_functions(FULL)
    assert list(found) == ["add", "f"]
    assert found["f"].arg_names == ["x", "n", "scale", "BLOCK"]
    assert found["f"].src.startswith("def f(x, n")


def test_the_same_text_gives_the_same_functions():
    """Equal sources share their functions, so that each is compiled once."""
    assert kernel_functions(FULL)["f"] is kernel_functions(FULL)["f"]
    assert kernel_functions(FULL)["f"] is not kernel_functions(FULL + "\n")["f"]


def test_the_kernels_of_the_tools_are_let_through(root):
    """Hand-written kernels of the project that fit the form pass too, down to attention."""
    for name in ("softmax", "norm"):
        text = (root / "tools" / "kernels" / f"{name}.py").read_text()
        start = text.index("@triton.jit")
        check_source(HEAD + text[start : text.index("\n\n\n", start)])


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("import os\n" + kernel("pass"), 1),
        ("import triton as t\n" + kernel("pass"), 1),
        ("from triton import language\n" + kernel("pass"), 1),
        ("from os import *\n" + kernel("pass"), 1),
        (HEAD + "print(1)\n", 5),
        (HEAD + "X = 3\n" + kernel("pass"), 5),
        (HEAD + "X: tl.constexpr = tl.constexpr(open('x'))\n" + kernel("pass"), 5),
        (HEAD + "X: print(1) = tl.constexpr(1)\n" + kernel("pass"), 5),
        (HEAD + "class A:\n    pass\n", 5),
        (HEAD + "async def f():\n    pass\n", 5),
        (HEAD + "def f(x):\n    pass\n", 5),
        (HEAD + "tl = 3\n", 5),
        (kernel("pass", decorator="@triton.jit\n@print"), 7),
        (kernel("pass", decorator="@triton.jit(debug=print(1))"), 6),
        (kernel("pass", decorator="@triton.autotune([], [])"), 6),
        (kernel("pass", parameters="x=print(1)"), 6),
        (kernel("pass", parameters="x: print(1)"), 6),
        (kernel("pass", parameters="*x"), 6),
        (kernel("pass", parameters="x, *, y"), 6),
        (kernel("pass", parameters="tl"), 6),
        (kernel("import os"), 7),
        (kernel("from os import path"), 7),
        (kernel("open('x')"), 7),
        (kernel("eval('1')"), 7),
        (kernel("getattr(x, 'y')"), 7),
        (kernel("x.__class__"), 7),
        (kernel("x._private"), 7),
        (kernel("x.handle.erase()"), 7),
        (kernel("tl.core.os.system('x')"), 7),
        (kernel("tl.semantic"), 7),
        (kernel("tl.inline_asm_elementwise('x', 'y', [x], tl.int32, True, 1)"), 7),
        (kernel("tl.extra.cuda.libdevice.exp(x)"), 7),
        (kernel("triton.runtime"), 7),
        (kernel("triton.testing.do_bench(x)"), 7),
        (kernel("y = tl", "y.core"), 7),
        (kernel("y = triton"), 7),
        (kernel("libdevice.exp(x)"), 7),
        (kernel("tl.load = 3"), 7),
        (kernel("f = 3"), 7),
        (kernel("triton = 3"), 7),
        (kernel("lambda: 1"), 7),
        (kernel("[i for i in range(3)]"), 7),
        (kernel("f'{x.__class__}'"), 7),
        (kernel("(y := 3)"), 7),
        (kernel("x()"), 7),
        (kernel("[open][0]('x')"), 7),
        (kernel("tl.load(*x)"), 7),
        (kernel("tl.load(**x)"), 7),
        (kernel("tl.load(x, _semantic=None)"), 7),
        (kernel("global x"), 7),
        (kernel("del x"), 7),
        (kernel("with x:", "    pass"), 7),
        (kernel("try:", "    pass", "finally:", "    pass"), 7),
        (kernel("raise x"), 7),
        (kernel("yield x"), 7),
        (kernel("def g():", "    pass"), 7),
        (kernel("y: print(1) = 3"), 7),
        (kernel("y = b'x'"), 7),
        (kernel("y = 1j"), 7),
        (kernel("y = missing"), 7),
    ],
)
def test_anything_else_is_refused(source, line):
    """What is not a kernel is refused before any of it runs, and the message names the line."""
    with pytest.raises(ArtifactError, match=rf"line {line}:"):
        kernel_functions(source)


@pytest.mark.parametrize("source", ["def f(:", "", "\0", "(" * 500, '"""Text."""'])
def test_what_is_no_source_is_refused(source):
    """Texts that do not parse or define nothing are refused."""
    with pytest.raises(ArtifactError, match="kernel source"):
        kernel_functions(source)


def test_nothing_is_left_in_the_modules():
    """Kernel sources are no modules that others could import."""
    kernel_functions(FULL)
    assert not [name for name in sys.modules if name.startswith("graphwright_kernel")]
