"""Kernels over quantised caches compared with the reference: prompts, parts of prompts, and single tokens."""

from __future__ import annotations

import math
import operator

import pytest
import torch

from graphwright.codegen.lower import lower
from graphwright.ir import dialect
from graphwright.ir.containers import Leaf
from graphwright.ir.errors import LoweringError
from graphwright.ir.fixing import fix_dimension
from graphwright.ir.ops.kv_quantized import CHANNEL, TOKEN, kv_quantized_append_reference
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec
from graphwright.runtime.executable import Executable

CAPACITY, GROUP, RESIDUAL = 1024, 16, 32
STATES = ("codes", "scale", "minimum", "ring")


def program_of(builder, heads=4, key_heads=2, size=16, values=16, bits=4, dtype=torch.float32, kept=torch.float16, **options):
    """Return a program of one attention over a quantised cache, which it then appends to."""
    made = builder()
    q = made.input("q", "batch", heads, "tokens", size, dtype=dtype)
    new = {x: made.input(x, "batch", key_heads, "tokens", n, dtype=dtype) for x, n in (("k", size), ("v", values))}
    past = made.input("past", "batch", dtype=torch.int64)
    count = made.input("count", "batch", dtype=torch.int64) if options.pop("counted", False) else None
    channels = values // math.gcd(values, GROUP)
    shapes = {
        "k": [(CAPACITY, size * bits // 8), (CAPACITY // GROUP, size), (CAPACITY // GROUP, size), (RESIDUAL + GROUP, size)],
        "v": [(CAPACITY, values * bits // 8), (channels, CAPACITY), (channels, CAPACITY), (RESIDUAL + GROUP, values)],
    }
    states = {
        f"{x}_{state}": made.input(f"{x}_{state}", "batch", key_heads, *shape, dtype=kind)
        for x in "kv"
        for state, shape, kind in zip(STATES, shapes[x], (torch.uint8, kept, kept, dtype), strict=True)
    }
    read = [made.weight(f"w{at}", weight) for at, weight in enumerate(options.pop("weights", ()))]
    sink = made.weight("sink", options.pop("sink")) if "sink" in options else None
    form = {"bits": bits, "group": GROUP}
    target, lists = dialect.kv_quantized_attention, []
    if listed := options.pop("listed", None):
        chosen = {name: [number] * heads for name, number in zip(("vertical", "slash", "fixed"), listed, strict=True)}
        least = options["minimum_tokens"] = 70
        index = made.call(dialect.block_index, q, new["k"], past, scale=0.3, minimum_tokens=least, **chosen)
        target, lists = dialect.kv_quantized_sparse_attention, [made.call(operator.getitem, index, at) for at in range(2)]
    y = made.call(
        target, q, *new.values(), past, *states.values(), *lists, read, sink, scale=0.3, **form,
        **{"predicate": "q - k >= 0", **options},
    )  # fmt: skip
    results = [y]
    for x, along in (("k", CHANNEL), ("v", TOKEN)):
        own = [states[f"{x}_{state}"] for state in STATES]
        node = made.call(dialect.kv_quantized_append, *own, new[x], past, count=count, along=along, **form)
        results += [made.call(operator.getitem, node, at) for at in range(4)]
    program = made.program(*results)
    program.states = {name: at for at, name in enumerate(states, 1)}
    names = [node.name for node in program.inputs]
    specs = [
        TensorSpec(node.name, node.meta["val"].dtype, "cpu", tuple(n if isinstance(n, int) else str(n) for n in shape))
        for node, shape in ((node, program.shape(node)) for node in program.inputs)
    ]
    ranges = {name: Range(0, None) for name in program.dimensions}
    parameters = tuple(Parameter(name, "positional_or_keyword") for name in names)
    program.signature = Signature(parameters, {n: Leaf(at) for at, n in enumerate(names)}, tuple(specs), ranges, Leaf(0))
    return program


def poisoned(spec: TensorSpec, batch: int) -> torch.Tensor:
    """Return a state that holds nothing: NaN, and bytes of all ones."""
    shape = [batch if n == "batch" else n for n in spec.shape]
    return torch.full(shape, 255 if spec.dtype == torch.uint8 else torch.nan, dtype=spec.dtype)


def drawn(program, past: list[int], tokens: int, count: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Return inputs: random new tokens, and states that hold `past` random tokens and nothing else."""
    batch, given, filled = len(past), {}, {}
    appends = {node.args[0].name[0]: node for node in program.graph.nodes if node.target is dialect.kv_quantized_append}
    for spec in program.signature.tensors:
        shape = [{"batch": batch, "tokens": tokens}.get(n, n) for n in spec.shape]
        if spec.name in ("past", "count"):
            given[spec.name] = torch.tensor(past if spec.name == "past" else count)
        elif spec.name in program.states:
            given[spec.name] = poisoned(spec, batch)
        else:
            given[spec.name] = torch.randn(shape).to(spec.dtype)
    for x, node in appends.items():
        states = [given[f"{x}_{state}"] for state in STATES]
        new = torch.randn(batch, given[x].shape[1], max(past), given[x].shape[3]).to(given[x].dtype)
        options = {key: value for key, value in node.kwargs.items() if key != "count"}
        states = kv_quantized_append_reference(
            *states, new, torch.zeros(batch, dtype=torch.int64), count=torch.tensor(past), **options
        )
        filled |= {f"{x}_{state}": value for state, value in zip(STATES, states, strict=True)}
    return {**given, **filled}


def run(program, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the kernels' result and the states afterwards."""
    given = {name: tensor.clone() for name, tensor in given.items()}
    tokens = given["q"].shape[2]
    made = fix_dimension(program, "tokens", 1) if tokens == 1 else program
    result = Executable(lower(made), made.weights, made.signature)(*given.values())
    return result, {name: given[name] for name in program.states}


def check(program, past: list[int], tokens: int = 1, tolerance: float = 1e-5, count: list[int] | None = None) -> None:
    """Compare one call with the reference: the result, and the states, which are bitwise the same."""
    given = drawn(program, past, tokens, count)
    expected, *states = program.module()(*(tensor.clone() for tensor in given.values()))
    got, after = run(program, given)
    assert not got.isnan().any()
    assert (got.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()
    for (name, found), wanted in zip(after.items(), states, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


FORMS = {
    "plain": {},
    "one head for each": {"heads": 3, "key_heads": 3},
    "three queries for a key head": {"heads": 6, "key_heads": 2},
    "sizes that are no power of two": {"size": 80, "values": 24},
    "small heads": {"size": 8, "values": 8},
    "window": {"predicate": "q - k >= 0 & k - q + 4 >= 0"},
    "strictly before": {"predicate": "q - k - 1 >= 0"},
    "capped": {"softcap": 2.0},
    "slopes": {"bias": "float(k - q)*in0[h]", "weights": (torch.tensor([0.5, 0.2, 0.1, 0.4]),)},
    "heads that differ": {"predicate": "q - k >= 0 & h - k + 30 >= 0"},
    "sink": {"sink": torch.tensor([0.3, -1.0, 2.0, 0.0])},
    "sink and bias": {"sink": torch.tensor([0.3, -1.0, 2.0, 0.0]), "bias": "float(k - q)*0.1"},
}


QUICK = {("plain", 1), ("plain", 5), ("sizes that are no power of two", 1), ("slopes", 5), ("sink", 1), ("capped", 1)}
CASES = [
    pytest.param(form, tokens, marks=[] if (form, tokens) in QUICK else [pytest.mark.slow])
    for form in FORMS
    for tokens in (1, 5)
]


@pytest.mark.parametrize(("form", "tokens"), CASES)
def test_kernels_give_what_the_reference_gives(builder, form, tokens) -> None:
    """Sequences at different positions, with groups that get full in the call; slots without tokens hold NaN."""
    check(program_of(builder, **FORMS[form]), [RESIDUAL + 3 * GROUP - 1, 0, 77], tokens)


@pytest.mark.parametrize(("bits", "tokens"), [(2, 1), (8, 1), (8, 63), (4, 1000)])
def test_bits_and_awkward_sizes(builder, bits, tokens) -> None:
    """Prompts of more than the ring, of more or less than a block, and that start a sequence."""
    check(program_of(builder, bits=bits, size=32, values=48), [0, 16, 71, 90] if tokens < 100 else [0], tokens)


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.bfloat16, 1), (torch.float16, 9)])
def test_half_precision(builder, dtype, tokens) -> None:
    """Scores and sums are float32."""
    check(program_of(builder, dtype=dtype), [70, 31], tokens, tolerance=1e-2)


def test_parameters_may_be_float32(builder) -> None:
    """Scales and minima are then as exact as the keys."""
    check(program_of(builder, kept=torch.float32), [50, 3], 40)


def test_tokens_that_do_not_count_are_not_kept(builder) -> None:
    """A prompt's padding is neither quantised nor in the ring."""
    check(program_of(builder, counted=True), [0, 40], 90, count=[61, 90])


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_prompts_may_see_listed_keys(builder, tokens) -> None:
    """Sequences that start see what their lists name, or all keys in a short call; those that go on see the cache."""
    check(program_of(builder, size=32, values=48, listed=(32, 40, False)), [0, 71, 0, 90], tokens)


def test_lists_leave_keys_out(builder) -> None:
    """Where a prompt is long enough, its result differs from the dense one, and that of a sequence that goes on does not."""
    sparse, dense = (program_of(builder, **options) for options in ({"listed": (30, 30, False)}, {}))
    given = drawn(dense, [0, 71], 400)
    differ = (run(sparse, given)[0] - run(dense, given)[0]).abs().amax((1, 2, 3))
    assert differ[0] > 1e-3
    assert differ[1] < 1e-5


def test_one_by_one_is_as_a_block(builder) -> None:
    """Kernels leave bitwise the same states, whatever the parts that tokens come in."""
    program = program_of(builder, heads=2, key_heads=2)
    given = drawn(program, [0, 0], 70)
    _, block = run(program, given)
    at = {name: given[name] for name in program.states}
    for first, last in [(0, 50), *((k, k + 1) for k in range(50, 70))]:
        parts = {name: given[name][:, :, first:last].contiguous() for name in "qkv"}
        _, at = run(program, {**given, **parts, **at, "past": torch.tensor([first, first])})
    for name, state in block.items():
        torch.testing.assert_close(at[name], state, rtol=0, atol=0, equal_nan=True)


def test_neighbours_do_not_matter(builder) -> None:
    """A sequence gets bitwise what it gets alone, whatever is beside it."""
    program = program_of(builder)
    given = drawn(program, [70, 20], 1)
    both, states = run(program, given)
    for row in range(2):
        alone, own = run(program, {name: tensor[row : row + 1] for name, tensor in given.items()})
        assert torch.equal(both[row : row + 1], alone)
        for name, state in own.items():
            torch.testing.assert_close(states[name][row : row + 1], state, rtol=0, atol=0, equal_nan=True)


def test_what_does_not_fit_is_dropped(builder) -> None:
    """Tokens beyond the capacity are not written anywhere."""
    check(program_of(builder), [CAPACITY - 2], 1)
    program = program_of(builder)
    given = drawn(program, [CAPACITY - 3], 9)
    expected = program.module()(*(tensor.clone() for tensor in given.values()))[1:]
    _, after = run(program, given)
    for found, wanted in zip(after.values(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_what_the_kernels_cannot_do_is_an_error(builder) -> None:
    """Heads beyond the largest, and float64, are refused by name."""
    with pytest.raises(LoweringError, match="up to 256 features"):
        lower(program_of(builder, size=288))
    with pytest.raises(LoweringError, match="float64"):
        lower(program_of(builder, dtype=torch.float64))
