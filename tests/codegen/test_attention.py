"""Attention kernels: what they compute, against plain attention in double precision, and what their text says."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from graphwright.codegen.attention import AttentionSpec, attention_parameters, attention_source, attention_tiles
from graphwright.codegen.attention_parts import cut
from graphwright.ir.errors import LoweringError
from graphwright.runtime.triton_cpu import prepare
from graphwright.runtime.triton_cpu.driver import CPUDriver

PADDING = "tl.load(p_lengths + i_b) > o_k"
ALIBI = "tl.load(p_slopes + i_h) * (o_k - o_q).to(tl.float32)"
TENSOR_BIAS = (
    "tl.load(p_bias + i_b * bias_batch + o_q * bias_row + o_k, mask=(o_q < query_length) & (o_k < key_length), other=0.0)"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def cpu_driver() -> Iterator[None]:
    """Let Triton run on the CPU, and draw the same inputs in every run."""
    torch.manual_seed(0)
    triton.runtime.driver.set_active(CPUDriver())
    yield
    triton.runtime.driver.reset_active()


@pytest.fixture(scope="module")
def kernel_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[AttentionSpec], Any]:
    """Return a function that writes a kernel's module, imports it and returns the kernel."""
    folder = tmp_path_factory.mktemp("kernels")

    def load(spec: AttentionSpec) -> Any:
        text = attention_source(spec, "attention_kernel", provenance=["a test"])
        path = folder / f"kernel_{hashlib.sha256(text.encode()).hexdigest()[:16]}.py"
        path.write_text(text)
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        return module.attention_kernel

    return load


@dataclass
class Case:
    """A specification with its inputs, and what to add to or hide from the scores in the reference."""

    spec: AttentionSpec
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    offset: int = 0
    operands: tuple[Any, ...] = ()
    bias: torch.Tensor | None = None
    visible: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


def make(
    batch: int = 2,
    heads: int = 2,
    queries: int = 63,
    keys: int | None = None,
    dim: int = 32,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    fused: bool = False,
    **options: Any,
) -> Case:
    """Return a case with random inputs; `fused` makes q, k and v views of one buffer."""
    keys = queries if keys is None else keys
    spec = AttentionSpec(head_dim=dim, value_dim=value_dim or dim, dtype=str(dtype).removeprefix("torch."), **options)
    key_heads = heads // spec.group
    sizes = [heads * dim, key_heads * dim, key_heads * spec.value_dim]
    if fused:
        q, k, v = torch.randn(batch, queries, sum(sizes)).to(dtype).split(sizes, -1)
    else:
        q, k, v = (torch.randn(batch, n, size).to(dtype) for n, size in zip((queries, keys, keys), sizes, strict=True))
    q, k, v = (t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in zip((q, k, v), (heads, key_heads, key_heads), strict=True))
    return Case(spec, q, k, v)


def run(
    kernel: Any, case: Case, *, starts: torch.Tensor | None = None, block: int | None = None, tiles: Any = None
) -> tuple[Any, Any]:
    """Run a kernel on outputs full of NaN with a margin, check that the margin is untouched, and return out and lse."""
    spec, (q, k, v) = case.spec, (case.q, case.k, case.v)
    batch, heads, queries, _ = q.shape
    margin = 3
    room = torch.full((batch, queries + 2 * margin, heads + 1, spec.value_dim + margin), math.nan, dtype=q.dtype)
    out = room[:, margin : margin + queries, :heads, : spec.value_dim].transpose(1, 2)
    lse_room = torch.full((batch * heads * queries + 2 * margin,), math.nan)
    values: dict[str, Any] = {"p_q": q, "p_k": k, "p_v": v, "p_out": out, "p_lse": lse_room[margin:]}
    values |= {"p_sink": case.sinks, "p_starts": starts, "query_length": queries, "key_length": k.shape[2]}
    values |= {"offset": case.offset, "scale": q.shape[-1] ** -0.5} | dict(zip(spec.operands, case.operands, strict=True))
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        values |= {f"{name}_{dim}": tensor.stride(i) for i, dim in enumerate(("batch", "head", "token"))}
    tiles = tiles or attention_tiles(spec, False) | ({"BLOCK_M": block, "BLOCK_N": block} if block else {})
    longest = queries if starts is None else int(starts.diff().max())
    grid = (triton.cdiv(longest, tiles["BLOCK_M"]), heads, batch if starts is None else len(starts) - 1)
    prepare(kernel, grid, *(values[name] for name in attention_parameters(spec)), **tiles)()
    touched = room.isnan().logical_not()
    touched[:, margin : margin + queries, :heads, : spec.value_dim] = False
    assert not touched.any()
    assert lse_room[:margin].isnan().all()
    assert lse_room[len(lse_room) - margin :].isnan().all()
    lse = lse_room[margin : len(lse_room) - margin]
    return out, lse.reshape(queries, heads).T if spec.ragged else lse.reshape(batch, heads, queries)


def plain(case: Case, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and log-sum-exp, computed one operation after the other in `dtype`."""
    spec = case.spec
    q, k, v = case.q.to(dtype), case.k.to(dtype), case.v.to(dtype)
    k, v = (t.repeat_interleave(spec.group, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if case.bias is not None:
        scores = scores + case.bias.to(dtype)
    position = torch.arange(q.shape[2])[:, None] + case.offset
    key = torch.arange(k.shape[2])[None, :]
    visible = torch.ones(len(position), key.shape[1], dtype=torch.bool)
    if spec.causal:
        visible &= key <= position
    if spec.window is not None:
        visible &= (key > position - spec.window) | (key < spec.sinks)
    if spec.right_window is not None:
        visible &= (key < position + spec.right_window) | (position < (spec.free or -math.inf))
    if spec.chunks_behind is not None:
        visible &= key // spec.chunk >= position // spec.chunk - spec.chunks_behind
    if spec.chunks_ahead is not None:
        visible &= key // spec.chunk <= position // spec.chunk + spec.chunks_ahead
    if case.visible is not None:
        visible = visible & case.visible
    scores = scores.masked_fill(~visible, -math.inf)
    if case.sinks is not None:
        scores = torch.cat([scores, case.sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    lse = torch.logsumexp(scores, -1)
    weights = torch.where((lse == -math.inf)[..., None], 0.0, torch.softmax(scores, -1))
    return weights @ v, lse


def check(
    kernel_of: Callable[[AttentionSpec], Any], case: Case, *, block: int | None = None, ratio: float = 3.0, tiles: Any = None
) -> None:
    """Run a kernel and require an error of at most about `ratio` times that of plain attention in the same type."""
    out, lse = run(kernel_of(case.spec), case, block=block, tiles=tiles)
    close(case, out, lse, ratio=ratio)


def close(case: Case, out: torch.Tensor, lse: torch.Tensor, *, ratio: float = 3.0) -> None:
    """Compare results with plain attention in double precision and in the case's own type."""
    dtype = case.q.dtype
    for ours, exact, rival in list(zip((out, lse), plain(case), plain(case, dtype), strict=True))[: 1 + case.spec.lse]:
        assert torch.equal(ours.isnan(), exact.isnan())
        assert torch.equal(ours == -math.inf, exact == -math.inf)
        finite = exact.isfinite()
        if not finite.any():
            continue
        reference = exact[finite]
        error, allowed = ((x[finite].double() - reference).abs().max() for x in (ours, rival))
        assert error <= ratio * allowed + 4 * torch.finfo(dtype).eps * reference.abs().max()


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 1), (1, 63), (63, 128), (128, 63), (128, 128), (1000, 130)])
def test_lengths(kernel_of: Any, queries: int, keys: int) -> None:
    """Lengths need not be multiples of a block, nor equal."""
    check(kernel_of, make(queries=queries, keys=keys, lse=True))


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (8, 8), (40, 40), (64, 80), (80, 64), (96, 1), (128, 128), (256, 256)])
def test_dims(kernel_of: Any, dim: int, value_dim: int) -> None:
    """Heads may have any size, and values another than keys."""
    check(kernel_of, make(queries=70, heads=1, dim=dim, value_dim=value_dim))


LIMITS = [
    {"causal": True},
    {"window": 1},
    {"window": 100},
    {"right_window": 5},
    {"window": 33, "right_window": 40},
    {"causal": True, "window": 20},
    {"causal": True, "window": 150},
    {"causal": True, "window": 20, "sinks": 3},
    {"causal": True, "window": 1, "sinks": 70},
    {"causal": True, "window": 40, "sinks": 33},
    {"window": 9, "right_window": 20, "sinks": 40, "free": 40},
    {"window": 9, "right_window": 20, "sinks": 1, "free": 50},
]

CHUNKS = [
    {"causal": True, "chunk": 24, "chunks_behind": 0},
    {"chunk": 24, "chunks_behind": 0, "chunks_ahead": 0},
    {"chunk": 64, "chunks_behind": 1, "chunks_ahead": 1},
    {"chunk": 40, "chunks_ahead": 0},
    {"causal": True, "window": 30, "sinks": 50, "chunk": 40, "chunks_behind": 2},
]


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: "-".join(map(str, limits.items())))
def test_limits(kernel_of: Any, limits: dict[str, Any]) -> None:
    """Causal and window limits follow the offset, and queries without keys get zeros."""
    for (queries, keys), offset in itertools.product([(1, 200), (130, 63), (200, 200)], [0, 70, 199, 400, -50]):
        case = make(batch=1, queries=queries, keys=keys, dim=16, lse=True, **limits)
        check(kernel_of, replace(case, offset=offset), block=32)


@pytest.mark.parametrize("limits", CHUNKS, ids=lambda limits: "-".join(map(str, limits.items())))
def test_chunks(kernel_of: Any, limits: dict[str, Any]) -> None:
    """Queries and keys see each other within a chunk and so many of its neighbours, wherever blocks of the kernel end."""
    for (queries, keys), offset in itertools.product([(1, 200), (130, 63), (200, 200)], [0, 70, 400]):
        case = make(batch=1, queries=queries, keys=keys, dim=16, lse=True, **limits)
        check(kernel_of, replace(case, offset=offset), block=32)


@pytest.mark.parametrize("limits", [LIMITS[-4], LIMITS[-2], CHUNKS[2]], ids=lambda limits: "-".join(map(str, limits.items())))
def test_keys_out_of_reach_are_not_read(kernel_of: Any, limits: dict[str, Any]) -> None:
    """What no query of a block sees is skipped: NaN there spoils nothing, but for the blocks that a limit crosses."""
    case = make(batch=1, queries=640, dim=16, **limits)
    out, _ = run(kernel_of(case.spec), case, block=32)
    hidden = slice(128, 384)
    case.k[:, :, hidden] = math.nan
    case.v[:, :, hidden] = math.nan
    poisoned, _ = run(kernel_of(case.spec), case, block=32)
    assert torch.equal(out[:, :, 512:], poisoned[:, :, 512:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types(kernel_of: Any, dtype: torch.dtype) -> None:
    """Scores and sums of half-precision inputs are float32."""
    check(kernel_of, make(queries=130, dim=64, dtype=dtype, causal=True, lse=True))
    check(kernel_of, make(queries=70, dim=40, dtype=dtype, softcap=5.0))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dtype": torch.bfloat16}])
def test_views_of_one_buffer(kernel_of: Any, options: dict[str, Any]) -> None:
    """Queries, keys and values may be views of one buffer, with keys and values shared by a group of heads."""
    check(kernel_of, make(heads=6, group=3, queries=100, fused=True, **options))


@pytest.mark.parametrize("limits", [{}, {"causal": True}, {"window": 40, "right_window": 40}])
def test_padding(kernel_of: Any, limits: dict[str, Any]) -> None:
    """A predicate hides keys, also all keys of a sequence."""
    lengths = torch.tensor([0, 1, 64, 100], dtype=torch.int32)
    case = make(batch=4, queries=100, predicate=PADDING, operands=("p_lengths",), lse=True, **limits)
    visible = torch.arange(100) < lengths[:, None, None, None]
    check(kernel_of, replace(case, operands=(lengths,), visible=visible))


def test_linear_bias(kernel_of: Any) -> None:
    """A bias may be computed from the head and the positions."""
    slopes = torch.tensor([0.5, 0.0625])
    case = make(queries=130, bias=ALIBI, operands=("p_slopes",), causal=True, lse=True)
    distance = (torch.arange(130)[None, :] - torch.arange(130)[:, None]).float()
    check(kernel_of, replace(case, operands=(slopes,), bias=slopes[:, None, None] * distance))


@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min])
def test_bias_that_hides(kernel_of: Any, hidden: float) -> None:
    """An additive mask may hide by -inf or the smallest number, also a whole row."""
    bias = torch.randn(2, 70, 100)
    bias[0, 3:9, 50:] = hidden
    bias[:, 20] = hidden
    names = ("p_bias", "bias_batch", "bias_row")
    case = make(queries=70, keys=100, bias=TENSOR_BIAS, operands=names)
    check(kernel_of, replace(case, operands=(bias, bias.stride(0), bias.stride(1)), bias=bias[:, None]))


@pytest.mark.parametrize("options", [{}, {"bias": ALIBI, "operands": ("p_slopes",)}, {"softcap": 2.0, "causal": True}])
def test_sinks(kernel_of: Any, options: dict[str, Any]) -> None:
    """A sink takes its share of each head's weight, and may be -inf."""
    slopes = torch.tensor([0.25, 0.125, 0.5])
    sinks = torch.tensor([1.5, -math.inf, 20.0])
    case = replace(make(heads=3, queries=70, sink=True, lse=True, **options), sinks=sinks)
    if case.spec.bias:
        distance = (torch.arange(70)[None, :] - torch.arange(70)[:, None]).float()
        case = replace(case, operands=(slopes,), bias=slopes[:, None, None] * distance)
    check(kernel_of, case)


@pytest.mark.parametrize("options", [{}, {"bias": ALIBI, "operands": ("p_slopes",)}])
def test_softcap(kernel_of: Any, options: dict[str, Any]) -> None:
    """Scores are capped before a bias is added."""
    slopes = torch.tensor([0.25, 0.125])
    case = make(queries=70, softcap=3.0, **options)
    case.q = case.q * 4
    if case.spec.bias:
        distance = (torch.arange(70)[None, :] - torch.arange(70)[:, None]).float()
        case = replace(case, operands=(slopes,), bias=slopes[:, None, None] * distance)
    check(kernel_of, case)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 30, "right_window": 30}])
def test_packed_sequences(kernel_of: Any, options: dict[str, Any]) -> None:
    """Packed sequences of any length, also empty ones, do not see each other."""
    lengths = [70, 0, 1, 129, 64]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    case = make(batch=1, heads=4, group=2, queries=sum(lengths), ragged=True, lse=True, fused=True, **options)
    out, lse = run(kernel_of(case.spec), case, starts=starts)
    for first, after in itertools.pairwise(starts.tolist()):
        q, k, v = (t[:, :, first:after] for t in (case.q, case.k, case.v))
        close(replace(case, q=q, k=k, v=v), out[:, :, first:after], lse[None, :, first:after])


def test_nan_and_infinity(kernel_of: Any) -> None:
    """NaN and infinite inputs spoil what they spoil in plain attention, and nothing else."""
    case = make(batch=1, heads=1, queries=70, causal=True)
    case.q[0, 0, 3, 0] = math.nan
    case.k[0, 0, 40, 5] = math.nan
    case.q[0, 0, 20, 2] = math.inf
    assert plain(case)[0].isnan().any()
    check(kernel_of, case)


def test_no_keys(kernel_of: Any) -> None:
    """Without keys all outputs are zero; without queries there is nothing to do."""
    case = make(queries=5, lse=True)
    none = replace(case, k=case.k[:, :, :0], v=case.v[:, :, :0])
    out, lse = run(kernel_of(case.spec), none)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    run(kernel_of(case.spec), replace(case, q=case.q[:, :, :0]))


def test_large_scores(kernel_of: Any) -> None:
    """Scores of thousands neither overflow nor lose the largest weight."""
    case = make(queries=70, lse=True)
    case.q *= 1000
    # The scores here differ in their last place by what the weights differ by as a whole.
    check(kernel_of, case, ratio=16.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 8, 32, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("limits", [{}, *LIMITS], ids=lambda limits: "-".join(map(str, limits.items())))
def test_all(kernel_of: Any, limits: dict[str, Any], dim: int, dtype: torch.dtype) -> None:
    """Every combination of lengths, dims, limits and types."""
    for queries, keys in itertools.product([1, 63, 128, 1000], repeat=2):
        for offset in (0, keys - queries):
            case = make(batch=1, heads=4, group=2, queries=queries, keys=keys, dim=dim, dtype=dtype, lse=True, **limits)
            check(kernel_of, replace(case, offset=offset))


@pytest.mark.parametrize(
    ("dim", "sizes"),
    [
        (1, [16]),
        (16, [16]),
        (17, [32]),
        (32, [32]),
        (40, [32, 16]),
        (80, [64, 16]),
        (112, [128]),
        (160, [128, 32]),
        (256, [256]),
    ],
)
def test_cut(dim: int, sizes: Sequence[int]) -> None:
    """A head is cut into one or two powers of two that cover it."""
    parts = cut(dim)
    assert [part.size for part in parts] == list(sizes)
    assert sum(part.used for part in parts) == dim
    assert [part.start for part in parts] == [0, *(part.size for part in parts[:-1])]


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_whole_blocks_have_no_masks(dim: int) -> None:
    """The text of whole blocks of heads of convenient sizes loads keys and values without a mask."""
    text = attention_source(AttentionSpec(head_dim=dim, value_dim=dim), "attention_kernel")
    whole = text.split("if part == 0:")[1].split("else:")[0]
    assert "tl.load" in whole
    assert "mask" not in whole


def test_text(tmp_path: Path) -> None:
    """A module says where its kernel comes from, and is valid Python with the promised parameters."""
    spec = AttentionSpec(head_dim=64, value_dim=64, sink=True, lse=True, predicate=PADDING, operands=("p_lengths",))
    text = attention_source(spec, "attention_7_kernel", provenance=["attention of layers 0 to 3", ""])
    assert text.startswith("# attention of layers 0 to 3\n#\nimport triton\n")
    names = [line.strip(" ,") for line in text.split("def attention_7_kernel(\n")[1].split("):")[0].splitlines()]
    assert names[:-2] == list(attention_parameters(spec))
    assert names[-2:] == ["BLOCK_M: tl.constexpr", "BLOCK_N: tl.constexpr"]
    compile(text, "kernel.py", "exec")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 257}, "head_dim must be 1 to 256, got 257"),
        ({"value_dim": 0}, "value_dim must be 1 to 256, got 0"),
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16, got 'float64'"),
        ({"group": 0}, "group must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"softcap": -1.0}, "softcap must be positive and finite, got -1.0"),
    ],
)
def test_wrong_specification(options: dict[str, Any], message: str) -> None:
    """A value out of range is named."""
    with pytest.raises(LoweringError, match=message):
        AttentionSpec(**({"head_dim": 64, "value_dim": 64} | options))


@pytest.mark.parametrize("name", ["p_q", "o_k", "row_max", "tl", "not a name", "acc0"])
def test_operand_names(name: str) -> None:
    """An operand cannot have a name that the kernel uses."""
    with pytest.raises(LoweringError, match="no operand can be called"):
        attention_source(AttentionSpec(head_dim=64, value_dim=64, operands=(name,)), "attention_kernel")


@pytest.mark.parametrize("queries", [1, 2, 5])
def test_few_queries(kernel_of: Any, queries: int) -> None:
    """The block of queries shrinks to the number of queries, where that is known."""
    case = replace(make(heads=6, group=3, queries=queries, keys=200, causal=True, lse=True), offset=200 - queries)
    tiles = attention_tiles(case.spec, False, query_length=queries)
    assert queries <= tiles["BLOCK_M"] < 2 * queries
    assert attention_tiles(case.spec, True, query_length=queries)["BLOCK_M"] == 16
    check(kernel_of, case, tiles=tiles)
