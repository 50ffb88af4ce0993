"""Kernels over caches compared with the reference: prompts, parts of prompts, and single tokens."""

from __future__ import annotations

import pytest
import torch

from graphwright.codegen.lower import lower
from graphwright.ir import dialect
from graphwright.ir.containers import Leaf
from graphwright.ir.errors import InputError, LoweringError
from graphwright.ir.fixing import fix_dimension
from graphwright.ir.program import Dimension
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec
from graphwright.runtime.executable import Executable

CAPACITY = 80


def program_of(builder, heads=4, key_heads=2, size=16, values=16, dtype=torch.float32, weights=(), **options):
    """Return a program of one attention over caches."""
    made = builder()
    q = made.input("q", "batch", heads, "tokens", size, dtype=dtype)
    new = [made.input(name, "batch", key_heads, "tokens", n, dtype=dtype) for name, n in (("k", size), ("v", values))]
    past = made.input("past", "batch", dtype=torch.int64)
    caches = [made.input(f"{x}_cache", "batch", key_heads, CAPACITY, n, dtype=dtype) for x, n in (("k", size), ("v", values))]
    read = [made.weight(f"w{at}", weight) for at, weight in enumerate(weights)]
    sink = made.weight("sink", options.pop("sink")) if "sink" in options else None
    kept = [made.call(dialect.kv_append, cache, entry, past) for cache, entry in zip(caches, new, strict=True)]
    y = made.call(dialect.kv_attention, q, *kept, past, read, sink, scale=0.3, **{"predicate": "q - k >= 0", **options})
    program = made.program(y, *kept)
    program.states = {"k_cache": 1, "v_cache": 2}
    names = [node.name for node in program.inputs]
    specs = [
        TensorSpec(node.name, node.meta["val"].dtype, "cpu", tuple(n if isinstance(n, int) else str(n) for n in shape))
        for node, shape in ((node, program.shape(node)) for node in program.inputs)
    ]
    ranges = {name: Range(0, None) for name in program.dimensions}
    leaves = {name: Leaf(at) for at, name in enumerate(names)}
    parameters = tuple(Parameter(name, "positional_or_keyword") for name in names)
    program.signature = Signature(parameters, leaves, tuple(specs), ranges, Leaf(0))
    assert isinstance(program.dimensions["tokens"], Dimension)
    return program


def drawn(program, batch: int, tokens: int) -> list[torch.Tensor]:
    """Return inputs: random new tokens, caches of random entries up to `past` and NaN behind."""
    sizes = {"batch": batch, "tokens": tokens}
    given = []
    past = torch.randint(0, CAPACITY - tokens + 1, (batch,))
    for spec in program.signature.tensors:
        shape = [n if isinstance(n, int) else sizes[n] for n in spec.shape]
        tensor = past.clone() if spec.name == "past" else torch.randn(shape).to(spec.dtype)
        if spec.name in program.states:
            for row in range(batch):
                tensor[row, :, int(past[row]) :] = torch.nan
        given.append(tensor)
    return given


def check(program, *, batch: int = 2, tokens: int = 1, tolerance: float = 1e-5) -> None:
    """Compare one call with the reference, the caches included."""
    given = drawn(program, batch, tokens)
    expected, *caches = program.module()(*(tensor.clone() for tensor in given))
    if tokens == 1:
        program = fix_dimension(program, "tokens", 1)
    executable = Executable(lower(program), program.weights, program.signature)
    got = executable(*given)
    assert not got.isnan().any()
    assert (got.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()
    for cache, tensor in zip(caches, given[-2:], strict=True):
        torch.testing.assert_close(tensor, cache, rtol=0, atol=0, equal_nan=True)


FORMS = {
    "plain": {},
    "one head for each": {"heads": 3, "key_heads": 3},
    "three queries for a key head": {"heads": 6, "key_heads": 2},
    "one key head": {"heads": 5, "key_heads": 1},
    "sizes that are no power of two": {"size": 80, "values": 24},
    "window": {"predicate": "q - k >= 0 & k - q + 4 >= 0"},
    "sinks": {"predicate": "(1 - k >= 0 | k - q + 3 >= 0) & q - k >= 0"},
    "strictly before": {"predicate": "q - k - 1 >= 0"},
    "capped": {"softcap": 2.0},
    "slopes": {"bias": "float(k - q)*in0[h]", "weights": (torch.tensor([0.5, 0.2, 0.1, 0.4]),)},
    "heads that differ": {"predicate": "q - k >= 0 & h - k + 30 >= 0"},
    "sink": {"sink": torch.tensor([0.3, -1.0, 2.0, 0.0])},
    "sink and bias": {"sink": torch.tensor([0.3, -1.0, 2.0, 0.0]), "bias": "float(k - q)*0.1"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_kernels_give_what_the_reference_gives(builder, form, tokens) -> None:
    """Sequences at different positions; caches hold NaN in unfilled slots, and get the new entries and nothing else."""
    check(program_of(builder, **FORMS[form]), tokens=tokens)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (1, 63), (2, 70)])
def test_awkward_sizes(builder, batch, tokens) -> None:
    """One sequence or several, and prompts of more or less than a block."""
    check(program_of(builder), batch=batch, tokens=tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 9])
def test_half_precision(builder, dtype, tokens) -> None:
    """Entries are kept as they come, and scores are summed in float32."""
    check(program_of(builder, dtype=dtype), tokens=tokens, tolerance=1e-2)


def test_a_single_token_needs_one_step(builder) -> None:
    """The entries of a single token are put into the caches by the attention itself."""
    program = fix_dimension(program_of(builder), "tokens", 1)
    assert [step.name for step in lower(program).steps] == ["kv_attention_default"]
    assert len(lower(program_of(builder)).steps) == 3


def test_a_cache_without_room_is_not_written_beyond_its_end(builder) -> None:
    """Entries that do not fit are dropped, in steps of one token and of several."""
    for tokens in (1, 4):
        program = program_of(builder)
        given = drawn(program, 1, tokens)
        given[3][:] = CAPACITY - tokens // 2
        room = [torch.full((tensor.numel() + 64,), 7.0) for tensor in given[-2:]]
        caches = [r[: t.numel()].view(t.shape).zero_() for r, t in zip(room, given[-2:], strict=True)]
        fixed = fix_dimension(program, "tokens", 1) if tokens == 1 else program
        Executable(lower(fixed), fixed.weights, fixed.signature)(*given[:-2], *caches)
        assert all((r[-64:] == 7.0).all() for r in room)


def test_a_state_is_not_copied(builder) -> None:
    """A cache of other strides cannot be written in place, which is said."""
    program = program_of(builder)
    given = drawn(program, 2, 3)
    given[-1] = given[-1].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(InputError, match="v_cache: it is used in place"):
        Executable(lower(program), program.weights, program.signature)(*given)


def test_what_the_template_cannot_do_is_an_error(builder) -> None:
    """Heads beyond its largest, and float64, are refused by name."""
    with pytest.raises(LoweringError, match="up to 256 features"):
        lower(program_of(builder, size=300))
    with pytest.raises(LoweringError, match="float64"):
        lower(program_of(builder, dtype=torch.float64))


def test_a_state_that_is_read_before_it_changes_is_an_error(builder) -> None:
    """A loop may be computed anywhere, and would read it too late."""
    program = program_of(builder)
    with program.graph.inserting_before(program.output):
        cache = next(node for node in program.inputs if node.name == "k_cache")
        more = program.call(torch.ops.aten.relu.default, cache)
    program.output.args = ((*program.results, more),)
    with pytest.raises(LoweringError, match="only an operation with steps of its own can do so before"):
        lower(program)
