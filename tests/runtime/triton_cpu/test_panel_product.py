"""Products by panels: every form of the code against float64, what it fetches, and its place in the cache."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from triton import knobs

from graphwright.runtime.triton_cpu import isa as isa_module
from graphwright.runtime.triton_cpu import jit, panel_product
from graphwright.runtime.triton_cpu.errors import BackendError
from graphwright.runtime.triton_cpu.isa import Isa, detect
from graphwright.runtime.triton_cpu.panel_code import Block, module_text
from graphwright.runtime.triton_cpu.panel_product import _BLOCKS, PanelProduct


def available(name: str) -> bool:
    try:
        detect(name)
    except BackendError:
        return False
    return True


FORMS = [(name, block) for name, blocks in _BLOCKS.items() if available(name) for block in blocks]
each_form = pytest.mark.parametrize(
    ("name", "block"), FORMS, ids=[f"{name}-{block.rows}x{block.vectors}" for name, block in FORMS]
)
needs_panels = pytest.mark.skipif(not FORMS, reason="this CPU has no FMA that products by panels could use")


def compiled(name: str, block: Block) -> PanelProduct:
    return panel_product._product(detect(name), block)


def panels_of(weight: torch.Tensor, width: int) -> torch.Tensor:
    """Return the panels, [ceil(N / width), K, width]; NaN fills up the last one."""
    n, k = weight.shape
    filled = torch.full((-(-n // width) * width, k), float("nan"))
    filled[:n] = weight
    return filled.view(-1, width, k).transpose(1, 2).contiguous()


def multiply(
    product: PanelProduct,
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
    cache_bytes: int = 2 << 20,
) -> None:
    """Compute out = x @ weight^T, or += where it accumulates."""
    (m, k), n = x.shape, weight.shape[0]
    strides = {"x_stride": x.stride(0), "out_stride": out.stride(0)}
    plan = product.plan(m, n, k, **strides, accumulate=accumulate, cache_bytes=cache_bytes)
    panels = panels_of(weight, product.width)
    product.call(x.data_ptr(), out.data_ptr(), panels.data_ptr(), ctypes.addressof(plan))


def within(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix of NaN, and the part of it that is surrounded by others."""
    whole = torch.full((rows + 2, columns + 7), float("nan"))
    return whole, whole[1 : rows + 1, 3 : columns + 3]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@each_form
def test_every_number_of_rows(name, block, generator):
    """Every number of rows up to two blocks and one is computed, and nothing is written around the result."""
    product = compiled(name, block)
    k, n = 13, block.width + 5
    weight = torch.randn(n, k, generator=generator)
    for m in range(1, 2 * block.rows + 2):
        _, x = within(m, k)
        x.copy_(torch.randn(m, k, generator=generator))
        whole, out = within(m, n)
        multiply(product, x, weight, out)
        assert error(out, x.double() @ weight.double().t()) < 1e-6, m
        assert int(whole.isnan().sum()) == whole.numel() - out.numel(), m


@each_form
@pytest.mark.parametrize("n", [1, 7, 63, 200])
@pytest.mark.parametrize("k", [1, 3, 4, 385, 1000])
def test_every_rest(name, block, n, k, generator):
    """Columns that do not fill a vector and sums that do not fill a chunk are computed, and added where asked."""
    x, weight = torch.randn(9, k, generator=generator), torch.randn(n, k, generator=generator)
    whole, out = within(9, n)
    multiply(compiled(name, block), x, weight, out)
    wanted = x.double() @ weight.double().t()
    assert error(out, wanted) < 1e-6
    multiply(compiled(name, block), x, weight, out, accumulate=True)
    assert error(out, 2 * wanted) < 1e-6
    assert int(whole.isnan().sum()) == whole.numel() - out.numel()


@each_form
@pytest.mark.parametrize("accumulate", [False, True])
def test_slabs_and_sweeps(name, block, accumulate, generator):
    """With more rows and a longer sum than a cache holds, the parts add up, accumulating or not."""
    m, k, n = 333, 1100, 130
    x, weight = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    out = torch.randn(m, n, generator=generator) if accumulate else torch.full((m, n), float("nan"))
    wanted = x.double() @ weight.double().t() + (out.double() if accumulate else 0.0)
    multiply(compiled(name, block), x, weight, out, accumulate=accumulate, cache_bytes=128 << 10)
    assert error(out, wanted) < 1e-6


@each_form
@pytest.mark.parametrize(("m", "k"), [(1, 4000), (32, 1536), (100, 384)])
def test_errors_are_like_those_of_torch(name, block, m, k, generator):
    """The error is at most a few times that of torch's own product."""
    x, weight = torch.randn(m, k, generator=generator), torch.randn(96, k, generator=generator)
    wanted = x.double() @ weight.double().t()
    out = torch.full((m, 96), float("nan"))
    multiply(compiled(name, block), x, weight, out)
    assert error(out, wanted) < 4 * error(x @ weight.t(), wanted)


@each_form
def test_threads_change_no_bit(name, block, generator):
    """Several threads compute what one does, with more tasks than threads and with fewer."""
    before = torch.get_num_threads()
    try:
        for m, n, k in ((70, 500, 300), (200, 96, 2000), (4, 3000, 200)):
            x, weight = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(torch.full((m, n), float("nan")))
                multiply(compiled(name, block), x, weight, results[-1])
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
            assert error(results[0], x.double() @ weight.double().t()) < 1e-6
    finally:
        torch.set_num_threads(before)


@each_form
def test_nan_and_infinity_stay_in_their_place(name, block, generator):
    """What is not finite makes its row or column of the result so, and no other; an old NaN is not added."""
    x, weight = torch.randn(20, 50, generator=generator), torch.randn(70, 50, generator=generator)
    x[3, 7], weight[60, 49], weight[2, 0] = float("nan"), float("inf"), float("nan")
    out = torch.full((20, 70), float("nan"))
    multiply(compiled(name, block), x, weight, out)
    expected = torch.zeros(20, 70, dtype=torch.bool)
    expected[3], expected[:, 60], expected[:, 2] = True, True, True
    assert torch.equal(~out.isfinite(), expected)


@each_form
def test_the_weight_is_fetched_ahead(name, block):
    """The code fetches into the second-level cache, and keeps its accumulators in registers."""
    isa = detect(name)
    text = jit.assembly(module_text(isa, block), isa)
    assert text.count("prefetcht1") == block.rows
    # A block of all rows: from its label to the next function.
    (body,) = re.findall(rf"^rows{block.rows}:\n(.*?)^\.Lfunc_end", text, re.MULTILINE | re.DOTALL)
    iteration = max(re.split(r"^\.LBB", body, flags=re.MULTILINE), key=lambda piece: piece.count("vfmadd"))
    assert iteration.count("vfmadd") == 4 * block.rows * block.vectors
    assert not re.search(r"\(%rsp\), %[yz]mm|%[yz]mm\d+, -?\d*\(%rsp\)", iteration)


@needs_panels
@pytest.mark.parametrize("n", [1, 16, 64, 100, 384, 576, 1152, 2048, 4097])
def test_panels_are_filled(n):
    """Of the widths that there are, the one is taken that leaves least of the last panel empty."""
    product = panel_product.panel_product(n)
    assert product is not None
    widths = [block.width for block in _BLOCKS[isa_module.host_isa().name]]
    assert product.width in widths
    assert -n % product.width == min(-n % width for width in widths)


def test_none_without_fused_multiplication(monkeypatch):
    """Where there is no FMA, there is no product by panels."""
    monkeypatch.setenv(isa_module.ENVIRONMENT_VARIABLE, "portable")
    assert panel_product.panel_product(384) is None


@needs_panels
def test_the_code_is_compiled_once(tmp_path, monkeypatch, generator):
    """A second process reads the code from the cache; damaged code is compiled again."""
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    name, block = FORMS[-1]
    compilations: list[Isa] = []
    compile_object = jit.compile_object
    monkeypatch.setattr(
        jit, "compile_object", lambda text, isa, **kw: compilations.append(isa) or compile_object(text, isa, **kw)
    )
    x, weight, out = torch.randn(3, 8, generator=generator), torch.randn(5, 8, generator=generator), torch.empty(3, 5)
    for _ in range(2):
        multiply(PanelProduct(detect(name), block), x, weight, out)
    assert len(compilations) == 1
    (stored,) = (path for path in Path(tmp_path).rglob("*.cpuobj") if not path.name.startswith("__grp__"))
    stored.write_bytes(b"\x7fELF damaged")
    multiply(PanelProduct(detect(name), block), x, weight, out)
    assert len(compilations) == 2
    assert error(out, x.double() @ weight.double().t()) < 1e-6
