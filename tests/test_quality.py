"""How far results are from the original's."""

from __future__ import annotations

import math

import pytest
import torch

from graphwright.quality import Comparison, Logits, find_logits, relative_error

LOGITS = Logits(result=0, ids=0, mask=None)


def compared(expected, found, *, logits=LOGITS, causal=True, inputs=None):
    comparison = Comparison(logits, causal)
    ids = torch.tensor([[1, 2, 0]]) if inputs is None else inputs
    comparison.add(ids if isinstance(ids, list) else [ids], expected, found)
    return comparison.quality()


def test_the_same_is_no_difference() -> None:
    """Results that are equal, infinities among them, have no error, no divergence and full agreement."""
    logits = torch.randn(1, 3, 5)
    logits[0, 0, 0] = -math.inf
    found = compared([logits], [logits.clone()])
    assert (found.relative_error, found.different, found.kl, found.top1_agreement) == (0, 0, 0, 1)
    assert found.nll_change == 0
    assert found.cosine is None
    assert found.tokens == 3


def test_language_numbers_are_those_of_the_definitions() -> None:
    """KL divergence and the rise of the next token's negative log-likelihood, in nats, worked out by hand."""
    uniform, sure = torch.zeros(1, 3, 3), torch.zeros(1, 3, 3)
    sure[0, :, 1] = math.log(2)
    found = compared([uniform], [sure])
    assert found.kl == pytest.approx(math.log(4) - math.log(3) - math.log(2) / 3)
    # Next tokens 2 and 0 had 1/3 each, and now have 1/4.
    assert found.nll_change == pytest.approx(math.log(4) - math.log(3))
    assert found.top1_agreement == 0
    assert compared([uniform], [sure], causal=False).nll_change is None


def test_padding_counts_for_nothing() -> None:
    """What the mask hides is not compared, neither as a token nor as the next one."""
    one, other = torch.zeros(1, 3, 3), torch.zeros(1, 3, 3)
    other[0, 2, 0] = 9.0
    inputs = [torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 0]])]
    found = compared([one], [other], logits=Logits(0, 0, 1), inputs=inputs)
    assert (found.kl, found.top1_agreement, found.nll_change, found.tokens) == (0, 1, 0, 2)


def test_padding_is_no_next_token() -> None:
    """What the last token of a text says of the padding after it does not count."""
    one, other = torch.zeros(1, 3, 3), torch.zeros(1, 3, 3)
    other[0, 1, 0] = 9.0
    inputs = [torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 0]])]
    found = compared([one], [other], logits=Logits(0, 0, 1), inputs=inputs)
    assert found.nll_change == 0
    assert found.kl > 1


def test_vectors_are_compared_by_their_angle() -> None:
    """Without logits it is the cosine; integers and plain values are counted."""
    expected = [torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1, 2]), "a"]
    found = compared(expected, [torch.tensor([[3.0, 0.0], [2.0, 0.0]]), torch.tensor([1, 3]), "b"], logits=None)
    assert found.cosine == pytest.approx(0.5)
    assert found.different == 2
    assert found.relative_error == pytest.approx(1.0)
    assert found.kl is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_an_infinite_error(value) -> None:
    """A number in the place of another kind of value cannot pass for a small error."""
    one, other = torch.ones(3), torch.ones(3)
    other[1] = value
    assert relative_error(one, other) == math.inf
    assert relative_error(other, other) == 0
    assert relative_error(one, torch.ones(2)) == math.inf


def test_logits_are_found_by_structure(captured) -> None:
    """A language model's logits and ids are found; an encoder has none."""
    program = captured("llama")
    found = find_logits(program)
    assert found is not None
    assert program.signature.tensors[found.ids].name == "input_ids"
    assert find_logits(captured("convnet")) is None
