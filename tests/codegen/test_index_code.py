"""Index expressions as Triton code: a kernel computes what `evaluate` does."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor

from graphwright.codegen.index_code import LoadCode, triton_code
from graphwright.ir.analyses import index as ix
from graphwright.ir.analyses.index import Expr
from graphwright.ir.errors import LoweringError
from graphwright.runtime.triton_cpu.driver import CPUDriver

BATCH, HEADS, BLOCK = 2, 3, 16
TYPES: Mapping[str, ix.Type] = {"flag": "bool", "slope": "float", "bias": "float"}

KERNEL = """
import triton
import triton.language as tl


@triton.jit
def probe_kernel({parameters}query_length, key_length, p_out, BLOCK: tl.constexpr):
    i_b = tl.program_id(0)
    i_h = tl.program_id(1)
    o_q = tl.arange(0, BLOCK)[:, None]
    o_k = tl.arange(0, BLOCK)[None, :]
    value = {code}
    at = ((i_b * {heads} + i_h) * query_length + o_q) * key_length + o_k
    value = tl.zeros([BLOCK, BLOCK], tl.{dtype}) + tl.cast(value, tl.{dtype})
    tl.store(p_out + at, value, mask=(o_q < query_length) & (o_k < key_length))
"""

VARIABLES = {"b": "i_b", "h": "i_h", "q": "o_q", "k": "o_k", "s": "query_length", "t": "key_length"}


def tensors(queries: int, keys: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    return {
        "in0": torch.randint(-2, 3, (BATCH, keys), generator=generator),
        "seg": torch.randint(0, 2, (BATCH, max(queries, keys)), generator=generator),
        "flag": torch.rand(BATCH, keys, generator=generator) < 0.5,
        "slope": torch.randn(HEADS, generator=generator),
        "bias": torch.randn(BATCH, HEADS, queries, keys, generator=generator).bfloat16(),
        "table": torch.arange(100, 200),
    }


def run(e: Expr, folder: Path, queries: int, keys: int) -> Tensor:
    """Return what a kernel with the code of `e` writes, for all b, h, q and k."""
    given = tensors(queries, keys)
    names = sorted(ix.loads_of(e))
    loads = {name: LoadCode(f"p_{name}", tuple(map(str, given[name].stride()))) for name in names}
    in_range = {"q": "o_q < query_length", "k": "o_k < key_length"}
    code = triton_code(e, VARIABLES, loads, in_range=in_range)
    dtype = {"bool": "int32", "int": "int32", "float": "float32"}[e.type]
    path = folder / "probe.py"
    parameters = "".join(f"p_{name}, " for name in names)
    path.write_text(KERNEL.format(parameters=parameters, code=code, heads=HEADS, dtype=dtype))
    spec = importlib.util.spec_from_file_location("probe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = torch.full((BATCH, HEADS, queries, keys), float("nan"))
    if e.type != "float":
        out = torch.full((BATCH, HEADS, queries, keys), -77, dtype=torch.int32)
    module.probe_kernel[(BATCH, HEADS)](*(given[name] for name in names), queries, keys, out, BLOCK=BLOCK)
    return out


def expected(e: Expr, queries: int, keys: int) -> Tensor:
    extents = {"b": BATCH, "h": HEADS, "q": queries, "k": keys}
    variables = {
        name: torch.arange(n).view([-1 if at == d else 1 for d in range(4)]) for at, (name, n) in enumerate(extents.items())
    }
    found = ix.evaluate(e, variables, tensors(queries, keys), {"s": queries, "t": keys})
    return found.expand(BATCH, HEADS, queries, keys)


@pytest.fixture(autouse=True)
def cpu_driver() -> Iterator[None]:
    """Let Triton run on the CPU."""
    triton.runtime.driver.set_active(CPUDriver())
    yield
    triton.runtime.driver.reset_active()


@pytest.mark.parametrize(
    "text",
    [
        "q - k >= 0 & k - q + 4 >= 0 & not (in0[b, k] == 0)",
        "(k < 2 | k > q - 3) & q >= k",
        "k//4 == q//4 & flag[b, k]",
        "not (flag[b, k]) | q == k",
        "seg[b, q] == seg[b, k]",
        "where(q >= k, flag[b, k], in0[b, k] > 0)",
        "(k - q)//3 + 2*((q - k) % 5)",
        "(q*k + b - h)*2 - min(q, 3*k) + max(k, abs(q - k))",
        "in0[b, int(q > k)*k] + int(k > 2)",
        "table[where(q == 0, 0, q - 1)]",
        "where(q == 0, 7, table[q - 1])",
        "q + k == s + t - 2",
        "where(q >= k, slope[h]*float(k - q), -inf)",
        "bias[b, h, q, k] + 0.5*slope[h]",
        "bfloat16(slope[h]*float(q)) / 3.0",
        "min(bias[b, h, q, k], slope[h]) + max(abs(slope[h]), 0.25)",
        "exp(slope[h]) + sqrt(float(q)) + log(float(k) + 1.0)",
        "trunc(float(q)*0.4) - trunc(bias[b, h, q, k]*-2.0)",
        "int(slope[h] < 0.0) + int(slope[h] <= bias[b, h, q, k])",
    ],
)
def test_kernels_compute_what_the_expression_says(text: str, tmp_path: Path) -> None:
    """The generated code, run for every element, gives what plain torch gives, at full and at partial blocks."""
    check(text, tmp_path, 13, 16)


@pytest.mark.parametrize(
    "text", ["q >= k & k - q + 4 >= 0 & flag[b, k]", "where(q == 0, 7, table[q - 1])", "slope[h]*float(q - s + 9)"]
)
def test_kernels_of_one_query_and_key(text: str, tmp_path: Path) -> None:
    """Sizes of one, which Triton takes for constants, do not disturb the code."""
    check(text, tmp_path, 1, 1)


def check(text: str, folder: Path, queries: int, keys: int) -> None:
    e = ix.parse(text, TYPES)
    found, wanted = run(e, folder, queries, keys), expected(e, queries, keys)
    if e.type == "float":
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, wanted.to(torch.int32))


def test_code_is_readable() -> None:
    """What is subtracted stands on the other side of a comparison, and one-element strides are left out."""
    e = ix.parse("q - k >= 0 & k - q + 4 >= 0 & not (in0[b, k] == 0)")
    loads = {"in0": LoadCode("p_in0", ("stride_in0", "1"))}
    code = triton_code(
        e, {"b": "i_b", "q": "o_m[:, None]", "k": "o_n[None, :]"}, loads, in_range={"k": "o_n[None, :] < length"}
    )
    assert code == (
        "((o_n[None, :] + 4 >= o_m[:, None]) & (o_m[:, None] >= o_n[None, :]) & "
        "(tl.load(p_in0 + i_b * stride_in0 + o_n[None, :], mask=(o_n[None, :] < length), other=0) != 0))"
    )


def test_reads_are_guarded_by_the_choice_they_are_in() -> None:
    """What a choice does not take is not read; a condition over more variables than the place has is no guard."""
    e = ix.parse("where(q == 0, 0, in0[q - 1])")
    loads = {"in0": LoadCode("p_in0", ("1",))}
    assert "mask=(o_q != 0)" in triton_code(e, VARIABLES, loads)
    assert "mask" not in triton_code(ix.parse("where(q >= k, 0, in0[q])"), VARIABLES, loads)


def test_what_has_no_code_is_refused() -> None:
    """A sum, an unknown variable, an unknown tensor and a wrong number of strides are named."""
    with pytest.raises(LoweringError, match="for_kernels=True"):
        triton_code(ix.parse("sum(j <= q, in0[b, j])"), VARIABLES, {"in0": LoadCode("p", ("1", "1"))})
    with pytest.raises(LoweringError, match="no text for the variable 'z'"):
        triton_code(ix.parse("z >= k"), VARIABLES, {})
    with pytest.raises(LoweringError, match="no text for the tensor 'in0'"):
        triton_code(ix.parse("in0[k] >= k"), VARIABLES, {})
    with pytest.raises(LoweringError, match="2 indices, but 1 strides"):
        triton_code(ix.parse("in0[b, k]"), VARIABLES, {"in0": LoadCode("p", ("1",))})
