"""Removal of casts that change nothing."""

from __future__ import annotations

import pytest
import torch

from graphwright.passes.cleanup.redundant_casts import CAST, is_exact_cast

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]

EDGES = {
    torch.float16: [6e-8, 6.1e-5, 65504.0, 1.0009765625],
    torch.bfloat16: [1e-40, 1.0078125, 3.38e38],
    torch.float32: [1e-45, 1.0 + 2**-23, 3.4e38],
    torch.float64: [5e-324, 1.0 + 2**-52, 1e308],
}


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_exact_casts_are_exact(source, target) -> None:
    """A cast is called exact if and only if the dtype's extreme values survive the way there and back."""
    if source.is_floating_point:
        values = torch.tensor(EDGES[source] + [-v for v in EDGES[source]], dtype=torch.float64).to(source)
    elif source == torch.bool:
        values = torch.tensor([True, False])
    else:
        info = torch.iinfo(source)
        values = torch.tensor([info.min, info.min + 1, 0, 1, info.max - 1, info.max], dtype=source)
    there = values.to(target)
    # The greatest int64 wraps on its way back from a float that is one more.
    survives = torch.equal(there.to(source), values) and all(float(a) == float(b) for a, b in zip(values, there, strict=True))
    if source == torch.int64 and target.is_floating_point:
        survives = False
    assert is_exact_cast(source, target) == survives


def cast_chain(b, start, *dtypes):
    """Return a program that casts its input one dtype after the other."""
    node = b.input("x", 5, dtype=start)
    for dtype in dtypes:
        node = b.call(CAST, node, dtype)
    return b.program(node)


@pytest.mark.parametrize(
    ("start", "dtypes", "left"),
    [
        (torch.float32, [torch.float32], 0),
        (torch.bfloat16, [torch.float32, torch.bfloat16], 0),
        (torch.int8, [torch.int32, torch.int64], 1),
        (torch.float16, [torch.float32, torch.float64, torch.float16], 0),
        (torch.float32, [torch.bfloat16, torch.float32], 2),
        (torch.float32, [torch.int64, torch.float32], 2),
    ],
)
def test_chains(builder, run, start, dtypes, left) -> None:
    """Detours that lose nothing go; a cast that rounds stays."""
    outcome = run("redundant-casts", cast_chain(builder(), start, *dtypes))
    assert len(outcome.operations) == left
    outcome.check((torch.randn(5) * 100).to(start))
    if left == len(dtypes) > 1:
        assert "rounds" in outcome.reasons[0]
