"""The benchmark: its kernels' results, its gate, and what it prints and writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from graphwright.tools import cli
from graphwright.tools.bench import cases, measure
from graphwright.tools.bench.cases import Case, Rival
from graphwright.tools.kernels import attention, decode, elementwise, matmul, norm, softmax


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


# -- kernels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "dim"), [(1, 16), (63, 64), (64, 64), (65, 64), (200, 128)])
def test_attention(length: int, dim: int, causal: bool) -> None:
    """Attention agrees with PyTorch at lengths on, below and above its tiles."""
    q, k, v = torch.randn(3, 2, length, dim)
    expected = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    close(attention.attention(q, k, v, causal=causal), expected)


@pytest.mark.parametrize("config", matmul.TILES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (64, 256, 128), (130, 70, 200)])
def test_matmul_tiles(config: object, m: int, n: int, k: int) -> None:
    """Every tile that the tuner may choose gives the right product, also where it does not divide the sizes."""
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.full((m, n), float("nan"))
    tile = config.kwargs  # type: ignore[attr-defined]
    grid = (-(-m // tile["BLOCK_M"]) * -(-n // tile["BLOCK_N"]),)
    matmul.matmul_tile_kernel[grid](a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride(), **tile)
    close(c, a.double() @ b.double(), 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)])
def test_matmul(dtype: torch.dtype, tolerance: float) -> None:
    """The tuned product agrees in each dtype, for a transposed operand as well."""
    a, b = torch.randn(40, 30).to(dtype), torch.randn(50, 30).to(dtype).t()
    close(matmul.matmul(a, b), a.double() @ b.double(), tolerance)


@pytest.mark.parametrize("n", [1, 100, 128])
def test_row_kernels(n: int) -> None:
    """Norms, softmax and cross-entropy agree with PyTorch."""
    x, weight, bias = torch.randn(5, n), torch.randn(n), torch.randn(n)
    close(norm.rms_norm(x, weight), functional.rms_norm(x.double(), (n,), weight.double(), 1e-5))
    close(norm.layer_norm(x, weight, bias), functional.layer_norm(x, (n,), weight, bias, 1e-5), 1e-4)
    close(softmax.softmax(x), torch.softmax(x.double(), -1))
    target = torch.randint(n, (5,))
    expected = functional.cross_entropy(x.double(), target, reduction="none")
    close(softmax.cross_entropy(x, target), expected)


def test_cross_entropy_over_several_blocks() -> None:
    """The running maximum is carried from block to block."""
    x, target = torch.randn(3, 5000).cumsum(-1), torch.tensor([0, 2500, 4999])
    close(softmax.cross_entropy(x, target), functional.cross_entropy(x.double(), target, reduction="none"), 1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("heads", "length"), [(1, 1), (1, 1000), (16, 70)])
def test_decode(heads: int, length: int, bits: int) -> None:
    """Decoding agrees with attention over the cache that the integers stand for, split or not."""
    q, cache = torch.randn(heads, 64), cases._cache(heads, length, 64, bits)
    scores = (cache.wide_k.double() @ q.double()[..., None])[..., 0] / 8
    expected = (torch.softmax(scores, -1)[:, None] @ cache.wide_v.double())[:, 0]
    close(decode.decode(q, cache.k, cache.k_scale, cache.v, cache.v_scale), expected)


def test_elementwise_kernels() -> None:
    """Addition, SwiGLU, rotary embedding and lookup agree with PyTorch."""
    x, y = torch.randn(2, 10_001)
    assert torch.equal(elementwise.add(x, y), x + y)
    close(elementwise.swiglu(x, y), functional.silu(x.double()) * y.double())
    table, index = torch.randn(30, 64), torch.randint(30, (37,))
    assert torch.equal(elementwise.embedding(index, table), table[index])
    x, (cos, sin) = torch.randn(3, 5, 32), torch.randn(2, 3, 16)
    low, high = x.chunk(2, -1)
    wide_cos, wide_sin = cos[:, None], sin[:, None]
    close(elementwise.rotary(x, cos, sin), torch.cat((low * wide_cos - high * wide_sin, high * wide_cos + low * wide_sin), -1))


@pytest.mark.parametrize("name", ["gemv-int8", "gemv-int4"])
def test_gemv(name: str) -> None:
    """The product with packed weights is that with the weights they stand for."""
    case = next(iter(cases.KERNELS[name]()))()
    assert measure.relative_error(case.run(), case.reference()) < case.tolerance


# -- measuring ---------------------------------------------------------------------------------------------------------


def make_case(run: Callable[[], torch.Tensor], **changes: object) -> Case:
    rival = Rival("double the work", lambda: torch.ones(3), 1.0)
    case = Case("a case", run, lambda: torch.ones(3), 1e-6, (rival,), quick=True)
    return dataclasses.replace(case, **changes)  # type: ignore[arg-type]


def test_measure_counts_the_pairs() -> None:
    """Each number of threads gets a timing with as many pairs as asked for, and the thread count is put back."""
    before = torch.get_num_threads()
    found = measure.measure("kernel", make_case(lambda: torch.ones(3)), [1, 2], 2)
    assert torch.get_num_threads() == before
    assert not found.problem
    (comparison,) = found.comparisons
    assert [t.threads for t in comparison.timings] == [1, 2]
    assert all(t.pairs >= 2 and t.lowest <= t.ratio <= t.highest for t in comparison.timings)


@pytest.mark.parametrize(
    "wrong", [torch.full((3,), 2.0), torch.tensor([1.0, float("nan"), 1.0]), torch.ones(2), torch.full((3,), float("inf"))]
)
def test_a_wrong_result_is_not_timed(wrong: torch.Tensor) -> None:
    """Where a result is off, not a number or of another shape, there is a problem and no ratio."""
    found = measure.measure("kernel", make_case(lambda: wrong), [1], 1)
    assert found.problem
    assert found.comparisons == []


def test_relative_error() -> None:
    """The error is relative to the largest element."""
    assert measure.relative_error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])) == 0.25
    assert measure.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert measure.relative_error(torch.ones(2), torch.zeros(2)) == float("inf")


def test_compile_time_is_measured_every_time() -> None:
    """A kernel that is in the cache on disk already is compiled again, so that there is something to report."""
    build = next(iter(cases.KERNELS["rotary"]()))
    elementwise.rotary_kernel.device_caches.clear()
    found = measure.measure("rotary", build(), [1], 1)
    assert found.compilations == 1
    assert found.compile_ms > 1


# -- command line ------------------------------------------------------------------------------------------------------


def test_bench_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints a row and writes it with the machine's description."""
    path = tmp_path / "bench.json"
    argv = ["bench", "--kernel", "launch-prepared", "--threads", "1", "--repeat", "2", "--json", str(path), "--quick"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "launch-prepared" in shown
    assert "torch.add(out=)" in shown
    written = json.loads(path.read_text())
    assert written["machine"]["cpu"]
    (measured,) = written["measurements"]
    assert measured["comparisons"][0]["timings"][0]["ratio"] > 0


def test_bench_exits_with_1_on_a_wrong_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong result is shown as a problem, and the exit code says so."""
    monkeypatch.setitem(cases.KERNELS, "launch", lambda: iter([lambda: make_case(lambda: torch.zeros(3))]))
    assert cli.main(["bench", "--kernel", "launch", "--threads", "1"]) == 1
    assert "error 1" in capsys.readouterr().out


def test_bench_exits_with_1_where_a_kernel_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A kernel that cannot be compiled or run is a problem of that kernel, not the end of the run."""

    def fail() -> torch.Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(cases.KERNELS, "launch", lambda: iter([lambda: make_case(fail)]))
    assert cli.main(["bench", "--kernel", "launch", "--kernel", "launch-prepared", "--threads", "1", "--repeat", "1"]) == 1
    shown = capsys.readouterr().out
    assert "no such" in shown
    assert "torch.add(out=)" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--kernel", "softmx"], "did you mean 'softmax'?"),
        (["--threads", "two"], "expected numbers of threads"),
        (["--threads", "0"], "expected numbers of threads"),
        (["--repeat", "0"], "--repeat"),
    ],
)
def test_wrong_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option that makes no sense is refused with exit code 2, and the nearest kernel suggested."""
    assert cli.main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err


def test_every_kernel_has_a_quick_case() -> None:
    """A quick run leaves no kernel out."""
    assert [name for name, build in cases.KERNELS.items() if not any(make().quick for make in build())] == []


def test_bench_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--markdown` writes the table with the hardware named."""
    page = tmp_path / "page.md"
    assert cli.main(["bench", "--kernel", "launch-prepared", "--threads", "1", "--repeat", "1", "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("# ")
    assert "| launch-prepared | add of 1024 elements | torch.add(out=) |" in text
