"""The memory of caches, and what ends sequences."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.containers import Leaf
from graphwright.ir.errors import ArtifactError, InputError
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec
from graphwright.runtime.ending import Ending
from graphwright.runtime.kv_cache import STEP, KVCache


def signature(limit: int | None = None) -> Signature:
    """The signature of a program with one cache."""
    specs = (
        TensorSpec("input_ids", torch.int64, "cpu", ("batch", 1)),
        TensorSpec("past", torch.int64, "cpu", ("batch",)),
        TensorSpec("k_cache_0", torch.bfloat16, "cpu", ("batch", 2, "capacity", 4)),
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
