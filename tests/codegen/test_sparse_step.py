"""Kernels that make lists of keys and attend over them, compared with the reference."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

from graphwright.codegen.lower import lower
from graphwright.ir import dialect
from graphwright.ir.containers import Leaf
from graphwright.ir.errors import LoweringError
from graphwright.ir.ops.block_index import TILE, tiles
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec
from graphwright.runtime.executable import Executable

CAUSAL = "q - k >= 0"
HEADS, KEY_HEADS = 4, 2
PATTERN = {"vertical": [35, 5, 70, 0], "slash": [33, 17, 0, 40], "fixed": [False, True, False, False]}
ROOM = 40


def signed(program):
    """Return a program built by hand with a signature of tensors by position, and its first result as the result."""
    specs = []
    for node in program.inputs:
        sizes = tuple(n if isinstance(n, int) else str(n) for n in program.shape(node))
        specs.append(TensorSpec(node.name, node.meta["val"].dtype, "cpu", sizes))
    names = [spec.name for spec in specs]
    parameters = tuple(Parameter(name, "positional_or_keyword") for name in names)
    leaves = {name: Leaf(at) for at, name in enumerate(names)}
    ranges = {name: Range(0, None) for name in program.dimensions}
    program.signature = Signature(parameters, leaves, tuple(specs), ranges, Leaf(0))
    return program


def executable_of(program) -> Executable:
    """Return what runs a program."""
    return Executable(lower(program), program.weights, program.signature)


def indexed(builder, result: int, size: int = 16, dtype=torch.float32, counted: bool = False, **options):
    """Return a program of lists and the attention over them, with one of these as its first result."""
    made = builder()
    q, k, v = (
        made.input(name, "batch", heads, "tokens", size, dtype=dtype)
        for name, heads in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS))
    )
    given = {"count": made.input("count", "batch", dtype=torch.int64)} if counted else {}
    cap = {"softcap": options.pop("softcap", 0.0)}
    minimum = {"minimum_tokens": options.pop("minimum_tokens", 0)}
    index = made.call(dialect.block_index, q, k, None, scale=0.3, **given, **cap, **minimum, **{**PATTERN, **options})
    blocks, columns = (made.call(operator.getitem, index, at) for at in range(2))
    y = made.call(dialect.sparse_attention, q, k, v, blocks, columns, [], None, predicate=CAUSAL, scale=0.3, **cap, **minimum)
    results = [y, blocks, columns]
    return signed(made.program(results[result], *results))


def drawn(tokens: int, batch: int = 2, size: int = 16, dtype=torch.float32) -> list[torch.Tensor]:
    """Return queries, keys and values."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, n, tokens, size, generator=generator).to(dtype) for n in (HEADS, KEY_HEADS, KEY_HEADS)]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Compare by the largest difference over the largest value."""
    assert got.dtype == expected.dtype
    assert not got.isnan().any()
    if expected.numel():
        assert (got.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max() + 1e-30


@pytest.fixture(scope="module")
def attention(builder):
    """A program with the pattern of this file, and what runs it."""
    program = indexed(builder, 0)
    return program, executable_of(program)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200, 1000])
def test_estimate_and_attention(attention, tokens) -> None:
    """Lists and attention over them are those of the reference, at lengths around the size of a block too."""
    program, executable = attention
    inputs = drawn(tokens)
    expected = program.module()(*inputs)[0]
    close(executable(*inputs), expected)
    if tokens > 200:
        plain = dialect.attention(*inputs, [], None, predicate=CAUSAL, scale=0.3)
        assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize(("result", "counted"), [(1, False), (2, True)])
def test_lists(builder, result, counted) -> None:
    """Both kinds of list are the reference's, of sequences with padding too."""
    program = indexed(builder, result, counted=counted)
    executable = executable_of(program)
    for tokens in (65, 330):
        inputs = [*drawn(tokens)[:2], drawn(tokens)[2], *([torch.tensor([tokens // 2, tokens])] if counted else [])]
        got, expected = executable(*inputs), program.module()(*inputs)[0]
        inside = torch.arange(expected.shape[-1]) <= expected[..., :1]
        assert torch.equal(torch.where(inside, got, 0), torch.where(inside, expected, 0))


def test_the_farthest_distances(builder) -> None:
    """A block that starts before the farthest distance is listed, and marks no keys of another head."""
    program = indexed(builder, 1, vertical=[0] * HEADS, slash=[32] * HEADS, fixed=[False] * HEADS)
    q, k, v = (torch.zeros(1, n, 256, 16) for n in (HEADS, KEY_HEADS, KEY_HEADS))
    q[:, :, -2:, 0], k[:, :, 0, 0] = 30.0, 30.0
    got = executable_of(program)(q, k, v)[0, :, -1]
    assert got[:, :4].tolist() == [[3, 192, 128, -62]] * HEADS
    assert torch.equal(got[:, :4], program.module()(q, k, v)[0][0, :, -1, :4])


def test_density_one_at_a_long_length(builder) -> None:
    """With all columns and diagonals it is causal attention, one token more than a multiple of the block too."""
    program = indexed(builder, 0, **{name: [5000] * HEADS for name in ("vertical", "slash")})
    inputs = drawn(4097, batch=1)
    close(executable_of(program)(*inputs), dialect.attention(*inputs, [], None, predicate=CAUSAL, scale=0.3), 4e-6)


@pytest.mark.parametrize(
    "options",
    [{"size": 40}, {"dtype": torch.bfloat16}, {"dtype": torch.float16, "softcap": 2.0}, {"softcap": 1.5, "size": 1}],
    ids=str,
)
def test_sizes_and_types(builder, options) -> None:
    """Heads may have any size, scores may be capped, and half precision is summed in float32."""
    # Which of nearly equal sums is taken depends on rounding: all of them are.
    program = indexed(builder, 0, **options, vertical=[300] * HEADS, slash=[31] * HEADS, fixed=[False] * HEADS)
    inputs = drawn(300, **{name: value for name, value in options.items() if name != "softcap"})
    close(executable_of(program)(*inputs), program.module()(*inputs)[0], 2e-6 if "dtype" not in options else 2e-2)


@pytest.mark.parametrize("tokens", [99, 100, 101])
def test_all_keys_below_the_minimum(builder, tokens) -> None:
    """Below the minimum the dense kernel runs, and nothing else; from it on the lists are used."""
    program = indexed(builder, 0, minimum_tokens=100)
    inputs = drawn(tokens)
    executable = executable_of(program)
    expected = program.module()(*inputs)[0]
    plain = dialect.attention(*inputs, [], None, predicate=CAUSAL, scale=0.3)
    assert torch.equal(expected, plain) == (tokens < 100)
    close(executable(*inputs), expected)
    steps = [name for name in executable.schedule.kernels if "block_index" in name]
    assert len(steps) == 4


def test_a_fixed_length_needs_one_of_them(builder) -> None:
    """Where the number of tokens is known, either the dense kernel or the lists are left out."""
    from graphwright.ir.fixing import fix_dimension

    for tokens, count in ((99, 1), (100, 5)):
        program = fix_dimension(indexed(builder, 0, minimum_tokens=100), "tokens", tokens)
        schedule = lower(program)
        assert len(schedule.steps) == count
        inputs = drawn(tokens)
        close(executable_of(program)(*inputs), program.module()(*inputs)[0])


# ---- attention over lists of any kind


def random_lists(tokens: int, batch: int, width: int, seed: int) -> list[torch.Tensor]:
    """Return lists with disjoint blocks anywhere, single keys outside of them, empty rows and rows of all keys."""
    generator = torch.Generator().manual_seed(seed)

    def number(high: int) -> int:
        return int(torch.randint(0, high, (), generator=generator))

    count = tiles(tokens)
    blocks = torch.full((batch, HEADS, count, count + 2), -(10**6), dtype=torch.int32)
    columns = torch.full((batch, HEADS, count, 1 + width), -(10**6), dtype=torch.int32)
    for b, h, i in torch.cartesian_prod(torch.arange(batch), torch.arange(HEADS), torch.arange(count)).tolist():
        starts, at = [], i * TILE + number(TILE)
        while at > -TILE and number(8):
            starts.append(at)
            at -= TILE + number(2) * number(90)
        covered = {key for start in starts for key in range(start, start + TILE)}
        free = [key for key in range(min((i + 1) * TILE, tokens)) if key not in covered]
        order = torch.randperm(len(free), generator=generator)[: number(width + 1)].tolist()
        keys = sorted(free[at] for at in order)
        blocks[b, h, i, : 1 + len(starts)] = torch.tensor([-1 if number(6) == 0 else len(starts), *starts])
        columns[b, h, i, : 1 + len(keys)] = torch.tensor([len(keys), *keys])
    return [blocks, columns]


def listed(builder, *, cached: bool = False, width: int = 90, weights: Any = (), dtype=torch.float32, **options):
    """Return a program of an attention over lists that calls bring."""
    made = builder()
    keys = "capacity" if cached else "tokens"
    q = made.input("q", "batch", HEADS, "tokens", 16, dtype=dtype)
    k, v = (made.input(name, "batch", KEY_HEADS, ROOM * 10 if cached else keys, 16, dtype=dtype) for name in "kv")
    past = [made.input("past", "batch", dtype=torch.int64)] if cached else []
    index = made.call(
        dialect.block_index, q, made.input("new", "batch", KEY_HEADS, "tokens", 16, dtype=dtype), None,
        **{**PATTERN, "vertical": [width] * HEADS}, scale=0.3,
    )  # fmt: skip
    lists = []
    for at, name in enumerate(("blocks", "columns")):
        node = made.call(operator.getitem, index, at)
        given = made.built.graph.placeholder(name)
        given.meta["val"] = node.meta["val"]
        lists.append(given)
        made.built.graph.erase_node(node)
    made.built.graph.erase_node(index)
    new = next(node for node in made.built.graph.nodes if node.name == "new")
    made.built.graph.erase_node(new)
    read = [made.weight(f"w{at}", weight) for at, weight in enumerate(weights)]
    sink = made.weight("sink", options.pop("sink")) if "sink" in options else None
    target = dialect.kv_sparse_attention if cached else dialect.sparse_attention
    y = made.call(target, q, k, v, *past, *lists, read, sink, scale=0.3, **{"predicate": CAUSAL, **options})
    return signed(made.program(y))


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0])
FORMS: dict[str, dict[str, Any]] = {
    "causal": {},
    "not causal": {"predicate": ""},
    "window": {"predicate": "q - k >= 0 & k - q + 70 >= 0"},
    "hidden queries": {"predicate": "q - k >= 0 & q - 70 >= 0"},
    "bias": {"weights": [SLOPES], "bias": "in0[h]*float(k)"},
    "sink and cap": {"sink": torch.tensor([0.3, -1.0, 2.0, 0.0]), "softcap": 3.0},
    "half precision": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("form", FORMS)
def test_lists_decide(builder, form) -> None:
    """Every listed key counts once, whatever lists hold; what is behind a list's end is not read."""
    options = dict(FORMS[form])
    program = listed(builder, **options)
    executable = executable_of(program)
    dtype = options.get("dtype", torch.float32)
    for tokens in (1, 65, 190):
        inputs = [*drawn(tokens, dtype=dtype), *random_lists(tokens, 2, 90, tokens)]
        close(executable(*inputs), program.module()(*inputs)[0], 4e-6 if dtype == torch.float32 else 2e-2)


def test_keys_that_are_not_listed_are_not_read(builder) -> None:
    """NaN in keys and values that no list names spoils nothing."""
    program = listed(builder)
    executable = executable_of(program)
    q, k, v = drawn(256)
    blocks = torch.zeros(2, HEADS, 4, 6, dtype=torch.int32)
    columns = torch.zeros(2, HEADS, 4, 91, dtype=torch.int32)
    blocks[..., :2] = torch.tensor([1, 0])
    columns[:, :, 1:, :3] = torch.tensor([2, 70, 100])
    expected = executable(q, k, v, blocks, columns)
    hidden = [key for key in range(TILE, 256) if key not in (70, 100)]
    k[:, :, hidden], v[:, :, hidden] = torch.nan, torch.nan
    assert torch.equal(executable(q, k, v, blocks, columns), expected)


@pytest.mark.parametrize("form", ["causal", "window"])
def test_lists_over_caches(builder, form) -> None:
    """Prompts in empty caches use lists, continuations see all; unfilled slots may hold NaN."""
    program = listed(builder, cached=True, **FORMS[form])
    executable = executable_of(program)
    for tokens in (1, 130):
        q, k, v = drawn(tokens)
        past = torch.tensor([0, 70])
        caches = [torch.full((2, KEY_HEADS, ROOM * 10, 16), torch.nan) for _ in range(2)]
        for cache, new in zip(caches, (k, v), strict=True):
            cache[0, :, :tokens], cache[1, :, :70], cache[1, :, 70 : 70 + tokens] = new[0], 0.5, new[1]
        blocks, columns = random_lists(tokens, 2, 90, tokens)
        blocks[1, ..., 0] = -1
        inputs = [q, *caches, past, blocks, columns]
        close(executable(*inputs), program.module()(*inputs)[0], 4e-6)


def test_what_has_no_kernel_is_said(builder) -> None:
    """Heads that are too large, and double precision, are refused with what there is."""
    for options in ({"size": 300}, {"dtype": torch.float64}):
        with pytest.raises(LoweringError, match="are made and used for float32, float16 and bfloat16, and heads of up to 256"):
            lower(indexed(builder, 0, **options))
