"""Operands of products read where they lie: which loads qualify, and tiles that turn out not to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from graphwright.runtime.triton_cpu import direct, isa
from graphwright.runtime.triton_cpu.analysis import Plan
from graphwright.runtime.triton_cpu.dot import plan_dots
from graphwright.runtime.triton_cpu.lowering import Lowering
from graphwright.runtime.triton_cpu.options import CPUOptions
from graphwright.runtime.triton_cpu.ttir import Op
from graphwright.runtime.triton_cpu.ttir_parse import parse

SIGNATURE = {"X": "*fp32", "W": "*fp32", "I": "*i32", "Y": "*fp32", "m": "i32", "s": "i32", "B": 32}
Lowered = Callable[..., tuple[Lowering, Op]]


@pytest.fixture
def lowered(ttir_text: Any) -> Lowered:
    """Return a function that plans a kernel and returns the state before its code is emitted, and its product."""

    def lower(kernel: Any, signature: dict[str, str | int] = SIGNATURE, **options: Any) -> tuple[Lowering, Op]:
        (function,) = parse(ttir_text(kernel, signature)).values()
        chosen, plan = isa.detect(""), Plan(function)
        plan_dots(plan, function, chosen)
        (product,) = (op for op in function.walk() if op.name == "tt.dot")
        return Lowering(plan=plan, isa=chosen, options=CPUOptions(isa=chosen.name, **options)), product

    return lower


@triton.jit
def plain_kernel(X, W, I, Y, m, s, B: tl.constexpr):
    i = tl.arange(0, B)
    place = i[:, None] * B + i[None, :]
    tl.store(Y + place, tl.dot(tl.load(X + place), tl.load(W + place)))


@triton.jit
def transposed_kernel(X, W, I, Y, m, s, B: tl.constexpr):
    i = tl.arange(0, B)
    place = i[:, None] * B + i[None, :]
    tl.store(Y + place, tl.dot(tl.load(X + place), tl.trans(tl.load(W + place))))


@triton.jit
def masked_kernel(X, W, I, Y, m, s, B: tl.constexpr):
    i = tl.arange(0, B)
    place = i[:, None] * B + i[None, :]
    w = tl.load(W + place, mask=(i[:, None] < m) & (i[None, :] < s), other=0.0)
    tl.store(Y + place, tl.dot(tl.load(X + place), w))


@triton.jit
def unordered_kernel(X, W, I, Y, m, s, B: tl.constexpr):
    i = tl.arange(0, B)
    place = i[:, None] * B + i[None, :]
    tl.store(Y + place, tl.dot(tl.load(X + place), tl.load(W + place, mask=i[:, None] != m, other=0.0)))


@triton.jit
def computed_kernel(X, W, I, Y, m, s, B: tl.constexpr):
    i = tl.arange(0, B)
    place = i[:, None] * B + i[None, :]
    tl.store(Y + place, tl.dot(tl.load(X + place), tl.load(W + place) * 2))


@triton.jit
def gathered_kernel(X, W, I, Y, m, s, B: tl.constexpr):
    i = tl.arange(0, B)
    place = i[:, None] * B + i[None, :]
    rows = tl.load(I + i)
    tl.store(Y + place, tl.dot(tl.load(X + place), tl.load(W + rows[:, None] * B + i[None, :])))


@triton.jit
def wrapped_kernel(X, W, I, Y, m, s, B: tl.constexpr):
    i = tl.arange(0, B)
    place = i[:, None] * B + i[None, :]
    rows = (tl.program_id(0) * B + i) % m
    y = tl.dot(tl.load(X + rows[:, None] * s + i[None, :]), tl.load(W + place))
    tl.store(Y + tl.program_id(0) * B * B + place, y)


@triton.jit
def strided_kernel(X, W, I, Y, m, s, B: tl.constexpr):
    i = tl.arange(0, B)
    place = i[:, None] * B + i[None, :]
    tl.store(Y + place, tl.dot(tl.load(X + place), tl.load(W + i[:, None] * s + i[None, :])))


@triton.jit
def overwritten_kernel(X, W, I, Y, m, s, B: tl.constexpr):
    i = tl.arange(0, B)
    place = i[:, None] * B + i[None, :]
    w = tl.load(W + place)
    tl.store(W + place, tl.load(X + place))
    tl.store(Y + place, tl.dot(tl.load(X + place), w))


KERNELS = [
    (plain_kernel, [0, 1]), (transposed_kernel, [1, 0]), (masked_kernel, [0, 1]), (strided_kernel, [0, 1]),
    (unordered_kernel, None), (computed_kernel, None), (gathered_kernel, None), (overwritten_kernel, None),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "order"), KERNELS, ids=lambda x: getattr(x, "__name__", ""))
def test_source(lowered: Lowered, kernel: Any, order: list[int] | None) -> None:
    """A load with even addresses and an orderly mask qualifies, transposed or not; one that memory may change does not."""
    lowering, product = lowered(kernel)
    found = direct.source(lowering, product.operands[1])
    if order is None:
        assert found is None
    else:
        assert found is not None
        assert (found[0].op.name, found[1]) == ("tt.load", order)


def test_source_in_checked_mode(lowered: Lowered) -> None:
    """In checked mode every load is made, so that each can be tested."""
    lowering, product = lowered(plain_kernel, checked=True)
    assert direct.source(lowering, product.operands[0]) is None


def test_source_of_remainders(lowered: Lowered) -> None:
    """Rows modulo a size qualify; whether they wrap is tested for each tile."""
    lowering, product = lowered(wrapped_kernel)
    assert direct.source(lowering, product.operands[0]) is not None


@pytest.mark.parametrize(
    ("size", "stride", "is_close"),
    [(32, 32, True), (32, 64, True), (32, 65, False), (32, 1024, False), (64, 64, True), (128, 1024, False)],
)
def test_rows_read_as_vectors(lowered: Lowered, size: int, stride: int, is_close: bool) -> None:
    """Rows close to each other are read as vectors where they lie; distant ones are packed."""
    lowering, product = lowered(strided_kernel, {**SIGNATURE, "s": stride, "B": size})
    load, order = direct.source(lowering, product.operands[1])
    assert direct.suits_vectors(lowering, load, order, 1) == is_close
    assert not direct.suits_vectors(lowering, load, order, 0)


def test_rows_in_the_same_cache_sets(lowered: Lowered) -> None:
    """Rows a page apart are packed, however long they are."""
    lowering, product = lowered(strided_kernel, {**SIGNATURE, "s": 1024, "B": 1024})
    load, order = direct.source(lowering, product.operands[1])
    assert not direct.suits_vectors(lowering, load, order, 1)


def test_rows_at_an_unknown_distance(lowered: Lowered) -> None:
    """Rows whose distance is an argument are packed."""
    lowering, product = lowered(strided_kernel)
    load, order = direct.source(lowering, product.operands[1])
    assert not direct.suits_vectors(lowering, load, order, 1)


def run(kernel: Any, **arguments: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run a kernel on random matrices; return those and the result."""
    grid = arguments.pop("grid", (1,))
    tensors = {
        "X": torch.randn(128, 48),
        "W": torch.randn(64, 48),
        "I": torch.randint(0, 32, (32,), dtype=torch.int32),
        "Y": torch.full((grid[0] * 32, 32), torch.nan),
    }
    given = {name: x.clone() for name, x in tensors.items()}
    kernel[grid](*tensors.values(), arguments.get("m", 32), arguments.get("s", 32), B=32)
    return given, tensors["Y"]


def square(x: torch.Tensor, stride: int = 32) -> torch.Tensor:
    """The 32 x 32 tile at the start of a tensor."""
    return x.as_strided((32, 32), (stride, 1))


@pytest.mark.parametrize(
    ("kernel", "right"),
    [
        (plain_kernel, lambda t: square(t["W"])),
        (transposed_kernel, lambda t: square(t["W"]).T),
        (computed_kernel, lambda t: 2 * square(t["W"])),
        (gathered_kernel, lambda t: square(t["W"])[t["I"].long()]),
        (overwritten_kernel, lambda t: square(t["W"])),
    ],
    ids=["plain", "transposed", "computed", "gathered", "overwritten"],
)
def test_products(kernel: Any, right: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> None:
    """A product is the same wherever its operands are read from."""
    given, y = run(kernel)
    torch.testing.assert_close(y, square(given["X"]) @ right(given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("m", "s"), [(32, 32), (31, 32), (32, 31), (5, 7), (0, 32), (100, 100)])
def test_ragged_operands(m: int, s: int) -> None:
    """A tile that its mask cuts is copied, with what the mask leaves out replaced."""
    given, y = run(masked_kernel, m=m, s=s)
    w = square(given["W"]).clone()
    w[m:] = 0
    w[:, s:] = 0
    torch.testing.assert_close(y, square(given["X"]) @ w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("m", "s"), [(64, 48), (63, 33), (50, 48), (33, 48), (20, 48), (1, 48), (64, 0)])
def test_wrapped_operands(m: int, s: int) -> None:
    """Rows that wrap within a tile are copied; the stride of those that do not is found when the kernel runs."""
    given, y = run(wrapped_kernel, m=m, s=s, grid=(2,))
    rows = torch.arange(64) % m
    x = given["X"].flatten()[(rows * s)[:, None] + torch.arange(32)]
    torch.testing.assert_close(y, x @ square(given["W"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("s", [32, 40, 96, 0, 1])
def test_strided_operands(s: int) -> None:
    """The distance of rows may be any number."""
    given, y = run(strided_kernel, s=s)
    torch.testing.assert_close(y, square(given["X"]) @ square(given["W"], s), rtol=1e-4, atol=1e-4)


@triton.jit
def cancelling_kernel(X, W, I, Y, m, s, B: tl.constexpr):
    i = tl.arange(0, B)
    place = i[:, None] * B + i[None, :]
    rows = (i + 1) % 4 - (i + 1) % 2
    tl.store(Y + place, tl.dot(tl.load(X + rows[:, None] * B + i[None, :]), tl.load(W + place)))


def test_remainders_that_cancel() -> None:
    """Rows that wrap twice, and are at the end where they would be without, are copied."""
    given, y = run(cancelling_kernel)
    i = torch.arange(32)
    x = square(given["X"])[(i + 1) % 4 - (i + 1) % 2]
    torch.testing.assert_close(y, x @ square(given["W"]), rtol=1e-4, atol=1e-4)
