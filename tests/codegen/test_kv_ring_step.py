"""Kernels over rings compared with the reference: prompts longer than the ring, parts of prompts, and single tokens."""

from __future__ import annotations

import pytest
import torch

from graphwright.codegen.lower import lower
from graphwright.ir import dialect
from graphwright.ir.containers import Leaf
from graphwright.ir.errors import LoweringError
from graphwright.ir.fixing import fix_dimension
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec
from graphwright.runtime.executable import Executable

SLOTS = 12


def program_of(builder, heads=4, key_heads=2, size=16, values=16, slots=SLOTS, dtype=torch.float32, counted=False, **options):
    """Return a program of one attention over rings."""
    made, weights = builder(), options.pop("weights", ())
    q = made.input("q", "batch", heads, "tokens", size, dtype=dtype)
    new = [made.input(name, "batch", key_heads, "tokens", n, dtype=dtype) for name, n in (("k", size), ("v", values))]
    past = made.input("past", "batch", dtype=torch.int64)
    rings = [made.input(f"{x}_ring", "batch", key_heads, slots, n, dtype=dtype) for x, n in (("k", size), ("v", values))]
    count = [made.input("count", "batch", dtype=torch.int64)] if counted else []
    read = [made.weight(f"w{at}", weight) for at, weight in enumerate(weights)]
    sink = made.weight("sink", options.pop("sink")) if "sink" in options else None
    old = [made.call(dialect.kv_ring_read, ring, entry, past) for ring, entry in zip(rings, new, strict=True)]
    predicate = f"q - k >= 0 & k - q + {slots - 1} >= 0"
    y = made.call(dialect.kv_ring_attention, q, *old, past, read, sink, scale=0.3, **{"predicate": predicate, **options})
    kept = [made.call(dialect.kv_ring_append, ring, entry, past, *count) for ring, entry in zip(rings, new, strict=True)]
    program = made.program(y, *kept)
    program.states = {"k_ring": 1, "v_ring": 2}
    names = [node.name for node in program.inputs]
    specs = [
        TensorSpec(node.name, node.meta["val"].dtype, "cpu", tuple(n if isinstance(n, int) else str(n) for n in shape))
        for node, shape in ((node, program.shape(node)) for node in program.inputs)
    ]
    ranges = {name: Range(0, None) for name in program.dimensions}
    parameters = tuple(Parameter(name, "positional_or_keyword") for name in names)
    program.signature = Signature(parameters, {n: Leaf(at) for at, n in enumerate(names)}, tuple(specs), ranges, Leaf(0))
    return program


def drawn(program, batch: int, tokens: int, most: int = 3 * SLOTS) -> list[torch.Tensor]:
    """Return inputs: random new tokens, rings of random entries with NaN in slots that no token went to yet."""
    sizes = {"batch": batch, "tokens": tokens}
    past, given = torch.randint(0, most, (batch,)), []
    for spec in program.signature.tensors:
        shape = [n if isinstance(n, int) else sizes[n] for n in spec.shape]
        tensor = torch.randn(shape).to(spec.dtype)
        if spec.name == "past":
            tensor = past.clone()
        elif spec.name == "count":
            tensor = torch.randint(0, tokens + 1, (batch,))
        elif spec.name in program.states:
            for row in range(batch):
                tensor[row, :, int(past[row]) :] = torch.nan
        given.append(tensor)
    return given


def check(program, *, batch: int = 2, tokens: int = 1, tolerance: float = 1e-5, most: int = 3 * SLOTS) -> None:
    """Compare one call with the reference, the rings included."""
    given = drawn(program, batch, tokens, most)
    expected, *rings = program.module()(*(tensor.clone() for tensor in given))
    if tokens == 1:
        program = fix_dimension(program, "tokens", 1)
    got = Executable(lower(program), program.weights, program.signature)(*given)
    assert not got.isnan().any()
    assert (got.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()
    for ring, spec, tensor in zip(rings, ("k_ring", "v_ring"), given[4:6], strict=True):
        torch.testing.assert_close(tensor, ring, rtol=0, atol=0, equal_nan=True, msg=lambda m, s=spec: f"{s}: {m}")


FORMS = {
    "plain": {},
    "one head for each": {"heads": 3, "key_heads": 3},
    "three queries for a key head": {"heads": 6, "key_heads": 2},
    "sizes that are no power of two": {"size": 80, "values": 24},
    "more slots than the window": {"predicate": "q - k >= 0 & k - q + 4 >= 0"},
    "positions": {"predicate": "q - k >= 0 & k - q + 11 >= 0 & (k - 20 >= 0 | 18 - k >= 0) & (q - 3 >= 0 | k - 1 >= 0)"},
    "capped": {"softcap": 2.0},
    "slopes": {"bias": "float(k - q)*in0[h]", "weights": (torch.tensor([0.5, 0.2, 0.1, 0.4]),)},
    "a table of positions": {"bias": "in0[k]", "weights": (torch.randn(64),)},
    "sink": {"sink": torch.tensor([0.3, -1.0, 2.0, 0.0])},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_kernels_give_what_the_reference_gives(builder, form, tokens) -> None:
    """Sequences at different positions, before and after the ring is full; more new tokens than slots too."""
    check(program_of(builder, **FORMS[form]), batch=3, tokens=tokens)


@pytest.mark.parametrize(("batch", "tokens", "slots"), [(1, 1, 1), (1, 63, 1), (3, 1, 100), (2, 70, 100), (1, 130, 64)])
def test_awkward_sizes(builder, batch, tokens, slots) -> None:
    """Rings of one slot and of more than a block."""
    for most in (1, 2 * slots + 1):
        check(program_of(builder, slots=slots), batch=batch, tokens=tokens, most=most)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 9])
def test_half_precision(builder, dtype, tokens) -> None:
    """Entries are kept as they come, and scores are summed in float32."""
    check(program_of(builder, dtype=dtype), tokens=tokens, tolerance=1e-2)


@pytest.mark.parametrize("tokens", [1, 7, 30])
def test_padding_does_not_push_tokens_out(builder, tokens) -> None:
    """Where it is said how many of the new tokens a sequence has, the others leave its ring alone."""
    check(program_of(builder, counted=True), batch=4, tokens=tokens)


def test_a_single_token_needs_one_step(builder) -> None:
    """Its entries are put into the rings by the attention itself, and nothing is copied."""
    program = fix_dimension(program_of(builder, slots=1000), "tokens", 1)
    schedule = lower(program)
    assert [step.name for step in schedule.steps] == ["kv_ring_attention_default"]
    assert len(lower(program_of(builder)).steps) == 5
    executable = Executable(schedule, program.weights, program.signature)
    executable(*drawn(program, 2, 1))
    assert executable.memory.arena_bytes < 1000 * 16


def test_what_the_template_cannot_do_is_an_error(builder) -> None:
    """Heads beyond its largest, and float64, are refused by name."""
    with pytest.raises(LoweringError, match="up to 256 features"):
        lower(program_of(builder, size=300))
    with pytest.raises(LoweringError, match="float64"):
        lower(program_of(builder, dtype=torch.float64))
