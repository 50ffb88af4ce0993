"""Where the tokens of a padded batch are."""

from __future__ import annotations

import pytest
import torch

from graphwright.ir.containers import Leaf
from graphwright.ir.errors import ArtifactError, InputError
from graphwright.ir.packing import PARTS, Packing
from graphwright.ir.signature import Parameter, Range, Signature, TensorSpec

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]])


def derive(mask, *, multiple=1, inverted=False):
    packing = Packing(0, inverted, multiple, PARTS, "packed")
    return dict(zip(PARTS, packing.derive(mask), strict=True))


def signature(packing, mask_shape=("batch", "tokens")):
    return Signature(
        parameters=(Parameter("ids", "positional_or_keyword"), Parameter("mask", "positional_or_keyword")),
        arguments={"ids": Leaf(0), "mask": Leaf(1)},
        tensors=(
            TensorSpec("ids", torch.int64, "cpu", ("batch", "tokens")),
            TensorSpec("mask", torch.int64, "cpu", mask_shape),
        ),
        dimensions={"batch": Range(0, None), "tokens": Range(1, None)},
        results=Leaf(0),
        packing=packing,
    )


def test_rows_are_the_tokens_in_order():
    """Tokens are numbered sequence by sequence, wherever they stand in it, and each knows its sequence and position."""
    parts = derive(MASK)
    assert parts["rows"].tolist() == [[0, 1, 9, 11]]
    assert parts["sequences"].tolist() == [[0, 0, 2, 2]]
    assert parts["positions"].tolist() == [[0, 1, 1, 3]]
    assert parts["places"].tolist() == [[0, 1, -1, -1], [-1] * 4, [-1, 2, -1, 3]]
    assert parts["starts"].tolist() == [0, 2, 2, 4, 4]
    assert parts["starts"].dtype == torch.int32


def test_rows_are_rounded_up():
    """Rows beyond the tokens stand for nothing, and are one more sequence."""
    parts = derive(MASK, multiple=6)
    assert parts["rows"].tolist() == [[0, 1, 9, 11, -1, -1]]
    assert parts["sequences"].tolist() == [[0, 0, 2, 2, -1, -1]]
    assert parts["positions"].tolist() == [[0, 1, 1, 3, -1, -1]]
    assert parts["starts"].tolist() == [0, 2, 2, 4, 6]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(dtype):
    """A mask may be of booleans or numbers, and may mark the padding instead of the tokens."""
    expected = derive(MASK, multiple=4)
    for found in (derive(MASK.to(dtype), multiple=4), derive((1 - MASK).to(dtype), multiple=4, inverted=True)):
        assert all(torch.equal(found[part], expected[part]) for part in PARTS)


@pytest.mark.parametrize(("shape", "rows"), [((2, 3), 8), ((0, 3), 0), ((2, 0), 0)])
def test_no_tokens(shape, rows):
    """A batch without tokens has rows that stand for nothing, if there is anything to compute at all."""
    parts = derive(torch.zeros(shape), multiple=8)
    assert parts["rows"].tolist() == [[-1] * rows]
    assert parts["starts"].tolist() == [*[0] * (shape[0] + 1), rows]
    assert parts["places"].tolist() == [[-1] * shape[1]] * shape[0]


def test_places_undo_rows():
    """Taking rows by place gives every token back, on random masks."""
    mask = torch.rand(7, 63) < 0.3
    parts = derive(mask, multiple=16)
    number = torch.arange(mask.numel()).reshape(mask.shape)
    assert torch.equal(parts["rows"][0][parts["places"][mask]], number[mask])


@pytest.mark.parametrize(
    "values",
    [
        (0, False, 0, ("rows",), "packed"),
        (0, False, 65, ("rows",), "packed"),
        (0, False, 16, (), "packed"),
        (0, False, 16, ("rows", "rows"), "packed"),
        (0, False, 16, ("lines",), "packed"),
        (-1, False, 16, ("rows",), "packed"),
        (0, False, 16, ("rows",), "a b"),
    ],
)
def test_what_is_no_packing_is_refused(values):
    """Values out of their range are refused, as they may come from a file."""
    with pytest.raises(ArtifactError, match="packing"):
        Packing(*values)


def test_a_signature_derives_after_the_tensors():
    """Flat tensors are followed by the parts; the call is checked first."""
    packed = signature(Packing(1, False, 8, ("starts", "rows"), "packed"))
    ids = torch.zeros_like(MASK)
    *given, starts, rows = packed.flatten((ids, MASK), {})
    assert given[0] is ids
    assert given[1] is MASK
    assert starts.tolist() == [0, 2, 2, 4, 8]
    assert rows.shape == (1, 8)
    with pytest.raises(InputError, match="mask: wrong dtype"):
        packed.derive([ids, MASK.float()])
    with pytest.raises(InputError, match="mask: wrong rank"):
        packed.derive([ids, MASK[0]])


def test_a_signature_keeps_its_packing_in_json():
    """JSON gives the packing back; without one there is none."""
    packed = signature(Packing(1, True, 8, ("starts", "rows"), "packed"))
    assert Signature.from_json(packed.to_json()).packing == packed.packing
    assert Signature.from_json(signature(None).to_json()).packing is None


@pytest.mark.parametrize("changed", [[5, False, 8, ["rows"], "packed"], [1, False, 8, ["rows"], "batch"], [1, 2], 7])
def test_a_packing_that_does_not_fit_is_refused(changed):
    """A file whose packing names no mask, or a dimension that is there already, is refused."""
    import json

    data = json.loads(signature(None).to_json())
    data["packing"] = changed
    with pytest.raises(ArtifactError):
        Signature.from_json(json.dumps(data))


def test_a_mask_has_two_dimensions():
    """Only a tensor [batch, tokens] can be the mask."""
    with pytest.raises(ArtifactError, match="no mask"):
        signature(Packing(1, False, 8, ("rows",), "packed"), ("batch", 1, "tokens"))
