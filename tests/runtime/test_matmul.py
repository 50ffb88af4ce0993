"""Prepared matrix products against float64, for every layout that this machine can hold."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from graphwright.ir.errors import InputError, OptionError
from graphwright.runtime import matmul_choice, mkl
from graphwright.runtime.matmul import PreparedWeight, _layouts, bind_bmm, prepare_weight

SIZES = (
    (1, 64, 32),
    (2, 30, 96),
    (29, 1030, 100),
    (300, 520, 70),
    (63, 77, 45),
    (1000, 33, 130),
    (5, 1, 7),
    (6, 9, 1),
    (8, 384, 384),
)
TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
CASES = [
    (dtype, layout)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for layout in _layouts(torch.ones(2, 2, dtype=dtype))
]
each_case = pytest.mark.parametrize(("dtype", "layout"), CASES, ids=lambda value: str(value).removeprefix("torch."))
needs_packing = pytest.mark.skipif(not mkl.can_pack(), reason="this build of torch does not export MKL's packed products")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, with nothing measured."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(matmul_choice, "_MEASURED", {})
    return tmp_path / "matmul"


def padded(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix within a wider one: random, or NaN without a generator."""
    whole = torch.full((rows + 2, columns + 5), float("nan"), dtype=dtype)
    part = whole[1 : rows + 1, 3 : columns + 3]
    if generator is not None:
        part.copy_(torch.randn(rows, columns, generator=generator))
    return whole, part


def error_ratio(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@each_case
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_product_is_that_of_float64(dtype, layout, m, k, n, generator, threads):
    """x @ weight^T with padded rows equals the float64 product, and nothing is written around the result."""
    weight = torch.randn(n, k, generator=generator).to(dtype)
    _, x = padded(m, k, dtype, generator)
    whole, out = padded(m, n, dtype, None)
    prepare_weight(weight, layout=layout).bind(x, out)()
    assert error_ratio(out, x.double() @ weight.double().t()) < TOLERANCE[dtype]
    assert int(whole.isnan().sum()) == whole.numel() - out.numel()


@each_case
def test_accumulating_adds_to_the_result(dtype, layout, generator):
    """With accumulate, the product is added to what the result holds."""
    weight = torch.randn(45, 77, generator=generator).to(dtype)
    _, x = padded(63, 77, dtype, generator)
    _, out = padded(63, 45, dtype, generator)
    wanted = out.double() + x.double() @ weight.double().t()
    prepare_weight(weight, layout=layout).bind(x, out, accumulate=True)()
    assert error_ratio(out, wanted) < TOLERANCE[dtype]


@each_case
def test_other_pointers(dtype, layout, generator):
    """One bound product serves operands at other addresses, and leaves its own alone."""
    weight = torch.randn(45, 77, generator=generator).to(dtype)
    (_, x), (_, out) = padded(63, 77, dtype, generator), padded(63, 45, dtype, None)
    (_, other_x), (_, other_out) = padded(63, 77, dtype, generator), padded(63, 45, dtype, None)
    product = prepare_weight(weight, layout=layout).bind(x, out)
    product.with_pointers(other_x.data_ptr(), other_out.data_ptr())
    assert bool(out.isnan().all())
    assert error_ratio(other_out, other_x.double() @ weight.double().t()) < TOLERANCE[dtype]


@each_case
@pytest.mark.parametrize("k", [64, 80, 33])
def test_nan_stays_in_its_row(dtype, layout, k, generator):
    """A NaN in x makes exactly its row of the result NaN."""
    x = torch.randn(33, k, generator=generator).to(dtype)
    x[4] = float("nan")
    out = torch.empty(33, 48, dtype=dtype)
    prepare_weight(torch.randn(48, k, generator=generator).to(dtype), layout=layout).bind(x, out)()
    assert out.isnan().all(1).tolist() == [row == 4 for row in range(33)]
    assert out.isnan().any(1).tolist() == [row == 4 for row in range(33)]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nan_stays_in_its_row_of_a_batch(dtype, generator):
    """A NaN in the left operand of a batched product makes exactly its row NaN."""
    a = torch.randn(2, 33, 80, generator=generator).to(dtype)
    a[1, 0] = float("nan")
    out = torch.empty(2, 33, 48, dtype=dtype)
    bind_bmm(a, torch.randn(2, 80, 48, generator=generator).to(dtype), out)()
    assert out.isnan().any(2).nonzero().tolist() == [[1, 0]]
    assert bool(out[1, 0].isnan().all())


@each_case
def test_no_rows(dtype, layout):
    """With M = 0 nothing is computed, with other pointers as well."""
    product = prepare_weight(torch.ones(4, 3, dtype=dtype), layout=layout).bind(
        torch.empty(0, 3, dtype=dtype), torch.empty(0, 4, dtype=dtype)
    )
    product()
    product.with_pointers(0, 0)


@pytest.mark.parametrize("accumulate", [False, True])
def test_no_columns_to_sum(accumulate):
    """With K = 0 the product is zero, and nothing is added."""
    out = torch.full((2, 3), 5.0)
    prepare_weight(torch.empty(3, 0)).bind(torch.empty(2, 0), out, accumulate=accumulate)()
    assert out.tolist() == [[5.0 if accumulate else 0.0] * 3] * 2


@each_case
@pytest.mark.parametrize(("n", "k"), [(45, 77), (1, 9), (7, 1), (300, 600)])
def test_unpacking_gives_the_weight_back(dtype, layout, n, k, generator):
    """Every element comes back as it was: the largest, the subnormal, and those that are no sums."""
    weight = torch.randn(n, k, generator=generator).to(dtype)
    info = torch.finfo(dtype)
    weight.view(-1)[:4] = torch.tensor([info.max, -info.max, info.smallest_normal / 4, 0.1], dtype=dtype)
    kept = weight.clone()
    assert torch.equal(prepare_weight(weight, layout=layout).unpack(), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_cannot_be_packed_are_kept_exactly(dtype, cache, generator):
    """Infinities and NaNs in a weight survive whatever layout is chosen, and are multiplied by."""
    weight = torch.randn(32, 48, generator=generator).to(dtype)
    weight[3, 4], weight[5, 6] = float("inf"), float("nan")
    prepared = prepare_weight(weight)
    assert torch.equal(prepared.unpack().isnan(), weight.isnan())
    assert torch.equal(prepared.unpack().nan_to_num(), weight.nan_to_num())
    out = torch.zeros(2, 32, dtype=dtype)
    prepared.bind(torch.ones(2, 48, dtype=dtype), out)()
    assert (~out.isfinite()).nonzero()[:, 1].tolist() == [3, 5, 3, 5]


MEMORY_OF_PACKING = """
import gc, os, resource
import torch
from graphwright.runtime.matmul import prepare_weight

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

weights = [torch.ones(768, 512) for _ in range(30)]
prepare_weight(weights[0], layout="packed")
gc.collect()
before = resident_bytes()
prepared = [prepare_weight(weight, layout="packed") for weight in weights]
grown = resident_bytes() - before
stated = sum(weight.bytes for weight in prepared)
original = sum(weight.nbytes for weight in weights)
del weights[:]
gc.collect()
print(original, stated, grown, resident_bytes() - before, torch.equal(prepared[-1].unpack(), torch.ones(768, 512)))
"""


@needs_packing
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_packing_takes_the_memory_that_it_says():
    """Packed weights take the memory of the originals, which they do not hold."""
    # In a process of its own: an allocator that other tests have used gives less back.
    result = subprocess.run([sys.executable, "-c", MEMORY_OF_PACKING], capture_output=True, text=True, check=True, timeout=120)
    original, stated, grown, left = map(int, result.stdout.split()[:4])
    assert stated == pytest.approx(original, rel=0.01)
    assert grown == pytest.approx(stated, rel=0.1)
    assert left < 0.2 * stated
    assert result.stdout.split()[4] == "True"


def test_a_layout_that_fits_is_not_copied(generator):
    """A weight that lies right already is shared."""
    weight = torch.randn(6, 4, generator=generator)
    assert prepare_weight(weight, layout="nk").unpack().data_ptr() == weight.data_ptr()
    transposed = torch.randn(4, 6, generator=generator)
    prepared = prepare_weight(transposed.t(), layout="kn")
    assert prepared._stored.data_ptr() == transposed.data_ptr()
    assert prepared.bytes == transposed.nbytes


@each_case
def test_products_keep_their_memory(dtype, layout, generator):
    """A bound product is all that must be kept."""
    weight = torch.randn(256, 128, generator=generator).to(dtype)
    x = torch.randn(16, 128, generator=generator).to(dtype)
    wanted = x.double() @ weight.double().t()
    out = torch.empty(16, 256, dtype=dtype)
    product = prepare_weight(weight.clone(), layout=layout).bind(x.clone(), out)
    gc.collect()
    noise = [torch.full((256, 128), 9.0, dtype=dtype) for _ in range(8)]
    product()
    assert error_ratio(out, wanted) < TOLERANCE[dtype]
    del noise


@each_case
def test_calls_overlap_in_threads(dtype, layout, generator):
    """Four threads share a product, each with memory of its own."""
    weight = torch.randn(96, 64, generator=generator).to(dtype)
    xs = [torch.randn(33, 64, generator=generator).to(dtype) for _ in range(4)]
    outs = [torch.empty(33, 96, dtype=dtype) for _ in range(4)]
    product = prepare_weight(weight, layout=layout).bind(xs[0], outs[0])
    wrong: list[int] = []

    def work(number: int) -> None:
        wanted = xs[number].double() @ weight.double().t()
        for _ in range(25):
            outs[number].fill_(float("nan"))
            product.with_pointers(xs[number].data_ptr(), outs[number].data_ptr())
            if not error_ratio(outs[number], wanted) < TOLERANCE[dtype]:
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_parameters_need_no_care(cache):
    """Weights and inputs that require gradients are taken as they are."""
    weight, x = torch.nn.Parameter(torch.ones(4, 3)), torch.ones(2, 3, requires_grad=True)
    out = torch.empty(2, 4)
    prepare_weight(weight).bind(x, out)()
    assert out.tolist() == [[3.0] * 4] * 2


def test_the_choice_is_measured_once(cache, monkeypatch, generator):
    """The times of a size are measured in one process and read by the next; a damaged file is measured anew."""
    weight = torch.randn(96, 64, generator=generator)
    measured: list[int] = []
    measure = matmul_choice._measure
    monkeypatch.setattr(
        matmul_choice, "_measure", lambda calls, clock: measured.extend(map(len, calls.values())) or measure(calls, clock)
    )
    first = prepare_weight(weight, rows=(1, 100))
    (file,) = cache.iterdir()
    stored = json.loads(file.read_text())
    assert sorted(stored) == ["float32 n96 k64 m1", "float32 n96 k64 m128"]
    count = len(measured)
    assert count == 2 * len(list(_layouts(weight)))
    matmul_choice._MEASURED.clear()
    assert prepare_weight(weight, rows=(128, 1)).layout == first.layout
    assert len(measured) == count
    file.write_text("{")
    matmul_choice._MEASURED.clear()
    prepare_weight(weight, rows=(1,))
    assert len(measured) == count + count // 2


@pytest.mark.parametrize("fastest", ["nk", "kn"])
def test_the_fastest_layout_is_chosen(cache, fastest, generator):
    """What was measured decides, and both numbers of rows count."""
    weight = torch.randn(96, 64, generator=generator)
    prepare_weight(weight, rows=(1, 32))
    (file,) = cache.iterdir()
    stored = json.loads(file.read_text())
    for entry in stored.values():
        entry.update(dict.fromkeys(entry, 2e-6), **{fastest: 1e-6})
    file.write_text(json.dumps(stored))
    matmul_choice._MEASURED.clear()
    assert prepare_weight(weight, rows=(1, 32)).layout == fastest


def test_measuring_leaves_random_numbers_alone(cache):
    """Preparing a weight does not change what torch draws next."""
    weight = torch.ones(64, 64)
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    prepare_weight(weight)
    assert torch.equal(torch.rand(4), wanted)


def test_an_unwritable_cache_is_no_error(monkeypatch, tmp_path):
    """Without a folder to write to, the choice is measured in this process."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(matmul_choice, "_MEASURED", {})
    assert prepare_weight(torch.ones(8, 8)).unpack().sum() == 64


def test_without_mkl(cache, monkeypatch, generator):
    """Where torch exports no BLAS, torch's own product is bound."""
    monkeypatch.setattr(mkl, "_packing", lambda: None)
    monkeypatch.setattr(mkl, "_sgemm", lambda: None)
    weight, x, out = torch.randn(6, 4, generator=generator), torch.randn(3, 4, generator=generator), torch.empty(3, 6)
    prepared = prepare_weight(weight)
    assert prepared.layout in ("nk", "kn")
    prepared.bind(x, out)()
    assert error_ratio(out, x.double() @ weight.double().t()) < 3e-6
    with pytest.raises(OptionError, match="layout 'packed' cannot hold"):
        prepare_weight(weight, layout="packed")


def test_misuse_is_named():
    """Operands that do not fit are refused with what was expected and found."""
    prepared = PreparedWeight(torch.ones(4, 3), "nk")
    with pytest.raises(InputError, match=r"x must be \[M, 3\].*got \[2, 5\]"):
        prepared.bind(torch.ones(2, 5), torch.ones(2, 4))
    with pytest.raises(InputError, match=r"out must be \[2, 4\].*strides \(1, 2\)"):
        prepared.bind(torch.ones(2, 3), torch.ones(4, 2).t())
    with pytest.raises(InputError, match="float64"):
        prepared.bind(torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 4))
    with pytest.raises(InputError, match="strides"):
        prepared.bind(torch.ones(1, 3).expand(2, 3), torch.ones(2, 4))
    with pytest.raises(OptionError, match="Did you mean 'packed'"):
        prepare_weight(torch.ones(4, 3), layout="pack")
    with pytest.raises(OptionError, match="rows"):
        prepare_weight(torch.ones(4, 3), rows=())
    with pytest.raises(InputError, match="int8"):
        prepare_weight(torch.ones(4, 3, dtype=torch.int8))
    with pytest.raises(InputError, match="bind_bmm"):
        bind_bmm(torch.ones(2, 3, 4), torch.ones(2, 5, 6), torch.ones(2, 3, 6))
    with pytest.raises(InputError, match="bind_bmm"):
        bind_bmm(torch.ones(2, 3, 4), torch.ones(3, 4, 6), torch.ones(2, 3, 6))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", ["3d", "4d", "heads", "broadcast", "2d", "empty"])
def test_batched_products(dtype, form, generator):
    """bind_bmm computes a @ b for batches that lie anyhow, at its own and at other pointers."""

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    nan = float("nan")
    a, b, out = {
        "3d": lambda: (make(3, 63, 20), make(3, 20, 33), torch.full((3, 63, 33), nan, dtype=dtype)),
        "4d": lambda: (make(2, 3, 7, 20), make(2, 3, 33, 20).mT, torch.full((2, 3, 7, 33), nan, dtype=dtype)),
        "heads": lambda: (
            make(2, 7, 3, 20).transpose(1, 2),
            make(2, 9, 3, 20).permute(0, 2, 3, 1),
            torch.full((2, 7, 3, 9), nan, dtype=dtype).transpose(1, 2),
        ),
        "broadcast": lambda: (make(2, 3, 7, 20), make(1, 3, 20, 9), torch.full((2, 3, 7, 9), nan, dtype=dtype)),
        "2d": lambda: (make(7, 20), make(20, 9), torch.full((7, 9), nan, dtype=dtype)),
        "empty": lambda: (make(2, 0, 20), make(2, 20, 9), torch.full((2, 0, 9), nan, dtype=dtype)),
    }[form]()
    wanted = a.double() @ b.double()
    product = bind_bmm(a, b, out)
    product()
    assert error_ratio(out, wanted) < TOLERANCE[dtype] or out.numel() == 0
    again = torch.empty_strided(out.shape, out.stride(), dtype=dtype).fill_(nan)
    product.with_pointers(a.data_ptr(), b.data_ptr(), again.data_ptr())
    assert torch.equal(again, out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_on_a_gpu(dtype):
    """On a CUDA device torch's products are bound, at their own and at other pointers."""
    weight, x = torch.randn(45, 77, device="cuda").to(dtype), torch.randn(63, 77, device="cuda").to(dtype)
    out, again = torch.empty(2, 63, 45, device="cuda", dtype=dtype)
    wanted = (x.double() @ weight.double().t()).cpu()
    product = prepare_weight(weight).bind(x, out)
    product()
    product.with_pointers(x.data_ptr(), again.data_ptr())
    for found in (out, again):
        assert error_ratio(found.cpu(), wanted) < max(TOLERANCE[dtype], 1e-3)


def test_large_weights_are_measured_in_part(cache, monkeypatch):
    """Choosing a layout costs no more for a large weight than for a middling one."""
    sizes: list[int] = []
    monkeypatch.setattr(matmul_choice, "copies_for", lambda size: sizes.append(size) or 1)
    monkeypatch.setattr(matmul_choice, "_LARGEST_WEIGHT_BYTES", 1 << 16)
    weight = torch.ones(1024, 128)
    prepared = prepare_weight(weight)
    assert set(sizes) == {1 << 16}
    assert torch.equal(prepared.unpack(), weight)
