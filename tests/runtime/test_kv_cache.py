"""The memory of caches, and what ends sequences."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.containers import Leaf
from graphwright.ir.errors import ArtifactError, InputError
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec
from graphwright.runtime.ending import Ending
from graphwright.runtime.kv_cache import STEP, KVCache, cache_bytes


def signature(limit: int | None = None, more: tuple[TensorSpec, ...] = ()) -> Signature:
    """The signature of a program with one cache, and with what else it keeps."""
    specs = (
        TensorSpec("input_ids", torch.int64, "cpu", ("batch", 1)),
        TensorSpec("past", torch.int64, "cpu", ("batch",)),
        TensorSpec("k_cache_0", torch.bfloat16, "cpu", ("batch", 2, "capacity", 4)),
        *more,
    )
    ranges = {"batch": Range(0, None), "capacity": Range(1, limit)}
    parameters = tuple(Parameter(spec.name, "positional_or_keyword") for spec in specs)
    return Signature(parameters, {spec.name: Leaf(at) for at, spec in enumerate(specs)}, specs, ranges, Leaf(0))


def test_capacities_are_rounded_up() -> None:
    """Few different capacities occur; the tensors are what the program takes."""
    cache = KVCache(signature(), 3, STEP + 1)
    assert cache.capacity == 2 * STEP
    assert {name: (tuple(t.shape), t.dtype) for name, t in cache.tensors.items()} == {
        "k_cache_0": ((3, 2, 2 * STEP, 4), torch.bfloat16)
    }
    assert cache.nbytes == 3 * 2 * 2 * STEP * 4 * 2


def test_growing_keeps_what_is_there() -> None:
    """Entries stay at their slots, and nothing happens where there is room."""
    cache = KVCache(signature(), 2, STEP)
    before = cache.tensors["k_cache_0"].normal_()
    cache.grow(STEP)
    assert cache.tensors["k_cache_0"] is before
    cache.grow(STEP + 1)
    assert torch.equal(cache.tensors["k_cache_0"][:, :, :STEP], before)


GROUPED = (
    TensorSpec("codes", torch.uint8, "cpu", ("batch", "capacity//2", 3)),
    TensorSpec("scales", torch.float16, "cpu", ("batch", 2, "(capacity//32)")),
    TensorSpec("ring", torch.float32, "cpu", ("batch", 160)),
)
"""States whose sizes are formulas of the capacity, or do not depend on it."""


def test_states_may_have_any_shape() -> None:
    """Sizes are formulas; a new state is all zeros; what is kept when it grows stays at its indices."""
    cache = KVCache(signature(more=GROUPED), 2, STEP)
    shapes = {"k_cache_0": (2, 2, STEP, 4), "codes": (2, STEP // 2, 3), "scales": (2, 2, STEP // 32), "ring": (2, 160)}
    assert {name: tuple(tensor.shape) for name, tensor in cache.tensors.items()} == shapes
    assert not any(tensor.any() for tensor in cache.tensors.values())
    before = {name: tensor.copy_(torch.randint(1, 99, tensor.shape)).clone() for name, tensor in cache.tensors.items()}
    cache.grow(3 * STEP)
    for name, tensor in before.items():
        old = tuple(slice(n) for n in tensor.shape)
        assert torch.equal(cache.tensors[name][old], tensor)
        assert cache.tensors[name].sum(dtype=torch.float64) == tensor.sum(dtype=torch.float64)
    assert tuple(cache.tensors["scales"].shape) == (2, 2, 3 * STEP // 32)


def test_bytes_are_those_of_the_tensors() -> None:
    """The formula of bytes gives what is allocated, at any capacity and batch."""
    made = signature(more=GROUPED)
    taken = cache_bytes(made)
    assert taken.per_sequence == 160 * 4
    for batch, room in ((1, 1), (3, 5 * STEP)):
        cache = KVCache(made, batch, room)
        assert cache.nbytes == sum(tensor.nbytes for tensor in cache.tensors.values())
        assert cache.nbytes == batch * (cache.capacity * taken.per_token + taken.per_sequence)


def test_the_model_limits_the_room() -> None:
    """A capacity is never beyond the positions of the model; asking for more says how many there are."""
    cache = KVCache(signature(100), 1, 99)
    assert cache.capacity == 100
    with pytest.raises(InputError, match=r"room for 100 tokens .* asked for 101"):
        cache.grow(101)


def test_endings_are_changed_for_a_call_and_stored() -> None:
    """What a call says goes before what the model says; a file keeps the model's."""
    own = Ending((5,), ((1, 2),), 7)
    assert own.changed() == own
    assert own.changed((), [[3]], 0) == Ending((), ((1, 2), (3,)), 0)
    assert own.changed(4).tokens == (4,)
    assert Ending.from_json(own.to_json()) == own
    with pytest.raises(ArtifactError, match="not what ends sequences"):
        Ending.from_json('{"tokens": 3}')
