"""Kernels over caches in two tiers compared with the references: prompts, parts of prompts, and single tokens."""

from __future__ import annotations

import operator
from dataclasses import asdict

import pytest
import torch

from graphwright.codegen.lower import lower
from graphwright.ir import dialect
from graphwright.ir.containers import Container, Leaf
from graphwright.ir.errors import LoweringError
from graphwright.ir.fixing import fix_dimension
from graphwright.ir.ops.kv_tiered import STATES, Tiers
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec
from graphwright.runtime.executable import Executable

CAPACITY = 96
PACKED = ("low_k", "low_v", "fine_k", "fine_v")


def state_shapes(tiers: Tiers, heads: int, size: int, values: int, dtype: torch.dtype):
    """Return the shape, without the batch, and the dtype of every state."""
    slots = CAPACITY // tiers.group_size * tiers.promoted // 8 * 8 + 8
    fine = (slots // 8 * tiers.fine_bits, torch.uint8) if tiers.fine_bits else (slots, dtype)
    shapes = {
        "recent_k": ((heads, tiers.ring, size), dtype),
        "recent_v": ((heads, tiers.ring, values), dtype),
        "recent_score": ((heads, tiers.ring), torch.float32),
        "balance": ((heads, size), torch.float32),
        "low_k": ((heads, CAPACITY, size * tiers.low_bits // 8), torch.uint8),
        "low_v": ((heads, CAPACITY, values * tiers.low_bits // 8), torch.uint8),
        "ranges": ((heads, 4, 8, CAPACITY // 8), torch.float16),
        "refined": ((heads, CAPACITY // 8), torch.uint8),
        "fine_k": ((heads, fine[0], size), fine[1]),
        "fine_v": ((heads, fine[0], values), fine[1]),
        "pool_token": ((heads, slots), torch.int32),
        "pool_score": ((heads, slots), torch.float32),
    }
    assert tuple(shapes) == STATES
    return shapes


def program_of(
    builder, tiers, heads=4, key_heads=2, size=16, values=16, dtype=torch.float32, counted=False, window=0, balanced=True
):
    """Return a program of one attention over a cache in two tiers."""
    made = builder()
    q = made.input("q", "batch", heads, "tokens", size, dtype=dtype)
    k, v = (made.input(name, "batch", key_heads, "tokens", n, dtype=dtype) for name, n in (("k", size), ("v", values)))
    past = made.input("past", "batch", dtype=torch.int64)
    given = {"count": made.input("count", "batch", dtype=torch.int64)} if counted else {}
    shapes = state_shapes(tiers, key_heads, size, values, dtype)
    states = [made.input(name, "batch", *shape, dtype=kind) for name, (shape, kind) in shapes.items()]
    form = asdict(tiers)
    both = made.call(dialect.kv_tiered_attention, q, k, v, past, *states, scale=0.3, **form)
    out, lse = (made.call(operator.getitem, both, at) for at in range(2))
    masses = made.call(dialect.kv_tiered_mass, q, k, lse, past, *states, scale=0.3, window=window, **form, **given)
    mass = [made.call(operator.getitem, masses, at) for at in range(3)]
    after = made.call(dialect.kv_tiered_append, q, k, v, past, *mass, *states, decay=0.9, balanced=balanced, **form, **given)
    program = made.program(out, lse, *mass, *(made.call(operator.getitem, after, at) for at in range(len(STATES))))
    program.states = {name: 5 + at for at, name in enumerate(STATES)}
    names = [node.name for node in program.inputs]
    specs = tuple(
        TensorSpec(node.name, node.meta["val"].dtype, "cpu", tuple(n if isinstance(n, int) else str(n) for n in shape))
        for node, shape in ((node, program.shape(node)) for node in program.inputs)
    )
    ranges = {name: Range(0, None) for name in program.dimensions}
    parameters = tuple(Parameter(name, "positional_or_keyword") for name in names)
    leaves = {name: Leaf(at) for at, name in enumerate(names)}
    program.signature = Signature(
        parameters, leaves, specs, ranges, Container("list", "", (), tuple(Leaf(at) for at in range(5)))
    )
    return program


def garbage(program, batch: int) -> list[torch.Tensor]:
    """Return states that hold NaN and arbitrary numbers."""
    made = []
    for spec in program.signature.tensors[-len(STATES) :]:
        shape = (batch, *(int(n) for n in spec.shape[1:]))
        noise = torch.randint(0, 100, shape).to(spec.dtype)
        made.append(torch.full(shape, torch.nan, dtype=spec.dtype) if spec.dtype.is_floating_point else noise)
    return made


class Pair:
    """The reference and the kernels, fed with the same calls."""

    def __init__(self, program, batch: int) -> None:
        self.program, self.batch = program, batch
        self.module = program.module()
        one = fix_dimension(program, "tokens", 1)
        self.executables = {made is one: Executable(lower(made), made.weights, made.signature) for made in (program, one)}
        self.states = garbage(program, batch)
        self.past = torch.zeros(batch, dtype=torch.int64)

    def call(self, tokens: int, counts=None, tolerance: float = 1e-5) -> None:
        """Run one call on equal states, compare what comes out, and go on from the reference's states."""
        given = []
        for spec in self.program.signature.tensors[: -len(STATES)]:
            sizes = [{"batch": self.batch, "tokens": tokens}.get(n, n) for n in spec.shape]
            given.append(torch.randn(sizes).to(spec.dtype) if spec.dtype.is_floating_point else self.past.clone())
        given[1][..., 3] *= 9
        counts = torch.full((self.batch,), tokens) if counts is None else torch.tensor(counts)
        if len(given) == 5:
            given[4] = counts
        copies = [state.clone() for state in self.states]
        expected = self.module(*given, *self.states)
        got = self.executables[tokens == 1](*given, *copies)
        used = torch.arange(tokens) < counts[:, None]
        for name, a, b in zip(("out", "lse", "recent", "pool", "own"), got, expected[:5], strict=True):
            assert not a.isnan().any(), name
            if name in ("out", "lse"):
                a, b = (x.transpose(1, 2)[used] for x in (a, b))
            assert (a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max().clamp(min=1), name
        self.past = self.past + counts
        self.states = list(expected[5:])
        self.compare(dict(zip(STATES, copies, strict=True)), dict(zip(STATES, self.states, strict=True)), tolerance)

    def compare(self, got, expected, tolerance) -> None:
        """Compare states; where a value is next to the middle of two codes either is right."""
        for name in STATES:
            if name in PACKED and got[name].dtype == torch.uint8:
                assert (got[name] != expected[name]).sum() <= 5e-3 * got[name].numel(), name
            else:
                near = 1e-3 if name == "ranges" else max(tolerance, 1e-5)
                torch.testing.assert_close(got[name], expected[name], rtol=near, atol=1e-6, equal_nan=True)


FORMATS = {
    "2 and 8 bits": Tiers(2, 6, 16, 16, 4),
    "3 and 8 bits": Tiers(3, 5, 16, 16, 8),
    "4 and 8 bits": Tiers(4, 4, 8, 8, 3),
    "2 and 5 bits": Tiers(2, 3, 16, 8, 1),
    "all in the pool": Tiers(4, 4, 16, 16, 16),
    "none in the pool": Tiers(2, 6, 16, 16, 0),
    "as they are": Tiers(2, 0, 16, 16, 4),
    "no residual": Tiers(3, 5, 0, 8, 2),
}


QUICK = ("3 and 8 bits",)
"""Compiling takes long."""


@pytest.mark.parametrize("form", [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in FORMATS])
def test_kernels_give_what_the_references_give(builder, form) -> None:
    """A prompt, single tokens over the end of a group, and a part of several groups; what is not in use is NaN."""
    torch.manual_seed(0)
    pair = Pair(program_of(builder, FORMATS[form]), 2)
    for tokens in (21, *[1] * 18, 37, 1):
        pair.call(tokens)


def test_sequences_of_different_lengths(builder) -> None:
    """Only the tokens that a call says there are get into a cache, and into scores; a sequence may get none."""
    torch.manual_seed(0)
    pair = Pair(program_of(builder, FORMATS["3 and 8 bits"], counted=True, window=5), 3)
    for tokens, counts in ((40, (40, 7, 0)), (30, (0, 30, 19)), (1, (1, 1, 1))):
        pair.call(tokens, counts)


def test_a_cache_without_room_is_not_written_beyond_its_end(builder) -> None:
    """Tokens that there is no room for are left out, as in the reference, and nothing behind the states changes."""
    torch.manual_seed(0)
    pair = Pair(program_of(builder, FORMATS["3 and 8 bits"]), 1)
    for tokens in (90, 60, 1):
        pair.call(tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [{"heads": 3, "key_heads": 3}, {"heads": 5, "key_heads": 1, "size": 80, "values": 24}, {"balanced": False}],
)
def test_shapes_of_heads(builder, shape) -> None:
    """Heads of their own or shared, sizes that are no power of two, and keys that are not balanced."""
    torch.manual_seed(0)
    pair = Pair(program_of(builder, FORMATS["3 and 8 bits"], **shape), 2)
    for tokens in (63, 1, 5):
        pair.call(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(builder, dtype) -> None:
    """Entries are kept as they come, and all sums are in float32."""
    torch.manual_seed(0)
    pair = Pair(program_of(builder, FORMATS["3 and 8 bits"], dtype=dtype), 2)
    for tokens in (50, 1, 5):
        pair.call(tokens, tolerance=2e-2)


def test_what_the_kernels_cannot_do_is_an_error(builder) -> None:
    """Heads beyond the largest, and float64, are refused by name."""
    with pytest.raises(LoweringError, match="up to 256 features"):
        lower(program_of(builder, FORMATS["2 and 8 bits"], size=304))
    with pytest.raises(LoweringError, match="float64"):
        lower(program_of(builder, FORMATS["2 and 8 bits"], dtype=torch.float64))
